"""Which prefixes are kept, and which go first: radix trees of snapshots.

A lightning layer cannot go back to the middle of a prefix: a prefix can be continued only where a
snapshot of the recurrent state was taken. So a node of the prefix tree is a snapshot point. It
holds a state slot and the pages from its parent's point to its own, or it does not exist. Two
branches that part between snapshot points therefore each keep their own pages of the shared span,
until somebody inserts a snapshot at the point where they part.

Nothing here touches a device. There is no clock but a counter, so equal calls give equal results.
"""

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

from infer.scheduling import id_pool, prefix_tree
from infer.scheduling import stats as stats_lib


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixHit:
    """What the tree knows of a prompt.

    Attributes:
      length: tokens up to the longest usable snapshot. 0 without one.
      pages: pages of those tokens.
      slot: the snapshot's state slot.
      common_tokens: tokens that agree with the tree, whole chunks, at least `length`. Between
        `length` and here the tree has pages but no state.
      cache_miss_reason: why `length` is 0, or "".
      node: the snapshot.
    """

    length: int
    pages: tuple[int, ...]
    slot: int
    common_tokens: int
    cache_miss_reason: str
    node: prefix_tree.SnapshotNode | None = dataclasses.field(repr=False)


class PrefixCache:
    """Radix trees of snapshots, one for each key.

    Args:
      pages: the pool of pages. Sequences take from it, too.
      slots: the pool of state slots. Sequences take from it, too.
      chunk_tokens: tokens of a page. Every length here is a multiple.
      page_bytes: bytes of one page.
      state_bytes: bytes of one state slot.
      max_bytes: most bytes of all nodes together. 0 switches the cache off.
    """

    def __init__(
        self,
        pages: id_pool.IdPool,
        slots: id_pool.IdPool,
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
        # One root for each weights version and recipe: states of different keys must not be mixed.
        self._roots: dict[Hashable, prefix_tree.SnapshotNode] = {}
        # Counts matches and inserts. It is the time of `last_use`.
        self._clock = 0
        self._stats = stats_lib.PrefixCacheStats()

    @property
    def is_off(self) -> bool:
        return not self._max_bytes

    def lookup(self, key: Hashable, tokens: Sequence[int], limit: int) -> PrefixHit:
        """Find as `match` does, without pinning or counting: the hit is good until the next call.

        Args:
          limit: longest snapshot that is of use, in tokens.
        """
        root = self._roots.get(key)
        if self.is_off or limit < self._chunk_tokens or root is None or not root.children:
            reason = "shorter than a chunk" if limit < self._chunk_tokens else "empty"
            return PrefixHit(0, (), 0, 0, "off" if self.is_off else reason, None)
        if tuple(tokens[: self._chunk_tokens]) not in root.children:
            # The common case, in all partitions but one, and cheap: nothing long is copied.
            return PrefixHit(0, (), 0, 0, "no common prefix", None)
        path = root.find_path(tokens, self._chunk_tokens)
        # Past the last snapshot on the way, tokens may still agree with a part of some edge.
        remainder = tuple(tokens[path[-1].length :])
        candidates = path[-1].children.get(remainder[: self._chunk_tokens], ())
        agreeing = (
            prefix_tree.count_common_tokens(remainder, child.edge, self._chunk_tokens)
            for child in candidates
        )
        common_tokens = path[-1].length + max(agreeing, default=0)
        # A longer snapshot would leave no token to compute. The root, of length 0, stays.
        path = [node for node in path if node.length <= limit]
        pages = tuple(page for node in path for page in node.pages)
        if len(path) > 1:
            return PrefixHit(path[-1].length, pages, path[-1].slot, common_tokens, "", path[-1])
        reason = "no snapshot on the way" if common_tokens else "no common prefix"
        return PrefixHit(0, (), 0, common_tokens, reason, None)

    def match(self, key: Hashable, tokens: Sequence[int], limit: int) -> PrefixHit:
        """Find the longest snapshot that `tokens` start with, and pin it until `release`.

        Args:
          key: whose tree to search.
          tokens: the prompt.
          limit: longest length that is of use: at least one token must remain to be computed.
        """
        hit = self.lookup(key, tokens, limit)
        self._clock += 1
        if hit.node is None:
            self._stats.misses += 1
            reasons = self._stats.miss_reasons
            reasons[hit.cache_miss_reason] = reasons.get(hit.cache_miss_reason, 0) + 1
            return hit
        self._stats.hits += 1
        self._stats.hit_tokens += hit.length
        hit.node.last_use = self._clock
        self._pin(hit, 1)
        return hit

    def release(self, hit: PrefixHit) -> None:
        """Unpin a hit."""
        self._pin(hit, -1)

    def take_over(self, hit: PrefixHit) -> int:
        """Unpin a hit and take its slot out of the tree: the state moves without a copy.

        This is the way out when no slot is free and nothing but this hit could give one. Whoever
        needs its pages must have become their holder before.

        Raises:
          RuntimeError: nodes below could have been evicted instead, or another hit needs it.
        """
        node = hit.node
        if node is None or node.children or node.pins != 1:
            raise RuntimeError("got a hit that others need; wanted a leaf pinned once; evict first")
        self.release(hit)
        # A second holder for a moment, so that removing the node does not free the slot.
        self._slots.add_holders([node.slot])
        self._remove_node(node)
        return node.slot

    def insert(self, key: Hashable, tokens: Sequence[int], pages: Sequence[int], slot: int) -> bool:
        """Add a snapshot of all of `tokens`, and return whether a node was added.

        Args:
          key: whose tree gets it.
          tokens: a multiple of chunk_tokens of them.
          pages: pages of the tokens. Those past the deepest snapshot on the way get the cache as
            one more holder.
          slot: holds the state. It is the cache's from now on. The cache releases it if the tree
            has this snapshot already, or has no room for it.
        """
        chunk = self._chunk_tokens
        if not pages or len(tokens) != len(pages) * chunk:
            raise ValueError(
                f"got {len(tokens)} tokens and {len(pages)} pages; wanted a multiple of {chunk} "
                "tokens and a page for each chunk: cut at the last chunk border"
            )
        self._clock += 1
        # An empty tree begins with a root of no tokens, which is never evicted: it is no node.
        root = self._roots.setdefault(key, prefix_tree.SnapshotNode(None, (), 0, [], 0))
        parent = root.find_path(tokens, self._chunk_tokens)[-1]
        num_own_pages = len(pages) - parent.length // chunk
        added_bytes = self._state_bytes + num_own_pages * self._page_bytes
        if parent.length == len(tokens) or added_bytes > self._max_bytes:
            parent.last_use = self._clock
            self._slots.release([slot])
            return False
        self._add_node(
            parent, tuple(tokens[parent.length :]), pages[parent.length // chunk :], slot
        )
        # The new node may be the cheapest itself, and go at once.
        while self.stats().num_bytes > self._max_bytes and (cheapest := self._find_cheapest()):
            self._remove_node(cheapest[1])
        return True

    def snapshot_value(self, key: Hashable, tokens: Sequence[int]) -> float:
        """Return what a snapshot of `tokens` would be worth: tokens saved per byte.

        A snapshot that is there already is worth 0.
        """
        root = self._roots.get(key)
        start = root.find_path(tokens, self._chunk_tokens)[-1].length if root else 0
        num_pages = (len(tokens) - start) // self._chunk_tokens
        return (len(tokens) - start) / self._count_bytes(num_pages)

    def evict(self, pages: int = 0, slots: int = 0, max_value: float = math.inf) -> bool:
        """Remove the cheapest unpinned snapshots until so many are free. Return whether they are.

        A leaf goes with its pages. A node with one child leaves its pages to that child. Nothing
        is removed when everything would not be enough.

        Args:
          pages: pages wanted free in the pool, those free already included.
          slots: slots wanted free, those free already included.
          max_value: only nodes worth less than this go (see `snapshot_value`).
        """
        if not self.can_free(pages, slots):
            return False
        while self._pages.num_free < pages or self._slots.num_free < slots:
            cheapest = self._find_cheapest(pages_alone=self._slots.num_free >= slots)
            # Snapshots removed so far stay removed, because `can_free` does not look at worth.
            if cheapest is None or cheapest[0] >= max_value:
                return False
            self._remove_node(cheapest[1])
        return True

    def can_free(self, pages: int, slots: int) -> bool:
        """Return whether so many are free, or would be after evicting all that is not pinned."""
        missing_pages = pages - self._pages.num_free
        missing_slots = slots - self._slots.num_free
        if missing_pages <= 0 and missing_slots <= 0:
            return True
        unpinned = [node for node in self._iterate_nodes() if not node.pins]
        if missing_pages > 0:
            # Only pages that no sequence holds become free. There may be very many: the count
            # stops when it is enough.
            freed = (
                1
                for node in unpinned
                for page in node.pages
                if self._pages.count_holders(page) == 1
            )
            missing_pages -= sum(itertools.islice(freed, missing_pages))
        return missing_pages <= 0 and missing_slots <= len(unpinned)

    def drop_key(self, key: Hashable) -> None:
        """Forget all snapshots of one key, pinned or not."""
        for node in self._roots.pop(
            key, prefix_tree.SnapshotNode(None, (), 0, [], 0)
        ).iterate_below():
            self._pages.release(node.pages)
            self._slots.release([node.slot])
            # A hit on it may still be pinned. Its release then ends at this node.
            node.parent = None
            self._stats.evicted += 1

    def stats(self) -> stats_lib.PrefixCacheStats:
        """Return sizes and counts, as a copy."""
        sizes = [len(node.pages) for node in self._iterate_nodes()]
        return dataclasses.replace(
            self._stats,
            num_nodes=len(sizes),
            num_pages=sum(sizes),
            num_slots=len(sizes),
            num_bytes=sum(sizes) * self._page_bytes + len(sizes) * self._state_bytes,
            miss_reasons=dict(self._stats.miss_reasons),
        )

    def _iterate_nodes(self) -> Iterable[prefix_tree.SnapshotNode]:
        for root in self._roots.values():
            yield from root.iterate_below()

    def _pin(self, hit: PrefixHit, change: int) -> None:
        """Count a hit on its node and on all nodes above, whose pages it uses."""
        node = hit.node
        while node is not None:
            if node.pins + change < 0:
                raise RuntimeError("got a hit that was released before; wanted one release each")
            node.pins += change
            node = node.parent

    def _add_node(
        self,
        parent: prefix_tree.SnapshotNode,
        edge: tuple[int, ...],
        pages: Sequence[int],
        slot: int,
    ) -> None:
        """Add a child. Edges that go on past it are split and become its children."""
        chunk = self._chunk_tokens
        siblings = parent.children.get(edge[:chunk], [])
        longer = [node for node in siblings if node.edge[: len(edge)] == edge]
        # The tree may have these tokens already, in pages of its own. It keeps those, and the
        # sequence's equal pages are freed when the sequence ends.
        own_pages = longer[0].pages[: len(pages)] if longer else list(pages)
        self._pages.add_holders(own_pages)
        length = parent.length + len(edge)
        self._stats.inserted += 1
        added = prefix_tree.SnapshotNode(
            parent, edge, length, own_pages, slot, self._clock, self._stats.inserted
        )
        for node in longer:
            # The first pages of its edge are the added node's now. Hits below it use them, too.
            node.detach(self._chunk_tokens)
            self._pages.release(node.pages[: len(pages)])
            node.edge, node.pages = node.edge[len(edge) :], node.pages[len(pages) :]
            added.pins += node.pins
            node.attach_to(added, self._chunk_tokens)
        added.attach_to(parent, self._chunk_tokens)

    def _find_cheapest(
        self, pages_alone: bool = False
    ) -> tuple[float, prefix_tree.SnapshotNode] | None:
        """Return (worth, node) of what to evict next.

        Worth is tokens saved per byte freed, and falls with the time since the last use.

        Args:
          pages_alone: only pages are short. Then no inner node goes, because its pages stay with
            its child, and leaves that free a page go before those that do not.
        """
        best = None
        for node in self._iterate_nodes():
            children = list(node.iterate_children())
            if node.pins or len(children) > 1 or (pages_alone and children):
                continue
            is_useless = pages_alone and not any(
                self._pages.count_holders(page) == 1 for page in node.pages
            )
            worth = len(node.edge) / self._count_bytes(0 if children else len(node.pages))
            worth /= 1 + self._clock - node.last_use  # 1 for the node used last
            # Inserted earlier goes first among equals, so that equal calls evict equally.
            order = (is_useless, worth, node.insert_order)
            if best is None or order < best[0]:
                best = (order, node)
        return best and (best[0][1], best[1])

    def _count_bytes(self, num_pages: int) -> int:
        """Return the bytes of a snapshot with so many pages, at least 1: others divide by it."""
        return max(1, num_pages * self._page_bytes + self._state_bytes)

    def _remove_node(self, node: prefix_tree.SnapshotNode) -> None:
        """Remove a leaf, or a node with one child, which gets its span."""
        parent = node.parent
        assert parent is not None
        node.detach(self._chunk_tokens)
        children = list(node.iterate_children())
        if children:
            # The child's pages are its edge's alone, so it takes those of the removed edge.
            (child,) = children
            child.edge, child.pages = node.edge + child.edge, node.pages + child.pages
            child.attach_to(parent, self._chunk_tokens)
        else:
            self._pages.release(node.pages)
        self._slots.release([node.slot])
        self._stats.evicted += 1
