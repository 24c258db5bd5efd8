"""What a sequence holds of the device, and how it comes and goes.

Admission, growth, snapshots, swaps to host memory. The scheduler chooses who is admitted or
preempted. This file does what that takes. Each step takes and frees ids at once, and appends to
`actions` what the device must do, in that order. The device runs actions and programs in order,
too, so no id is ever used by two sequences at the same time.
"""

import dataclasses
from collections.abc import Hashable, Sequence

from infer import config as config_lib
from infer.scheduling import id_pool, prefix_cache, sequence
from infer.scheduling import plan as plan_lib
from infer.scheduling import stats as stats_lib


@dataclasses.dataclass
class SharedMemory:
    """What the memory managers of all partitions share.

    Attributes:
      actions: what the device must do before the next program, in order. One list, because a
        sequence may leave one partition and enter another between two programs.
      host_bytes: bytes of swapped-out sequences.
    """

    actions: list[plan_lib.Action] = dataclasses.field(default_factory=list)
    host_bytes: int = 0


class MemoryManager:
    """Pools and prefix cache of one partition.

    Args:
      config: sizes of one partition.
      limits: sizes of its pools.
      key: weights version and recipe, as in `Scheduler`.
      shared: what all partitions share.
      partition: the number of the partition.

    Attributes:
      key: the prefix tree that sequences read and write now.
    """

    def __init__(
        self,
        config: config_lib.EngineConfig,
        limits: plan_lib.DeviceLimits,
        key: Hashable,
        shared: SharedMemory,
        partition: int,
    ):
        self._config, self._limits, self._shared = config, limits, shared
        self.key = key
        # Each partition has an id of padding before its own ids: see `plan.py`.
        self.pages = id_pool.IdPool(limits.num_pages, partition * (limits.num_pages + 1) + 1)
        self.slots = id_pool.IdPool(limits.num_slots, partition * (limits.num_slots + 1) + 1)
        self.cache = prefix_cache.PrefixCache(
            self.pages,
            self.slots,
            chunk_tokens=config.chunk_tokens,
            page_bytes=limits.page_bytes,
            state_bytes=limits.state_bytes,
            max_bytes=limits.cache_bytes,
        )
        self.stats = stats_lib.MemoryStats()

    def lookup_prefix(
        self, waiter: sequence.Sequence, prefill_tokens: Sequence[int]
    ) -> prefix_cache.PrefixHit:
        """Return the longest snapshot that leaves a token to compute.

        The last token before decoding must be computed, not restored: its logits give the next one.

        Args:
          prefill_tokens: the tokens that `waiter` has to prefill. Every partition is asked for the
            same ones, so the caller copies them once.
        """
        if not waiter.is_cacheable:
            return prefix_cache.PrefixHit(0, (), 0, 0, "off", None)
        return self.cache.lookup(self.key, prefill_tokens, len(prefill_tokens) - 1)

    def admit(
        self,
        waiter: sequence.Sequence,
        hit: prefix_cache.PrefixHit,
        spare_pages: int = 0,
        spare_slots: int = 0,
    ) -> bool:
        """Give a sequence a slot and pages for all it has to prefill, and restore its hit.

        Args:
          waiter: a sequence without memory.
          hit: what `lookup_prefix` returned just now.
          spare_pages: pages to be left free or evictable.
          spare_slots: slots to be left free or evictable.

        Returns:
          Whether there was room. If not, nothing has changed.
        """
        target = waiter.prefill_target
        num_new_pages = self._config.count_pages(target) - len(hit.pages)
        # The sequence becomes a holder first, so that the hit's pages do not count as evictable.
        self.pages.add_holders(hit.pages)
        if not self.cache.can_free(num_new_pages + spare_pages, 1 + spare_slots):
            self.pages.release(hit.pages)
            return False
        if waiter.is_cacheable:
            # The same hit again, now pinned and counted: evicting must not remove it.
            hit = self.cache.match(self.key, waiter.tokens[:target], target - 1)
        if self.cache.evict(num_new_pages, 1):
            (waiter.slot,) = self.slots.allocate(1)
            if hit.node:
                self._shared.actions.append(plan_lib.CopyState(hit.slot, waiter.slot))
                self.cache.release(hit)
        else:
            # Every other slot is in use, so only the hit's own slot can be freed. The snapshot's
            # slot becomes the sequence's.
            self.cache.evict(num_new_pages)
            waiter.slot = self.cache.take_over(hit)
            self.stats.slots_taken_over += 1
        waiter.pages = [*hit.pages, *self.pages.allocate(num_new_pages)]
        waiter.computed_tokens = hit.length
        # Users are told of the first start alone. A restart may find the sequence's own snapshots.
        if not waiter.restarts:
            waiter.cached_tokens, waiter.cache_miss_reason = hit.length, hit.cache_miss_reason
        return True

    def extend_pages(self, running: sequence.Sequence, tokens: int) -> int:
        """Give a running sequence pages up to a length, as far as they can be had.

        Returns:
          The length that its pages allow now, `tokens` at most.
        """
        # As many as possible, down from all: a few pages still let it make some steps.
        for count in range(self._config.count_pages(tokens) - len(running.pages), 0, -1):
            if self.cache.evict(pages=count):
                running.pages += self.pages.allocate(count)
                break
        return min(tokens, len(running.pages) * self._config.chunk_tokens)

    def save_snapshot(self, running: sequence.Sequence) -> None:
        """Copy the state of a sequence that stands at its pending point.

        Only cheaper snapshots go to make room. This must come before any program or action that
        changes the state.
        """
        point, running.pending_snapshot = running.pending_snapshot, 0
        tokens = running.tokens[:point]
        worth_saving = point and running.can_snapshot
        value = self.cache.snapshot_value(self.key, tokens) if worth_saving else 0
        if not value:
            return
        if not self.cache.evict(slots=1, max_value=value):
            self.stats.snapshots_skipped += 1
            return
        (slot,) = self.slots.allocate(1)
        self._shared.actions.append(plan_lib.CopyState(running.slot, slot))
        # Pages are shared, not copied: the sequence writes only past the point from here on.
        pages = running.pages[: self._config.count_pages(point)]
        self.stats.snapshots_copied += self.cache.insert(self.key, tokens, pages, slot)

    def retire(self, ended: sequence.Sequence, final_length: int | None) -> None:
        """Free what a sequence holds that is over. Its state becomes a snapshot where possible.

        That is where the state certainly stands in its last whole chunk: a recurrent state in the
        slot is of the last chunk border, and plans under way may still move it to the next.

        Args:
          final_length: tokens in the state if plans under way leave it alone, otherwise None.
        """
        if ended.swapped_pages:
            self.drop_host_copy(ended)
        if not ended.slot:
            return
        min_length, max_length = ended.computed_tokens, ended.max_computed_tokens
        if final_length is not None:
            # The device has stopped by itself, so the upper bound is exact.
            min_length, max_length = min(min_length, final_length), final_length
        point = self._config.floor_to_chunk(min_length)
        if point and self._config.floor_to_chunk(max_length) == point and ended.can_snapshot:
            # The cache owns the slot from here on, and is one more holder of the pages.
            pages = ended.pages[: self._config.count_pages(point)]
            self.stats.snapshots_moved += self.cache.insert(
                self.key, ended.tokens[:point], pages, ended.slot
            )
        else:
            self.slots.release([ended.slot])
        self._release_memory(ended)

    def swap_out(self, running: sequence.Sequence) -> bool:
        """Copy a sequence to the host and free its memory, if it is long and the host has room.

        Returns:
          Whether it was copied. If not, nothing has changed.
        """
        # Plans under way may still write up to the upper bound, and the copy comes after them.
        count = self._config.count_pages(running.max_computed_tokens)
        size_bytes = self._count_host_bytes(count)
        if (
            not running.computed_tokens
            # Computing a short sequence again is faster than two copies.
            or running.computed_tokens < self._config.swap_tokens
            or self._shared.host_bytes + size_bytes > self._config.host_bytes
        ):
            return False
        self.save_snapshot(running)
        self._shared.actions.append(
            plan_lib.SwapOut(running.sequence_id, running.slot, tuple(running.pages[:count]))
        )
        # Free at once: the device copies before any later plan can write there.
        self.slots.release([running.slot])
        self._release_memory(running)
        running.swapped_pages = count
        self._shared.host_bytes += size_bytes
        self.stats.swapped_out += 1
        return True

    def swap_in(
        self, waiter: sequence.Sequence, spare_pages: int = 0, spare_slots: int = 0
    ) -> bool:
        """Bring a sequence back from the host. Arguments and result are those of `admit`."""
        num_pages = waiter.swapped_pages
        if not waiter.is_decoding:
            # It was preempted inside its prefill, which takes pages for all of the prompt.
            num_pages = max(num_pages, self._config.count_pages(waiter.prefill_target))
        if not self.cache.can_free(num_pages + spare_pages, 1 + spare_slots):
            return False
        # `can_free` counted all that is unpinned, so this succeeds.
        self.cache.evict(num_pages, 1)
        (waiter.slot,) = self.slots.allocate(1)
        waiter.pages = self.pages.allocate(num_pages)
        # Those past the host copy are for the rest of the prefill.
        pages = tuple(waiter.pages[: waiter.swapped_pages])
        self._shared.actions.append(plan_lib.SwapIn(waiter.sequence_id, waiter.slot, pages))
        self._shared.host_bytes -= self._count_host_bytes(waiter.swapped_pages)
        waiter.swapped_pages = 0
        self.stats.swapped_in += 1
        return True

    def restart(self, preempted: sequence.Sequence) -> None:
        """Free what a sequence holds that is to be computed again."""
        if preempted.swapped_pages:
            self.drop_host_copy(preempted)
        if preempted.slot:
            self.save_snapshot(preempted)
            self.slots.release([preempted.slot])
            self._release_memory(preempted)
        preempted.restart()
        self.stats.restarted += 1

    def drop_host_copy(self, swapped: sequence.Sequence) -> None:
        """Have the device forget a sequence's host copy."""
        self._shared.actions.append(plan_lib.DropHostCopy(swapped.sequence_id))
        self._shared.host_bytes -= self._count_host_bytes(swapped.swapped_pages)
        swapped.swapped_pages = 0

    def _release_memory(self, holder: sequence.Sequence) -> None:
        """Give up the pages, and the slot, which has been released or given away before."""
        self.pages.release(holder.pages)
        holder.pages, holder.slot = [], 0

    def _count_host_bytes(self, num_pages: int) -> int:
        return num_pages * self._limits.page_bytes + self._limits.state_bytes
