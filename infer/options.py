"""Options of one request: plain values, checked on the host before anything runs.

A value out of range is a ValueError that names the field. Nothing is clipped, rounded or ignored
silently. Checks that need a vocabulary are in `check_options`.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from m1_jax import configlib

MAX_BIASES = 300  # entries of logit_bias, which have a fixed array on the device
MAX_STOP_IDS = 8  # in the device's fixed array; the host alone knows of further ones
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
# Magnitudes of float32. Devices take smaller ones for 0.
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127

# Fields that the device applies to a row's logits.
# name: (default, which is the release's recommendation, check, description of valid values)
SAMPLING_FIELDS: dict[str, tuple[float, Callable[[float], bool], str]] = {
    "temperature": (1.0, lambda x: x >= 0, "0 (greedy) or more"),
    "top_p": (0.95, lambda x: 0 < x <= 1, "more than 0, at most 1 (off)"),
    # Whole numbers may be floats, as JSON does not tell 5 and 5.0 apart.
    "top_k": (0, lambda x: 0 <= x < 2**31 and x == int(x), "a whole number, 0 (off) or more"),
    "min_p": (0.0, lambda x: 0 <= x <= 1, "0 (off) to 1"),
    "repetition_penalty": (1.0, lambda x: x > 0, "more than 0; 1 is off"),
    "presence_penalty": (0.0, lambda x: -2 <= x <= 2, "-2 to 2; 0 is off"),
    "frequency_penalty": (0.0, lambda x: -2 <= x <= 2, "-2 to 2; 0 is off"),
    "top_logprobs": (
        0,
        lambda x: 0 <= x <= MAX_TOP_LOGPROBS and x == int(x),
        f"a whole number, 0 (off) to {MAX_TOP_LOGPROBS}",
    ),
}
# Fields of which at most one is set.
_CONSTRAINTS = ("json_schema", "regex", "grammar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue one prompt.

    Attributes:
      temperature: 0 takes the likeliest token; see `SAMPLING_FIELDS` for all ranges.
      top_p: mass of the likeliest tokens that are kept, in (0, 1]. 1 is off.
      top_k: number of likeliest tokens that are kept. 0 is off.
      min_p: tokens less likely than this share of the likeliest token are left out. 0 is off.
      repetition_penalty: over prompt and output, as in transformers. 1 is off.
      presence_penalty: over the output alone, as in OpenAI's API. 0 is off.
      frequency_penalty: over the output alone, by count, as in OpenAI's API. 0 is off.
      logit_bias: numbers that are added to logits, -100 to 100, by token id.
      seed: 0 to 2^32 - 1. The same seed draws the same tokens: a prompt that is asked twice with
        one seed, 0 by default, has one answer. `Engine.generate` numbers the seeds of `samples`.
      max_tokens: longest output, in tokens.
      min_tokens: tokens that the output has before anything ends it. A stop token is not one of
        them, and is never chosen before that.
      stop_token_ids: token ids that end the output, beside the tokenizer's own.
      ignore_eos: the tokenizer's own stop ids do not end the output.
      stop: strings that end the output and are not part of its text. A control token's name stands
        for the token, too.
      thinking_tokens: thinking that is still open after this many tokens is closed by force. It
        rests under a constraint without `after_thinking`, where all of the output is the answer.
      stop_on_loop: end an output that has long been certain of every token; see `infer.stopping`.
      top_logprobs: number of likeliest tokens that are listed beside each chosen one, 0 to 20.
      json_schema: JSON schema, an object or its text, which the output matches as a whole. It may
        stand in OpenAI's wrapper, as in {"name": ..., "strict": ..., "schema": {...}}.
      regex: regular expression, which the output matches as a whole.
      grammar: grammar in Lark's notation, which the output matches as a whole. At most one of
        json_schema, regex and grammar is set.
      after_thinking: the model may first think freely. The constraint holds for what follows.

    Sampling options act in the order that `infer.execution.sampling` gives. Numbers and arrays may
    be NumPy's, JAX's or PyTorch's: the fields are Python's own.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0
    max_tokens: int = 512
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    thinking_tokens: int | None = None
    stop_on_loop: bool = False
    top_logprobs: int = 0
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    grammar: str | None = None
    after_thinking: bool = False

    def __post_init__(self):
        # A frozen dataclass assigns its fields through `object`.
        for field in dataclasses.fields(self):
            if field.name != "json_schema":  # it may be deep, and `json` refuses arrays in it
                object.__setattr__(self, field.name, plain_value(getattr(self, field.name)))
        for name, (_, is_valid, description) in SAMPLING_FIELDS.items():
            value = getattr(self, name)
            _check_float32(name, value)
            configlib.check_field(_is_number(value) and is_valid(value), name, value, description)
        _check_whole_number("seed", self.seed, 0, 2**32 - 1)
        _check_whole_number("max_tokens", self.max_tokens, 1)
        _check_whole_number("min_tokens", self.min_tokens, 0, self.max_tokens, " (max_tokens)")
        if self.thinking_tokens is not None:
            _check_whole_number("thinking_tokens", self.thinking_tokens, 0)
        for name in ("ignore_eos", "stop_on_loop", "after_thinking"):
            value = getattr(self, name)
            configlib.check_field(isinstance(value, bool), name, value, "True or False")
        # Copies: the caller may change its own list or dict later.
        object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))
        object.__setattr__(self, "stop_token_ids", _check_stop_ids(self.stop_token_ids))
        object.__setattr__(self, "stop", _check_stop_strings(self.stop))
        self._check_constraint()

    @property
    def sampling_values(self) -> dict[str, float]:
        """Return the sampling fields, as `sampling.make_options` takes them."""
        return {name: getattr(self, name) for name in SAMPLING_FIELDS}

    @property
    def constraint(self) -> str | None:
        """Return the name of the one constraint that is set."""
        return next((name for name in _CONSTRAINTS if getattr(self, name) is not None), None)

    def _check_constraint(self) -> None:
        names = [name for name in _CONSTRAINTS if getattr(self, name) is not None]
        if len(names) > 1:
            raise ValueError(f"got {' and '.join(names)}; wanted at most one of them")
        for name in names:
            value = getattr(self, name)
            kinds = str | Mapping if name == "json_schema" else str
            description = "text or an object" if name == "json_schema" else "text"
            # {} is a schema, which any JSON matches. An empty text is a mistake.
            configlib.check_field(
                isinstance(value, kinds) and bool(value or value == {}), name, value, description
            )
            # When a structure is complete, only a stop token may follow.
            for option in ("ignore_eos", "min_tokens"):
                if getattr(self, option):
                    raise ValueError(
                        f"{option}: got {getattr(self, option)} with {name}, whose end it would "
                        "forbid; leave one of them out"
                    )


def check_options(options: Options, vocab_size: int) -> None:
    """Check the options that depend on the model, which are token ids.

    Args:
      options: one request's options.
      vocab_size: the model's vocabulary size.

    Raises:
      ValueError: a token id outside of the vocabulary.
    """
    ids = {"logit_bias": options.logit_bias, "stop_token_ids": options.stop_token_ids}
    for name, values in ids.items():
        for token in values:
            configlib.check_field(
                token < vocab_size, name, token, f"token ids of 0 to {vocab_size - 1}"
            )


def all_stop_ids(options: Options, own_stop_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return all token ids that end the output, ascending."""
    own = () if options.ignore_eos else own_stop_ids
    return tuple(sorted({*own, *options.stop_token_ids}))


