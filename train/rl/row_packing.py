"""Which rows samples lie in: few shapes of microbatches, and as little padding as they allow.

A microbatch is a number of rows of one length. Each shape is a compiled program, so there are few:
lengths about a twelfth apart, and at most three numbers of rows. The largest shape bounds the
memory. Everything here is a function of the samples' lengths alone, so that a run that goes on
packs as it did before.
"""

import bisect
import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

from m1_jax import sharding

_LENGTH_UNIT = 128  # row lengths are multiples of it, which is the width of a TPU's registers
# Lengths between one and its double. Half of the distance between two is lost to padding, 4%.
_LENGTHS_PER_DOUBLING = 8
_NUM_DOUBLINGS = 4  # from the shortest length to the longest
_NUM_HALVINGS = 2  # from the most rows to the fewest
# A microbatch costs as much as so large a part of the largest one, besides its places: the weights
# are gathered for it once more.
_MICROBATCH_COST = 1 / 64


class RowLocation(NamedTuple):
    """Where a sample lies.

    Attributes:
      microbatch: index of the microbatch.
      row: index in the microbatch, 0 to B - 1.
      start: column of the sample's first token, 0 to T - 1.
    """

    microbatch: int
    row: int
    start: int


class MicrobatchShape(NamedTuple):
    """The shape of a microbatch: B rows of T tokens."""

    num_rows: int
    row_tokens: int

    @property
    def num_places(self) -> int:
        """Return the number of tokens that are computed, padding included."""
        return self.num_rows * self.row_tokens


@dataclasses.dataclass(frozen=True)
class RowShapes:
    """The shapes that microbatches may have: any number of rows with any length.

    Attributes:
      row_counts: numbers of rows, ascending.
      row_lengths: tokens of a row, ascending.
    """

    row_counts: tuple[int, ...]
    row_lengths: tuple[int, ...]

    @property
    def largest(self) -> MicrobatchShape:
        """Return the shape that takes the most memory."""
        return MicrobatchShape(self.row_counts[-1], self.row_lengths[-1])

    def smallest_shape(self, num_rows: int, row_tokens: int) -> MicrobatchShape:
        """Return the smallest shape that has so many rows of so many tokens."""
        return MicrobatchShape(
            self.row_counts[bisect.bisect_left(self.row_counts, num_rows)],
            self.row_lengths[bisect.bisect_left(self.row_lengths, row_tokens)],
        )


@dataclasses.dataclass(frozen=True)
class RowPlan:
    """Where samples lie.

    Attributes:
      locations: location of each sample, in the order in which the samples were given.
      shapes: shape of each microbatch.
    """

    locations: list[RowLocation]
    shapes: list[MicrobatchShape]

    @property
    def num_places(self) -> int:
        """Return the number of tokens that are computed, padding included."""
        return sum(shape.num_places for shape in self.shapes)


def make_row_shapes(
    num_rows: int, longest_sample: int, layout: sharding.MeshLayout | None
) -> RowShapes:
    """Return the shapes of a run.

    Args:
      num_rows: the most rows of a microbatch.
      longest_sample: tokens that the longest row must hold. Rows are somewhat longer where the
        layout or the hardware wants it.
      layout: layout of the trainer, None on a single device.

    Raises:
      ValueError: rows that the layout cannot split evenly.
    """
    sharding.check_batch_rows(layout, num_rows)
    batch_split = 1 if layout is None else layout.axis_size("batch")
    length_split = 1 if layout is None else layout.axis_size("length")
    unit = math.lcm(_LENGTH_UNIT, length_split)
    num_lengths = _LENGTHS_PER_DOUBLING * _NUM_DOUBLINGS + 1
    lengths = {
        _round_up(longest_sample / 2 ** (i / _LENGTHS_PER_DOUBLING), unit)
        for i in range(num_lengths)
    }
    counts = {
        num_rows >> halvings
        for halvings in range(_NUM_HALVINGS + 1)
        if num_rows % (batch_split << halvings) == 0
    }
    return RowShapes(tuple(sorted(counts)), tuple(sorted(lengths)))


def plan_rows(lengths: Sequence[int], shapes: RowShapes) -> RowPlan:
    """Return the rows of samples of these lengths, of the packings tried the one that costs least.

    Tried are the best fit into rows of each length, longest sample first, and even rows. Of a
    packing the fullest rows come first, so that only the last microbatches have short rows.

    Raises:
      ValueError: a sample that is longer than the longest row.
    """
    if not lengths:
        return RowPlan([], [])
    longest = max(lengths)
    if longest > shapes.row_lengths[-1]:
        raise ValueError(
            f"got a sample of {longest} tokens; wanted at most {shapes.row_lengths[-1]}, the "
            "longest row"
        )
    # Equal lengths keep their order, so that the same samples always lie in the same rows.
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fitted = [
        _best_fit(lengths, order, row_tokens)
        for row_tokens in shapes.row_lengths
        if row_tokens >= longest
    ]
    fewest = -(-sum(lengths) // shapes.largest.num_places)
    # One microbatch more may be of shorter rows, and so cost less.
    even = [
        _even_rows(lengths, order, num_microbatches * shapes.row_counts[-1])
        for num_microbatches in range(fewest, fewest + 3)
    ]
    plans = [
        _cut_microbatches(lengths, rows, shapes)
        for rows in fitted + even
        if max(sum(lengths[i] for i in row) for row in rows) <= shapes.row_lengths[-1]
    ]
    overhead = _MICROBATCH_COST * shapes.largest.num_places
    return min(plans, key=lambda plan: plan.num_places + overhead * len(plan.shapes))


def _best_fit(lengths: Sequence[int], order: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return the samples of each row: a sample goes where it leaves the least room."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for i in order:
        index = bisect.bisect_left(free, (lengths[i], -1))
        room, row = free.pop(index) if index < len(free) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return rows


def _even_rows(lengths: Sequence[int], order: Sequence[int], num_rows: int) -> list[list[int]]:
    """Return the samples of each row: a sample goes into the emptiest of so many rows."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    filled = [(0, row) for row in range(num_rows)]  # a heap: equal entries are one already
    for i in order:
        tokens, row = filled[0]
        rows[row].append(i)
        heapq.heapreplace(filled, (tokens + lengths[i], row))
    return [row for row in rows if row]


def _cut_microbatches(lengths: Sequence[int], rows: list[list[int]], shapes: RowShapes) -> RowPlan:
    """Return rows as microbatches, the fullest rows first, each of the smallest shape."""
    fills = [sum(lengths[i] for i in row) for row in rows]
    by_fill = sorted(range(len(rows)), key=lambda row: (-fills[row], row))
    locations, plan_shapes = [RowLocation(0, 0, 0)] * len(lengths), []
    max_rows = shapes.row_counts[-1]
    for first in range(0, len(rows), max_rows):
        chosen = by_fill[first : first + max_rows]
        for index, row in enumerate(chosen):
            start = 0
            for i in rows[row]:
                locations[i] = RowLocation(len(plan_shapes), index, start)
                start += lengths[i]
        plan_shapes.append(shapes.smallest_shape(len(chosen), fills[chosen[0]]))
    return RowPlan(locations, plan_shapes)


def _round_up(value: float, unit: int) -> int:
    return math.ceil(value / unit) * unit
