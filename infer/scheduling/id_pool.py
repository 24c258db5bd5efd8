"""Free lists with holders: which pages and slots are in use, and by how many."""

import heapq
from collections.abc import Iterable


class IdPool:
    """`size` consecutive ids, each free or held by one or more holders.

    The id before the first is no member: on the device it takes the writes of padding rows.

    Args:
      size: number of ids.
      first: the lowest id.
    """

    def __init__(self, size: int, first: int = 1):
        self.size = size
        # A heap, so that the lowest free id is allocated first and equal calls give equal ids.
        self._free = list(range(first, first + size))
        self._num_holders = dict.fromkeys(self._free, 0)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count_holders(self, member: int) -> int:
        return self._num_holders[member]

    def allocate(self, count: int) -> list[int]:
        """Return `count` free ids, each with one holder now.

        Raises:
          RuntimeError: fewer are free. Look at `num_free` first.
        """
        if count > self.num_free:
            raise RuntimeError(
                f"got {self.num_free} free of {self.size}, wanted {count}; evict first"
            )
        ids = [heapq.heappop(self._free) for _ in range(count)]
        for member in ids:
            self._num_holders[member] = 1
        return ids

    def add_holders(self, ids: Iterable[int]) -> None:
        """Add a holder to each id, which must have one already."""
        for member in ids:
            self._check_held(member)
            self._num_holders[member] += 1

    def release(self, ids: Iterable[int]) -> None:
        """Take a holder from each id. An id without holders is free."""
        for member in ids:
            self._check_held(member)
            self._num_holders[member] -= 1
            if not self._num_holders[member]:
                heapq.heappush(self._free, member)

    def _check_held(self, member: int) -> None:
        if not self._num_holders.get(member):
            raise RuntimeError(f"got id {member}, which is free; wanted ids that are held")
