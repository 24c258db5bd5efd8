"""JSON as RFC 8259 has it: Python's own parser also takes repeated keys, NaN and infinities."""

import json
import math
from typing import Any


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of these members, for `object_pairs_hook`.

    Raises:
      ValueError: a key that is given twice. Python's parser would keep the last value silently.
    """
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"{key} is given twice: {members[key]!r:.80} and {value!r:.80}")
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
