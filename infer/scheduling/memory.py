"""What a job holds of the device, and how it comes and goes: admission, growth, snapshots, swaps.

Who is admitted or preempted is the scheduler's choice; here is only what that takes. Each step
takes and frees ids at once and notes what the device must do in `actions`, in that order: the
device runs in order, too, so an id is never used by two at the same time.
"""

import dataclasses
from collections.abc import Hashable

from infer.scheduling import plan as plan_lib
from infer.scheduling import prefix_cache, sequence


@dataclasses.dataclass
class MemoryStats:
    """Counts since the start. taken_over: hits whose slot moved to the request without a copy.

    kept: sequences that became snapshots at their end. skipped: snapshots for which was no slot.
    """

    swapped_out: int = 0
    swapped_in: int = 0
    restarted: int = 0
    snapshots_copied: int = 0
    snapshots_moved: int = 0
    snapshots_skipped: int = 0
    slots_taken_over: int = 0


class MemoryManager:
    """Pools, prefix cache and host budget of one device."""

    def __init__(self, limits: plan_lib.SchedulerLimits, key: Hashable):
        self._limits = limits
        self.key = key
        self.pages = prefix_cache.IdPool(limits.num_pages)
        self.slots = prefix_cache.IdPool(limits.num_slots)
        self.cache = prefix_cache.PrefixCache(
            self.pages,
            self.slots,
            chunk_tokens=limits.chunk_tokens,
            page_bytes=limits.page_bytes,
            state_bytes=limits.state_bytes,
            max_bytes=limits.cache_bytes,
        )
        self.actions: list[
            plan_lib.CopyState | plan_lib.SwapOut | plan_lib.SwapIn | plan_lib.DropHostCopy
        ] = []
        self.host_bytes = 0
        self.stats = MemoryStats()

    def count_pages(self, tokens: int) -> int:
        return -(-tokens // self._limits.chunk_tokens)

    def floor_to_chunk(self, tokens: int) -> int:
        """Return the last grid point."""
        return tokens // self._limits.chunk_tokens * self._limits.chunk_tokens

    def lookup_prefix(self, job: sequence.Sequence) -> prefix_cache.PrefixHit:
        """Return the longest snapshot that leaves a token to compute."""
        if not job.is_cacheable:
            return prefix_cache.PrefixHit(0, (), 0, 0, "off", None)
        return self.cache.lookup(self.key, job.tokens[: job.prefill_target], job.prefill_target - 1)

    def admit(
        self,
        job: sequence.Sequence,
        hit: prefix_cache.PrefixHit,
        spare_pages: int = 0,
        spare_slots: int = 0,
    ) -> bool:
        """Give a job a slot and pages for all it has to prefill, and restore its hit.

        Args:
          job: without memory. hit: what `lookup` returned just now.
          spare_pages, spare_slots: to be left free or evictable.

        Returns:
          Whether there was room; if not, nothing has changed.
        """
        wanted = self.count_pages(job.prefill_target) - len(hit.pages)
        self.pages.add_holders(hit.pages)  # so that they do not count as evictable
        if not self.cache.can_free(wanted + spare_pages, 1 + spare_slots):
            self.pages.release(hit.pages)
            return False
        if job.is_cacheable:
            hit = self.cache.match(
                self.key, job.tokens[: job.prefill_target], job.prefill_target - 1
            )
        if self.cache.evict(wanted, 1):
            (job.slot,) = self.slots.allocate(1)
            if hit.node:
                self.actions.append(plan_lib.CopyState(hit.slot, job.slot))
                self.cache.release(hit)
        else:  # every other slot runs: the snapshot's own becomes the job's
            self.cache.evict(wanted)
            job.slot = self.cache.take_over(hit)
            self.stats.slots_taken_over += 1
        job.pages = [*hit.pages, *self.pages.allocate(wanted)]
        job.computed_tokens = hit.length
        if not job.restarts:
            job.cached_tokens, job.cached_reason = hit.length, hit.miss_reason
        return True

    def extend_pages(self, job: sequence.Sequence, tokens: int) -> int:
        """Give a running job pages up to a length, as far as they can be had; return how far."""
        for count in range(self.count_pages(tokens) - len(job.pages), 0, -1):
            if self.cache.evict(pages=count):
                job.pages += self.pages.allocate(count)
                break
        return min(tokens, len(job.pages) * self._limits.chunk_tokens)

    def save_snapshot(self, job: sequence.Sequence) -> None:
        """Copy the state of a job that is at its pending point, unless something dearer has to go.

        Must come before anything that changes the state.
        """
        point, job.pending_snapshot = job.pending_snapshot, 0
        tokens = job.tokens[:point]
        value = self.cache.snapshot_value(self.key, tokens) if point and job.can_snapshot else 0
        if not value:
            return
        if not self.cache.evict(slots=1, max_value=value):
            self.stats.snapshots_skipped += 1
            return
        (slot,) = self.slots.allocate(1)
        self.actions.append(plan_lib.CopyState(job.slot, slot))
        pages = job.pages[: self.count_pages(point)]
        self.stats.snapshots_copied += self.cache.insert(self.key, tokens, pages, slot)

    def retire(self, job: sequence.Sequence, length: int | None) -> None:
        """Free what a job holds that is over; its state becomes a snapshot where that is certain.

        Args:
          length: tokens in the state if plans under way leave it alone; otherwise None.
        """
        if job.swapped_pages:
            self.drop_host_copy(job)
        if not job.slot:
            return
        least, most = job.computed_tokens, job.max_computed_tokens
        if length is not None:
            least, most = min(least, length), length
        point = self.floor_to_chunk(least)
        if point and self.floor_to_chunk(most) == point and job.can_snapshot:
            pages = job.pages[: self.count_pages(point)]
            self.stats.snapshots_moved += self.cache.insert(
                self.key, job.tokens[:point], pages, job.slot
            )
        else:
            self.slots.release([job.slot])
        self._release_memory(job)

    def swap_out(self, job: sequence.Sequence) -> bool:
        """Copy a running job to the host and free its memory, if it is long and there is room."""
        count = self.count_pages(job.max_computed_tokens)
        size_bytes = self._count_host_bytes(count)
        if (
            not job.computed_tokens
            or job.computed_tokens < self._limits.swap_tokens
            or self.host_bytes + size_bytes > self._limits.host_bytes
        ):
            return False
        self.save_snapshot(job)
        self.actions.append(plan_lib.SwapOut(job.sequence_id, job.slot, tuple(job.pages[:count])))
        self.slots.release([job.slot])
        self._release_memory(job)
        job.swapped_pages = count
        self.host_bytes += size_bytes
        self.stats.swapped_out += 1
        return True

    def swap_in(self, job: sequence.Sequence, spare_pages: int = 0, spare_slots: int = 0) -> bool:
        """Bring a job back from the host; as `admit`."""
        total = job.swapped_pages
        if not job.is_decoding:
            total = max(total, self.count_pages(job.prefill_target))
        if not self.cache.can_free(total + spare_pages, 1 + spare_slots):
            return False
        self.cache.evict(total, 1)
        (job.slot,) = self.slots.allocate(1)
        job.pages = self.pages.allocate(total)
        pages = tuple(job.pages[: job.swapped_pages])
        self.actions.append(plan_lib.SwapIn(job.sequence_id, job.slot, pages))
        self.host_bytes -= self._count_host_bytes(job.swapped_pages)
        job.swapped_pages = 0
        self.stats.swapped_in += 1
        return True

    def restart(self, job: sequence.Sequence) -> None:
        """Free what a job holds that is to be computed again."""
        if job.swapped_pages:
            self.drop_host_copy(job)
        if job.slot:
            self.save_snapshot(job)
            self.slots.release([job.slot])
            self._release_memory(job)
        job.restart()
        self.stats.restarted += 1

    def drop_host_copy(self, job: sequence.Sequence) -> None:
        """Drop a job's host copy."""
        self.actions.append(plan_lib.DropHostCopy(job.sequence_id))
        self.host_bytes -= self._count_host_bytes(job.swapped_pages)
        job.swapped_pages = 0

    def _release_memory(self, job: sequence.Sequence) -> None:
        self.pages.release(job.pages)
        job.pages, job.slot = [], 0

    def _count_host_bytes(self, pages: int) -> int:
        return pages * self._limits.page_bytes + self._limits.state_bytes
