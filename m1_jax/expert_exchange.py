"""Tokens travel to the devices that hold their experts, and the experts' outputs come back.

The devices that share the experts are a group. Every device knows the routing of the whole group (a
few bytes a token), so each computes by itself where every row goes. The rows that a device receives
are sorted by expert, then by sender. They pass through a buffer of fixed size, in as many rounds as
the fullest device needs: one round where the router is balanced, more where it is not. No token is
dropped. A capacity limit means a single round, which drops what does not fit.

Few tokens, as in decoding, have no such plan. Every device of the group gets all of them, and what
their experts make of them is added up over the group.

Chunk (s, e) is the rows that sender s has for expert e. P devices share E experts, e on each.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from m1_jax import choice_rows, collectives, exchange_plan, experts, layer_stack, quantize

# Name of the rows that arrived at their experts, for rematerialisation.
ROWS_NAME = "experts_rows"
# Up to so many tokens of a group, without a gradient, each device takes all of them.
MAX_GATHERED_TOKENS = 256


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
    num_devices, is_dropless = collectives.axis_size("experts"), capacity is None
    is_shared = is_dropless and stack_index is not None and num_devices > 1
    if is_shared and takes_all_tokens(num_devices * len(x), weights.shape[1]):
        return _run_on_all_tokens(x, weights, expert_ids, gate, up, down, stack_index)
    choices = choice_rows.sort_choices(x, weights, expert_ids, num_devices * gate.shape[-3])
    rows, scale, counts = choices.rows, choices.scale, choices.counts
    if is_dropless and num_devices == 1:
        y = _run_local_experts(choices, gate, up, down, stack_index)
        return choices.sum_over_choices(y), jnp.zeros(())
    plan = exchange_plan.make_plan(
        counts, scale, gate.shape[-3], capacity, has_gradient=stack_index is None
    )
    if stack_index is None:
        y = _exchange_rows(plan, rows, scale, gate, up, down)
    else:

        def run_experts(arrived, weights, group_sizes):
            return experts.grouped_mlp_stacked(
                arrived, gate, up, down, stack_index, group_sizes, weights
            )

        y = _run_rounds(plan, rows, run_experts)
    num_sent = jnp.sum(counts if is_dropless else plan.leaving_chunks(0)[2])
    num_dropped = (jnp.sum(counts) - num_sent).astype(jnp.float32)
    return choices.sum_over_choices(y), num_dropped


def takes_all_tokens(num_tokens: int, num_choices: int) -> bool:
    """Say whether each device takes all tokens of its group, where there is no gradient.

    To bring few rows everywhere takes less time than to plan where each goes. Two choices of a
    token have the same sum in any order, whatever zeros the other devices add to it. The sum of
    three could depend on where in the batch a token is.

    Args:
      num_tokens: of the group.
      num_choices: experts of a token.
    """
    return num_tokens <= MAX_GATHERED_TOKENS and num_choices <= 2


def _run_on_all_tokens(x, weights, expert_ids, gate, up, down, stack_index):
    """Do the same where each device runs its experts on the tokens of the whole group."""
    numbers = jax.lax.bitcast_convert_type(weights, expert_ids.dtype)
    numbers = jnp.concatenate([expert_ids, numbers], axis=1)
    x, numbers = (collectives.all_gather(a, "experts", 0) for a in (x, numbers))
    expert_ids, numbers = jnp.split(numbers, 2, axis=1)
    weights = jax.lax.bitcast_convert_type(numbers, weights.dtype)
    num_experts = gate.shape[-3]
    local_ids = expert_ids - collectives.axis_index("experts") * num_experts
    is_local = (local_ids >= 0) & (local_ids < num_experts)
    local_ids = jnp.where(is_local, local_ids, num_experts)
    choices = choice_rows.sort_choices(x, weights, local_ids, num_experts)
    y = choices.sum_over_choices(_run_local_experts(choices, gate, up, down, stack_index))
    return collectives.psum_scatter(y, "experts", 0), jnp.zeros(())


def _run_local_experts(choices: choice_rows.SortedChoices, gate, up, down, stack_index):
    arguments = choices.counts, choices.scale
    if stack_index is None:
        return experts.grouped_mlp(choices.rows, gate, up, down, *arguments)
    return experts.grouped_mlp_stacked(choices.rows, gate, up, down, stack_index, *arguments)


# ---- sending chunks of rows


def _send_rows(plan: exchange_plan.ExchangePlan, rows, output, transfer: exchange_plan.RowTransfer):
    """Return this device's `output` with the chunks of rows that all devices sent to it."""
    if not plan.is_ragged:
        return _send_rows_dense(rows, output, transfer)
    # XLA:CPU has none either. Lowering decides, so that ahead-of-time compiles get the target's.
    return jax.lax.platform_dependent(
        rows, output, transfer, cpu=_send_rows_dense, default=_send_rows_ragged
    )


