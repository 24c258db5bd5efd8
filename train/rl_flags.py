"""slime's flags put into a run's config: `slime.py` reads them, this says what they change."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from train import rl_config, slime

# slime's reward types that have a name of ours.
_REWARDS = {"math": "mathematics", "dapo": "mathematics", "deepscaler": "mathematics"}


def change(config: rl_config.Run, argv: Sequence[str]) -> tuple[rl_config.Run, str]:
    """Return the config as the flags want it, and what to print about that.

    Raises:
      ValueError: a flag that is unknown or cannot be followed here, or values that do not fit.
    """
    flags = slime.parse(argv)
    if not flags:
        return config, ""
    found = slime.translate(flags)
    options = dict(found.options)
    objective = config.objective
    if set(flags) - set(slime.OPTIONS):
        objective = found.objective
    rollout, update = config.rollout, config.update
    groups = options.pop("prompts_per_batch", rollout.groups)
    size = options.pop("group_size", rollout.group_size)
    oversample = options.pop("prompts_per_round", groups * rollout.oversample) / groups
    prompt_tokens = options.pop("prompt_tokens", rollout.max_prompt_tokens)
    windows = rollout.windows
    if "context_tokens" in options:
        windows = dataclasses.replace(
            windows, tokens=(options.pop("context_tokens") - prompt_tokens,)
        )
    if "answer_tokens" in options:
        windows = dataclasses.replace(windows, tokens=(options.pop("answer_tokens"),))
    minibatches = options.pop("minibatches", update.minibatches)
    if "samples_per_update" in options:
        minibatches = _whole(groups * size, options.pop("samples_per_update"))
    sampling = {n: options.pop(n) for n in ("temperature", "top_p", "top_k") if n in options}
    sampling["top_k"] = max(sampling.get("top_k", rollout.top_k), 0)  # slime's off is -1
    config = dataclasses.replace(
        config,
        objective=objective,
        rollout=dataclasses.replace(
            rollout,
            groups=groups,
            group_size=size,
            oversample=oversample,
            max_prompt_tokens=prompt_tokens,
            windows=windows,
            **sampling,
        ),
        update=dataclasses.replace(
            update,
            minibatches=minibatches,
            learning_rate=options.pop("learning_rate", update.learning_rate),
        ),
        optimizer=dataclasses.replace(
            config.optimizer, clip_norm=options.pop("clip_norm", config.optimizer.clip_norm)
        ),
        batches=options.pop("batches", config.batches),
        seed=options.pop("seed", config.seed),
    )
    config = _with_tasks(config, options)
    if options:
        raise ValueError(
            f"slime's flags: got {', '.join(sorted(options))}, which nothing here follows; wanted "
            "the config to say it, see train/rl_config.py"
        )
    return config, found.text


def _with_tasks(config: rl_config.Run, options: dict[str, Any]) -> rl_config.Run:
    """Return the config with the flags about tasks followed, which are taken out of `options`."""
    if options.pop("apply_chat_template", True) is False:
        raise ValueError("--apply-chat-template: got false; wanted true: prompts are messages here")
    ours = {"prompt_key": "prompt", "label_key": "label"}
    ours |= {"metadata_key": "metadata", "tools_key": "tools"}
    keys = {name: options.pop(flag) for flag, name in ours.items() if flag in options}
    path, reward = options.pop("tasks", ""), options.pop("reward", "")
    first, *others = config.sources
    if keys or path:
        first = dataclasses.replace(
            first,
            keys=tuple((dict(first.keys) | keys).items()),
            **({"path": path, "make": "", "size": 0} if path else {}),
        )
    rewards = config.rewards
    if reward:
        name = _REWARDS.get(reward, reward)
        mine = (first.name, ((name, 1.0, ()),))
        rest = () if rewards is None else tuple(s for s in rewards.sources if s[0] != first.name)
        rewards = dataclasses.replace(
            rewards or rl_config.Rewards(sources=(mine,)), sources=(mine, *rest)
        )
    return dataclasses.replace(config, sources=(first, *others), rewards=rewards)


def _whole(samples: int, each: int) -> int:
    if each < 1 or samples % each:
        raise ValueError(
            f"--global-batch-size: got {each} of the {samples} samples of a batch; wanted a divisor"
        )
    return samples // each
