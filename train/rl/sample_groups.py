"""The samples of one task, and the groups of one generation batch."""

import dataclasses
from typing import Any

import numpy as np

from train.rl import sample as sample_lib

_NO_VERSION = np.iinfo(np.int32).max  # later than any version


@dataclasses.dataclass
class SampleGroup:
    """All samples of one task.

    Attributes:
      group_id: counts the groups of a run from 0, in the order in which they were begun.
      source: name of the task's source.
      task_index: index of the task in its source.
      window_tokens: the most tokens that an answer may have.
      task: what is sampled.
      samples: one entry a sample, None while the sample is unfinished.
      partial: one entry a sample, what an unfinished sample has generated so far, None before its
        first tokens and after its end.
      rewards: rewards of the valid samples, before penalties for their length. Empty until scored.
    """

    group_id: int
    source: str
    task_index: int
    window_tokens: int
    task: sample_lib.Task
    samples: list[sample_lib.Sample | None]
    partial: list[sample_lib.Generation | None]
    rewards: list[float] = dataclasses.field(default_factory=list)

    @property
    def oldest_version(self) -> int | None:
        """Return the oldest version of the weights that generated a token, None before any."""
        oldest = [
            # -1 marks what a tool wrote.
            np.min(answer.versions, where=answer.versions >= 0, initial=_NO_VERSION)
            for answer in (*self.samples, *self.partial)
            if answer is not None
        ]
        version = int(min(oldest, default=_NO_VERSION))
        return None if version == _NO_VERSION else version


@dataclasses.dataclass(frozen=True)
class GenerationBatch:
    """What the trainer gets.

    Attributes:
      groups: groups to train on.
      metrics: how the groups were sampled, by name.
      mean_reward: mean reward of all sampled groups, before penalties. NaN without a valid sample.
      events: what happened while the batch was made, for the log of process 0, which alone has it.
    """

    groups: list[SampleGroup]
    metrics: dict[str, float]
    mean_reward: float
    events: tuple[dict[str, Any], ...] = ()


def finished_samples(group: SampleGroup) -> list[sample_lib.Sample]:
    """Return the samples of a group that are finished."""
    return [sample for sample in group.samples if sample is not None]
