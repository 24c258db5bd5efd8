"""Which rows go from which device to which experts, in how many rounds.

All devices of a group compute the same plan, from the numbers of rows that each has for each
expert. The rows that a device receives are sorted by expert, then by sender.

Chunk (s, e) is the rows that sender s has for expert e. P devices share E experts, e on each. A
device has n rows of its own.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import collectives, sharding

# Rows of the receive buffer over those of a balanced router. A larger buffer costs memory, a
# smaller one costs rounds. The released router's load on a device varies by far less than a half.
BUFFER_SLACK = 1.5
# Without a gradient a receive buffer of up to this many rows takes all that could ever arrive: 12
# MiB in the release. Decoding then has one round, whatever the router does.
SINGLE_ROUND_ROWS = 1024


class RowChunks(NamedTuple):
    """Chunks of rows that go from an array of their sender to an array of their receiver."""

    input_offsets: Int[Array, "*chunks"]  # of their first rows, in the sender's array
    sizes: Int[Array, "*chunks"]  # in rows
    output_offsets: Int[Array, "*chunks"]  # in the receiver's array


class RowTransfer(NamedTuple):
    """What one device sends and receives, each in the order of the device at the other end."""

    sends: RowChunks  # [E]
    receives: RowChunks  # [P, e]


def make_plan(counts, scale, num_local_experts: int, capacity: float | None, has_gradient: bool):
    """Tell the group this device's counts and weights, and return the plan of all."""
    # Both in one collective, since each costs some microseconds of latency in every layer. The
    # gradient of the weights is `_return_scalars`, not the transpose of this gather.
    numbers = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(scale), counts.dtype)
    numbers = collectives.all_gather_stacked(jnp.concatenate([counts, numbers]), "experts")
    row_counts, row_scales = numbers[:, : len(counts)], numbers[:, len(counts) :]
    return ExchangePlan(
        row_counts,
        jax.lax.bitcast_convert_type(row_scales, scale.dtype),
        num_local_experts=num_local_experts,
        num_buffer_rows=_num_buffer_rows(len(scale), capacity, has_gradient),
        is_dropless=capacity is None,
        is_ragged=collectives.axis_size("experts") > 1 and sharding.has_ragged_all_to_all(),
    )


def _num_buffer_rows(num_rows: int, capacity: float | None, has_gradient: bool) -> int:
    """Return the rows of the receive buffer: a multiple of 8, or all rows that could arrive."""
    max_rows = num_rows * collectives.axis_size("experts")
    if capacity is None and not has_gradient and max_rows <= SINGLE_ROUND_ROWS:
        return max_rows
    factor = BUFFER_SLACK if capacity is None else capacity
    # A balanced router sends a device as many rows as it has itself.
    return min(max(math.ceil(num_rows * factor / 8) * 8, 8), max_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Where rows go. All devices of a group compute the same plan.

    Attributes:
      row_counts: row_counts[s, e] is the number of rows that sender s has for expert e.
      row_scales: the weight of each of sender s's n rows.
      num_local_experts: experts of one device.
      num_buffer_rows: rows that a device receives in a round.
      is_dropless: whether there are as many rounds as all rows need. Otherwise there is one.
      is_ragged: whether the devices have a ragged all-to-all. The plan says so, since a gradient is
        traced where nobody knows the devices.
    """

    row_counts: Int[Array, "P E"]
    row_scales: Float[Array, "P n"]
    num_local_experts: int = dataclasses.field(metadata={"static": True})
    num_buffer_rows: int = dataclasses.field(metadata={"static": True})
    is_dropless: bool = dataclasses.field(metadata={"static": True})
    is_ragged: bool = dataclasses.field(metadata={"static": True})

    def _chunk_starts(self):
        """Return where each chunk begins among its sender's rows, and among its receiver's rows."""
        sender_starts = jnp.cumsum(self.row_counts, axis=1) - self.row_counts
        # A receiver orders its rows by expert, then by sender: [receivers, e * P].
        per_device = self.row_counts.T.reshape(
            -1, self.num_local_experts * self.row_counts.shape[0]
        )
        receiver_starts = jnp.cumsum(per_device, axis=1) - per_device
        return sender_starts, receiver_starts.reshape(self.row_counts.shape[::-1]).T

    def chunk_parts(self, round_index):
        """Return the part of each chunk that passes in a round: three arrays [P, E].

        They are its offset among the sender's rows, its offset in the receiver's buffer, and its
        number of rows.
        """
        sender_start, receiver_start = self._chunk_starts()
        # The round takes this part of each receiver's rows.
        low, high = round_index * self.num_buffer_rows, (round_index + 1) * self.num_buffer_rows
        first = jnp.clip(receiver_start, low, high)
        size = jnp.clip(receiver_start + self.row_counts, low, high) - first
        # An empty part's offsets could lie outside of the buffers.
        sender_offset, buffer_offset = (
            jnp.where(size > 0, x, 0) for x in (sender_start + first - receiver_start, first - low)
        )
        return sender_offset, buffer_offset, size

    def num_rounds(self):
        """Return the number of rounds, the same on all devices of the mesh."""
        if not self.is_dropless or self.num_buffer_rows == self.row_scales.size:
            return 1
        per_device = jnp.sum(
            self.row_counts.reshape(self.row_counts.shape[0], -1, self.num_local_experts),
            axis=(0, 2),
        )
        num_rounds = (jnp.max(per_device) + self.num_buffer_rows - 1) // self.num_buffer_rows
        if collectives.mesh_axes("tokens") == collectives.mesh_axes("experts"):
            return num_rounds  # one group has all tokens
        # The largest number of all groups, since groups also meet in other collectives: devices
        # whose programs differ in length could wait for each other forever.
        return collectives.pmax(num_rounds, "tokens")

    def arriving_chunks(self, round_index):
        """Return `chunk_parts` of the chunks for this device's experts, each [P, e]."""
        start = collectives.axis_index("experts") * self.num_local_experts
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, slice_size=self.num_local_experts, axis=1
        )
        return tuple(cut(x, start) for x in self.chunk_parts(round_index))

    def leaving_chunks(self, round_index):
        """Return `chunk_parts` of this device's own rows, each [E]."""
        return tuple(x[collectives.axis_index("experts")] for x in self.chunk_parts(round_index))

    def dispatch_transfer(self, round_index):
        """Return how rows travel to the experts."""
        sender_offset, buffer_offset, size = self.leaving_chunks(round_index)
        sends = RowChunks(sender_offset, size, buffer_offset)
        sender_offset, buffer_offset, size = self.arriving_chunks(round_index)
        return RowTransfer(sends, RowChunks(sender_offset, size, buffer_offset))

    def combine_transfer(self, round_index):
        """Return how the experts' outputs travel back."""
        num_devices = self.row_counts.shape[0]
        sender_offset, buffer_offset, size = (
            x.reshape(-1) for x in self.arriving_chunks(round_index)
        )
        sends = RowChunks(buffer_offset, size, sender_offset)
        sender_offset, buffer_offset, size = (
            x.reshape(num_devices, -1) for x in self.leaving_chunks(round_index)
        )
        return RowTransfer(sends, RowChunks(buffer_offset, size, sender_offset))

    def group_sizes(self, round_index):
        """Return how many rows of the buffer belong to each of this device's experts."""
        return jnp.sum(self.arriving_chunks(round_index)[2], axis=0)