def options_to_json(options: Options) -> dict[str, Any]:
    """Return the fields that differ from their defaults, for `json` to write."""
    values = dataclasses.asdict(options)
    return {
        name: value for name, value in values.items() if value != getattr(_DEFAULT_OPTIONS, name)
    }


def options_from_json(values: Mapping[str, Any], base: Options | None = None) -> Options:
    """Return the options that `options_to_json` wrote.

    JSON has no tuples, and its keys are text. So lists stand for tuples, and logit_bias may have
    ids in quotes. A single stop string may stand without a list.

    Args:
      values: the fields that are set.
      base: has the values of all other fields. None: the defaults.

    Raises:
      ValueError: an unknown field, or what `Options` refuses.
    """
    names = [field.name for field in dataclasses.fields(Options)]
    check_names("option", values, names)
    values = dict(values)
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    if isinstance(bias := values.get("logit_bias"), Mapping):
        values["logit_bias"] = {_parse_token_id(key): value for key, value in bias.items()}
    return dataclasses.replace(base or _DEFAULT_OPTIONS, **values)


def _parse_token_id(key: Any) -> Any:
    """Return an id in quotes as a number, and anything else as it is, for later checks."""
    return int(key) if isinstance(key, str) and key.isdecimal() and key.isascii() else key


