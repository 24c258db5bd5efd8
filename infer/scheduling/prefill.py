"""The prefill programs: whose prompt is computed next, and in which partition a sequence begins.

Each partition of a program has rows of its own. Sequences take them in order of submission. One
that waits is admitted when its turn comes: in the partition that has the longest part of its prompt
in memory, or else in the one with the fewest sequences.
"""

import dataclasses
import heapq
from collections.abc import Sequence

from infer import config as config_lib
from infer.scheduling import partition as partition_lib
from infer.scheduling import plan as plan_lib
from infer.scheduling import prefix_cache, sequence, snapshots


@dataclasses.dataclass
class _PartitionRows:
    """One partition's part of a prefill program that is being planned.

    Attributes:
      partition: whose rows they are.
      rows_left: rows that no chunk has taken.
      chunks_left: chunks that may still be added.
      held_back: sequences that will be admitted here later. Their memory is left to them.
      is_blocked: whether one of them waits for rows. Nobody younger is admitted here before.
    """

    partition: partition_lib.SchedulerPartition
    rows_left: int
    chunks_left: int
    held_back: list[sequence.Sequence] = dataclasses.field(default_factory=list)
    is_blocked: bool = False

    @property
    def is_full(self) -> bool:
        return not self.rows_left or not self.chunks_left

    @property
    def num_sequences(self) -> int:
        return len(self.partition.running) + len(self.held_back)


