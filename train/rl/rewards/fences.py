"""The program in an answer: which of its fenced blocks it is, and where that block ends."""

import ast
import re
import textwrap

# A fence opens at the end of a line, also after text. Its tag may be `python`, `Python3`,
# `{.python}`, `python title="a.py"` or `python:a.py`.
_OPENING_PATTERN = re.compile(r"^(?P<before>[^`~]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<tag>[^`]*)$")
# It closes in a line of its own, or at the end of a line of code. A tag of HTML may follow.
_CLOSING_PATTERN = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(</?\w+>)?[ \t.]*$")
_PYTHON_TAG_PATTERN = re.compile(r"(?i)[{.\s]*(python[0-9.]*|py[0-9]?)\b")
_MAX_INNER_FENCES = 9
_MAX_FENCE_CHARS = 300  # of a line that opens or closes: patterns take long on longer ones


def extract_program(text: str) -> str | None:
    """Return the last block that is tagged as Python, or else the last one without a tag.

    A block that is never closed ends with the text.

    Args:
      text: the answer, without thinking.
    """
    # Not `splitlines`: that also splits at characters which a string of a program may hold.
    lines = re.split(r"\r\n|\n|\r", text)
    python_blocks: list[str] = []
    plain_blocks: list[str] = []
    number = 0
    while number < len(lines):
        opening = _match_line(_OPENING_PATTERN, lines[number])
        number += 1
        if opening is None:
            continue
        end, block = _read_block(lines, number, opening["fence"])
        if _PYTHON_TAG_PATTERN.match(opening["tag"]):
            # A docstring may hold fences. The program then ends at the first one where it is one.
            longer = (
                _read_block(lines, number, opening["fence"], num_skipped)
                for num_skipped in range(_MAX_INNER_FENCES)
            )
            end, block = next((pair for pair in longer if _is_program(pair[1])), (end, block))
            python_blocks.append(block)
        elif not opening["tag"].strip():
            plain_blocks.append(block)
        number = end
    blocks = python_blocks or plain_blocks
    return textwrap.dedent(blocks[-1]) + "\n" if blocks else None


def _read_block(lines: list[str], start: int, fence: str, num_skipped: int = 0) -> tuple[int, str]:
    """Return the number of the line after a block, and the block's text.

    Args:
      num_skipped: how many fences that could end the block belong to it.
    """
    for number in range(start, len(lines)):
        closing = _match_line(_CLOSING_PATTERN, lines[number])
        opening = _match_line(_OPENING_PATTERN, lines[number])
        is_closing = closing is not None and closing["fence"].startswith(fence)
        # Another block begins where this one was never closed.
        is_opening = not is_closing and opening is not None and not opening["before"].strip()
        if not (is_closing or is_opening):
            continue
        if num_skipped:
            num_skipped -= 1
            continue
        if closing is None or not is_closing:
            return number, "\n".join(lines[start:number])
        last_line = [closing["before"]] if closing["before"].strip() else []
        return number + 1, "\n".join([*lines[start:number], *last_line])
    return len(lines), "\n".join(lines[start:])


def _match_line(pattern: re.Pattern[str], line: str) -> re.Match[str] | None:
    return pattern.match(line) if len(line) <= _MAX_FENCE_CHARS else None


def _is_program(text: str) -> bool:
    try:
        ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
