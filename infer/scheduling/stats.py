"""What scheduler, memory and prefix cache count. Nothing decides by these numbers."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass
class PrefixCacheStats:
    """Sizes now, and counts since the start.

    Attributes:
      num_nodes: snapshots now.
      num_pages: pages that they hold now.
      num_slots: state slots that they hold now.
      num_bytes: bytes of both now.
      hits: matches that found a snapshot.
      misses: matches that found none.
      hit_tokens: tokens of all hits, which were not computed.
      inserted: snapshots added.
      evicted: snapshots removed, for whatever reason.
      miss_reasons: misses by reason.
    """

    num_nodes: int = 0
    num_pages: int = 0
    num_slots: int = 0
    num_bytes: int = 0
    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    inserted: int = 0
    evicted: int = 0
    miss_reasons: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class MemoryStats:
    """Counts since the start.

    Attributes:
      swapped_out: sequences copied to host memory.
      swapped_in: sequences copied back.
      restarted: sequences that lost all that was computed, to be computed again.
      snapshots_copied: snapshots taken by a copy of a running sequence's state.
      snapshots_moved: sequences whose slot became a snapshot at their end, without a copy.
      snapshots_skipped: snapshots not taken, because only dearer ones could have made room.
      slots_taken_over: prefix hits whose slot moved to the request, without a copy.
    """

    swapped_out: int = 0
    swapped_in: int = 0
    restarted: int = 0
    snapshots_copied: int = 0
    snapshots_moved: int = 0
    snapshots_skipped: int = 0
    slots_taken_over: int = 0


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
    """Sizes now, and counts since the start.

    Attributes:
      num_waiting: requests without memory on the device now.
      num_running: requests with a slot now.
      free_pages: free pages now.
      free_slots: free state slots now.
      num_held_back: times that a request waited for a snapshot of an older one.
      num_plans: plans made.
      cache: sizes and counts of the prefix cache.
      memory: counts of admission, preemption and snapshots.
    """

    num_waiting: int
    num_running: int
    free_pages: int
    free_slots: int
    num_held_back: int
    num_plans: int
    cache: PrefixCacheStats
    memory: MemoryStats


def sum_cache_stats(partitions: Sequence[PrefixCacheStats]) -> PrefixCacheStats:
    """Return the sums over partitions."""
    sums = _sum_fields(partitions)
    reasons: dict[str, int] = {}
    for partition in partitions:
        for reason, count in partition.miss_reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return PrefixCacheStats(**sums, miss_reasons=reasons)


def sum_memory_stats(partitions: Sequence[MemoryStats]) -> MemoryStats:
    """Return the sums over partitions."""
    return MemoryStats(**_sum_fields(partitions))


def _sum_fields(partitions: Sequence[PrefixCacheStats] | Sequence[MemoryStats]) -> dict[str, int]:
    """Return the sums of the fields that are numbers, by name."""
    return {
        field.name: sum(getattr(partition, field.name) for partition in partitions)
        for field in dataclasses.fields(partitions[0])
        if field.name != "miss_reasons"
    }