class PrefillPlanner:
    """Packs prefill programs and admits the sequences that wait.

    Args:
      config: sizes of one partition.
      limits: sizes of the device's programs.
      partitions: where sequences may run.
      waiting: the sequences without memory, in order of submission. Admission removes from it.
      snapshot_planner: says which snapshots are worth a wait.

    Attributes:
      num_held_back: times that a sequence waited for a snapshot of an older one.
    """

    def __init__(
        self,
        config: config_lib.EngineConfig,
        limits: plan_lib.DeviceLimits,
        partitions: Sequence[partition_lib.SchedulerPartition],
        waiting: list[sequence.Sequence],
        snapshot_planner: snapshots.SnapshotPlanner,
    ):
        self._config, self._limits = config, limits
        self._partitions, self._waiting = partitions, waiting
        self._snapshots = snapshot_planner
        self.num_held_back = 0

    def plan_chunks(self, steps: list[sequence.ScheduledStep]) -> tuple[plan_lib.PrefillChunk, ...]:
        """Pack chunks of the oldest sequences, admitting those that wait as they come up.

        Args:
          steps: gets each sequence's part in the plan.
        """
        chunks: list[plan_lib.PrefillChunk] = []
        max_chunks, max_rows = self._limits.max_prefill_chunks, self._config.prefill_tokens[-1]
        parts = [_PartitionRows(p, max_rows, max_chunks) for p in self._partitions]
        # Once a sequence finds no room, no younger one is admitted: it could take the memory that
        # the older one waits for.
        is_blocked = False
        prefilling = [
            [running for running in p.running if not running.is_decoding] for p in self._partitions
        ]
        # The queue is copied, because admission removes from it.
        candidates = (*prefilling, list(self._waiting))
        for candidate in heapq.merge(*candidates, key=sequence.SUBMISSION_ORDER):
            if all(part.is_full for part in parts):
                break
            if not candidate.slot and not is_blocked:
                is_blocked = not self._admit_or_hold_back(candidate, parts)
            if candidate.slot and not candidate.is_decoding:
                part = parts[candidate.partition]
                chunk = None if part.is_full else self._next_chunk(candidate, part.rows_left, steps)
                if chunk is not None:
                    chunks.append(chunk)
                    part.rows_left -= self._config.pad_to_tile(chunk.num_tokens)
                    part.chunks_left -= 1
        return tuple(chunks)

    def _admit_or_hold_back(
        self, waiter: sequence.Sequence, parts: Sequence[_PartitionRows]
    ) -> bool:
        """Make a sequence run, or hold it back for a partition. Return whether there is room."""
        parts = [
            part
            for part in parts
            if part.num_sequences < self._config.max_rows and not part.is_blocked
        ]
        if not parts:
            return False
        if waiter.swapped_pages:
            return self._swap_in(waiter, parts)
        if waiter.plans_in_flight:
            return False  # preempted, and its tokens are not all known
        prefill_tokens = waiter.tokens[: waiter.prefill_target]
        hits = [part.partition.memory.lookup_prefix(waiter, prefill_tokens) for part in parts]
        awaited = [self._snapshots.awaited_length(waiter, p.partition.running) for p in parts]
        # A snapshot that a tree has already is no reason to wait.
        if max(awaited) > max(hit.length for hit in hits):
            parts[awaited.index(max(awaited))].held_back.append(waiter)
            self.num_held_back += 1
            return True
        # `min` and `sorted` take the first of equals, so equal calls choose equally.
        ranked = sorted(
            zip(parts, hits, strict=True),
            key=lambda pair: (
                -pair[1].length,
                self._lacks_rows(waiter, pair[0]),
                pair[0].num_sequences,
            ),
        )
        for part, hit in ranked:
            if self._lacks_rows(waiter, part):
                if not hit.length:
                    return False  # the others lack rows, too
                # It goes on from the hit in a later program.
                part.held_back.append(waiter)
                part.is_blocked = True
                return True
            if self._admit(waiter, part, hit):
                return True
        return False

    def _lacks_rows(self, waiter: sequence.Sequence, part: _PartitionRows) -> bool:
        """Return whether a partition's program has no rows for a sequence to begin with."""
        # A swapped-out sequence that decodes needs none.
        if waiter.is_decoding:
            return False
        first_rows = min(self._config.chunk_tokens, self._config.pad_to_tile(waiter.prefill_target))
        return not part.chunks_left or part.rows_left < first_rows

    def _admit(
        self, waiter: sequence.Sequence, part: _PartitionRows, hit: prefix_cache.PrefixHit
    ) -> bool:
        """Make a sequence run in a partition if there is room."""
        spare_pages = self._count_spare_pages(waiter, part)
        if not part.partition.memory.admit(waiter, hit, spare_pages, len(part.held_back)):
            return False
        self._snapshots.plan_admitted(waiter, hit.common_tokens, self._waiting)
        self._start(waiter, part)
        return True

    def _swap_in(self, waiter: sequence.Sequence, parts: Sequence[_PartitionRows]) -> bool:
        """Bring a sequence back from the host, to any partition that has room."""
        for part in sorted(parts, key=lambda part: part.num_sequences):
            spare_pages = self._count_spare_pages(waiter, part)
            if not self._lacks_rows(waiter, part) and part.partition.memory.swap_in(
                waiter, spare_pages, len(part.held_back)
            ):
                self._start(waiter, part)
                return True
        return False

    def _start(self, admitted: sequence.Sequence, part: _PartitionRows) -> None:
        self._waiting.remove(admitted)
        part.partition.add(admitted)

    def _count_spare_pages(self, waiter: sequence.Sequence, part: _PartitionRows) -> int:
        """Return the pages that a partition must keep for others when it admits `waiter`."""
        spare_pages = sum(
            self._config.count_pages(older.prefill_target) for older in part.held_back
        )
        num_running = len(part.partition.running)
        if num_running:
            # Running sequences grow. A sequence that was preempted comes back only when each of
            # them has a page to grow into, or it would be preempted again at once.
            was_preempted = waiter.restarts or waiter.swapped_pages
            spare_pages += num_running if was_preempted else 1
        return spare_pages

    def _next_chunk(
        self,
        prefilling: sequence.Sequence,
        rows_left: int,
        steps: list[sequence.ScheduledStep],
    ) -> plan_lib.PrefillChunk | None:
        """Return a sequence's next chunk, to a snapshot point, a chunk border or the end."""
        start = prefilling.computed_tokens
        end = min([prefilling.prefill_target, *prefilling.snapshot_points[:1]])
        if self._config.pad_to_tile(end - start) > rows_left:
            # A chunk that does not end the prompt must end at a chunk border: the next one
            # continues from the slot's recurrent state, which exists only there.
            end = self._config.floor_to_chunk(start + rows_left)
        if end <= start:
            return None
        prefilling.computed_tokens = end
        is_last = prefilling.is_decoding = end == prefilling.prefill_target
        if prefilling.snapshot_points and prefilling.snapshot_points[0] == end:
            prefilling.pending_snapshot = prefilling.snapshot_points.pop(0)
        is_resumed = is_last and prefilling.is_resumed
        samples_token = is_last and not is_resumed
        pages = tuple(prefilling.pages[: self._config.count_pages(end)])
        steps.append(sequence.ScheduledStep(prefilling, prefilling.restarts, 0, samples_token))
        return plan_lib.PrefillChunk(
            prefilling.sequence_id,
            prefilling.slot,
            start,
            end - start,
            pages,
            is_last,
            is_resumed,
            prefilling.partition,
        )
