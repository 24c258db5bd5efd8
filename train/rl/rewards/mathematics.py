"""Mathematics: whether the answer equals the label, by math-verify in worker processes.

An answer is read once, as one formula, so that `3 or 5` is the list of both and not 5.
math-verify's own time limits use SIGALRM, which works in a main thread alone. They are switched
off, and the pool kills a worker that takes too long.
"""

import functools
import importlib.util
import logging
import re
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import answer, formula, pool

_MISSING_MESSAGE = "got no math_verify; wanted it for mathematics. Run: pip install 'm1-jax[rl]'"
_MAX_ANSWER_CHARS = 2_000


def check_labels(task: sample_lib.Task) -> None:
    """Raise ValueError where a task has no label that is a formula.

    Whether math-verify parses it is known when the first answer is graded.
    """
    answer.check_labels(task)
    for label in answer.read_labels(task):
        text = formula.normalize_formula(label)
        depth = text.replace(r"\{", "").count("{") - text.replace(r"\}", "").count("}")
        if depth or not re.search(r"[0-9A-Za-z]", text):
            raise ValueError(f"got the label {label!r:.80}; wanted a formula, a number or words")


def prepare_worker(text: str = "", labels: str | tuple[str, ...] = ()) -> None:
    """Import the library and read the labels. The pool calls this outside of the time limit."""
    import math_verify  # noqa: F401

    # Both warn when their own time limits are off.
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)
    del text
    for label in _as_tuple(labels):
        _parse_label(label)


def grade_answer(text: str, labels: str | tuple[str, ...]) -> float:
    """Return 1 if the answer in `text` equals the label, or one of several. Runs in a worker.

    A label of words, such as a name, is compared as words.

    Raises:
      ValueError: math-verify cannot parse a label.
    """
    extracted = answer.extract_answer(text)
    if extracted is None:
        found = formula.find_last_formula(answer.strip_thinking(text))
    else:
        found = formula.read_sentence(extracted)
    # An answer this long is no answer, and takes long to parse.
    if not found or len(found) > _MAX_ANSWER_CHARS:
        found = None
    return float(any(_is_equal(found, extracted, label) for label in _as_tuple(labels)))


def _as_tuple(labels: str | tuple[str, ...]) -> tuple[str, ...]:
    return (labels,) if isinstance(labels, str) else labels


@functools.lru_cache(maxsize=256)
def _parse_label(label: str) -> list[Any]:
    import math_verify

    # The whole label is the formula. Without a box, math-verify would search the label for one.
    gold = math_verify.parse(
        f"\\boxed{{{formula.normalize_formula(label)}}}", parsing_timeout=0, raise_on_error=True
    )
    if not gold:
        raise ValueError(f"label: got {label!r}; wanted a formula or a number")
    return gold


def _is_equal(found: str | None, extracted: str | None, label: str) -> bool:
    import math_verify

    gold = _parse_label(label)
    words = formula.strip_text_command(label).strip("() ")
    is_choice = len(words) == 1 and words.isupper()
    if formula.is_words(words) or is_choice:
        text = formula.strip_text_command(extracted or "")
        is_same = words.casefold() == text.strip("() ").casefold()
        return is_same or (is_choice and words == answer.find_choice(text))
    if found is None:
        return False
    # An answer that cannot be parsed is wrong, not a failure: no raise_on_error here.
    text, wanted = formula.normalize_formula(found), formula.normalize_formula(label)
    if "".join(text.split()) == "".join(wanted.split()):
        return True
    parsed = math_verify.parse(f"\\boxed{{{text}}}", parsing_timeout=0)
    if formula.have_other_bases(wanted, text):
        return False
    # The order of the arguments matters: an interval may answer an inequality, not the reverse.
    is_equal = math_verify.verify(gold, parsed, timeout_seconds=0)
    return is_equal and not ("%" not in text + label and _is_other_rational(gold, parsed))


def _is_other_rational(gold: list[Any], parsed: list[Any]) -> bool:
    """Tell whether both are exact and differ: math-verify rounds 2^-99 and 2^-98 to 0."""
    import sympy

    values = [formulas[0] for formulas in (gold, parsed) if formulas]
    if len(values) < 2 or not all(isinstance(value, sympy.Expr) for value in values):
        return False
    exact_values = [value.doit() for value in values if not value.has(sympy.Float)]
    return (
        len(exact_values) == 2
        and all(isinstance(value, sympy.Rational) for value in exact_values)
        and exact_values[0] != exact_values[1]
    )


class MathematicsReward:
    """1 where the answer equals the label as a formula, else 0, by `grade_answer` in a worker."""

    limit_secs = None  # the pool keeps the time

    def __init__(self, workers: pool.WorkerPool, limit_secs: float = 5.0):
        """Set the reward up.

        Args:
          workers: the pool that grades.
          limit_secs: time for an answer, in seconds. One that takes longer, such as
            `10^{10^{10}}`, is wrong: it is the model's doing. The pool's own limit counts, too.

        Raises:
          ImportError: math-verify is not installed.
          ValueError: the limit is not above 0.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(_MISSING_MESSAGE)
        if not limit_secs > 0:
            raise ValueError(f"limit_secs: got {limit_secs}; wanted more than 0")
        self._pool, self._answer_secs = workers, limit_secs

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no label, or one that is no text.
          pool.WorkerError: a label that math-verify cannot parse, or a worker that died.
        """
        try:
            labels = tuple(answer.read_labels(sample.task))
        except ValueError as error:
            raise ValueError(f"task {sample.task.id!r}: {error}") from None
        try:
            return await self._pool.call(
                "train.rl.rewards.mathematics:grade_answer",
                answer.final_text(sample),
                labels,
                limit_secs=self._answer_secs,
            )
        except pool.WorkerTimeout as error:
            if error.is_startup:
                raise
            return 0.0
