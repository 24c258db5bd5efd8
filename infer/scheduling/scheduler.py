"""Continuous batching: what the device does next. Plain Python, and no clock but a counter.

Who goes first is a matter of age alone, so nothing that arrives later delays a request for ever:
decode rows before prefill, at most one prefill program between two decode dispatches, prefill and
admission in order of submission. Memory is taken as it is needed; when none is left, snapshots go,
then the youngest running request is preempted. The oldest never is.

The scheduler runs one plan ahead of what it knows: of a sequence that decodes it knows the least
and the most that may be computed once the plans under way are done, and reserves for the most.
"""

import bisect
import collections
import dataclasses
import heapq
from collections.abc import Hashable, Mapping, Sequence

from infer.scheduling import memory, prefix_cache, sequence
from infer.scheduling import plan as plan_lib

_MAX_PLANS_IN_FLIGHT = 2  # one that runs, and one behind it
_LOOKAHEAD_SEQUENCES = 32  # that wait and are compared with one that begins: each costs time


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
    """Now: waiting, running, pages and slots free. Since the start: the rest."""

    num_waiting: int
    num_running: int
    free_pages: int
    free_slots: int
    num_held_back: int
    num_plans: int
    cache: prefix_cache.PrefixCacheStats
    memory: memory.MemoryStats


