"""Finds the answer in a text: the one parser of all rewards.

A text has at most one answer. It is written as the content of `\\boxed{}`, between `<answer>` and
`</answer>`, or after `Answer:`. Of several, the one that ends last counts, and of forms within each
other the innermost: `Answer: $\\boxed{4}$` is 4. Only a text without any of these may say that "the
answer is 4" or end with `#### 4`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from train.rl import sample as sample_lib

_MAX_DEPTH = 8  # of forms and marks within each other: a text of nothing else must not take hours
THINKING_START, THINKING_END = "<think>", "</think>"
# The colon may lie inside or outside of Markdown's emphasis. A heading needs none.
_LINE_PATTERN = re.compile(
    r"(?im)(?:(?:(?<![a-z])answer|答案)[*_ \t]*[:：]"
    r"|^[ \t]*#+[ \t*]*(?:final[ \t]+)?answer[*_ \t]*$)[*_]*\s*"
)
_BOX_PATTERN = re.compile(r"\\(?:boxed|fbox)\s*\{")
_OPEN_BOX_PATTERN = re.compile(r"\\boxed[ \t]+([^\s{}$]+)")  # \boxed 5
_TAG_PATTERN = re.compile(r"(?is)<answer>((?:(?!<answer>).)*?)(?:</answer>|\Z)")
# What may stand between two boxes that are one answer.
_BETWEEN_BOXES_PATTERN = re.compile(r"(?:[\s$,;]|\\[()\[\]]|\\text\{|\}|\b(?:and|or)\b)*")
_SENTENCE_PATTERN = re.compile(
    r"(?im)\banswer(?:[ \t]+is|[ \t]*=)(?:[ \t]*:)?[ \t]*([^\n]*)|^[ \t]*####[ \t]*(.+)$"
)
# The first sentence of a line. A point within a number or a formula does not end it.
_SENTENCE_END_PATTERN = re.compile(r"\.(?=\s+[A-Z])")
_WRAPPERS = (("**", "**"), ("__", "__"), ("$$", "$$"), ("$", "$"), ("`", "`"))
_MATH_WRAPPERS = ((r"\(", r"\)"), (r"\[", r"\]"))
_CHOICE_PATTERN = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\(?([A-Z])\)?\s*\}?"
    r"(?:[.):]*|[.):]+(?:\s.*|\s*\}.*))",
    re.DOTALL,
)


def strip_thinking(text: str) -> str:
    """Return the text after the thinking: none where a thought is opened and never closed."""
    answer = text.rpartition(THINKING_END)[2]
    return "" if THINKING_START in answer else answer


def final_text(sample: sample_lib.Sample) -> str:
    """Return what a sample says after its thinking: nothing where the model was cut off."""
    return strip_thinking(sample.text) if sample.status == "stop" else ""


def extract_answer(text: str) -> str | None:
    """Return the answer after the thinking, without Markdown or dollar signs around it, or None."""
    text = strip_thinking(text)
    content = _find_last_form(text)
    if content is None:
        sentences = list(_SENTENCE_PATTERN.finditer(text))
        if not sentences:
            return None
        line = sentences[-1].group(1) or sentences[-1].group(2) or ""
        return clean_answer(_SENTENCE_END_PATTERN.split(line)[0])
    for _ in range(_MAX_DEPTH):
        inner = _find_last_form(content)
        if inner is None:
            break
        content = inner
    return clean_answer(content)


def find_tagged_answer(text: str) -> str | None:
    """Return the content of the last `<answer>`, which the end of the text may close, or None."""
    tags = _TAG_PATTERN.findall(text)
    return tags[-1].strip() if tags else None


def clean_answer(text: str) -> str:
    """Return an answer without what is written around it: emphasis, math mode, a closing point."""
    text = text.strip()
    for _ in range(_MAX_DEPTH):
        previous = text
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for start, end in (*_WRAPPERS, *_MATH_WRAPPERS):
            inner = text[len(start) : -len(end)]
            is_wrapped = text.startswith(start) and text.endswith(end) and inner
            if is_wrapped and start not in inner and end not in inner:
                text = inner
        # Emphasis that began before `Answer:` ends after the answer.
        for mark in ("**", "__", "`"):
            if text.endswith(mark) and text.count(mark) == 1:
                text = text.removesuffix(mark)
        text = text.strip()
        if text == previous:
            break
    return text


def find_choice(text: str) -> str | None:
    """Return the letter of an answer to a question of multiple choice: (B), \\text{B}, B. Paris."""
    match = _CHOICE_PATTERN.fullmatch(text.strip())
    return match[1] if match else None


def read_labels(task: sample_lib.Task) -> list[str]:
    """Return the right answers of a task, any of which counts, as texts.

    A label is a text, a number, or a list of these. Of a solution that ends with a box, as in
    MATH, or with `#### 72`, as in GSM8K, the label is that answer.

    Raises:
      ValueError: there is no label, or an object.
    """
    label = task.label
    values = label if isinstance(label, list | tuple) else [label]
    if label is None or not values:
        raise ValueError("got no label; wanted the right answer")
    if not all(isinstance(value, str | int | float) for value in values):
        remedy = ""
        if isinstance(label, Mapping) and label:
            remedy = f" Name one of its keys by keys=(('label', 'KEY.{next(iter(label))}'),)."
        raise ValueError(
            f"got the label {label!r:.80}; wanted text, a number, or a list of them.{remedy}"
        )
    return [_clean_label(str(value)) for value in values]


def check_labels(task: sample_lib.Task) -> None:
    """Raise ValueError where a task has no label, one that is empty, or one that is no text."""
    if not all(read_labels(task)):
        raise ValueError(f"got the label {task.label!r:.80}; wanted one that is not empty")


def _clean_label(label: str) -> str:
    _, _, after = label.rpartition("####")
    boxes = list(_find_boxes(label))
    return clean_answer(boxes[-1][2] if boxes and len(label.split()) > 1 else after)


def _find_last_form(text: str) -> str | None:
    """Return the content of the form that ends last."""
    forms = [_join_boxes(text, list(_find_boxes(text)))]
    forms += [(match.end(), match[1]) for match in _TAG_PATTERN.finditer(text)][-1:]
    for match in list(_LINE_PATTERN.finditer(text))[-1:]:
        forms.append(_read_line(text, match.end()))
    # The last one of forms with one end is the outermost.
    found_forms = [form for form in forms if form is not None and form[1] != text]
    return max(found_forms, key=lambda form: (form[0], len(form[1])), default=(0, None))[1]


def _read_line(text: str, start: int) -> tuple[int, str]:
    """Return the end and the content of the line at `start`, or of the display formula there."""
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        end = text.find(closing, start + 2)
        if text.startswith(opening, start) and end >= 0:
            return end + 2, text[start + 2 : end]
    line = re.split(r"\n|(?i:</?answer>)", text[start:], maxsplit=1)[0]
    return start + len(line), line


def _find_boxes(text: str) -> Iterator[tuple[int, int, str]]:
    """Yield the start, the end and the content of each box that is closed and in no other one."""
    position = 0
    while match := _BOX_PATTERN.search(text, position):
        # Formulas nest braces, which a regular expression cannot match: count them.
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            return
        yield match.start(), end, text[match.end() : end - 1]
        position = end
    for match in _OPEN_BOX_PATTERN.finditer(text, position):
        yield match.start(), match.end(), match[1]


def _join_boxes(text: str, boxes: list[tuple[int, int, str]]) -> tuple[int, str] | None:
    r"""Return the end and the content of the last box, joined with those that it is a list with.

    `\boxed{1} and \boxed{2}` are the answer `1, 2`.
    """
    if not boxes:
        return None
    contents = [boxes[-1][2].strip()]
    for (_, end, content), (next_start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=False):
        if not _BETWEEN_BOXES_PATTERN.fullmatch(text, end, next_start):
            break
        if content.strip() not in contents:  # models repeat their answer
            contents.insert(0, content.strip())
    return boxes[-1][1], ", ".join(contents)


class ExactReward:
    """1 where the answer equals the label word for word, else 0.

    White space, Markdown and dollar signs around the two do not matter, nor does a point at their
    end. A label of one capital letter also equals `(B)` and `B. Paris`.
    """

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no label, or one that is no text.
        """
        try:
            labels: list[Any] = read_labels(sample.task)
        except ValueError as error:
            raise ValueError(f"task {sample.task.id!r}: {error}") from None
        text = extract_answer(final_text(sample))
        if text is None:
            return 0.0
        choice = find_choice(text)
        return float(any(label in (text, choice) for label in labels))
