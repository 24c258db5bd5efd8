"""Hooks of `json` that refuse what JSON does not define and Python's parser lets through."""

from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of these members, for `object_pairs_hook`.

    Raises:
      ValueError: a key that is there twice. Python's parser would keep the last value silently.
    """
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def refuse_constant(constant: str) -> None:
    """Raise ValueError for NaN, Infinity or -Infinity, for `parse_constant`."""
    raise ValueError(f"{constant} is not JSON")