class Scheduler:
    """Turns requests into plans and reports into memory.

    Every plan returned must be given to the device, and reported, in order.

    Args:
      limits: of the device and of requests.
      key: weights version and recipe, or whatever tells apart states that must not be mixed.
    """

    def __init__(self, limits: plan_lib.SchedulerLimits, key: Hashable = (0, "")):
        self.limits = limits
        self._memory = memory.MemoryManager(limits, key)
        self._sequences: dict[Hashable, sequence.Sequence] = {}
        self._waiting: list[sequence.Sequence] = []  # both in order of age
        self._running: list[sequence.Sequence] = []
        self._in_flight: collections.deque[list[sequence.ScheduledStep]] = collections.deque()
        self._last_was_prefill = False
        self._num_submitted = self._num_planned = self._num_held_back = 0

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
          job_id: not in use. tokens: the prompt, at least one. max_tokens: longest output.
          made: its output so far, of a request that was suspended and is as one that was
            preempted; such a request is taken into a full queue, too.
          cacheable: whether it may read and write the prefix cache.
          single_step: whether the host must see each token before the next one is made.
          waits: whether it must see the tokens of each dispatch before the next one.

        Raises:
          ValueError: it is empty, longer than max_length or what all pages could hold, or the id
            is in use.
          QueueFull: max_queue requests wait already.
        """
        limit = len(tokens) + max_tokens
        if sequence_id in self._sequences:
            raise ValueError(f"got sequence_id {sequence_id!r}, which is in use; wanted a new one")
        if not len(tokens) or max_tokens < 1:
            raise ValueError(
                f"got {len(tokens)} prompt tokens and max_tokens {max_tokens}; wanted 1 of each "
                "at least: send a prompt, raise max_tokens"
            )
        held = self.limits.num_pages * self.limits.chunk_tokens + 1  # the last is never computed
        most = min(self.limits.max_length, held)
        if limit > most:
            name = "max_length" if most == self.limits.max_length else "num_pages"
            raise ValueError(
                f"got {len(tokens)} prompt tokens and max_tokens {max_tokens}, {limit} together; "
                f"wanted {most} at most ({name}): shorten the prompt or lower max_tokens"
            )
        if prior_tokens is None and len(self._waiting) >= self.limits.max_queue:
            raise plan_lib.QueueFull(
                f"got a request while {len(self._waiting)} wait; wanted fewer than "
                f"{self.limits.max_queue} (max_queue): try again later"
            )
        self._num_submitted += 1
        job = sequence.Sequence(
            sequence_id,
            self._num_submitted,
            [*tokens, *(prior_tokens or ())],
            len(tokens),
            limit,
            is_cacheable and not self._memory.cache.is_off,
            single_step,
            waits_for_reports,
            restarts=int(bool(prior_tokens)),
        )
        self._sequences[sequence_id] = job
        self._waiting.append(job)
        for other in self._running if len(self._waiting) <= _LOOKAHEAD_SEQUENCES else ():
            self._plan_shared_snapshot(other, job)
            if (
                job.is_cacheable
                and not other.is_decoding
                and self._shared_grid_point(other, job) == other.computed_tokens
            ):
                other.pending_snapshot = other.computed_tokens  # the next plan starts with the copy

    def cancel(self, sequence_id: Hashable) -> None:
        """End a request now, if it is not over; plans under way may still name it."""
        if job := self._sequences.get(sequence_id):
            self._end_sequence(job, None)

    def preempt(self, sequence_id: Hashable) -> None:
        """Take a running request's memory; it goes on when there is room again."""
        if (job := self._sequences.get(sequence_id)) and job.slot:
            self._preempt(job)

    def set_cache_key(self, key: Hashable, keep_running: bool) -> None:
        """Say that plans from now on run with other weights.

        Args:
          key: the new one; nothing cached under the old one is used again.
          keep_running: requests under way go on with the state they have. Otherwise they are
            computed again from their tokens.
        """
        if key == self._memory.key:
            return
        self._memory.cache.drop_key(self._memory.key)
        self._memory.key = key
        for job in list(self._sequences.values()):
            if not job.slot and not job.swapped_pages:
                continue
            job.single_version, job.snapshot_points, job.pending_snapshot = False, [], 0
            if not keep_running:
                self._restart(job)

    def set_single_step(self, sequence_id: Hashable, single_step: bool) -> None:
        """Change whether the host must see each token of a request before the next one is made."""
        job = self._sequences.get(sequence_id)
        if job:
            job.single_step = single_step

    def cached_prompt(self, sequence_id: Hashable) -> tuple[int, str]:
        """Return how many prompt tokens came from the cache, and if none, why; until it is over."""
        job = self._sequences[sequence_id]
        return job.cached_tokens, job.cached_reason

    def sequence_pages(self, sequence_id: Hashable) -> list[int]:
        """Return the pages that a request holds, in order; none if it was preempted."""
        return list(self._sequences[sequence_id].pages)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            len(self._waiting),
            len(self._running),
            self._memory.pages.num_free,
            self._memory.slots.num_free,
            self._num_held_back,
            self._num_planned,
            self._memory.cache.stats(),
            dataclasses.replace(self._memory.stats),
        )

    def plan(self) -> plan_lib.StepPlan | None:
        """Decide what the device does next; None when there is nothing, or a report must come."""
        if len(self._in_flight) >= _MAX_PLANS_IN_FLIGHT:
            return None
        for job in self._running:
            self._memory.save_snapshot(job)
        works: list[sequence.ScheduledStep] = []
        parts, rows, steps = (), (), 0
        decode_turn = self._last_was_prefill and any(job.can_decode for job in self._running)
        if not decode_turn:
            parts = self._plan_prefill(works)
        if not parts:
            rows, steps = self._plan_decode(works)
        if decode_turn and not rows:  # preemption took them all
            parts = self._plan_prefill(works)
        actions = tuple(self._memory.actions)
        if not works and not actions:
            return None
        self._memory.actions.clear()
        if works:
            self._last_was_prefill = bool(parts)
        for work in works:
            work.sequence.plans_in_flight += 1
            work.sequence.steps_in_flight += work.decode_steps
        self._in_flight.append(works)
        self._num_planned += 1
        return plan_lib.StepPlan(actions, parts, rows, steps)

    def report(self, results: Mapping[Hashable, plan_lib.StepResult]) -> None:
        """Take the results of the oldest plan not yet reported.

        Args:
          results: by job; a job that made no token and goes on may be left out, one that is over
            is ignored.

        Raises:
          RuntimeError: no plan is under way.
          ValueError: a result is not what the plan asked for.
        """
        if not self._in_flight:
            raise RuntimeError("got a report, wanted a plan first: each plan is reported once")
        works = self._in_flight[0]
        found = [results.get(work.sequence.sequence_id, plan_lib.StepResult()) for work in works]
        for work, result in zip(works, found, strict=True):
            _check_result(work, result)
        self._in_flight.popleft()
        for work, result in zip(works, found, strict=True):
            job = work.sequence
            job.plans_in_flight -= 1
            if work.restarts == job.restarts:
                job.steps_in_flight -= work.decode_steps
            if job.is_over:
                continue
            job.tokens += result.new_tokens
            if work.decode_steps and work.restarts == job.restarts:
                job.computed_tokens += result.num_tokens
            if result.is_finished or len(job.tokens) >= job.length_limit:
                self._end_sequence(job, result.final_length)

    def _end_sequence(self, job: sequence.Sequence, length: int | None) -> None:
        (self._running if job.slot else self._waiting).remove(job)
        self._memory.retire(job, length)
        job.is_over = True
        del self._sequences[job.sequence_id]

    def _preempt(self, job: sequence.Sequence) -> None:
        if self._memory.swap_out(job):
            self._running.remove(job)
            bisect.insort(self._waiting, job, key=_sequence_age)
        else:
            self._restart(job)

    def _restart(self, job: sequence.Sequence) -> None:
        """Make a job with memory, here or at the host, one that waits without."""
        if job.slot:
            self._running.remove(job)
            bisect.insort(self._waiting, job, key=_sequence_age)
        self._memory.restart(job)

    def _plan_prefill(
        self, works: list[sequence.ScheduledStep]
    ) -> tuple[plan_lib.PrefillChunk, ...]:
        """Pack parts of the oldest sequences, admitting those that wait as they come up."""
        limits = self.limits
        parts: list[plan_lib.PrefillChunk] = []
        left, blocked, held = limits.max_prefill_tokens, False, []
        prefilling = [job for job in self._running if not job.is_decoding]
        for job in heapq.merge(prefilling, list(self._waiting), key=_sequence_age):
            if len(parts) == limits.max_prefill_chunks or not left:
                break
            if not job.slot:
                first = min(limits.chunk_tokens, self._pad_to_tile(job.prefill_target))
                blocked = blocked or (left < first and not job.is_decoding)
                if not blocked and self._is_held_back(job):
                    held.append(job)
                elif not blocked:
                    blocked = not self._admit(job, held)
            if job.slot and not job.is_decoding and (part := self._next_chunk(job, left, works)):
                parts.append(part)
                left -= self._pad_to_tile(part.num_tokens)
        return tuple(parts)

    def _next_chunk(
        self, job: sequence.Sequence, left: int, works: list[sequence.ScheduledStep]
    ) -> plan_lib.PrefillChunk | None:
        """Return the next part of a sequence in `left` rows: up to a snapshot, the grid, or all."""
        start = job.computed_tokens
        end = min([job.prefill_target, *job.snapshot_points[:1]])
        if self._pad_to_tile(end - start) > left:
            end = self._memory.floor_to_chunk(start + left)
        if end <= start:
            return None
        job.computed_tokens = end
        job.is_decoding = last = end == job.prefill_target
        if job.snapshot_points and job.snapshot_points[0] == end:
            job.pending_snapshot = job.snapshot_points.pop(0)
        resume = last and job.is_resumed
        pages = tuple(job.pages[: self._memory.count_pages(end)])
        works.append(sequence.ScheduledStep(job, job.restarts, samples_token=last and not resume))
        return plan_lib.PrefillChunk(
            job.sequence_id, job.slot, start, end - start, pages, last, resume
        )

    def _plan_decode(
        self, works: list[sequence.ScheduledStep]
    ) -> tuple[tuple[plan_lib.DecodeRow, ...], int]:
        """Advance every sequence that can be, oldest first in the claim to pages."""
        ready = [job for job in self._running if job.can_decode]
        if not ready:
            return (), 0
        steps = min(self.limits.decode_steps, max(_remaining_steps(job) for job in ready))
        # While one waits for its report the others keep its pace, or it would fall far behind.
        if any(job.single_step and job.is_decoding for job in self._running):
            steps = 1
        chosen = []
        for job in ready:
            while job.slot:
                most = job.max_computed_tokens
                reach = (
                    self._memory.extend_pages(job, most + min(steps, _remaining_steps(job))) - most
                )
                if reach > 0:
                    steps = min(steps, reach) if reach < _remaining_steps(job) else steps
                    chosen.append(job)
                    break
                self._preempt(self._running[-1])
        rows = []
        for job in chosen:
            end = job.max_computed_tokens + min(steps, _remaining_steps(job))
            pages = tuple(job.pages[: self._memory.count_pages(end)])
            rows.append(plan_lib.DecodeRow(job.sequence_id, job.slot, pages, job.length_limit))
            works.append(sequence.ScheduledStep(job, job.restarts, decode_steps=steps))
        return tuple(rows), steps

    def _admit(self, job: sequence.Sequence, held: Sequence[sequence.Sequence]) -> bool:
        """Make a job run if there is room for it, and for those older that are held back."""
        if len(self._running) + len(held) >= self.limits.max_rows:
            return False
        spare_pages = sum(self._memory.count_pages(other.prefill_target) for other in held)
        if self._running:  # one that was preempted must not be preempted again at once
            spare_pages += len(self._running) if job.restarts or job.swapped_pages else 1
        if job.swapped_pages:
            admitted = self._memory.swap_in(job, spare_pages, len(held))
        elif job.plans_in_flight:
            return False  # preempted, and its tokens are not all known
        else:
            hit = self._memory.lookup_prefix(job)
            admitted = self._memory.admit(job, hit, spare_pages, len(held))
            if admitted:
                self._plan_snapshots(job, hit.common_tokens)
        if admitted:
            self._waiting.remove(job)
            bisect.insort(self._running, job, key=_sequence_age)
        return admitted

    def _plan_snapshots(self, job: sequence.Sequence, common: int) -> None:
        """Choose where snapshots of a job just admitted are to be taken."""
        if not job.can_snapshot:
            return
        every = self.limits.snapshot_every_tokens
        points = {self._memory.floor_to_chunk(job.prompt_tokens - 1), common}
        points.update(range(every, job.prefill_target, every) if every else ())
        job.snapshot_points = sorted(
            point for point in points if job.computed_tokens < point < job.prefill_target
        )
        for other in self._waiting[:_LOOKAHEAD_SEQUENCES]:
            if other is not job:
                self._plan_shared_snapshot(job, other)

    def _plan_shared_snapshot(self, job: sequence.Sequence, other: sequence.Sequence) -> None:
        """Add the snapshot of a prefilling job that one that waits would continue from."""
        if job.is_decoding or not job.can_snapshot or not other.is_cacheable:
            return
        point = self._shared_grid_point(job, other)
        if point > job.computed_tokens and point not in job.snapshot_points:
            bisect.insort(job.snapshot_points, point)

    def _shared_grid_point(self, job: sequence.Sequence, other: sequence.Sequence) -> int:
        """Return the last grid point that both share and that leaves each a token to compute."""
        if job.age not in other.shared_prefix_tokens:
            chunk_tokens = self.limits.chunk_tokens
            other.shared_prefix_tokens[job.age] = prefix_cache.count_common_tokens(
                job.tokens, other.tokens, chunk_tokens
            )
        return self._memory.floor_to_chunk(
            min(
                other.shared_prefix_tokens[job.age],
                job.prefill_target - 1,
                other.prefill_target - 1,
            )
        )

    def _is_held_back(self, job: sequence.Sequence) -> bool:
        """Return whether an older prefill is about to take a snapshot that saves this job work.

        Older ones only: they end whatever arrives, and so does the wait.
        """
        if not job.is_cacheable or job.swapped_pages or job.plans_in_flight:
            return False
        best = 0
        for other in self._running:
            if other.age < job.age and not other.is_decoding and other.can_snapshot:
                common = self._shared_grid_point(other, job)
                points = [*other.snapshot_points, other.pending_snapshot]
                best = max(best, *(point for point in points if point <= common), 0)
        held = best > 0 and best > self._memory.lookup_prefix(job).length
        self._num_held_back += held
        return held

    def _pad_to_tile(self, tokens: int) -> int:
        return -(-tokens // self.limits.attention_tile) * self.limits.attention_tile


def _sequence_age(job: sequence.Sequence) -> int:
    return job.age


def _remaining_steps(job: sequence.Sequence) -> int:
    """Return the decode steps that a job may still need."""
    return job.length_limit - 1 - job.max_computed_tokens


def _check_result(work: sequence.ScheduledStep, result: plan_lib.StepResult) -> None:
    """Raise ValueError for a result that the plan cannot have had."""
    if work.sequence.is_over:
        return
    least, most = (1, work.decode_steps) if work.decode_steps else (int(work.samples_token),) * 2
    if not least <= result.num_tokens <= most or len(result.new_tokens) != result.num_tokens:
        raise ValueError(
            f"got {result.num_tokens} tokens ({len(result.new_tokens)} values) for job "
            f"{work.sequence.sequence_id!r}, wanted {least} to {most}: report what the oldest plan made, "
            "and a row that stopped by itself as finished in the plan where it did"
        )
