"""How much of a tag the end of a text holds.

Text that arrives in parts may end within a tag or a stop string. Its end is held back until the
next part shows whether the tag is completed.
"""

from typing import AnyStr


def overlap_length(text: AnyStr, tag: AnyStr) -> int:
    """Return the length of the longest end of `text` that begins `tag` without completing it."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text[len(text) - n :] == tag[:n]), 0)
