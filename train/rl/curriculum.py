"""Which task comes next: sources by a schedule of weights, and tasks that still teach something.

The report begins with reasoning tasks that rules can check and mixes general ones in (M1 4.3), and
keeps tasks that are solved sometimes: pass@10 strictly between 0 and 0.9 (M1 4.1).
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from train.data import shuffle


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """weights: (step, ((source, weight), ...)), ascending from step 0. Between two steps a weight
    goes from one value to the other in a straight line; after the last it stays. Sources that are
    not named have weight 0. seed: of what is drawn.
    """

    weights: tuple[tuple[int, tuple[tuple[str, float], ...]], ...]
    seed: int = 0

    def __post_init__(self):
        steps = [step for step, _ in self.weights]
        if not steps or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"weights: got the steps {steps}; wanted ascending ones from 0")
        for step, weights in self.weights:
            names = [name for name, _ in weights]
            values = [weight for _, weight in weights]
            good = all(math.isfinite(one) and one >= 0 for one in values)
            if not good or not sum(values) > 0 or len(set(names)) < len(names):
                raise ValueError(
                    f"weights from step {step}: got {weights}; wanted different sources, weights "
                    "of 0 or more and one above"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """All sources, in the order they are named."""
        return tuple(dict.fromkeys(name for _, weights in self.weights for name, _ in weights))

    def weights_at(self, step: int) -> dict[str, float]:
        """Return each source's weight at a step; they sum up to 1."""
        after = bisect.bisect_right([first for first, _ in self.weights], step)
        first, low = self.weights[after - 1]
        last, high = self.weights[min(after, len(self.weights) - 1)]
        share = (step - first) / (last - first) if last > first else 0.0
        here, there = _normalize_weights(low), _normalize_weights(high)
        return {
            name: (1 - share) * here.get(name, 0.0) + share * there.get(name, 0.0)
            for name in self.sources
        }


class TaskDraws:
    """Draws (source, index) for ever, each source in a shuffled order of its own per epoch.

    A draw is a function of the seed, its number, the step, and how often each source came before.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        sizes: Mapping[str, int],
        state: dict[str, Any] | None = None,
    ):
        """Go on from a `state`. sizes: tasks by source.

        Raises:
          ValueError: a source of the schedule that is missing or empty.
        """
        for name in config.sources:
            if not sizes.get(name, 0) > 0:
                raise ValueError(
                    f"source {name!r}: got {sizes.get(name)} tasks; wanted at least one. The "
                    f"schedule names {', '.join(config.sources)}"
                )
        state = state or {}
        self._config, self._sizes = config, dict(sizes)
        self._num_draws: int = state.get("number", 0)
        self._num_draws_by_source: dict[str, int] = dict.fromkeys(config.sources, 0) | state.get(
            "read", {}
        )

    def draw_task(self, step: int) -> tuple[str, int]:
        """Return the source and the index of the next task, for a batch of this step."""
        name = self._draw_source(step)
        epoch, position = divmod(self._num_draws_by_source[name], self._sizes[name])
        self._num_draws += 1
        self._num_draws_by_source[name] += 1
        index = shuffle.shuffle_position(
            position, self._sizes[name], self._config.seed, name, epoch
        )
        return name, index

    def state(self) -> dict[str, Any]:
        """Return what continues these draws, JSON-able."""
        return {"number": self._num_draws, "read": dict(self._num_draws_by_source)}

    def _draw_source(self, step: int) -> str:
        weights = {k: w for k, w in self._config.weights_at(step).items() if w > 0}
        total = math.fsum(weights.values())
        return shuffle.choose_by_weight(weights, total, self._config.seed, self._num_draws)


@dataclasses.dataclass(frozen=True)
class PassRateConfig:
    """A task is left out once `least` of its answers were judged and the share of passed ones is
    not strictly between low and high. A low below 0 or a high above 1 leaves that side open.
    """

    low: float = 0.0
    high: float = 0.9
    least: int = 10

    def __post_init__(self):
        if not self.low < self.high or self.least < 1:
            raise ValueError(
                f"pass rates: got {self.low} to {self.high} after {self.least}; wanted low below "
                "high, after at least 1"
            )


class PassRateTracker:
    """Counts how often each task was solved, and says which to leave out."""

    def __init__(self, config: PassRateConfig, state: dict[str, Any] | None = None):
        """Go on from a `state`."""
        self._config = config
        self._counts: dict[str, tuple[int, int]] = {
            task: (passed, total) for task, (passed, total) in (state or {}).items()
        }

    def push(self, task: str, passed: int, total: int) -> None:
        """Count a group: of `total` answers to the task with this id, `passed` were right.

        Raises:
          ValueError: more passed than there are.
        """
        if not 0 <= passed <= total:
            raise ValueError(f"task {task!r}: got {passed} of {total} passed; wanted 0 to {total}")
        before, many = self._counts.get(task, (0, 0))
        self._counts[task] = (before + passed, many + total)

    def should_draw(self, task: str) -> bool:
        """Tell whether the task should still be drawn."""
        passed, total = self._counts.get(task, (0, 0))
        enough = total >= self._config.least
        return not enough or self._config.low < passed / total < self._config.high

    def metrics(self) -> dict[str, float]:
        """Return what to log."""
        dropped = sum(not self.should_draw(task) for task in self._counts)
        return {
            "curriculum/tasks_seen": float(len(self._counts)),
            "curriculum/tasks_dropped": float(dropped),
        }

    def state(self) -> dict[str, Any]:
        """Return what continues these counts, JSON-able."""
        return {task: list(counts) for task, counts in self._counts.items()}


def _normalize_weights(weights: tuple[tuple[str, float], ...]) -> dict[str, float]:
    total = math.fsum(weight for _, weight in weights)
    return {name: weight / total for name, weight in weights}
