"""slime's flags put into a run's config: `rl/slime_flags.py` reads them, this says what they
change.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from train.rl import config as rl_config
from train.rl import slime_flags

# slime's reward types that have a name of ours.
_REWARD_NAMES = {"math": "mathematics", "dapo": "mathematics", "deepscaler": "mathematics"}


def apply_flags(config: rl_config.RlConfig, argv: Sequence[str]) -> tuple[rl_config.RlConfig, str]:
    """Return the config as the flags want it, and what to print about that.

    Flags of the objective change its preset: the one they name, or that of the config's objective.
    Those of tasks change the first source.

    Raises:
      ValueError: a flag that is unknown or cannot be followed here, or values that do not fit.
    """
    flags = slime_flags.parse_flags(argv)
    if not flags:
        return config, ""
    own = config.objective.name
    known = (
        own in slime_flags.ESTIMATOR_PRESETS and own != "cispo"
    )  # which absent flags mean anyway
    found = slime_flags.translate_flags({"advantage-estimator": own, **flags} if known else flags)
    options = dict(found.options)
    objective, text = config.objective, slime_flags.describe_objective(config.objective)
    if set(flags) - set(slime_flags.FLAG_OPTIONS):
        objective, text = found.objective, found.text
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
            f"--{name}" for name, (_, ours) in slime_flags.FLAG_OPTIONS.items() if ours in options
        ]
        raise ValueError(
            f"slime's flags: got {', '.join(names)}, which nothing here follows; wanted the config "
            "to say it, see train/rl/config.py"
        )
    return config, text


def _apply_rollout_flags(
    rollout: rl_config.RolloutConfig, options: dict[str, Any]
) -> rl_config.RolloutConfig:
    """Return the rollout with its flags followed, which are taken out of `options`."""
    names = {"prompts_per_batch": "groups", "prompt_tokens": "max_prompt_tokens"}
    names |= {name: name for name in ("group_size", "temperature", "top_p", "top_k")}
    changes = {name: options.pop(flag) for flag, name in names.items() if flag in options}
    if "top_k" in changes:
        changes["top_k"] = max(changes["top_k"], 0)  # slime's off is -1
    if "prompts_per_round" in options:
        number = options.pop("prompts_per_round")
        changes["oversample"] = number / max(changes.get("groups", rollout.groups), 1)
    limits = [options.pop("answer_tokens")] if "answer_tokens" in options else []
    if "context_tokens" in options:
        prompt_tokens = changes.get("max_prompt_tokens", rollout.max_prompt_tokens)
        limits.append(options.pop("context_tokens") - prompt_tokens)
    if limits:
        changes["windows"] = dataclasses.replace(rollout.windows, tokens=(min(limits),))
    return dataclasses.replace(rollout, **changes)


def _num_minibatches(rollout: rl_config.RolloutConfig, given: int, options: dict[str, Any]) -> int:
    """Return how many updates the flags want, or those given; flags are taken out of `options`."""
    asked, each = options.pop("minibatches", None), options.pop("samples_per_update", None)
    if each is None:
        return given if asked is None else asked
    samples = rollout.groups * rollout.group_size
    if each < 1 or samples % each or asked not in (None, samples // each):
        raise ValueError(
            f"--global-batch-size: got {each} of the {samples} samples of a batch, and "
            f"--num-steps-per-rollout {asked}; wanted a divisor, and as many steps as it leaves"
        )
    return samples // each


def _apply_task_flags(config: rl_config.RlConfig, options: dict[str, Any]) -> rl_config.RlConfig:
    """Return the config with the flags about tasks followed, which are taken out of `options`."""
    if options.pop("apply_chat_template", True) is False:
        raise ValueError("--apply-chat-template: got false; wanted true: prompts are messages here")
    ours = {"prompt_key": "prompt", "label_key": "label"}
    ours |= {"metadata_key": "metadata", "tools_key": "tools"}
    keys: dict[str, str] = {n: options.pop(flag) for flag, n in ours.items() if flag in options}
    path: str = options.pop("tasks", "")
    reward: str = options.pop("reward", "")
    first, *others = config.sources
    if keys or path:
        first = dataclasses.replace(
            first,
            keys=tuple((dict(first.keys) | keys).items()),
            **({"path": path, "make": "", "size": 0, "options": ()} if path else {}),
        )
    rewards = config.rewards
    if reward:
        name = _REWARD_NAMES.get(reward, reward)
        mine = (first.name, ((name, 1.0, ()),))
        rest = () if rewards is None else tuple(s for s in rewards.sources if s[0] != first.name)
        rewards = dataclasses.replace(
            rewards or rl_config.RewardsConfig(sources=(mine,)), sources=(mine, *rest)
        )
    return dataclasses.replace(config, sources=(first, *others), rewards=rewards)
