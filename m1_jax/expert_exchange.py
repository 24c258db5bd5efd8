"""Tokens travel to the devices that hold their experts, and the experts' answers come back.

Every device of a group knows the whole group's routing (a few bytes a token), so each computes by
itself where every row goes: the rows that a device receives are sorted by expert, then by sender.
They pass through a buffer of fixed size, in as many rounds as the fullest device needs: one where
the router is balanced, more where it is not, and no token is dropped. A capacity limit is one
round only.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import collectives, experts, quantize, sharding

# Rows of the receive buffer over those of a balanced router. A larger buffer costs memory, a
# smaller one rounds; tokens per device of the release scatter by far less than a half.
BUFFER_SLACK = 1.5


@jax.named_scope("exchange")
def run_routed_experts(
    x: Float[Array, "M D"],
    weights: Float[Array, "M A"],
    expert_ids: Int[Array, "M A"],
    gate: Float[Array, "*n e D F"] | quantize.QuantizedMatrices,
    up: Float[Array, "*n e D F"] | quantize.QuantizedMatrices,
    down: Float[Array, "*n e F D"] | quantize.QuantizedMatrices,
    capacity: float | None = None,
    stack_index: tuple | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """Return each token's weighted sum of its experts' outputs, float32, and dropped choices.

    Args:
      x: tokens of this device.
      weights: of the chosen experts, float32.
      chosen: experts of all devices together; their number or more means none.
      gate, up, down: experts of this device (of E in all, spread evenly).
      capacity: None for dropless; else a device takes at most this many times the rows of a
        balanced router, and the last ones of its last experts are dropped.
      place: of this layer, where gate, up and down are still stacked over layers; no gradient.
    """
    number = gate.shape[-3] * collectives.axis_size("experts")
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    inverse = jnp.argsort(order).reshape(expert_ids.shape)
    rows = _take_rows(x, order // expert_ids.shape[1], inverse)
    scale = jnp.take(weights.reshape(-1), order)
    counts = jnp.bincount(expert_ids.reshape(-1), length=number).astype(jnp.int32)
    if capacity is None and collectives.axis_size("experts") == 1:
        if stack_index is None:
            y = experts.grouped_mlp(rows, gate, up, down, counts, scale)
        else:
            y = experts.grouped_mlp_stacked(rows, gate, up, down, stack_index, counts, scale)
        return _sum_over_experts(y, order, inverse), jnp.zeros(())
    if stack_index is not None:
        gate, up, down = (jax.tree.map(lambda a: a[stack_index], x) for x in (gate, up, down))
    plan = _ExchangePlan(
        collectives.all_gather_stacked(counts, "experts"),
        num_local_experts=gate.shape[0],
        num_buffer_rows=_num_buffer_rows(rows, capacity),
        has_ragged_all_to_all=sharding.has_ragged_all_to_all(),
    )
    y = _exchange_rows(capacity is None, plan, rows, scale, gate, up, down)
    kept = jnp.sum(counts if capacity is None else plan.leaving_chunks(0)[2])
    dropped = (jnp.sum(counts) - kept).astype(jnp.float32)
    return _sum_over_experts(y, order, inverse), dropped


def _sum_over_experts(rows, order, inverse):
    """Return the sum over each token's experts, float32; rows that went nowhere are zero."""
    y = _take_rows(rows, inverse.reshape(-1), order.reshape(-1, 1))
    return jnp.sum(y.reshape(*inverse.shape, -1).astype(jnp.float32), axis=1)


