"""How long an answer may be: windows that grow as the model learns to fill them (M1 5).

M1-80k went 40K, 48K, 56K, 64K, 72K, 80K. It moved on when the longest answers (p99) came near to
the window and the perplexity of the generated tokens had converged. The paper does not say what
"near" and "converged" are, so those numbers are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LengthSchedule:
    """The windows of a run, and when the next one begins.

    Attributes:
      tokens: most tokens of an answer in each window, rising and above 0.
      near: share of the window that the 99th percentile of lengths must reach, in (0, 1].
      tolerance: how far the last `patience` batches' mean negative log-probabilities may be apart
        and still count as converged, as a share of their mean, above 0.
      patience: batches that convergence is measured over, at least 1.

    Raises:
      ValueError: a value out of range.
    """

    tokens: tuple[int, ...]
    near: float = 0.9
    tolerance: float = 0.02
    patience: int = 4

    def __post_init__(self):
        is_rising = (
            list(self.tokens) == sorted(set(self.tokens)) and min(self.tokens, default=0) > 0
        )
        if not is_rising:
            raise ValueError(f"windows.tokens: got {self.tokens}; wanted rising numbers above 0")
        if self.patience < 1 or self.tolerance <= 0 or not 0 < self.near <= 1:
            raise ValueError(
                f"windows: got patience {self.patience}, tolerance {self.tolerance}, near "
                f"{self.near}; wanted patience at least 1, tolerance above 0, near in (0, 1]"
            )


class LengthStage:
    """The window that a run is in.

    Args:
      schedule: schedule of the run.
      state: state of the stage that this one continues, from `LengthStage.state`. None begins with
        the first window.

    Attributes:
      index: number of the window, from 0.
    """

    def __init__(self, schedule: LengthSchedule, state: Mapping[str, Any] | None = None):
        self._schedule = schedule
        self.index: int = state["index"] if state else 0
        # Mean negative log-probability of the newest batches, at most `patience` of them, nats.
        self._nlls: list[float] = list(state["nlls"]) if state else []

    @property
    def window_tokens(self) -> int:
        return self._schedule.tokens[self.index]

    def push(self, p99_tokens: float, mean_nll: float) -> bool:
        """Take one batch's signals, and return whether the next window begins.

        Args:
          p99_tokens: 99th percentile of the answers' lengths.
          mean_nll: mean negative log-probability of the generated tokens, nats.
        """
        schedule = self._schedule
        self._nlls = [*self._nlls, mean_nll][-schedule.patience :]
        is_last_window = self.index + 1 == len(schedule.tokens)
        # Relative to the mean, as the level depends on the tasks.
        mean = sum(self._nlls) / len(self._nlls)
        spread = max(self._nlls) - min(self._nlls)
        is_converged = len(self._nlls) == schedule.patience and spread <= schedule.tolerance * abs(
            mean
        )
        is_near = p99_tokens >= schedule.near * self.window_tokens
        if is_last_window or not is_converged or not is_near:
            return False
        # Batches of a shorter window say nothing about convergence in the next, so none is kept.
        self.index, self._nlls = self.index + 1, []
        return True

    def state(self) -> dict[str, Any]:
        """Return what continues this stage, JSON-able."""
        return {"index": self.index, "nlls": self._nlls}