def check_names(kind: str, names: Iterable[str], allowed: Collection[str]) -> None:
    """Raise ValueError for the first name that is not allowed.

    The message suggests similar names. It lists all of them where none is similar.
    """
    for name in names:
        if name not in allowed:
            all_names = f"wanted one of {', '.join(allowed)}"
            hint = configlib.suggest_names(name, allowed, all_names, limit=3)
            raise ValueError(f"{kind}: got {name!r}; {hint}")


def plain_value(value: Any) -> Any:
    """Return numbers and arrays of NumPy, JAX and PyTorch as Python's own, also in containers.

    Anything else is returned as it is.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | list):
        return type(value)(map(plain_value, value)) if type(value) in (tuple, list) else value
    if isinstance(value, dict):
        return {plain_value(key): plain_value(entry) for key, entry in value.items()}
    return value


def _is_number(value: Any) -> bool:
    # A bool is an int in Python.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _FLOAT32_MAX


def _check_float32(name: str, value: Any) -> None:
    """Refuse numbers that are infinite for the device, or 0 although they are not."""
    if isinstance(value, int | float) and not (
        value == 0 or _FLOAT32_MIN <= abs(value) <= _FLOAT32_MAX
    ):
        raise ValueError(
            f"{name}: got {value!r:.40}; wanted a number that float32 holds: "
            f"{_FLOAT32_MIN:.3g} to {_FLOAT32_MAX:.3g} of either sign, or 0"
        )


def is_token_id(value: Any, vocab_size: int) -> bool:
    """Return whether a value is a whole number of the vocabulary, also of an array's kind."""
    try:
        # This admits the integers of arrays, and keeps out floats and text.
        number = operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool) and 0 <= number < vocab_size


def is_whole_number(value: Any) -> bool:
    """Return whether a value is one of Python's integers, 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_whole_number(
    name: str, value: Any, low: int, high: float = math.inf, high_name: str = ""
) -> None:
    """Check low <= value <= high. `high_name` explains the upper limit in the error."""
    description = (
        f"a whole number, {low} or more" if high == math.inf else f"{low} to {high}{high_name}"
    )
    configlib.check_field(is_whole_number(value) and low <= value <= high, name, value, description)


def _check_logit_bias(bias: Any) -> dict[int, float]:
    configlib.check_field(
        isinstance(bias, Mapping), "logit_bias", bias, "a mapping of token ids to numbers"
    )
    if len(bias) > MAX_BIASES:
        raise ValueError(f"logit_bias: got {len(bias)} entries; wanted at most {MAX_BIASES}")
    for token, value in bias.items():
        configlib.check_field(
            is_whole_number(token), "logit_bias", token, "token ids, whole numbers from 0"
        )
        _check_float32(f"logit_bias[{token}]", value)
        configlib.check_field(
            _is_number(value) and abs(value) <= 100, f"logit_bias[{token}]", value, "-100 to 100"
        )
    return dict(bias)


def _check_stop_ids(ids: Any) -> tuple[int, ...]:
    name = "stop_token_ids"
    configlib.check_field(isinstance(ids, tuple | list), name, ids, "a tuple of token ids")
    for token in ids:
        configlib.check_field(
            is_whole_number(token), name, token, "token ids, whole numbers from 0"
        )
    return tuple(ids)


def _check_stop_strings(stop: Any) -> tuple[str, ...]:
    configlib.check_field(isinstance(stop, tuple | list), "stop", stop, "a tuple of strings")
    if len(stop) > MAX_STOP_STRINGS:
        raise ValueError(f"stop: got {len(stop)} strings; wanted at most {MAX_STOP_STRINGS}")
    for text in stop:
        valid = isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARS
        configlib.check_field(valid, "stop", text, f"strings of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stop)


# Last in the file: constructing options calls the functions above.
_DEFAULT_OPTIONS = Options()
PRESETS: dict[str, Options] = {
    # The output limits that the two checkpoints were trained with. A tenth is left for the answer.
    "thinking-40k": Options(max_tokens=40_000, thinking_tokens=36_000),
    "thinking-80k": Options(max_tokens=80_000, thinking_tokens=72_000),
    "lightning": Options(max_tokens=4_096, thinking_tokens=1_024),
    "pro": Options(max_tokens=96_000, thinking_tokens=80_000, stop_on_loop=True),
}


def preset_options(name: str, **changes: Any) -> Options:
    """Return the preset of this name, with some fields replaced.

    Raises:
      ValueError: an unknown name or field, or what `Options` refuses.
    """
    check_names("preset", [name], PRESETS)
    fields = [field.name for field in dataclasses.fields(Options)]
    check_names("option", changes, fields)
    return dataclasses.replace(PRESETS[name], **changes)
