"""A radix tree of snapshots: nodes, the way down, and how sequences are compared."""

import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(eq=False)
class SnapshotNode:
    """A snapshot, or the root of a tree, which has no slot and no tokens.

    Attributes:
      parent: the next shorter snapshot on the way to the root. None for a root or a dropped node.
      edge: tokens between the parent's point and this one, whole chunks.
      length: tokens from the root to this point.
      pages: pages of the edge's tokens, one a chunk.
      slot: state slot of the snapshot.
      last_use: the cache's counter when this node was last matched or inserted.
      insert_order: number of its insertion. It breaks ties in eviction.
      pins: hits not released, here or below. So nothing below an unpinned node is pinned.
      children: longer snapshots, by the first chunk of their edges. Several may share it, because
        edges that part later than their first chunk are separate nodes.
    """

    parent: "SnapshotNode | None"
    edge: tuple[int, ...]
    length: int
    pages: list[int]
    slot: int
    last_use: int = 0
    insert_order: int = 0
    pins: int = 0
    children: dict[tuple[int, ...], list["SnapshotNode"]] = dataclasses.field(default_factory=dict)

    def iterate_below(self) -> Iterable["SnapshotNode"]:
        """Yield every node below this one, parents first."""
        # A stack instead of recursion: a chain of snapshots may be long.
        stack = [self]
        while stack:
            for siblings in stack.pop().children.values():
                yield from siblings
                stack += siblings

    def iterate_children(self) -> Iterable["SnapshotNode"]:
        for siblings in self.children.values():
            yield from siblings

    def attach_to(self, parent: "SnapshotNode", chunk_tokens: int) -> None:
        """Become a child of `parent`."""
        self.parent = parent
        parent.children.setdefault(self.edge[:chunk_tokens], []).append(self)

    def detach(self, chunk_tokens: int) -> None:
        """Leave the parent's children. `parent` stays as it is."""
        assert self.parent is not None
        first_chunk = self.edge[:chunk_tokens]
        siblings = self.parent.children[first_chunk]
        siblings.remove(self)
        if not siblings:
            del self.parent.children[first_chunk]

    def find_path(self, tokens: Sequence[int], chunk_tokens: int) -> list["SnapshotNode"]:
        """Return the nodes whose tokens are a prefix of `tokens`, from this root down."""
        path: list[SnapshotNode] = [self]
        while True:
            start = path[-1].length
            first_chunk = tuple(tokens[start : start + chunk_tokens])
            # One child at most agrees: `PrefixCache.insert` puts a longer edge below a shorter one.
            for child in path[-1].children.get(first_chunk, ()):
                if tuple(tokens[start : child.length]) == child.edge:
                    path.append(child)
                    break
            else:
                return path


def count_common_tokens(
    tokens: Sequence[int], other_tokens: Sequence[int], chunk_tokens: int
) -> int:
    """Return how many tokens two sequences of one type start with in common, in whole chunks."""
    longest = min(len(tokens), len(other_tokens)) // chunk_tokens * chunk_tokens
    agreeing, step = 0, chunk_tokens
    # Slices are compared at C speed, so steps double while they agree and start over where they
    # do not. One chunk that differs ends the search.
    while agreeing < longest:
        stop = min(agreeing + step, longest)
        if tokens[agreeing:stop] == other_tokens[agreeing:stop]:
            agreeing, step = stop, 2 * step
        elif step == chunk_tokens:
            break
        else:
            step = chunk_tokens
    return agreeing
