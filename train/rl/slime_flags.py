"""slime's flags for reinforcement learning, translated to this project's options.

Pure functions: no flag is defined here. An absent flag has this project's default, and the text
that is printed at the start says where slime's default differs. An unknown flag is an error, as it
would change nothing silently.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from m1_jax import configlib
from train.rl import objective as objective_lib
from train.rl import rollout_correction as rollout_correction_lib

# slime's --advantage-estimator: the preset of the objective.
ESTIMATOR_PRESETS = {name: name for name in objective_lib.PRESETS} | {
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp_baseline",
}
# slime's flag: (type, option), for all flags that do not concern the objective. The options are the
# keys of `SlimeOverrides.options`.
FLAG_OPTIONS: dict[str, tuple[type, str]] = {
    "n-samples-per-prompt": (int, "group_size"),
    "rollout-batch-size": (int, "prompts_per_batch"),
    "over-sampling-batch-size": (int, "prompts_per_round"),
    "global-batch-size": (int, "samples_per_update"),
    "num-steps-per-rollout": (int, "minibatches"),
    "num-rollout": (int, "batches"),
    "rollout-max-response-len": (int, "answer_tokens"),
    "rollout-max-prompt-len": (int, "prompt_tokens"),
    "rollout-max-context-len": (int, "context_tokens"),
    "rollout-temperature": (float, "temperature"),
    "rollout-top-p": (float, "top_p"),
    "rollout-top-k": (int, "top_k"),
    "rollout-seed": (int, "seed"),
    "lr": (float, "learning_rate"),
    "clip-grad": (float, "clip_norm"),
    "ref-load": (str, "reference"),
    "prompt-data": (str, "tasks"),
    "input-key": (str, "prompt_key"),
    "label-key": (str, "label_key"),
    "metadata-key": (str, "metadata_key"),
    "tool-key": (str, "tools_key"),
    "reward-key": (str, "reward_key"),
    "rm-type": (str, "reward"),
    "apply-chat-template": (bool, "apply_chat_template"),
}
_OBJECTIVE_FLAG_TYPES: dict[str, type] = {
    "advantage-estimator": str,
    "eps-clip": float,
    "eps-clip-high": float,
    "eps-clip-c": float,
    "calculate-per-token-loss": bool,
    "disable-grpo-std-normalization": bool,
    "normalize-advantages": bool,
    "gamma": float,
    "kl-coef": float,
    "use-kl-loss": bool,
    "kl-loss-coef": float,
    "kl-loss-type": str,
    "entropy-coef": float,
    "use-rollout-logprobs": bool,
    "use-tis": bool,
    "tis-clip": float,
    "tis-clip-low": float,
}
_FLAG_TYPES = {name: kind for name, (kind, _) in FLAG_OPTIONS.items()} | _OBJECTIVE_FLAG_TYPES
# A flag: the flag without which slime does not read it.
_REQUIRED_FLAGS = {
    "kl-loss-coef": "use-kl-loss",
    "kl-loss-type": "use-kl-loss",
    "tis-clip": "use-tis",
    "tis-clip-low": "use-tis",
}
# slime's --kl-loss-type: (kl_kind, kl_max) of the objective.
_KL_KINDS = {"k1": ("k1", None), "k2": ("k2", None), "k3": ("k3", None), "low_var_kl": ("k3", 10.0)}


@dataclasses.dataclass(frozen=True)
class SlimeOverrides:
    """The meaning of a set of flags."""

    objective: objective_lib.Objective
    options: Mapping[str, Any]  # values of the flags in FLAG_OPTIONS that are set, by option
    text: str  # to print at the start


def parse_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Return the flags of a command line, `--name value`, `--name=value` or `--switch`, by name.

    Raises:
      ValueError: an unknown flag, a flag with two different values, or a value that is missing or
        wrong.
    """
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"got {word!r}; wanted a flag, such as --eps-clip-high")
        name, equals, value = word.removeprefix("--").partition("=")
        name = _check_flag_name(name)
        if not equals and _FLAG_TYPES[name] is bool:  # a switch
            value = "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise ValueError(f"--{name}: got no value; wanted --{name} VALUE")
            value = words.pop(0)
        value = _parse_value(name, value)
        if flags.setdefault(name, value) != value:
            raise ValueError(f"--{name}: got {flags[name]} and {value}; wanted one of them")
    return flags


