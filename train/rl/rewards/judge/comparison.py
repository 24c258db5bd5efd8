"""Whether a program's output is the right one."""

import math
import re
from typing import Any


def is_same_value(value: Any, wanted: Any, tolerance: float) -> bool:
    """Tell whether a call's value is the wanted JSON value.

    A tuple is a list, and an object of JSON has keys of text alone.

    Args:
      tolerance: by how much floats may differ, relative or, below 1, absolute.
    """
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        if isinstance(value, float) or isinstance(wanted, float):
            return _is_near(value, wanted, tolerance)
        return value == wanted
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(
            is_same_value(item, wanted_item, tolerance)
            for item, wanted_item in zip(value, wanted, strict=True)
        )
    if isinstance(value, dict) and isinstance(wanted, dict):
        by_text = {str(key): item for key, item in value.items()}
        return by_text.keys() == wanted.keys() and all(
            is_same_value(item, wanted[key], tolerance) for key, item in by_text.items()
        )
    return type(value) is type(wanted) and value == wanted


def is_same_output(printed: str, wanted: str, tolerance: float) -> bool:
    """Tell whether printed text is the wanted one.

    White space at ends of lines and empty lines at the end do not matter. Words that are numbers
    may differ as in `is_same_value`, where the wanted one is written with a point or an exponent.
    """
    lines, wanted_lines = _strip_lines(printed), _strip_lines(wanted)
    return lines == wanted_lines or (
        len(lines) == len(wanted_lines)
        and all(
            _is_same_line(line, wanted_line, tolerance)
            for line, wanted_line in zip(lines, wanted_lines, strict=True)
        )
    )


def _is_same_line(line: str, wanted: str, tolerance: float) -> bool:
    # Words, and the white space between them.
    words, wanted_words = (re.findall(r"\s+|\S+", text) for text in (line, wanted))
    return len(words) == len(wanted_words) and all(
        word == wanted_word or _is_same_number(word, wanted_word, tolerance)
        for word, wanted_word in zip(words, wanted_words, strict=True)
    )


def _is_same_number(word: str, wanted: str, tolerance: float) -> bool:
    # Whole numbers are exact: floats would take 10**17 and 10**17 + 1 for equal.
    if not re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?", wanted):
        return False
    try:
        return _is_near(float(word), float(wanted), tolerance)
    except ValueError:
        return False


def _is_near(value: float, wanted: float, tolerance: float) -> bool:
    try:
        return value == wanted or math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # a whole number beyond all floats
        return False


def _strip_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
