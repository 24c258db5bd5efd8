"""How long an answer may be: windows that grow as the model learns to fill them (M1 5).

M1-80k went 40K, 48K, 56K, 64K, 72K, 80K, moving on when the longest answers (p99) came near to the
window and the perplexity of what was generated had converged. What "near" and "converged" are is
not said there; the numbers here are ours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class LengthSchedule:
    """tokens: of an answer, in each stage.

    near: the share of the window that the 99th percentile of lengths has to reach. tolerance: by
    which the mean negative log-probability of the last `patience` batches may differ, relative to
    their mean, and count as converged.
    """

    tokens: tuple[int, ...]
    near: float = 0.9
    tolerance: float = 0.02
    patience: int = 4

    def __post_init__(self):
        rising = list(self.tokens) == sorted(set(self.tokens)) and min(self.tokens, default=0) > 0
        if not rising:
            raise ValueError(f"windows.tokens: got {self.tokens}; wanted rising numbers above 0")
        if self.patience < 1 or self.tolerance <= 0 or not 0 < self.near <= 1:
            raise ValueError(
                f"windows: got patience {self.patience}, tolerance {self.tolerance}, near "
                f"{self.near}; wanted patience at least 1, tolerance above 0, near in (0, 1]"
            )


class LengthStage:
    """The window that a run is in.

    Attributes:
      index: of the window.
    """

    def __init__(self, schedule: LengthSchedule):
        self._schedule, self.index, self._nlls = schedule, 0, []

    @property
    def window_tokens(self) -> int:
        return self._schedule.tokens[self.index]

    def push(self, p99_tokens: float, mean_nll: float) -> bool:
        """Take one batch's signals; return whether the next window begins."""
        windows = self._schedule
        self._nlls = [*self._nlls, mean_nll][-windows.patience :]
        last = self.index + 1 == len(windows.tokens)
        mean = sum(self._nlls) / len(self._nlls)
        spread = max(self._nlls) - min(self._nlls)
        converged = len(self._nlls) == windows.patience and spread <= windows.tolerance * abs(mean)
        if last or not converged or p99_tokens < windows.near * self.window_tokens:
            return False
        self.index, self._nlls = self.index + 1, []
        return True

    def state(self) -> dict[str, Any]:
        return {"index": self.index, "nlls": self._nlls}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.index, self._nlls = state["index"], list(state["nlls"])