def translate_flags(flags: Mapping[str, Any]) -> SlimeOverrides:
    """Return the objective and the options that slime's flags mean.

    Under cispo, eps-clip x and eps-clip-high y bound the weight by 1 - x and 1 + y. A bound of 0 or
    below is none. Under all other estimators they are clip_low and clip_high.

    Args:
      flags: values by the flag's name, with or without the dashes.

    Raises:
      ValueError: an unknown flag, a wrong value, or flags that contradict each other.
    """
    values: dict[str, Any] = {}
    for name, value in flags.items():
        name = _check_flag_name(name.removeprefix("--"))
        values[name] = _parse_value(name, value)
    for name, required in _REQUIRED_FLAGS.items():
        if name in values and not values.get(required):
            raise ValueError(f"--{name}: got it without --{required}; wanted both, or neither")
    # slime's default is grpo; `_default_differences` says so.
    estimator = values.get("advantage-estimator", "cispo")
    if estimator not in ESTIMATOR_PRESETS:
        hint = " 'ppo' needs a critic, which is not here." if estimator == "ppo" else ""
        names = ", ".join(ESTIMATOR_PRESETS)
        raise ValueError(f"--advantage-estimator: got {estimator!r}; wanted one of {names}.{hint}")
    preset = objective_lib.PRESETS[ESTIMATOR_PRESETS[estimator]]
    objective = dataclasses.replace(preset, **_objective_changes(preset, values))
    options = {option: values[name] for name, (_, option) in FLAG_OPTIONS.items() if name in values}
    if options.get("clip_norm") == 0:
        options["clip_norm"] = None  # slime's off
    _check_batch_sizes(options)
    text = "\n".join([describe_objective(objective), *_default_differences(preset, values)])
    return SlimeOverrides(objective, options, text)


def describe_objective(objective: objective_lib.Objective) -> str:
    """Return the line that every run prints of its objective: its bounds, and how it averages."""
    low, high = objective.is_weight_min, objective.is_weight_max
    parts = [f"objective {objective.name}: "]
    if not objective.weighted:
        parts.append("weight 1")
    elif (low, high) == (None, None):
        parts.append("weight r, not bounded")
    else:
        parts.append(f"weight r within [{_format_bound(low)}, {_format_bound(high)}]")
    if (objective.clip_low, objective.clip_high) != (None, None):
        bottom = None if objective.clip_low is None else 1 - objective.clip_low
        top = None if objective.clip_high is None else 1 + objective.clip_high
        parts.append(
            f"; tokens dropped where r leaves [{_format_bound(bottom)}, {_format_bound(top)}]"
        )
    if objective.dual_clip is not None:
        parts.append(f", or is above {objective.dual_clip:g} with A < 0")
    parts.append(f"; r of a {objective.ratio} against {objective.anchor}")
    parts.append(f"; aggregation {objective.aggregation}")
    if objective.aggregation == "mix":
        parts.append(f" ({objective.mix_lambda:g} by sample: our reading of M1 section 5)")
    elif objective.aggregation == "prompt-mean":
        parts.append(" (M1's Eq. 4 as printed; most implementations: token-mean)")
    elif objective.aggregation == "token-mean":
        parts.append(" (M1's Eq. 4 as printed: prompt-mean)")
    return "".join(parts)