def _send_rows_ragged(rows, output, transfer):
    (axis,) = collectives.mesh_axes("experts")
    input_offsets, send_sizes, output_offsets = transfer.sends
    receive_sizes = transfer.receives.sizes.reshape(-1)
    return jax.lax.ragged_all_to_all(
        rows, output, input_offsets, send_sizes, output_offsets, receive_sizes, axis_name=axis
    )


def _send_rows_dense(rows, output, transfer):
    """Do the same without a ragged all-to-all (CPU, v5e): gather all rows, then select."""
    return _copy_chunks(collectives.all_gather_stacked(rows, "experts"), output, *transfer.receives)


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
    source = jnp.where(is_covered, sender * rows.shape[1] + source, 0)
    copied = jnp.take(flat, source, axis=0, mode="clip")
    return jnp.where(is_covered[:, None], copied, output)


# ---- the exchange, round by round


def _run_rounds(plan: exchange_plan.ExchangePlan, rows, run_experts: Callable):
    """Return the experts' outputs for rows sorted by expert, in their order.

    Rows that went to no expert are undefined, and rows that a capacity limit dropped are zeros.

    Args:
      run_experts: called as run_experts(rows, weights, group_sizes).
    """

    def run_round(i, y):
        # The experts compute each row from itself alone, and rows of no group never travel back.
        # So the end of the buffer needs no zeros.
        buffer = jax.lax.empty((plan.num_buffer_rows, rows.shape[1]), rows.dtype)
        arrived, weights = _receive_rows(plan, i, rows, buffer)
        out = run_experts(arrived, weights, plan.group_sizes(i))
        return _send_rows(plan, out, y, plan.combine_transfer(i))

    return _loop_over_rounds(plan, run_round, _make_returned(plan, rows))


def _make_returned(plan: exchange_plan.ExchangePlan, rows):
    """Return an array for what comes back of the rows."""
    # Without a limit every row of an expert comes back, and nobody reads the others.
    return jax.lax.empty(rows.shape, rows.dtype) if plan.is_dropless else jnp.zeros_like(rows)


def _loop_over_rounds(plan: exchange_plan.ExchangePlan, run_round: Callable, carry, first=0):
    """Run run_round(round, carry) for all rounds from `first`, which is 0 or 1, on."""
    num_rounds = plan.num_rounds()
    if isinstance(num_rounds, int):  # known to be one, which is written out
        assert num_rounds == 1
        return carry if first else run_round(0, carry)
    return jax.lax.fori_loop(first, num_rounds, run_round, carry)


@jax.custom_vjp
def _exchange_rows(plan: exchange_plan.ExchangePlan, rows, scale, gate, up, down):
    """Return scale * expert(row) for rows sorted by expert, in their order.

    A custom gradient, since reverse mode cannot go through a loop whose length is data. It keeps
    what arrived in the first round, or, as rematerialisation says, dispatches the rows a second
    time. It always does that for further rounds, which are rare.
    """
    del scale  # the plan has the weights of all rows: `scale` is here for its gradient
    return _run_rounds(plan, rows, functools.partial(_run_experts, gate, up, down))


def _run_experts(gate, up, down, arrived, weights, group_sizes):
    return experts.grouped_mlp(arrived, gate, up, down, group_sizes, weights)


def _receive_rows(plan: exchange_plan.ExchangePlan, round_index, rows, buffer):
    """Return `buffer` with the rows of this device's experts at its start, and their weights."""
    arrived = _send_rows(plan, rows, buffer, plan.dispatch_transfer(round_index))
    # One number a row is few bytes, so every device has those of all rows and takes its own.
    sender_offset, buffer_offset, size = plan.arriving_chunks(round_index)
    weights = jnp.zeros((plan.num_buffer_rows, 1), plan.row_scales.dtype)
    weights = _copy_chunks(plan.row_scales[..., None], weights, sender_offset, size, buffer_offset)
    return arrived, weights[:, 0]


