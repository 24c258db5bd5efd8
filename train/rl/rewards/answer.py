"""Finds the answer in a text, and compares it with the label word by word."""

import re

from train.rl import sample as sample_lib

THINKING_END = "</think>"


def strip_thinking(text: str) -> str:
    """Return what follows the last `</think>`; all of it where there is none."""
    return text.rpartition(THINKING_END)[2]


def extract_answer(text: str) -> str | None:
    """Return the final answer after the thinking, or None.

    It is the rest of the line after the last `Answer:`, or what the last `\\boxed{}` holds,
    whichever comes later.
    """
    text = strip_thinking(text)
    lines = list(re.finditer(r"(?i)\banswer:[ \t]*(.*)", text))
    box = _find_last_box(text)
    if box is not None and (not lines or box[0] > lines[-1].start()):
        return box[1].strip()
    return lines[-1].group(1).strip() if lines else None


def _find_last_box(text: str) -> tuple[int, str] | None:
    r"""Return where the last whole `\boxed{}` starts, and its content."""
    for found in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for at in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return found.start(), text[found.end() : at]
    return None


class ExactReward:
    """1 where the answer is the label, but for white space around it, else 0."""

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no label.
        """
        if sample.task.label is None:
            raise ValueError(f"task {sample.task.id!r}: got no label; wanted the right answer")
        return float(extract_answer(sample.text) == str(sample.task.label).strip())
