"""Mathematics: is the answer equal to the label? Decided by math-verify, in worker processes.

math-verify's own time limits use SIGALRM, which raises in threads; they are off, and the pool's
kill stands in for them.
"""

import importlib.util
import logging

from train.rl import sample as sample_lib
from train.rl.rewards import answer, pool

_MISSING_MESSAGE = "got no math_verify; wanted it for mathematics. Run: pip install 'm1-jax[rl]'"


def prepare_worker(*_: object) -> None:
    """Import the library; the pool calls this outside of the time limit."""
    import math_verify  # noqa: F401

    for name in ("parser", "grader"):  # they warn that nobody keeps the time: the pool does
        logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)


def grade_answer(text: str, label: str) -> float:
    """Return 1 if the answer in `text` is equal to `label`, a formula, else 0; runs in a worker.

    Words are no formulas: a label such as a name belongs to the reward `exact`.

    Raises:
      ValueError: the label cannot be read.
    """
    import math_verify

    # A label is a formula as a whole; without a box, math-verify would search for one in it.
    gold = math_verify.parse(f"\\boxed{{{label}}}", parsing_timeout=0, raise_on_error=True)
    if not gold:
        raise ValueError(f"label: got {label!r}; wanted a formula or a number")
    found = answer.extract_answer(text)
    # An answer is a formula, or a sentence that ends with one.
    said = [f"\\boxed{{{found.strip('*.` ')}}}", found] if found else [answer.strip_thinking(text)]
    # What the model wrote may be unreadable: that is a wrong answer, not a failure.
    parsed = [one for text in said for one in math_verify.parse(text, parsing_timeout=0)]
    return float(math_verify.verify(gold, parsed, timeout_seconds=0))


class MathematicsReward:
    """See `grade_answer`."""

    limit_secs = None  # the pool's

    def __init__(self, workers: pool.WorkerPool):
        """Take the pool to work in.

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