def _num_buffer_rows(rows, capacity: float | None) -> int:
    """Return rows of the receive buffer: no more than could ever arrive, a multiple of 8."""
    most = rows.shape[0] * collectives.axis_size("experts")
    wanted = math.ceil(rows.shape[0] * (BUFFER_SLACK if capacity is None else capacity) / 8) * 8
    return min(max(wanted, 8), most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ExchangePlan:
    """Where rows go.

    counts[s, e]: rows of sender s for expert e. local: experts of a device. buffer: rows that a
    device receives in a round. ragged: whether the devices have a ragged all-to-all.
    """

    row_counts: Int[Array, "P E"]
    num_local_experts: int = dataclasses.field(metadata={"static": True})
    num_buffer_rows: int = dataclasses.field(metadata={"static": True})
    has_ragged_all_to_all: bool = dataclasses.field(metadata={"static": True})

    def _chunk_starts(self):
        """Return where chunk (s, e) begins among the sender's rows, and among the receiver's."""
        sent = jnp.cumsum(self.row_counts, axis=1) - self.row_counts
        per_device = self.row_counts.T.reshape(
            -1, self.num_local_experts * self.row_counts.shape[0]
        )
        received = jnp.cumsum(per_device, axis=1) - per_device
        return sent, received.reshape(self.row_counts.shape[::-1]).T

    def chunk_windows(self, round_index):
        """Return offset at the sender, offset in the buffer, and size of every chunk's part."""
        sent, received = self._chunk_starts()
        low, high = round_index * self.num_buffer_rows, (round_index + 1) * self.num_buffer_rows
        first = jnp.clip(received, low, high)
        size = jnp.clip(received + self.row_counts, low, high) - first
        # Offsets of nothing could lie outside of the buffers.
        at, place = (jnp.where(size > 0, x, 0) for x in (sent + first - received, first - low))
        return at, place, size

    def num_rounds(self):
        """Return in how many rounds all rows of all devices have passed."""
        per_device = jnp.sum(
            self.row_counts.reshape(self.row_counts.shape[0], -1, self.num_local_experts),
            axis=(0, 2),
        )
        return (jnp.max(per_device) + self.num_buffer_rows - 1) // self.num_buffer_rows

    def arriving_chunks(self, round_index):
        """Return `window` of the chunks for this device's experts, each [P, local]."""
        start = collectives.axis_index("experts") * self.num_local_experts
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, slice_size=self.num_local_experts, axis=1
        )
        return tuple(cut(x, start) for x in self.chunk_windows(round_index))

    def leaving_chunks(self, round_index):
        """Return `window` of this device's own rows, each [E]."""
        return tuple(x[collectives.axis_index("experts")] for x in self.chunk_windows(round_index))

    def dispatch_arguments(self, round_index):
        """Return the arguments of `_send_rows` for rows on their way to the experts."""
        at, place, size = self.leaving_chunks(round_index)
        return at, size, place, self.arriving_chunks(round_index)[2].reshape(-1)

    def combine_arguments(self, round_index):
        """Return the arguments of `_send_rows` for the way back."""
        at, place, size = (x.reshape(-1) for x in self.arriving_chunks(round_index))
        return place, size, at, self.leaving_chunks(round_index)[2]

    def group_sizes(self, round_index):
        """Return how many rows of the buffer belong to each of this device's experts."""
        return jnp.sum(self.arriving_chunks(round_index)[2], axis=0)


def _send_rows(plan: _ExchangePlan, rows, into, arguments):
    """Send chunks of rows to other devices' `into`. See `jax.lax.ragged_all_to_all`."""
    if collectives.axis_size("experts") == 1:
        return _copy_chunks(rows[None], into, *(x[None] for x in arguments[:3]))
    if not plan.has_ragged_all_to_all:
        return _send_rows_dense(rows, into, *arguments)
    return jax.lax.platform_dependent(
        rows, into, *arguments, cpu=_send_rows_dense, default=_send_rows_ragged
    )


def _send_rows_ragged(rows, into, at, size, place, arriving):
    (axis,) = collectives.mesh_axes("experts")
    return jax.lax.ragged_all_to_all(rows, into, at, size, place, arriving, axis_name=axis)


def _send_rows_dense(rows, into, at, size, place, arriving):
    """The same where there is no ragged exchange (CPU, v5e): everybody's rows, then a choice."""
    del arriving
    devices, me = collectives.axis_size("experts"), collectives.axis_index("experts")

    def to_me(x):
        return jnp.take(
            collectives.all_gather_stacked(x, "experts").reshape(devices, devices, -1), me, axis=1
        )

    return _copy_chunks(
        collectives.all_gather_stacked(rows, "experts"), into, *map(to_me, (at, size, place))
    )


def _copy_chunks(rows, into, at, size, place):
    """Copy chunks of rows [P, n, D], at [P, k] and of the given sizes, to their places."""
    target = jnp.arange(into.shape[0], dtype=jnp.int32)[:, None]
    start, stop = place.reshape(1, -1), (place + size).reshape(1, -1)
    inside = (target >= start) & (target < stop)
    chunk = jnp.argmax(inside, axis=1)
    sender = chunk // at.shape[1]
    source = jnp.take(at.reshape(-1), chunk) + target[:, 0] - jnp.take(place.reshape(-1), chunk)
    found = jnp.any(inside, axis=1)
    flat = rows.reshape(-1, rows.shape[-1])
    new = jnp.take(flat, jnp.where(found, sender * rows.shape[1] + source, 0), axis=0)
    return jnp.where(found[:, None], new, into)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange_rows(dropless: bool, plan: _ExchangePlan, rows, scale, gate, up, down):
    """Return scale * expert(row) for rows sorted by expert, in their order."""

    def turn(i, y):
        arrived, weights = _receive_rows(plan, i, rows, scale)
        out = experts.grouped_mlp(arrived, gate, up, down, plan.group_sizes(i), weights)
        return _send_rows(plan, out, y, plan.combine_arguments(i))

    return jax.lax.fori_loop(0, _count_rounds(dropless, plan), turn, jnp.zeros_like(rows))


