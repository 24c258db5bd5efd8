"""Who owns which memory: pages of keys and values, state slots, and the prefixes worth keeping.

A lightning layer cannot go back to the middle of a prefix: a prefix can be continued only where a
snapshot of the recurrent state was taken. So a node of the prefix tree is a snapshot point. It
holds a state slot and the pages from its parent's point to its own, or it does not exist. Two
branches that part between snapshot points therefore each keep their own pages of the shared span,
until somebody inserts a snapshot at the point where they part.

Nothing here touches a device; there is no clock but a counter, so equal calls give equal results.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence


class IdPool:
    """Ids 1 to `size`, each free or held by one or more holders; the lowest goes first."""

    def __init__(self, size: int):
        self.size = size
        self._free = list(range(1, size + 1))
        self._holders = [0] * (size + 1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def count_holders(self, one: int) -> int:
        return self._holders[one]

    def allocate(self, count: int) -> list[int]:
        """Return `count` free ids, now held once each.

        Raises:
          RuntimeError: fewer are free; look at `free` first.
        """
        if count > self.num_free:
            raise RuntimeError(
                f"got {self.num_free} free of {self.size}, wanted {count}; evict first"
            )
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for one in taken:
            self._holders[one] = 1
        return taken

    def add_holders(self, ids: Iterable[int]) -> None:
        """Add a holder to each."""
        for one in ids:
            self._check_held(one)
            self._holders[one] += 1

    def release(self, ids: Iterable[int]) -> None:
        """Take a holder from each; without any it is free."""
        for one in ids:
            self._check_held(one)
            self._holders[one] -= 1
            if not self._holders[one]:
                heapq.heappush(self._free, one)

    def _check_held(self, one: int) -> None:
        if not self._holders[one]:
            raise RuntimeError(f"got id {one}, which is free; wanted ids that are held")


@dataclasses.dataclass(eq=False)
class _SnapshotNode:
    """A snapshot of `length` tokens; `edge` and `pages` are of the span below the parent's.

    children: by the first chunk of their edges, which several may share. pins: hits not released
    here or below, so that nothing below an unpinned node is pinned.
    """

    parent: "_SnapshotNode | None"
    edge: tuple[int, ...]
    length: int
    pages: list[int]
    slot: int
    last_use: int = 0
    insert_order: int = 0
    pins: int = 0
    children: dict[tuple[int, ...], list["_SnapshotNode"]] = dataclasses.field(default_factory=dict)

    def iterate_below(self) -> Iterable["_SnapshotNode"]:
        """Yield every node below this one, parents first."""
        waiting = [self]
        while waiting:
            for same in waiting.pop().children.values():
                yield from same
                waiting += same


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixHit:
    """What the tree knows of a prompt.

    length: tokens up to the snapshot, 0 without one; `pages` hold them, `slot` their state.
    common: tokens that agree with the tree, whole chunks, at least `length`. reason: why `length`
    is 0, or "".
    """

    length: int
    pages: tuple[int, ...]
    slot: int
    common_tokens: int
    miss_reason: str
    node: _SnapshotNode | None = dataclasses.field(repr=False)


@dataclasses.dataclass
class PrefixCacheStats:
    """Now: nodes, pages, slots, bytes. Since the start: the rest; `reasons` count the misses."""

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


class PrefixCache:
    """Radix trees of snapshots, one per key: weights version and recipe, or what tells them apart.

    Args:
      pages, slots: the pools that sequences take from, too.
      chunk_tokens: tokens of a page; every length is a multiple.
      page_bytes, state_bytes: of one page and one snapshot.
      max_bytes: of all nodes together; 0 switches the cache off.
    """

    def __init__(
        self,
        pages: IdPool,
        slots: IdPool,
        *,
        chunk_tokens: int,
        page_bytes: int,
        state_bytes: int,
        max_bytes: int,
    ):
        self._pages, self._slots = pages, slots
        self._chunk_tokens = chunk_tokens
        self._page_bytes, self._state_bytes = page_bytes, state_bytes
        self._max_bytes = max_bytes
        self._roots: dict[Hashable, _SnapshotNode] = {}
        self._clock = 0
        self._stats = PrefixCacheStats()

    @property
    def is_off(self) -> bool:
        return not self._max_bytes

    def lookup(self, key: Hashable, tokens: Sequence[int], limit: int) -> PrefixHit:
        """As `match`, without pinning or counting: the hit is good until the next call."""
        root = self._roots.get(key)
        if self.is_off or limit < self._chunk_tokens or root is None or not root.children:
            small = "shorter than a chunk" if limit < self._chunk_tokens else "empty"
            return PrefixHit(0, (), 0, 0, "off" if self.is_off else small, None)
        path = self._find_path(root, tokens)
        rest = tuple(tokens[path[-1].length :])
        partly = path[-1].children.get(rest[: self._chunk_tokens], ())
        more = (count_common_tokens(rest, child.edge, self._chunk_tokens) for child in partly)
        common = path[-1].length + max(more, default=0)
        path = [node for node in path if node.length <= limit]
        pages = tuple(page for node in path for page in node.pages)
        if len(path) > 1:
            return PrefixHit(path[-1].length, pages, path[-1].slot, common, "", path[-1])
        reason = "no snapshot on the way" if common else "no common prefix"
        return PrefixHit(0, (), 0, common, reason, None)

    def match(self, key: Hashable, tokens: Sequence[int], limit: int) -> PrefixHit:
        """Find the longest snapshot that `tokens` start with, and pin it until `release`.

        Args:
          tokens: the prompt.
          limit: longest length that is of use: at least one token must remain to be computed.
        """
        hit = self.lookup(key, tokens, limit)
        self._clock += 1
        if hit.node is None:
            self._stats.misses += 1
            self._stats.miss_reasons[hit.miss_reason] = (
                self._stats.miss_reasons.get(hit.miss_reason, 0) + 1
            )
            return hit
        self._stats.hits += 1
        self._stats.hit_tokens += hit.length
        hit.node.last_use = self._clock
        self._pin(hit, 1)
        return hit

    def release(self, hit: PrefixHit) -> None:
        self._pin(hit, -1)

    def take_over(self, hit: PrefixHit) -> int:
        """Unpin a hit and take its slot out of the tree: the state moves without a copy.

        The way out when no slot is free and nothing but this hit could give one. Whoever needs
        its pages must have shared them before.

        Raises:
          RuntimeError: nodes below could have been evicted instead, or another hit needs it.
        """
        node = hit.node
        if node is None or node.children or node.pins != 1:
            raise RuntimeError("got a hit that others need; wanted a leaf pinned once; evict first")
        self.release(hit)
        self._slots.add_holders([node.slot])
        self._remove_node(node)
        return node.slot

    def insert(self, key: Hashable, tokens: Sequence[int], pages: Sequence[int], slot: int) -> bool:
        """Add a snapshot of all of `tokens`, and return whether a node was added.

        The slot is the cache's from now on, whatever comes of it.

        Args:
          tokens: a multiple of chunk_tokens of them. pages: theirs; those past the deepest
            snapshot on the way get the cache as one more holder.
          slot: holds the state. Released if the tree has this snapshot or no room for it.
        """
        chunk = self._chunk_tokens
        if not pages or len(tokens) != len(pages) * chunk:
            raise ValueError(
                f"got {len(tokens)} tokens and {len(pages)} pages; wanted a multiple of {chunk} "
                "tokens and a page for each chunk: cut at the last grid point"
            )
        self._clock += 1
        root = self._roots.setdefault(key, _SnapshotNode(None, (), 0, [], 0))
        parent = self._find_path(root, tokens)[-1]
        more = self._state_bytes + (len(pages) - parent.length // chunk) * self._page_bytes
        if parent.length == len(tokens) or more > self._max_bytes:
            parent.last_use = self._clock
            self._slots.release([slot])
            return False
        self._add_node(
            parent, tuple(tokens[parent.length :]), pages[parent.length // chunk :], slot
        )
        while self.stats().num_bytes > self._max_bytes and (cheapest := self._find_cheapest()):
            self._remove_node(cheapest[1])
        return True

    def snapshot_value(self, key: Hashable, tokens: Sequence[int]) -> float:
        """Return what this snapshot would be worth: tokens saved per byte; 0 if it is there."""
        root = self._roots.get(key)
        start = self._find_path(root, tokens)[-1].length if root else 0
        pages = (len(tokens) - start) // self._chunk_tokens
        return (len(tokens) - start) / self._size_bytes(pages)

    def evict(self, pages: int = 0, slots: int = 0, max_value: float = math.inf) -> bool:
        """Remove the cheapest unpinned snapshots until so many are free; return whether they are.

        Leaves go with their pages; a node with one child leaves its pages to that child. Nothing
        is removed when everything would not be enough.

        Args:
          pages, slots: wanted free in the pools, what is free already included.
          below: only nodes worth less than this (see `value`).
        """
        if not self.can_free(pages, slots):
            return False
        while self._pages.num_free < pages or self._slots.num_free < slots:
            cheapest = self._find_cheapest(pages_alone=self._slots.num_free >= slots)
            if cheapest is None or cheapest[0] >= max_value:
                return False
            self._remove_node(cheapest[1])
        return True

    def can_free(self, pages: int, slots: int) -> bool:
        """Return whether so many are free, or would be after evicting all that is not pinned."""
        more_pages, more_slots = pages - self._pages.num_free, slots - self._slots.num_free
        if more_pages <= 0 and more_slots <= 0:
            return True
        loose = [node for node in self._iterate_nodes() if not node.pins]
        if more_pages > 0:  # there may be very many: stop when it is enough
            given = (1 for node in loose for p in node.pages if self._pages.count_holders(p) == 1)
            more_pages -= sum(itertools.islice(given, more_pages))
        return more_pages <= 0 and more_slots <= len(loose)

    def drop_key(self, key: Hashable) -> None:
        """Forget all of one key, pinned or not."""
        for node in self._roots.pop(key, _SnapshotNode(None, (), 0, [], 0)).iterate_below():
            self._pages.release(node.pages)
            self._slots.release([node.slot])
            node.parent = None
            self._stats.evicted += 1

    def stats(self) -> PrefixCacheStats:
        sizes = [len(node.pages) for node in self._iterate_nodes()]
        size_bytes = sum(sizes) * self._page_bytes + len(sizes) * self._state_bytes
        now = {
            "num_nodes": len(sizes),
            "num_pages": sum(sizes),
            "num_slots": len(sizes),
            "num_bytes": size_bytes,
        }
        return dataclasses.replace(self._stats, **now, miss_reasons=dict(self._stats.miss_reasons))

    def _iterate_nodes(self) -> Iterable[_SnapshotNode]:
        for root in self._roots.values():
            yield from root.iterate_below()

    def _find_path(self, root: _SnapshotNode, tokens: Sequence[int]) -> list[_SnapshotNode]:
        """Return the nodes whose tokens are a prefix of `tokens`, from the root down."""
        path = [root]
        while True:
            start = path[-1].length
            first = tuple(tokens[start : start + self._chunk_tokens])
            for child in path[-1].children.get(first, ()):
                if tuple(tokens[start : child.length]) == child.edge:
                    path.append(child)
                    break
            else:
                return path

    def _pin(self, hit: PrefixHit, change: int) -> None:
        node = hit.node
        while node is not None:
            if node.pins + change < 0:
                raise RuntimeError("got a hit that was released before; wanted one release each")
            node.pins += change
            node = node.parent

    def _add_node(
        self, parent: _SnapshotNode, edge: tuple[int, ...], pages: Sequence[int], slot: int
    ) -> None:
        """Add a child; edges that go on past it are split and become its children."""
        chunk = self._chunk_tokens
        siblings = parent.children.get(edge[:chunk], [])
        longer = [node for node in siblings if node.edge[: len(edge)] == edge]
        own = longer[0].pages[: len(pages)] if longer else list(pages)
        self._pages.add_holders(own)
        length = parent.length + len(edge)
        self._stats.inserted += 1
        new = _SnapshotNode(parent, edge, length, own, slot, self._clock, self._stats.inserted)
        for node in longer:
            self._detach(node)
            self._pages.release(node.pages[: len(pages)])
            node.edge, node.pages = node.edge[len(edge) :], node.pages[len(pages) :]
            new.pins += node.pins
            self._attach(node, new)
        self._attach(new, parent)

    def _find_cheapest(self, pages_alone: bool = False) -> tuple[float, _SnapshotNode] | None:
        """Return (worth, node) of what to evict next.

        pages_alone: only pages are short, so leaves that give one go before those that do not.
        """
        best = None
        for node in self._iterate_nodes():
            children = [child for same in node.children.values() for child in same]
            if node.pins or len(children) > 1 or (pages_alone and children):
                continue
            alone = pages_alone and not any(
                self._pages.count_holders(page) == 1 for page in node.pages
            )
            worth = len(node.edge) / self._size_bytes(0 if children else len(node.pages))
            worth /= 1 + self._clock - node.last_use
            order = (alone, worth, node.insert_order)
            if best is None or order < best[0]:
                best = (order, node)
        return best and (best[0][1], best[1])

    def _size_bytes(self, pages: int) -> int:
        return max(1, pages * self._page_bytes + self._state_bytes)

    def _remove_node(self, node: _SnapshotNode) -> None:
        """Remove a leaf, or a node with one child, which gets its span."""
        parent = node.parent
        assert parent is not None
        self._detach(node)
        children = [child for same in node.children.values() for child in same]
        if children:
            (child,) = children
            child.edge, child.pages = node.edge + child.edge, node.pages + child.pages
            self._attach(child, parent)
        else:
            self._pages.release(node.pages)
        self._slots.release([node.slot])
        self._stats.evicted += 1

    def _attach(self, node: _SnapshotNode, parent: _SnapshotNode) -> None:
        node.parent = parent
        parent.children.setdefault(node.edge[: self._chunk_tokens], []).append(node)

    def _detach(self, node: _SnapshotNode) -> None:
        assert node.parent is not None
        first = node.edge[: self._chunk_tokens]
        same = node.parent.children[first]
        same.remove(node)
        if not same:
            del node.parent.children[first]


def count_common_tokens(one: Sequence[int], other: Sequence[int], chunk_tokens: int) -> int:
    """Return how many tokens two sequences of one type start with in common, in whole chunks."""
    most = min(len(one), len(other)) // chunk_tokens * chunk_tokens
    same, step = 0, chunk_tokens
    while same < most:
        stop = min(same + step, most)
        if one[same:stop] == other[same:stop]:
            same, step = stop, 2 * step
        elif step == chunk_tokens:
            break
        else:
            step = chunk_tokens
    return same
