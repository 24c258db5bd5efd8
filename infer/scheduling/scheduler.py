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

Limits, Plan, Part, Row, Result = (
    plan_lib.Limits,
    plan_lib.Plan,
    plan_lib.Part,
    plan_lib.Row,
    plan_lib.Result,
)
Copy, SwapOut, SwapIn, Drop = plan_lib.Copy, plan_lib.SwapOut, plan_lib.SwapIn, plan_lib.Drop
QueueFull = plan_lib.QueueFull

_PLANS_IN_FLIGHT = 2  # one that runs, and one behind it
_LOOKAHEAD_JOBS = 32  # that wait and are compared with one that begins: each costs time


@dataclasses.dataclass(frozen=True)
class Stats:
    """Now: waiting, running, pages and slots free. Since the start: the rest."""

    waiting: int
    running: int
    free_pages: int
    free_slots: int
    held_back: int
    plans: int
    cache: prefix_cache.Stats
    memory: memory.Stats


class Scheduler:
    """Turns requests into plans and reports into memory.

    Every plan returned must be given to the device, and reported, in order.

    Args:
      limits: of the device and of requests.
      key: weights version and recipe, or whatever tells apart states that must not be mixed.
    """

    def __init__(self, limits: plan_lib.Limits, key: Hashable = (0, "")):
        self.limits = limits
        self._memory = memory.Memory(limits, key)
        self._jobs: dict[Hashable, sequence.Job] = {}
        self._waiting: list[sequence.Job] = []  # both in order of age
        self._running: list[sequence.Job] = []
        self._in_flight: collections.deque[list[sequence.Work]] = collections.deque()
        self._prefill_last = False
        self._submitted = self._planned = self._held_back = 0

    def submit(
        self,
        job_id: Hashable,
        tokens: Sequence[int],
        max_tokens: int,
        *,
        cacheable: bool = True,
        single_step: bool = False,
        waits: bool = False,
        made: Sequence[int] | None = None,
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
        if job_id in self._jobs:
            raise ValueError(f"got job_id {job_id!r}, which is in use; wanted a new one")
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
        if made is None and len(self._waiting) >= self.limits.max_queue:
            raise QueueFull(
                f"got a request while {len(self._waiting)} wait; wanted fewer than "
                f"{self.limits.max_queue} (max_queue): try again later"
            )
        self._submitted += 1
        job = sequence.Job(
            job_id,
            self._submitted,
            [*tokens, *(made or ())],
            len(tokens),
            limit,
            cacheable and not self._memory.cache.off,
            single_step,
            waits,
            run=int(bool(made)),
        )
        self._jobs[job_id] = job
        self._waiting.append(job)
        for other in self._running if len(self._waiting) <= _LOOKAHEAD_JOBS else ():
            self._plan_shared_point(other, job)
            if job.cacheable and not other.decoding and self._common(other, job) == other.computed:
                other.pending = other.computed  # the next plan starts with the copy

    def cancel(self, job_id: Hashable) -> None:
        """End a request now, if it is not over; plans under way may still name it."""
        if job := self._jobs.get(job_id):
            self._end(job, None)

    def preempt(self, job_id: Hashable) -> None:
        """Take a running request's memory; it goes on when there is room again."""
        if (job := self._jobs.get(job_id)) and job.slot:
            self._preempt(job)

    def set_key(self, key: Hashable, keep_running: bool) -> None:
        """Say that plans from now on run with other weights.

        Args:
          key: the new one; nothing cached under the old one is used again.
          keep_running: requests under way go on with the state they have. Otherwise they are
            computed again from their tokens.
        """
        if key == self._memory.key:
            return
        self._memory.cache.drop(self._memory.key)
        self._memory.key = key
        for job in list(self._jobs.values()):
            if not job.slot and not job.swapped_pages:
                continue
            job.pure, job.points, job.pending = False, [], 0
            if not keep_running:
                self._restart(job)

    def set_single_step(self, job_id: Hashable, single_step: bool) -> None:
        """Change whether the host must see each token of a request before the next one is made."""
        job = self._jobs.get(job_id)
        if job:
            job.single_step = single_step

    def cached(self, job_id: Hashable) -> tuple[int, str]:
        """Return how many prompt tokens came from the cache, and if none, why; until it is over."""
        job = self._jobs[job_id]
        return job.cached_tokens, job.cached_reason

    def pages(self, job_id: Hashable) -> list[int]:
        """Return the pages that a request holds, in order; none if it was preempted."""
        return list(self._jobs[job_id].pages)

    def stats(self) -> Stats:
        return Stats(
            len(self._waiting),
            len(self._running),
            self._memory.pages.free,
            self._memory.slots.free,
            self._held_back,
            self._planned,
            self._memory.cache.stats(),
            dataclasses.replace(self._memory.stats),
        )

    def plan(self) -> plan_lib.Plan | None:
        """Decide what the device does next; None when there is nothing, or a report must come."""
        if len(self._in_flight) >= _PLANS_IN_FLIGHT:
            return None
        for job in self._running:
            self._memory.save(job)
        works: list[sequence.Work] = []
        parts, rows, steps = (), (), 0
        decode_turn = self._prefill_last and any(job.ready for job in self._running)
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
            self._prefill_last = bool(parts)
        for work in works:
            work.job.works_in_flight += 1
            work.job.steps_in_flight += work.steps
        self._in_flight.append(works)
        self._planned += 1
        return plan_lib.Plan(actions, parts, rows, steps)

    def report(self, results: Mapping[Hashable, plan_lib.Result]) -> None:
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
        found = [results.get(work.job.job_id, plan_lib.Result()) for work in works]
        for work, result in zip(works, found, strict=True):
            _check(work, result)
        self._in_flight.popleft()
        for work, result in zip(works, found, strict=True):
            job = work.job
            job.works_in_flight -= 1
            if work.run == job.run:
                job.steps_in_flight -= work.steps
            if job.over:
                continue
            job.tokens += result.new_tokens
            if work.steps and work.run == job.run:
                job.computed += result.tokens
            if result.finished or len(job.tokens) >= job.limit:
                self._end(job, result.length)

    def _end(self, job: sequence.Job, length: int | None) -> None:
        (self._running if job.slot else self._waiting).remove(job)
        self._memory.retire(job, length)
        job.over = True
        del self._jobs[job.job_id]

    def _preempt(self, job: sequence.Job) -> None:
        if self._memory.swap_out(job):
            self._running.remove(job)
            bisect.insort(self._waiting, job, key=_age)
        else:
            self._restart(job)

    def _restart(self, job: sequence.Job) -> None:
        """Make a job with memory, here or at the host, one that waits without."""
        if job.slot:
            self._running.remove(job)
            bisect.insort(self._waiting, job, key=_age)
        self._memory.restart(job)

    def _plan_prefill(self, works: list[sequence.Work]) -> tuple[plan_lib.Part, ...]:
        """Pack parts of the oldest sequences, admitting those that wait as they come up."""
        limits = self.limits
        parts: list[plan_lib.Part] = []
        left, blocked, held = limits.max_prefill_tokens, False, []
        prefilling = [job for job in self._running if not job.decoding]
        for job in heapq.merge(prefilling, list(self._waiting), key=_age):
            if len(parts) == limits.prefill_parts or not left:
                break
            if not job.slot:
                first = min(limits.chunk_tokens, self._padded(job.target))
                blocked = blocked or (left < first and not job.decoding)
                if not blocked and self._held(job):
                    held.append(job)
                elif not blocked:
                    blocked = not self._admit(job, held)
            if job.slot and not job.decoding and (part := self._part(job, left, works)):
                parts.append(part)
                left -= self._padded(part.count)
        return tuple(parts)

    def _part(
        self, job: sequence.Job, left: int, works: list[sequence.Work]
    ) -> plan_lib.Part | None:
        """Return the next part of a sequence in `left` rows: up to a snapshot, the grid, or all."""
        start = job.computed
        end = min([job.target, *job.points[:1]])
        if self._padded(end - start) > left:
            end = self._memory.grid(start + left)
        if end <= start:
            return None
        job.computed = end
        job.decoding = last = end == job.target
        if job.points and job.points[0] == end:
            job.pending = job.points.pop(0)
        resume = last and job.resumed
        pages = tuple(job.pages[: self._memory.num_pages(end)])
        works.append(sequence.Work(job, job.run, samples=last and not resume))
        return plan_lib.Part(job.job_id, job.slot, start, end - start, pages, last, resume)

    def _plan_decode(self, works: list[sequence.Work]) -> tuple[tuple[plan_lib.Row, ...], int]:
        """Advance every sequence that can be, oldest first in the claim to pages."""
        ready = [job for job in self._running if job.ready]
        if not ready:
            return (), 0
        steps = min(self.limits.decode_steps, max(_left(job) for job in ready))
        # While one waits for its report the others keep its pace, or it would fall far behind.
        if any(job.single_step and job.decoding for job in self._running):
            steps = 1
        chosen = []
        for job in ready:
            while job.slot:
                most = job.most_computed
                reach = self._memory.cover(job, most + min(steps, _left(job))) - most
                if reach > 0:
                    steps = min(steps, reach) if reach < _left(job) else steps
                    chosen.append(job)
                    break
                self._preempt(self._running[-1])
        rows = []
        for job in chosen:
            end = job.most_computed + min(steps, _left(job))
            pages = tuple(job.pages[: self._memory.num_pages(end)])
            rows.append(plan_lib.Row(job.job_id, job.slot, pages, job.limit))
            works.append(sequence.Work(job, job.run, steps=steps))
        return tuple(rows), steps

    def _admit(self, job: sequence.Job, held: Sequence[sequence.Job]) -> bool:
        """Make a job run if there is room for it, and for those older that are held back."""
        if len(self._running) + len(held) >= self.limits.max_rows:
            return False
        spare_pages = sum(self._memory.num_pages(other.target) for other in held)
        if self._running:  # one that was preempted must not be preempted again at once
            spare_pages += len(self._running) if job.run or job.swapped_pages else 1
        if job.swapped_pages:
            admitted = self._memory.swap_in(job, spare_pages, len(held))
        elif job.works_in_flight:
            return False  # preempted, and its tokens are not all known
        else:
            hit = self._memory.lookup(job)
            admitted = self._memory.admit(job, hit, spare_pages, len(held))
            if admitted:
                self._plan_points(job, hit.common)
        if admitted:
            self._waiting.remove(job)
            bisect.insort(self._running, job, key=_age)
        return admitted

    def _plan_points(self, job: sequence.Job, common: int) -> None:
        """Choose where snapshots of a job just admitted are to be taken."""
        if not job.saves:
            return
        every = self.limits.snapshot_every_tokens
        points = {self._memory.grid(job.prompt_tokens - 1), common}
        points.update(range(every, job.target, every) if every else ())
        job.points = sorted(point for point in points if job.computed < point < job.target)
        for other in self._waiting[:_LOOKAHEAD_JOBS]:
            if other is not job:
                self._plan_shared_point(job, other)

    def _plan_shared_point(self, job: sequence.Job, other: sequence.Job) -> None:
        """Add the snapshot of a prefilling job that one that waits would continue from."""
        if job.decoding or not job.saves or not other.cacheable:
            return
        point = self._common(job, other)
        if point > job.computed and point not in job.points:
            bisect.insort(job.points, point)

    def _common(self, job: sequence.Job, other: sequence.Job) -> int:
        """Return the last grid point that both share and that leaves each a token to compute."""
        if job.age not in other.common:
            chunk_tokens = self.limits.chunk_tokens
            other.common[job.age] = prefix_cache.common_tokens(
                job.tokens, other.tokens, chunk_tokens
            )
        return self._memory.grid(min(other.common[job.age], job.target - 1, other.target - 1))

    def _held(self, job: sequence.Job) -> bool:
        """Return whether an older prefill is about to take a snapshot that saves this job work.

        Older ones only: they end whatever arrives, and so does the wait.
        """
        if not job.cacheable or job.swapped_pages or job.works_in_flight:
            return False
        best = 0
        for other in self._running:
            if other.age < job.age and not other.decoding and other.saves:
                common = self._common(other, job)
                points = [*other.points, other.pending]
                best = max(best, *(point for point in points if point <= common), 0)
        held = best > 0 and best > self._memory.lookup(job).length
        self._held_back += held
        return held

    def _padded(self, tokens: int) -> int:
        return -(-tokens // self.limits.row_tokens) * self.limits.row_tokens


def _age(job: sequence.Job) -> int:
    return job.age


def _left(job: sequence.Job) -> int:
    """Return the decode steps that a job may still need."""
    return job.limit - 1 - job.most_computed


def _check(work: sequence.Work, result: plan_lib.Result) -> None:
    """Raise ValueError for a result that the plan cannot have had."""
    if work.job.over:
        return
    least, most = (1, work.steps) if work.steps else (int(work.samples),) * 2
    if not least <= result.tokens <= most or len(result.new_tokens) != result.tokens:
        raise ValueError(
            f"got {result.tokens} tokens ({len(result.new_tokens)} values) for job "
            f"{work.job.job_id!r}, wanted {least} to {most}: report what the oldest plan made, "
            "and a row that stopped by itself as finished in the plan where it did"
        )