def _count_rounds(dropless, plan):
    # The same number everywhere: groups whose programs differ in length could wait for each other.
    return collectives.pmax(plan.num_rounds(), "tokens") if dropless else 1


def _receive_rows(plan: _ExchangePlan, round_index, rows, scale):
    """Return the rows of this device's experts and their weights; the rest of the buffer is 0."""
    into = jnp.zeros((plan.num_buffer_rows, rows.shape[1]), rows.dtype)
    arrived = _send_rows(plan, rows, into, plan.dispatch_arguments(round_index))
    return arrived, _send_scalars(plan, round_index, scale)


def _send_scalars(plan: _ExchangePlan, round_index, scale):
    """Move one number a row the dense way: all of a group's together are few bytes."""
    at, place, size = plan.arriving_chunks(round_index)
    everyone = collectives.all_gather_stacked(scale, "experts")[..., None]
    into = jnp.zeros((plan.num_buffer_rows, 1), scale.dtype)
    return _copy_chunks(everyone, into, at, size, place)[:, 0]


def _return_scalars(plan: _ExchangePlan, round_index, numbers, into):
    """Give one number a row of the buffer back to the rows' senders; adds nothing to others."""
    at, place, size = plan.arriving_chunks(round_index)
    devices, length = collectives.axis_size("experts"), into.shape[0]
    row = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    inside = (row >= at[:, None]) & (row < (at + size)[:, None])
    source = jnp.sum(jnp.where(inside, place[:, None] + row - at[:, None], 0), axis=2)
    found = jnp.any(inside, axis=2)
    mine = jnp.where(found, jnp.take(numbers, source.reshape(-1)).reshape(devices, length), 0)
    axes = collectives.mesh_axes("experts")
    if axes:
        return into + jax.lax.psum_scatter(mine, axes, scatter_dimension=0, tiled=True)[0]
    return into + mine[0]


def _exchange_rows_fwd(dropless, plan, rows, scale, gate, up, down):
    y = _exchange_rows(dropless, plan, rows, scale, gate, up, down)
    return y, (plan, rows, scale, gate, up, down)


def _exchange_rows_bwd(dropless, residuals, grad):
    plan, rows, scale, gate, up, down = residuals

    def turn(i, carry):
        d_rows, d_scale, d_experts = carry
        arrived, weights = _receive_rows(plan, i, rows, scale)
        d_out = _send_rows(plan, grad, jnp.zeros_like(arrived), plan.dispatch_arguments(i))
        groups = plan.group_sizes(i)

        def function(arrived, weights, gate, up, down):
            return experts.grouped_mlp(arrived, gate, up, down, groups, weights)

        _, pull = jax.vjp(function, arrived, weights, gate, up, down)
        d_arrived, d_weights, *more = pull(d_out)
        d_experts = [sum_ + x.astype(jnp.float32) for sum_, x in zip(d_experts, more, strict=True)]
        d_rows = _send_rows(plan, d_arrived, d_rows, plan.combine_arguments(i))
        return d_rows, _return_scalars(plan, i, d_weights, d_scale), d_experts

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (gate, up, down)]
    carry = (jnp.zeros_like(rows), jnp.zeros_like(scale), zeros)
    turns = _count_rounds(dropless, plan)
    d_rows, d_scale, d_experts = jax.lax.fori_loop(0, turns, turn, carry)
    d_experts = [d.astype(x.dtype) for d, x in zip(d_experts, (gate, up, down), strict=True)]
    return None, d_rows, d_scale, *d_experts


_exchange_rows.defvjp(_exchange_rows_fwd, _exchange_rows_bwd)


@jax.custom_vjp
def _take_rows(
    x: Float[Array, "M D"], index: Int[Array, "P"], inverse: Int[Array, "M A"]
) -> Float[Array, "P D"]:
    """x[index], where inverse[m] lists the A places at which row m was put.

    The gradient gathers through `inverse`; autodiff would scatter, which is slow everywhere.
    """
    return jnp.take(x, index, axis=0)


def _take_rows_fwd(x, index, inverse):
    return _take_rows(x, index, inverse), inverse


def _take_rows_bwd(inverse, grad):
    return jnp.sum(jnp.take(grad, inverse, axis=0), axis=1), None, None


_take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)
