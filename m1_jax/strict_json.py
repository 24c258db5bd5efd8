"""JSON as RFC 8259 has it: Python's own parser also takes repeated keys, NaN and infinities."""

import json
import math
from typing import Any

MAX_DEPTH = 200  # arrays and objects within each other
# Of a whole number. transformers writes 10^30 for "no limit" into tokenizer_config.json.
_MAX_DIGITS = 40
_MAX_REASON = 150  # characters of an error's reason


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of these members, for `object_pairs_hook`.

    Raises:
      ValueError: a key that is given twice. Python's parser would keep the last value silently.
    """
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            first, second = show_value(members[key], 30), show_value(value, 30)
            raise ValueError(f"{shorten_text(key)} is given twice: {first} and {second}")
        members[key] = value
    return members


def _refuse_constant(constant: str) -> None:
    """Raise ValueError for NaN, Infinity or -Infinity, for `parse_constant`."""
    raise ValueError(f"{constant} is not JSON")


def _parse_finite(digits: str) -> float:
    """Return a float, for `parse_float`. Python reads 1e999 as infinity, which is not JSON."""
    if math.isinf(value := float(digits)):
        raise ValueError(f"{digits} is too large")
    return value


# `decode` reads a whole text, `raw_decode` a value at the start of a text.
DECODER = json.JSONDecoder(
    object_pairs_hook=refuse_repeated_keys,
    parse_constant=_refuse_constant,
    parse_float=_parse_finite,
)


class JsonError(ValueError):
    """A text that is no JSON, or JSON beyond our limits. The message is one short line.

    Attributes:
      reason: what is wrong, without the text's name and the remedy.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: got no valid JSON ({reason}); mend or replace it")
        self.reason = reason


def shorten_text(text: str, max_characters: int = 80) -> str:
    """Return a text as one line of at most so many characters, for an error message."""
    text = " ".join(text[: 2 * max_characters].split())
    return text if len(text) <= max_characters else text[: max_characters - 3] + "..."


def show_value(value: Any, max_characters: int = 80) -> str:
    """Return a value as an error message shows it: its `repr`, shortened."""
    try:
        return shorten_text(repr(value), max_characters)
    except (RecursionError, ValueError):  # too deep, or a whole number of thousands of digits
        return f"a {type(value).__name__} too large to show"


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value of a JSON text that a user may have damaged.

    Args:
      text: the text, bytes in UTF-8. A byte order mark at its start is left out.
      name: what the error calls it, most often the file's name, with the line if it has several.

    Raises:
      JsonError: no JSON, a key that is given twice, NaN, a number beyond float64 or of more than 40
        digits, or more than `MAX_DEPTH` values within each other.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = _BOUNDED_DECODER.decode(text.removeprefix("\ufeff"))
        # Most texts have too few brackets to be deep, and need no look at each value.
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
        return value
    except RecursionError:
        reason = f"more than {MAX_DEPTH} arrays and objects lie within each other"
    except UnicodeDecodeError as error:
        # Its own message has all the bytes.
        reason = f"byte {error.start} is no UTF-8"
    except ValueError as error:
        reason = str(error)
    raise JsonError(name, shorten_text(reason, _MAX_REASON))


def _check_depth(value: Any) -> None:
    """Raise RecursionError for a value of too many levels."""
    level, depth = [value], 0
    while level := [
        inner
        for outer in level
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError


def _parse_bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise ValueError(f"{digits[:_MAX_DIGITS]}... has {len(digits)} digits")
    return int(digits)


_BOUNDED_DECODER = json.JSONDecoder(
    object_pairs_hook=refuse_repeated_keys,
    parse_constant=_refuse_constant,
    parse_float=_parse_finite,
    parse_int=_parse_bounded_int,
)
