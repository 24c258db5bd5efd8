"""Which task comes next: sources by a schedule of weights, and tasks that still teach something.

M1 begins with reasoning tasks that rules can check, and mixes general ones in later (M1 4.3). It
keeps tasks that are solved sometimes: pass@10 strictly between 0 and 0.9 (M1 4.1).
"""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from train.data import shuffle


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """How the weights of the sources change over a run.

    Attributes:
      weights: (step, ((source, weight), ...)) points, at ascending steps from 0. A step is a batch.
        A weight is at least 0, and 0 for a source that a point does not name. Each point's weights
        are divided by their sum. Between two points a share goes from one value to the other in a
        straight line. After the last point it stays.
      seed: seed of the draws.

    Raises:
      ValueError: steps that do not ascend from 0, or weights out of range.
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
            in_range = all(math.isfinite(value) and value >= 0 for value in values)
            if not in_range or not sum(values) > 0 or len(set(names)) < len(names):
                raise ValueError(
                    f"weights from step {step}: got {weights}; wanted different sources, weights "
                    "of 0 or more and one above"
                )

    @property
    def sources(self) -> tuple[str, ...]:
        """Return all sources, in the order in which the points name them."""
        return tuple(dict.fromkeys(name for _, weights in self.weights for name, _ in weights))

    def weights_at(self, step: int) -> dict[str, float]:
        """Return each source's weight at a step. They sum up to 1."""
        # The first point after `step`. The one before it exists, as the points begin at step 0.
        next_point = bisect.bisect_right([point_step for point_step, _ in self.weights], step)
        first_step, first_weights = self.weights[next_point - 1]
        # After the last point both ends are the last point, and `share` is 0.
        last_step, last_weights = self.weights[min(next_point, len(self.weights) - 1)]
        share = (step - first_step) / (last_step - first_step) if last_step > first_step else 0.0
        low, high = _normalize_weights(first_weights), _normalize_weights(last_weights)
        return {
            name: (1 - share) * low.get(name, 0.0) + share * high.get(name, 0.0)
            for name in self.sources
        }


class TaskDraws:
    """Draws (source, index) without end. Each source has a shuffled order of its own in each epoch.

    A draw is a function of the seed, its number, the step, and how often each source was drawn
    before. So a restarted run draws the same tasks.
    """

    def __init__(
        self,
        config: CurriculumConfig,
        sizes: Mapping[str, int],
        state: dict[str, Any] | None = None,
    ):
        """Go on from `state`, or begin where it is None.

        Args:
          config: config of the schedule.
          sizes: number of tasks by source.
          state: state of earlier draws, from `TaskDraws.state`.

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
        # A source that the saved state does not know begins at its first task.
        self._num_draws_by_source: dict[str, int] = dict.fromkeys(config.sources, 0) | state.get(
            "read", {}
        )

    def draw_task(self, step: int) -> tuple[str, int]:
        """Return the source and the index of the next task, for the batch of number `step`."""
        name = self._draw_source(step)
        # A source's n-th draw is the n-th task of its shuffled epochs, one after another.
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
        # A source of weight 0 is left out, so that rounding can never choose it.
        weights = {k: w for k, w in self._config.weights_at(step).items() if w > 0}
        total = math.fsum(weights.values())
        return shuffle.choose_by_weight(weights, total, self._config.seed, self._num_draws)


@dataclasses.dataclass(frozen=True)
class PassRateConfig:
    """When a task is left out: its share of passed answers is not strictly between two bounds.

    Attributes:
      low: bound below, less than `high`. A value below 0 leaves this side open.
      high: bound above. A value above 1 leaves this side open.
      least: answers that must have been judged before a task is left out, at least 1.
      retry_batches: batches after which a task that was left out is drawn and judged anew, at least
        1, because the model has changed since.

    Raises:
      ValueError: bounds in the wrong order, or a `least` or `retry_batches` below 1.
    """

    low: float = 0.0
    high: float = 0.9
    least: int = 10
    retry_batches: int = 50

    def __post_init__(self):
        # NaN fails this comparison, too.
        if not self.low < self.high or self.least < 1:
            raise ValueError(
                f"pass rates: got {self.low} to {self.high} after {self.least}; wanted low below "
                "high, after at least 1"
            )
        if self.retry_batches < 1:
            raise ValueError(
                f"pass rates: retry_batches: got {self.retry_batches}; wanted at least 1"
            )


@dataclasses.dataclass
class _TaskCounts:
    """Answers to one task since it was last judged anew, and the batch of the latest."""

    passed: int = 0
    total: int = 0
    batch: int = 0


class PassRateTracker:
    """Counts how often each task was solved, and says which to leave out for the time being."""

    def __init__(self, config: PassRateConfig, state: dict[str, Any] | None = None):
        """Go on from `state`, which `PassRateTracker.state` returned, or begin where it is None."""
        self._config = config
        # By task id. A state of an earlier version has no batches: they count as 0.
        self._counts = {task: _TaskCounts(*counts) for task, counts in (state or {}).items()}
        self._batch = 0  # the latest that anything was asked of

    def push(self, task: str, passed: int, total: int, batch: int = 0) -> None:
        """Count a group: of `total` answers to the task with this id, `passed` were right.

        Args:
          task: id of the task.
          passed: right answers.
          total: judged answers.
          batch: number of the batch that they were sampled for. It never falls.

        Raises:
          ValueError: more answers passed than there are.
        """
        if not 0 <= passed <= total:
            raise ValueError(f"task {task!r}: got {passed} of {total} passed; wanted 0 to {total}")
        self._batch = max(self._batch, batch)
        counts = self._counts.get(task)
        if counts is None or self._is_due(counts, batch):
            # What another model did long ago says nothing of this one.
            counts = self._counts[task] = _TaskCounts()
        counts.passed += passed
        counts.total += total
        counts.batch = batch

    def should_draw(self, task: str, batch: int = 0) -> bool:
        """Return whether the task should be drawn for the batch of this number."""
        self._batch = max(self._batch, batch)
        counts = self._counts.get(task)
        return counts is None or self._is_due(counts, batch) or not self._is_left_out(counts)

    def readmit(self, tasks: Iterable[str]) -> None:
        """Forget what was counted of tasks, so that they are drawn and judged anew."""
        for task in tasks:
            self._counts.pop(task, None)

    def metrics(self) -> dict[str, float]:
        """Return the number of tasks that were sampled, and of those that are left out now."""
        dropped = sum(
            self._is_left_out(counts) and not self._is_due(counts, self._batch)
            for counts in self._counts.values()
        )
        return {
            "curriculum/tasks_seen": float(len(self._counts)),
            "curriculum/tasks_dropped": float(dropped),
        }

    def state(self) -> dict[str, Any]:
        """Return what continues these counts, JSON-able."""
        return {task: list(dataclasses.astuple(counts)) for task, counts in self._counts.items()}

    def _is_left_out(self, counts: _TaskCounts) -> bool:
        if counts.total < self._config.least:
            return False
        return not self._config.low < counts.passed / counts.total < self._config.high

    def _is_due(self, counts: _TaskCounts, batch: int) -> bool:
        """Return whether a task was left out for so long that it is to be judged anew."""
        age_batches = batch - counts.batch
        return self._is_left_out(counts) and age_batches >= self._config.retry_batches


def _normalize_weights(weights: tuple[tuple[str, float], ...]) -> dict[str, float]:
    total = math.fsum(weight for _, weight in weights)
    return {name: weight / total for name, weight in weights}
