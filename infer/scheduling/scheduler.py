"""Continuous batching: what the device does next. Plain Python, and no clock but a counter.

Requests go in order of submission, so nothing that arrives later delays a request for ever:
decode rows before prefill, at most one prefill program between two decode dispatches, prefill and
admission in order of submission. Memory is taken as it is needed. When a partition has none left,
its snapshots go, then its youngest running request is preempted. Its oldest never is.

The scheduler runs one plan ahead of what it knows. While the device runs a plan, the tokens of a
decoding sequence are known only between two bounds: those reported, and those that the plans under
way may add. Pages are reserved for the upper bound. Results are applied by the lower one.
"""

import bisect
import collections
import heapq
from collections.abc import Hashable, Iterable, Mapping, Sequence

from infer import config as config_lib
from infer.scheduling import memory, partition, prefill, sequence, snapshots
from infer.scheduling import plan as plan_lib
from infer.scheduling import stats as stats_lib

_MAX_PLANS_IN_FLIGHT = 2  # one that runs, and one behind it


class Scheduler:
    """Turns requests into plans and reports into memory.

    Every plan returned must be given to the device, and reported, in order.

    Args:
      config: sizes of the engine, of all partitions together.
      limits: the partitions, and the sizes of their pools and programs.
      key: weights version and recipe, or whatever tells apart states that must not be mixed.
    """

    def __init__(
        self,
        config: config_lib.EngineConfig,
        limits: plan_lib.DeviceLimits,
        key: Hashable = (0, ""),
    ):
        self._config, self._limits = config.split(limits.num_partitions), limits
        self._shared = memory.SharedMemory()
        self._partitions = [
            partition.SchedulerPartition(index, self._config, limits, key, self._shared)
            for index in range(limits.num_partitions)
        ]
        self._key = key
        self._snapshots = snapshots.SnapshotPlanner(self._config)
        self._sequences: dict[Hashable, sequence.Sequence] = {}
        # In order of submission. A sequence waits here, or runs in a partition.
        self._waiting: list[sequence.Sequence] = []
        self._prefill = prefill.PrefillPlanner(
            self._config, limits, self._partitions, self._waiting, self._snapshots
        )
        # Plans not reported, oldest first, each by its sequences' parts in it.
        self._in_flight: collections.deque[list[sequence.ScheduledStep]] = collections.deque()
        self._last_was_prefill = False
        self._num_submitted = self._num_planned = 0

    def submit(
        self,
        sequence_id: Hashable,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        is_cacheable: bool = True,
        single_step: bool = False,
        waits_for_reports: bool = False,
        prior_tokens: Sequence[int] | None = None,
    ) -> None:
        """Queue a request.

        Args:
          sequence_id: not in use.
          tokens: the prompt, at least one token.
          max_tokens: longest output.
          is_cacheable: whether it may read and write the prefix cache.
          single_step: whether the host must see each token before the next one is made.
          waits_for_reports: whether it must see the tokens of each dispatch before the next one.
          prior_tokens: its output so far, of a request that was suspended. It goes on as a
            preempted one does, and is taken into a full queue, too.

        Raises:
          ValueError: it is empty, longer than max_length or what a partition's pages could hold,
            or the id is in use.
          QueueFull: max_queue requests wait already.
        """
        if sequence_id in self._sequences:
            raise ValueError(f"got sequence_id {sequence_id!r}, which is in use; wanted a new one")
        plan_lib.check_length(self._config, self._limits.num_pages, len(tokens), max_tokens)
        if prior_tokens is None:
            self.check_queue()
        self._num_submitted += 1
        submitted = sequence.Sequence(
            sequence_id,
            self._num_submitted,
            [*tokens, *(prior_tokens or ())],
            len(tokens),
            len(tokens) + max_tokens,
            is_cacheable and bool(self._limits.cache_bytes),
            single_step,
            waits_for_reports,
            # A request with output has begun before: it counts as preempted, not as new.
            restarts=int(bool(prior_tokens)),
        )
        self._sequences[sequence_id] = submitted
        # It was submitted last, so the end of the queue keeps the order.
        self._waiting.append(submitted)
        if len(self._waiting) <= snapshots.LOOKAHEAD_SEQUENCES:
            self._snapshots.plan_submitted(submitted, self._iterate_running())

    def check_queue(self) -> None:
        """Raise QueueFull if max_queue requests wait already."""
        if len(self._waiting) >= self._config.max_queue:
            raise plan_lib.QueueFull(
                f"got a request while {len(self._waiting)} wait; wanted fewer than "
                f"{self._config.max_queue} (max_queue): try again later"
            )

    def cancel(self, sequence_id: Hashable) -> None:
        """End a request now, if it is not over. Plans under way may still name it."""
        if cancelled := self._sequences.get(sequence_id):
            self._end_sequence(cancelled, None)

    def preempt(self, sequence_id: Hashable) -> None:
        """Take a running request's memory. It goes on when there is room again."""
        if (running := self._sequences.get(sequence_id)) and running.slot:
            self._preempt(running)

    def set_cache_key(self, key: Hashable, keep_running: bool) -> None:
        """Say that plans from now on run with other weights.

        Args:
          key: the new one. Nothing cached under the old one is used again.
          keep_running: requests under way go on with the state they have. Otherwise they are
            computed again from their tokens.
        """
        if key == self._key:
            return
        for part in self._partitions:
            part.memory.cache.drop_key(self._key)
            part.memory.key = key
        self._key = key
        for holder in list(self._sequences.values()):
            if not holder.slot and not holder.swapped_pages:
                continue
            # Its state is of the old weights, or will be of both: never a snapshot of the new key.
            holder.single_version = False
            holder.snapshot_points, holder.pending_snapshot = [], 0
            if not keep_running:
                self._restart(holder)

    def set_single_step(self, sequence_id: Hashable, single_step: bool) -> None:
        """Change whether the host must see each token of a request before the next one is made."""
        if changed := self._sequences.get(sequence_id):
            changed.single_step = single_step

    def cached_prompt(self, sequence_id: Hashable) -> tuple[int, str]:
        """Return how many prompt tokens came from the cache, and why if none did."""
        queried = self._sequences[sequence_id]
        return queried.cached_tokens, queried.cache_miss_reason

    def sequence_pages(self, sequence_id: Hashable) -> list[int]:
        """Return the pages that a request holds, in order. A preempted one holds none."""
        return list(self._sequences[sequence_id].pages)

    def stats(self) -> stats_lib.SchedulerStats:
        """Return sizes and counts of all partitions together, as a copy."""
        memories = [part.memory for part in self._partitions]
        return stats_lib.SchedulerStats(
            len(self._waiting),
            sum(len(part.running) for part in self._partitions),
            sum(memory.pages.num_free for memory in memories),
            sum(memory.slots.num_free for memory in memories),
            self._prefill.num_held_back,
            self._num_planned,
            stats_lib.sum_cache_stats([memory.cache.stats() for memory in memories]),
            stats_lib.sum_memory_stats([memory.stats for memory in memories]),
        )

    def plan(self) -> plan_lib.StepPlan | None:
        """Decide what the device does next. None if nothing, or if a report must come first."""
        if len(self._in_flight) >= _MAX_PLANS_IN_FLIGHT:
            return None
        # Snapshots that the plan before reached. They are copied first, before this plan's program
        # moves the states on.
        for part in self._partitions:
            for running in part.running:
                part.memory.save_snapshot(running)
        steps: list[sequence.ScheduledStep] = []
        chunks, rows, max_steps = (), (), 0
        # Prefill goes first, but never twice in a row while a sequence can decode: one dispatch of
        # decoding comes between, so that long prompts do not stop outputs under way.
        decode_turn = self._last_was_prefill and any(s.can_decode for s in self._iterate_running())
        if not decode_turn:
            chunks = self._prefill.plan_chunks(steps)
        if not chunks:
            rows, max_steps = self._plan_decode(steps)
        if decode_turn and not rows:
            # Every sequence that could decode was preempted for pages.
            chunks = self._prefill.plan_chunks(steps)
        actions = tuple(self._shared.actions)
        if not steps and not actions:
            return None
        self._shared.actions.clear()
        if steps:
            self._last_was_prefill = bool(chunks)
        for step in steps:
            step.sequence.plans_in_flight += 1
            step.sequence.steps_in_flight += step.decode_steps
        self._in_flight.append(steps)
        self._num_planned += 1
        return plan_lib.StepPlan(actions, chunks, rows, max_steps)

    def report(self, results: Mapping[Hashable, plan_lib.StepResult]) -> None:
        """Take the results of the oldest plan not yet reported.

        Args:
          results: results by sequence id. A sequence that made no token and goes on may be left
            out. One that is over is ignored.

        Raises:
          RuntimeError: no plan is under way.
          ValueError: a result is not what the plan asked for. Nothing has changed then.
        """
        if not self._in_flight:
            raise RuntimeError("got a report, wanted a plan first: each plan is reported once")
        steps = self._in_flight[0]
        by_step = [results.get(step.sequence.sequence_id, plan_lib.StepResult()) for step in steps]
        for step, result in zip(steps, by_step, strict=True):
            step.check_result(result)
        self._in_flight.popleft()
        for step, result in zip(steps, by_step, strict=True):
            reported = step.sequence
            # A restart since this plan was made has reset the counts of steps and of the state.
            # The tokens count all the same: they were sampled.
            same_life = step.restarts == reported.restarts
            reported.plans_in_flight -= 1
            if same_life:
                reported.steps_in_flight -= step.decode_steps
            if reported.is_over:
                continue
            reported.tokens += result.new_tokens
            if step.decode_steps and same_life:
                reported.computed_tokens += result.num_tokens
            if result.is_finished or len(reported.tokens) >= reported.length_limit:
                self._end_sequence(reported, result.final_length)

    def _iterate_running(self) -> Iterable[sequence.Sequence]:
        """Yield the sequences that run in any partition, oldest first."""
        return heapq.merge(
            *(part.running for part in self._partitions), key=sequence.SUBMISSION_ORDER
        )

    def _end_sequence(self, ended: sequence.Sequence, final_length: int | None) -> None:
        part = self._partitions[ended.partition]
        (part.running if ended.slot else self._waiting).remove(ended)
        part.memory.retire(ended, final_length)
        ended.is_over = True
        del self._sequences[ended.sequence_id]

    def _preempt(self, running: sequence.Sequence) -> None:
        """Take a running sequence's memory: to the host if it is long, otherwise for good."""
        part = self._partitions[running.partition]
        if part.memory.swap_out(running):
            part.running.remove(running)
            bisect.insort(self._waiting, running, key=sequence.SUBMISSION_ORDER)
        else:
            self._restart(running)

    def _restart(self, holder: sequence.Sequence) -> None:
        """Make a sequence with memory, here or at the host, one that waits without."""
        part = self._partitions[holder.partition]
        if holder.slot:
            part.running.remove(holder)
            bisect.insort(self._waiting, holder, key=sequence.SUBMISSION_ORDER)
        part.memory.restart(holder)

    def _plan_decode(
        self, steps: list[sequence.ScheduledStep]
    ) -> tuple[tuple[plan_lib.DecodeRow, ...], int]:
        """Advance every sequence that can be, oldest first in the claim to pages."""
        decodable = [running for running in self._iterate_running() if running.can_decode]
        if not decodable:
            return (), 0
        max_steps = min(self._config.decode_steps, max(s.remaining_steps for s in decodable))
        # While one waits for its report the others keep its pace, or it would fall far behind.
        if any(running.single_step and running.is_decoding for running in self._iterate_running()):
            max_steps = 1
        chosen = []
        for decoding in decodable:
            part = self._partitions[decoding.partition]
            # The slot is lost if this sequence is the youngest and preempted itself.
            while decoding.slot:
                length = decoding.max_computed_tokens
                wanted_steps = min(max_steps, decoding.remaining_steps)
                reach = part.memory.extend_pages(decoding, length + wanted_steps) - length
                if reach > 0:
                    # All rows of a program make the same number of steps. One that ends earlier
                    # by its own limit does not hold the others back.
                    if reach < decoding.remaining_steps:
                        max_steps = min(max_steps, reach)
                    chosen.append(decoding)
                    break
                self._preempt(part.running[-1])
        rows = []
        # Only now is `max_steps` known, and with it how many pages each row may write.
        for decoding in chosen:
            end = decoding.max_computed_tokens + min(max_steps, decoding.remaining_steps)
            pages = tuple(decoding.pages[: self._config.count_pages(end)])
            rows.append(
                plan_lib.DecodeRow(
                    decoding.sequence_id,
                    decoding.slot,
                    pages,
                    decoding.length_limit,
                    decoding.partition,
                )
            )
            steps.append(
                sequence.ScheduledStep(decoding, decoding.restarts, decode_steps=max_steps)
            )
        return tuple(rows), max_steps
