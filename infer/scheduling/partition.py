"""A partition: the slots and pages of one group of devices, and the sequences that run there.

The engine's rows, slots and pages are split over groups of devices. All of a sequence's memory lies
in one partition, so that one group computes the sequence by itself. Without a mesh there is one
partition.
"""

import bisect
from collections.abc import Hashable

from infer import config as config_lib
from infer.scheduling import memory, sequence
from infer.scheduling import plan as plan_lib


class SchedulerPartition:
    """Memory and running sequences of one group of devices.

    Args:
      index: the number of the partition.
      config, limits, key, shared: as in `memory.MemoryManager`.

    Attributes:
      index: the number of the partition.
      memory: its pools and its prefix cache.
      running: sequences with a slot here, in order of submission.
    """

    def __init__(
        self,
        index: int,
        config: config_lib.EngineConfig,
        limits: plan_lib.DeviceLimits,
        key: Hashable,
        shared: memory.SharedMemory,
    ):
        self.index = index
        self.memory = memory.MemoryManager(config, limits, key, shared, index)
        self.running: list[sequence.Sequence] = []

    def add(self, admitted: sequence.Sequence) -> None:
        """Note a sequence that has got a slot here."""
        admitted.partition = self.index
        bisect.insort(self.running, admitted, key=sequence.SUBMISSION_ORDER)
