"""Finds the answer in a text, and compares it with the label word for word."""

import re

from train.rl import sample as sample_lib

THINKING_END = "</think>"


def strip_thinking(text: str) -> str:
    """Return the text after the last `</think>`, or the whole text where that tag is missing."""
    return text.rpartition(THINKING_END)[2]


def extract_answer(text: str) -> str | None:
    """Return the final answer after the thinking, or None.

    The answer is the remainder of the line after the last `Answer:`, or the content of the last
    `\\boxed{}`. Where both are present, the later one counts.
    """
    text = strip_thinking(text)
    lines = list(re.finditer(r"(?i)\banswer:[ \t]*(.*)", text))
    box = _find_last_box(text)
    if box is not None and (not lines or box[0] > lines[-1].start()):
        return box[1].strip()
    return lines[-1].group(1).strip() if lines else None


def _find_last_box(text: str) -> tuple[int, str] | None:
    r"""Return the start of the last complete `\boxed{}`, and its content."""
    # Formulas nest braces, which a regular expression cannot match: count them.
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if not depth:
                return match.start(), text[match.end() : end]
    return None


class ExactReward:
    """1 where the answer equals the label up to surrounding white space, else 0."""

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no label.
        """
        if sample.task.label is None:
            raise ValueError(f"task {sample.task.id!r}: got no label; wanted the right answer")
        # A label from a JSON file may be a number.
        return float(extract_answer(sample.text) == str(sample.task.label).strip())


def final_text(sample: sample_lib.Sample) -> str:
    return strip_thinking(sample.text)
