"""Mathematics: whether the answer equals the label, by math-verify in worker processes.

math-verify's own time limits use SIGALRM, which works in a main thread alone. They are switched
off, and the pool kills a worker that takes too long.
"""

import importlib.util
import logging

from train.rl import sample as sample_lib
from train.rl.rewards import answer, pool

_MISSING_MESSAGE = "got no math_verify; wanted it for mathematics. Run: pip install 'm1-jax[rl]'"


def prepare_worker(*_: object) -> None:
    """Import the library. The pool calls this outside of the time limit."""
    import math_verify  # noqa: F401

    # Both warn when their own time limits are off.
    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)


def grade_answer(text: str, label: str) -> float:
    """Return 1 if the answer in `text` equals the formula `label`, else 0. Runs in a worker.

    A label of words, such as a name, is no formula: use the reward `exact` for it.

    Raises:
      ValueError: math-verify cannot parse the label.
    """
    import math_verify

    # The whole label is the formula. Without a box, math-verify would search the label for one.
    gold = math_verify.parse(f"\\boxed{{{label}}}", parsing_timeout=0, raise_on_error=True)
    if not gold:
        raise ValueError(f"label: got {label!r}; wanted a formula or a number")
    extracted = answer.extract_answer(text)
    # An extracted answer is a formula, or a sentence that ends with one: try both readings.
    candidates = (
        [f"\\boxed{{{extracted.strip('*.` ')}}}", extracted]
        if extracted
        else [answer.strip_thinking(text)]
    )
    # An answer that cannot be parsed is wrong, not a failure: no raise_on_error here.
    parsed = [
        formula
        for candidate in candidates
        for formula in math_verify.parse(candidate, parsing_timeout=0)
    ]
    # The order of the arguments matters: an interval may answer an inequality, not the reverse.
    return float(math_verify.verify(gold, parsed, timeout_seconds=0))


class MathematicsReward:
    """1 where the answer equals the label as a formula, else 0, by `grade_answer` in a worker."""

    limit_secs = None  # the pool keeps the time

    def __init__(self, workers: pool.WorkerPool):
        """Set the reward up.

        Args:
          workers: the pool that grades.

        Raises:
          ImportError: math-verify is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(_MISSING_MESSAGE)
        self._pool = workers

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task has no label.
        """
        if sample.task.label is None:
            raise ValueError(f"task {sample.task.id!r}: got no label; wanted the right answer")
        label = str(sample.task.label)
        return await self._pool.call(
            "train.rl.rewards.mathematics:grade_answer", sample.text, label
        )