def _objective_changes(preset: objective_lib.Objective, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the objective that the flags set."""
    names = {"eps-clip-c": "dual_clip", "gamma": "discount", "kl-coef": "reward_kl_coef"}
    names |= {"entropy-coef": "entropy_coef", "kl-loss-coef": "kl_coef"}
    changes = {field: flags[name] for name, field in names.items() if name in flags}
    low, high = flags.get("eps-clip"), flags.get("eps-clip-high")
    for name in ("eps-clip", "eps-clip-high"):
        # NaN fails this comparison, too. A distance below 0 would swap the sides of the ratio 1.
        if name in flags and not flags[name] >= 0:
            raise ValueError(f"--{name}: got {flags[name]:g}; wanted at least 0")
    if preset.name == "cispo":
        if low is not None:
            # Rounded, so that 1 - 0.2 is the 0.8 that it reads as.
            changes["is_weight_min"] = round(1 - low, 12) if low < 1 else None
        if high is not None:
            changes["is_weight_max"] = round(1 + high, 12)
    else:
        changes |= {"clip_low": low} if low is not None else {}
        changes |= {"clip_high": high} if high is not None else {}
    if flags.get("calculate-per-token-loss"):
        # `length_max` belongs to the aggregation that the flag replaces.
        changes |= {"aggregation": "token-mean", "length_max": None}
    if flags.get("disable-grpo-std-normalization"):
        if preset.advantage not in ("group", "mean"):
            raise ValueError(
                f"--disable-grpo-std-normalization: got advantage {preset.advantage!r}; "
                "wanted an estimator that divides by the group's deviation"
            )
        changes["advantage"] = "mean"
    if flags.get("normalize-advantages") and not preset.advantage.startswith("return"):
        raise ValueError(
            f"--normalize-advantages: got the estimator {preset.name}; wanted "
            "reinforce_plus_plus or its baseline, which whiten over the batch anyway"
        )
    if "kl-loss-type" in flags:
        if flags["kl-loss-type"] not in _KL_KINDS:
            raise ValueError(
                f"--kl-loss-type: got {flags['kl-loss-type']!r}; wanted one of "
                f"{', '.join(_KL_KINDS)}"
            )
        changes["kl_kind"], changes["kl_max"] = _KL_KINDS[flags["kl-loss-type"]]
    if flags.get("use-rollout-logprobs"):
        changes["anchor"] = "rollout"  # ratios against the sampler's log-probabilities
    if flags.get("use-tis"):
        # slime's default of tis-clip-low is 0, which bounds nothing.
        low, high = flags.get("tis-clip-low") or None, flags.get("tis-clip", 2.0)
        changes["correction"] = rollout_correction_lib.RolloutCorrection(
            "token", "truncate", low, high
        )
    return changes


def _default_differences(preset: objective_lib.Objective, flags: Mapping[str, Any]) -> list[str]:
    """Return a line for each absent flag whose default differs in slime."""
    # slime's defaults: eps-clip is 0.2, and eps-clip-high is eps-clip.
    low = flags.get("eps-clip", 0.2)
    high = flags.get("eps-clip-high", low)
    if preset.name == "cispo":
        own_bounds = (_format_bound(preset.is_weight_min), _format_bound(preset.is_weight_max))
        slime_bounds = (f"{1 - low:g}", f"{1 + high:g}")
    else:
        own_bounds, slime_bounds = (
            (_format_bound(preset.clip_low), _format_bound(preset.clip_high)),
            (f"{low:g}", f"{high:g}"),
        )
    # (flag, this project's default, slime's)
    rows = [
        ("advantage-estimator", "cispo", "grpo"),
        ("eps-clip", own_bounds[0], slime_bounds[0]),
        ("eps-clip-high", own_bounds[1], slime_bounds[1]),
        ("calculate-per-token-loss", preset.aggregation, "seq-mean-token-mean"),
    ]
    if flags.get("use-kl-loss"):
        rows += [("kl-loss-type", preset.kl_kind, "k1")]
        rows += [("kl-loss-coef", f"{preset.kl_coef:g}", "0")]
    meaning = {
        "eps-clip": "lowest weight" if preset.name == "cispo" else "clip_low",
        "eps-clip-high": "highest weight" if preset.name == "cispo" else "clip_high",
        "calculate-per-token-loss": "aggregation",
    }
    return [
        f"--{name} not given: {meaning.get(name, 'value')} {own}; slime would use {slime}"
        for name, own, slime in rows
        if not flags.get(name) and own != slime
    ]


def _check_batch_sizes(options: Mapping[str, Any]) -> None:
    """Raise ValueError for sizes that contradict each other: three of them imply the fourth."""
    names = ("prompts_per_batch", "group_size", "samples_per_update", "minibatches")
    if any(name not in options for name in names):
        return
    prompts, size, samples, updates = (options[name] for name in names)
    if prompts * size != samples * updates:
        raise ValueError(
            f"got {prompts} prompts of {size} samples in {updates} updates of {samples} samples; "
            "wanted --rollout-batch-size * --n-samples-per-prompt = --global-batch-size * "
            "--num-steps-per-rollout. Leave one of the last two out."
        )


def _check_flag_name(name: str) -> str:
    """Return a flag's name with hyphens, which slime spells with underscores as well."""
    name = name.replace("_", "-")
    if name not in _FLAG_TYPES:
        all_names = f"wanted one of {', '.join(_FLAG_TYPES)}"
        hint = configlib.suggest_names(name, _FLAG_TYPES, all_names, limit=3)
        raise ValueError(f"--{name}: got an unknown flag; {hint}")
    return name


def _parse_value(name: str, value: Any) -> Any:
    kind = _FLAG_TYPES[name]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and isinstance(value, float):  # int() would cut the fraction off
            raise ValueError
        return kind(value)
    except (KeyError, TypeError, ValueError):
        description = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        raise ValueError(f"--{name}: got {value!r}; wanted {description}") from None


def _format_bound(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"