def _return_scalars(plan: exchange_plan.ExchangePlan, round_index, numbers, totals):
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
        jnp.take(numbers, source.reshape(-1), mode="clip").reshape(num_devices, length),
        0,
    )
    axes = collectives.mesh_axes("experts")
    if axes:
        return totals + jax.lax.psum_scatter(by_sender, axes, scatter_dimension=0, tiled=True)[0]
    return totals + by_sender[0]


def _exchange_rows_fwd(plan, rows, scale, gate, up, down):
    arrived, weights = _receive_rows(plan, 0, rows, _make_zero_rows(plan, rows))
    arrived = ad_checkpoint.checkpoint_name(arrived, ROWS_NAME)
    out, gate_out, up_out = experts.grouped_mlp_with_residuals(
        arrived, gate, up, down, plan.group_sizes(0), weights
    )
    y = _send_rows(plan, out, _make_returned(plan, rows), plan.combine_transfer(0))

    def run_round(i, y):
        arrived, weights = _receive_rows(plan, i, rows, _make_zero_rows(plan, rows))
        out = _run_experts(gate, up, down, arrived, weights, plan.group_sizes(i))
        return _send_rows(plan, out, y, plan.combine_transfer(i))

    y = _loop_over_rounds(plan, run_round, y, first=1)
    return y, (plan, rows, scale, gate, up, down, arrived, weights, gate_out, up_out)


def _make_zero_rows(plan: exchange_plan.ExchangePlan, rows):
    """Return zeros to receive rows into, where gradients of matrices are computed.

    They are sums over rows, in which a NaN of a row of no group would spread, even times 0.
    """
    return jnp.zeros((plan.num_buffer_rows, rows.shape[1]), rows.dtype)


def _exchange_rows_bwd(residuals, grad):
    plan, rows, scale, gate, up, down, *first_round = residuals
    matrices = (gate, up, down)

    def run_round(i, d_rows, d_scale, arrived, weights, gate_out, up_out):
        """Return both gradients with this round's added, and the gradients of the matrices."""
        # The gradient of the output travels as the rows do, and that of the rows as the output.
        d_out = _send_rows(plan, grad, _make_zero_rows(plan, rows), plan.dispatch_transfer(i))
        d_arrived, *d_matrices, d_weights = experts.grouped_mlp_gradients(
            arrived, *matrices, plan.group_sizes(i), weights, gate_out, up_out, d_out
        )
        d_rows = _send_rows(plan, d_arrived, d_rows, plan.combine_transfer(i))
        return d_rows, _return_scalars(plan, i, d_weights, d_scale), d_matrices

    def run_later_round(i, carry):
        d_rows, d_scale, sums = carry
        arrived, weights = _receive_rows(plan, i, rows, _make_zero_rows(plan, rows))
        _, gate_out, up_out = experts.grouped_mlp_with_residuals(
            arrived, *matrices, plan.group_sizes(i), weights
        )
        d_rows, d_scale, d_matrices = run_round(
            i, d_rows, d_scale, arrived, weights, gate_out, up_out
        )
        # Float32, since a sum of many rounds would lose the small ones in bfloat16.
        sums = [x + d.astype(jnp.float32) for x, d in zip(sums, d_matrices, strict=True)]
        return d_rows, d_scale, sums

    def run_later_rounds(gradients):
        d_rows, d_scale, d_matrices = gradients
        sums = [d.astype(jnp.float32) for d in d_matrices]
        carry = (d_rows, d_scale, sums)
        d_rows, d_scale, sums = _loop_over_rounds(plan, run_later_round, carry, first=1)
        d_matrices = [x.astype(d.dtype) for x, d in zip(sums, d_matrices, strict=True)]
        return d_rows, d_scale, d_matrices

    d_rows, d_scale = _make_returned(plan, rows), jnp.zeros_like(scale)
    gradients = run_round(0, d_rows, d_scale, *first_round)
    # A condition, so that one round has no float32 copies of the matrices' gradients.
    num_rounds = plan.num_rounds()
    if not isinstance(num_rounds, int):
        gradients = jax.lax.cond(num_rounds > 1, run_later_rounds, lambda x: x, gradients)
    d_rows, d_scale, d_matrices = gradients
    return None, d_rows, d_scale, *d_matrices


_exchange_rows.defvjp(_exchange_rows_fwd, _exchange_rows_bwd)
