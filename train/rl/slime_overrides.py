"""slime's flags applied to a run's config. `train/rl/slime_flags.py` gives them their meaning."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from train.rl import config as rl_config
from train.rl import slime_flags

# slime's --rm-type: the reward here, where the names differ.
_REWARD_NAMES = {"math": "mathematics", "dapo": "mathematics", "deepscaler": "mathematics"}


def apply_flags(config: rl_config.RlConfig, argv: Sequence[str]) -> tuple[rl_config.RlConfig, str]:
    """Return the config with slime's flags applied, and a text to print.

    Flags of the objective change a preset: the one that they name, or else the preset of the
    config's objective. Flags of tasks change the first source.

    Args:
      argv: the command line's slime flags.

    Raises:
      ValueError: a flag that is unknown or cannot be applied here, or values that contradict each
        other.
    """
    flags = slime_flags.parse_flags(argv)
    if not flags:
        return config, ""
    own = config.objective.name
    # An absent --advantage-estimator means cispo, so any other preset has to be named.
    must_name = own in slime_flags.ESTIMATOR_PRESETS and own != "cispo"
    overrides = slime_flags.translate_flags(
        {"advantage-estimator": own, **flags} if must_name else flags
    )
    # Each option is taken out when it is applied. What is left at the end cannot be applied.
    options = dict(overrides.options)
    objective, text = config.objective, slime_flags.describe_objective(config.objective)
    if set(flags) - set(slime_flags.FLAG_OPTIONS):
        objective, text = overrides.objective, overrides.text
    rollout = _apply_rollout_flags(config.rollout, options)
    update = config.update
    config = dataclasses.replace(
        config,
        objective=objective,
        rollout=rollout,
        update=dataclasses.replace(
            update,
            minibatches=_num_minibatches(rollout, update.minibatches, options),
            learning_rate=options.pop("learning_rate", update.learning_rate),
        ),
        optimizer=dataclasses.replace(
            config.optimizer, clip_norm=options.pop("clip_norm", config.optimizer.clip_norm)
        ),
        batches=options.pop("batches", config.batches),
        seed=options.pop("seed", config.seed),
    )
    config = _apply_task_flags(config, options)
    if options:
        names = [
            f"--{name}"
            for name, (_, option) in slime_flags.FLAG_OPTIONS.items()
            if option in options
        ]
        raise ValueError(
            f"slime's flags: got {', '.join(names)}, which nothing here follows; wanted fields of "
            "the config in their place, see train/rl/config.py"
        )
    return config, text


def _apply_rollout_flags(
    rollout: rl_config.RolloutConfig, options: dict[str, Any]
) -> rl_config.RolloutConfig:
    """Return the rollout with its options applied. These are taken out of `options`."""
    # Option: field of the rollout's config.
    names = {"prompts_per_batch": "groups", "prompt_tokens": "max_prompt_tokens"}
    names |= {name: name for name in ("group_size", "temperature", "top_p", "top_k")}
    changes = {field: options.pop(option) for option, field in names.items() if option in options}
    if "top_k" in changes:
        changes["top_k"] = max(changes["top_k"], 0)  # slime's off is -1
    if "prompts_per_round" in options:
        num_prompts = options.pop("prompts_per_round")
        changes["oversample"] = num_prompts / max(changes.get("groups", rollout.groups), 1)
    # The answer's limit is the lower of its own and of what a prompt leaves of the context.
    limits = [options.pop("answer_tokens")] if "answer_tokens" in options else []
    if "context_tokens" in options:
        prompt_tokens = changes.get("max_prompt_tokens", rollout.max_prompt_tokens)
        limits.append(options.pop("context_tokens") - prompt_tokens)
    if limits:
        changes["windows"] = dataclasses.replace(rollout.windows, tokens=(min(limits),))
    return dataclasses.replace(rollout, **changes)


def _num_minibatches(
    rollout: rl_config.RolloutConfig, config_minibatches: int, options: dict[str, Any]
) -> int:
    """Return the number of updates a batch, from the config if no flag sets it.

    The options that set it are taken out of `options`.
    """
    minibatches = options.pop("minibatches", None)
    update_samples = options.pop("samples_per_update", None)
    if update_samples is None:
        return config_minibatches if minibatches is None else minibatches
    samples = rollout.groups * rollout.group_size
    if (
        update_samples < 1
        or samples % update_samples
        or minibatches not in (None, samples // update_samples)
    ):
        raise ValueError(
            f"--global-batch-size: got {update_samples} of the {samples} samples of a batch, and "
            f"--num-steps-per-rollout {minibatches}; wanted a divisor of {samples}, and {samples} "
            "over it as the number of steps, or none"
        )
    return samples // update_samples


def _apply_task_flags(config: rl_config.RlConfig, options: dict[str, Any]) -> rl_config.RlConfig:
    """Return the config with the options of tasks applied. These are taken out of `options`."""
    if options.pop("apply_chat_template", True) is False:
        raise ValueError("--apply-chat-template: got false; wanted true: prompts are messages here")
    # Option: field of `tasks.TASK_KEYS`.
    key_fields = {"prompt_key": "prompt", "label_key": "label"}
    key_fields |= {"metadata_key": "metadata", "tools_key": "tools"}
    keys: dict[str, str] = {
        field: options.pop(option) for option, field in key_fields.items() if option in options
    }
    path: str = options.pop("tasks", "")
    reward: str = options.pop("reward", "")
    first, *other_sources = config.sources
    if keys or path:
        first = dataclasses.replace(
            first,
            keys=tuple((dict(first.keys) | keys).items()),
            # Files replace a generator, and with it all that describes one.
            **({"path": path, "make": "", "size": 0, "options": ()} if path else {}),
        )
    rewards = config.rewards
    if reward:
        name = _REWARD_NAMES.get(reward, reward)
        first_rewards = (first.name, ((name, 1.0, ()),))  # weight 1, no options
        other_rewards = (
            () if rewards is None else tuple(s for s in rewards.sources if s[0] != first.name)
        )
        rewards = dataclasses.replace(
            rewards or rl_config.RewardsConfig(sources=(first_rewards,)),
            sources=(first_rewards, *other_rewards),
        )
    return dataclasses.replace(config, sources=(first, *other_sources), rewards=rewards)
