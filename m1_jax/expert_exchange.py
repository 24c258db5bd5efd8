"""Tokens travel to the devices that hold their experts, and the experts' outputs come back.

The devices that share the experts are a group. Every device knows the routing of the whole group (a
few bytes a token), so each computes by itself where every row goes. The rows that a device receives
are sorted by expert, then by sender. They pass through a buffer of fixed size, in as many rounds as
the fullest device needs: one round where the router is balanced, more where it is not. No token is
dropped. A capacity limit means a single round, which drops what does not fit.

Chunk (s, e) is the rows that sender s has for expert e. P devices share E experts, e on each.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import collectives, experts, layer_stack, quantize, sharding

# Rows of the receive buffer over those of a balanced router. A larger buffer costs memory, a
# smaller one costs rounds. The released router's load on a device varies by far less than a half.
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
    stack_index: layer_stack.StackIndex | None = None,
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """Return each token's weighted sum of its experts' outputs, float32, and dropped choices.

    Args:
      x: tokens of this device.
      weights: float32 weights of each token's experts.
      expert_ids: each token's experts, numbered over all devices. E or more means no expert.
      gate, up, down: matrices of this device's experts.
      capacity: None drops no token. Otherwise a device takes at most this many times the rows of a
        balanced router, and the last rows of its last experts are dropped.
      stack_index: index of this layer, where gate, up and down are still stacked over layers. There
        is no gradient then.
    """
    num_experts = gate.shape[-3] * collectives.axis_size("experts")
    # A row for each of a token's A choices, sorted by expert. A stable sort keeps the tokens of an
    # expert in order, so that results do not depend on how the sort breaks ties.
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    inverse = jnp.argsort(order).reshape(expert_ids.shape)
    rows = _take_rows(x, order // expert_ids.shape[1], inverse)
    scale = jnp.take(weights.reshape(-1), order)
    # Choices of no expert are past the end: they sort last, and no chunk counts them.
    counts = jnp.bincount(expert_ids.reshape(-1), length=num_experts).astype(jnp.int32)
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
    num_sent = jnp.sum(counts if capacity is None else plan.leaving_chunks(0)[2])
    num_dropped = (jnp.sum(counts) - num_sent).astype(jnp.float32)
    return _sum_over_experts(y, order, inverse), num_dropped


def _sum_over_experts(rows, order, inverse):
    """Return the sum over each token's experts, float32. Rows that went to no expert are zero."""
    y = _take_rows(rows, inverse.reshape(-1), order.reshape(-1, 1))
    return jnp.sum(y.reshape(*inverse.shape, -1).astype(jnp.float32), axis=1)


def _num_buffer_rows(rows, capacity: float | None) -> int:
    """Return the rows of the receive buffer: a multiple of 8, or all rows that could arrive."""
    max_rows = rows.shape[0] * collectives.axis_size("experts")
    factor = BUFFER_SLACK if capacity is None else capacity
    # A balanced router sends a device as many rows as it has itself.
    num_rows = math.ceil(rows.shape[0] * factor / 8) * 8
    return min(max(num_rows, 8), max_rows)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _ExchangePlan:
    """Where rows go. All devices of a group compute the same plan.

    Attributes:
      row_counts: row_counts[s, e] is the number of rows that sender s has for expert e.
      num_local_experts: experts of one device.
      num_buffer_rows: rows that a device receives in a round.
      has_ragged_all_to_all: whether the devices have a ragged all-to-all.
    """

    row_counts: Int[Array, "P E"]
    num_local_experts: int = dataclasses.field(metadata={"static": True})
    num_buffer_rows: int = dataclasses.field(metadata={"static": True})
    has_ragged_all_to_all: bool = dataclasses.field(metadata={"static": True})

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
        """Return in how many rounds all rows of all devices have passed."""
        per_device = jnp.sum(
            self.row_counts.reshape(self.row_counts.shape[0], -1, self.num_local_experts),
            axis=(0, 2),
        )
        return (jnp.max(per_device) + self.num_buffer_rows - 1) // self.num_buffer_rows

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

    # The two below return the last four arguments of `jax.lax.ragged_all_to_all`, in its order.

    def dispatch_arguments(self, round_index):
        """Return the arguments of `_send_rows` for rows on their way to the experts."""
        sender_offset, buffer_offset, size = self.leaving_chunks(round_index)
        return sender_offset, size, buffer_offset, self.arriving_chunks(round_index)[2].reshape(-1)

    def combine_arguments(self, round_index):
        """Return the arguments of `_send_rows` for the way back."""
        sender_offset, buffer_offset, size = (
            x.reshape(-1) for x in self.arriving_chunks(round_index)
        )
        return buffer_offset, size, sender_offset, self.leaving_chunks(round_index)[2]

    def group_sizes(self, round_index):
        """Return how many rows of the buffer belong to each of this device's experts."""
        return jnp.sum(self.arriving_chunks(round_index)[2], axis=0)


# ---- sending chunks of rows: arguments are named as in `jax.lax.ragged_all_to_all`


def _send_rows(plan: _ExchangePlan, rows, output, arguments):
    """Return this device's `output` with the chunks of rows that all devices sent to it."""
    if collectives.axis_size("experts") == 1:
        return _copy_chunks(rows[None], output, *(x[None] for x in arguments[:3]))
    if not plan.has_ragged_all_to_all:
        return _send_rows_dense(rows, output, *arguments)
    # XLA:CPU has none either. Lowering decides, so that ahead-of-time compiles get the target's.
    return jax.lax.platform_dependent(
        rows, output, *arguments, cpu=_send_rows_dense, default=_send_rows_ragged
    )


def _send_rows_ragged(rows, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    (axis,) = collectives.mesh_axes("experts")
    return jax.lax.ragged_all_to_all(
        rows, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axis
    )


def _send_rows_dense(rows, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    """Do the same without a ragged all-to-all (CPU, v5e): gather all rows, then select."""
    del recv_sizes
    num_devices = collectives.axis_size("experts")
    this_device = collectives.axis_index("experts")

    def take_column(x):
        """Return what each sender says of its chunks for this device, [P, chunks]."""
        return jnp.take(
            collectives.all_gather_stacked(x, "experts").reshape(num_devices, num_devices, -1),
            this_device,
            axis=1,
        )

    return _copy_chunks(
        collectives.all_gather_stacked(rows, "experts"),
        output,
        *map(take_column, (input_offsets, send_sizes, output_offsets)),
    )


def _copy_chunks(rows, output, input_offsets, sizes, output_offsets):
    """Return `output` with chunks of rows [P, n, D] copied in. Offsets and sizes are [P, k]."""
    # For each row of the output: which chunk covers it, and which row of the input that is. A
    # gather by output row is fast everywhere, and a scatter by chunk is not.
    target = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    start, stop = output_offsets.reshape(1, -1), (output_offsets + sizes).reshape(1, -1)
    is_inside = (target >= start) & (target < stop)
    chunk = jnp.argmax(is_inside, axis=1)
    sender = chunk // input_offsets.shape[1]
    source = (
        jnp.take(input_offsets.reshape(-1), chunk)
        + target[:, 0]
        - jnp.take(output_offsets.reshape(-1), chunk)
    )
    is_covered = jnp.any(is_inside, axis=1)
    flat = rows.reshape(-1, rows.shape[-1])
    copied = jnp.take(flat, jnp.where(is_covered, sender * rows.shape[1] + source, 0), axis=0)
    return jnp.where(is_covered[:, None], copied, output)


# ---- the exchange, round by round


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange_rows(dropless: bool, plan: _ExchangePlan, rows, scale, gate, up, down):
    """Return scale * expert(row) for rows sorted by expert, in their order.

    A custom gradient, since reverse mode cannot go through a loop whose length is data. It
    dispatches the rows a second time rather than keep every round's buffer.
    """

    def run_round(i, y):
        arrived, weights = _receive_rows(plan, i, rows, scale)
        out = experts.grouped_mlp(arrived, gate, up, down, plan.group_sizes(i), weights)
        return _send_rows(plan, out, y, plan.combine_arguments(i))

    return jax.lax.fori_loop(0, _count_rounds(dropless, plan), run_round, jnp.zeros_like(rows))


def _count_rounds(dropless, plan):
    # The largest number of all groups, since groups also meet in other collectives: devices whose
    # programs differ in length could wait for each other forever.
    return collectives.pmax(plan.num_rounds(), "tokens") if dropless else 1


def _receive_rows(plan: _ExchangePlan, round_index, rows, scale):
    """Return the rows of this device's experts and their weights. The buffer's end is zeros."""
    buffer = jnp.zeros((plan.num_buffer_rows, rows.shape[1]), rows.dtype)
    arrived = _send_rows(plan, rows, buffer, plan.dispatch_arguments(round_index))
    return arrived, _send_scalars(plan, round_index, scale)


def _send_scalars(plan: _ExchangePlan, round_index, scale):
    """Send one number a row the dense way, since all numbers of a group are few bytes."""
    sender_offset, buffer_offset, size = plan.arriving_chunks(round_index)
    group_scales = collectives.all_gather_stacked(scale, "experts")[..., None]
    buffer = jnp.zeros((plan.num_buffer_rows, 1), scale.dtype)
    return _copy_chunks(group_scales, buffer, sender_offset, size, buffer_offset)[:, 0]


def _return_scalars(plan: _ExchangePlan, round_index, numbers, totals):
    """Return `totals` with one number per buffer row added at the rows' senders."""
    sender_offset, buffer_offset, size = plan.arriving_chunks(round_index)
    num_devices, length = collectives.axis_size("experts"), totals.shape[0]
    # [P, rows of a sender, e]: whether the sender's row came to this device in this round.
    row = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    is_inside = (row >= sender_offset[:, None]) & (row < (sender_offset + size)[:, None])
    # At most one expert has the row, so the sum selects.
    source = jnp.sum(
        jnp.where(is_inside, buffer_offset[:, None] + row - sender_offset[:, None], 0), axis=2
    )
    by_sender = jnp.where(
        jnp.any(is_inside, axis=2),
        jnp.take(numbers, source.reshape(-1)).reshape(num_devices, length),
        0,
    )
    axes = collectives.mesh_axes("experts")
    if axes:
        return totals + jax.lax.psum_scatter(by_sender, axes, scatter_dimension=0, tiled=True)[0]
    return totals + by_sender[0]


def _exchange_rows_fwd(dropless, plan, rows, scale, gate, up, down):
    y = _exchange_rows(dropless, plan, rows, scale, gate, up, down)
    return y, (plan, rows, scale, gate, up, down)


def _exchange_rows_bwd(dropless, residuals, grad):
    plan, rows, scale, gate, up, down = residuals

    # The carry: gradients of this device's rows and weights, and float32 sums of the gradients of
    # its experts' matrices, which every round adds to.
    def run_round(i, carry):
        d_rows, d_scale, d_experts = carry
        arrived, weights = _receive_rows(plan, i, rows, scale)
        # The gradient of the output travels as the rows do, and that of the rows as the output.
        d_out = _send_rows(plan, grad, jnp.zeros_like(arrived), plan.dispatch_arguments(i))
        group_sizes = plan.group_sizes(i)

        def run_experts(arrived, weights, gate, up, down):
            return experts.grouped_mlp(arrived, gate, up, down, group_sizes, weights)

        _, pullback = jax.vjp(run_experts, arrived, weights, gate, up, down)
        d_arrived, d_weights, *d_matrices = pullback(d_out)
        d_experts = [
            total + x.astype(jnp.float32) for total, x in zip(d_experts, d_matrices, strict=True)
        ]
        d_rows = _send_rows(plan, d_arrived, d_rows, plan.combine_arguments(i))
        return d_rows, _return_scalars(plan, i, d_weights, d_scale), d_experts

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (gate, up, down)]
    carry = (jnp.zeros_like(rows), jnp.zeros_like(scale), zeros)
    num_rounds = _count_rounds(dropless, plan)
    d_rows, d_scale, d_experts = jax.lax.fori_loop(0, num_rounds, run_round, carry)
    d_experts = [d.astype(x.dtype) for d, x in zip(d_experts, (gate, up, down), strict=True)]
    return None, d_rows, d_scale, *d_experts


_exchange_rows.defvjp(_exchange_rows_fwd, _exchange_rows_bwd)


@jax.custom_vjp
def _take_rows(
    x: Float[Array, "M D"], index: Int[Array, "n"], inverse: Int[Array, "M A"]
) -> Float[Array, "n D"]:
    """Return x[index], where inverse[m] lists the A positions of row m in the result.

    The gradient gathers through `inverse`. Autodiff would scatter, which is slow everywhere.
    """
    return jnp.take(x, index, axis=0)


def _take_rows_fwd(x, index, inverse):
    return _take_rows(x, index, inverse), inverse


def _take_rows_bwd(inverse, grad):
    return jnp.sum(jnp.take(grad, inverse, axis=0), axis=1), None, None


_take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)
