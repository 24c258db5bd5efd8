"""Running each expert on its own rows, in the way that is fastest on each backend.

M rows of size D are sorted by expert. An expert has F hidden units.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from m1_jax import layer_stack, quantize, sharding

# Rows per CPU matmul: big tiles first, small ones for the remaining rows. A loop over tiles of each
# size is compiled, so there are few sizes.
ROW_TILES, FEW_ROWS_TILES = (256, 32), (16, 4)
# The batch-invariant tile. Inside of `with matmul_tile(rows)`, every CPU matmul has that many rows.
# A row's numbers then do not depend on how many other rows its expert has. Tiles of twice and half
# as many rows are mixed in, which is faster, for widths that are powers of two alone: a row has the
# same bits in products of 4, 8 and 16 rows there. For others it may not: of 832 inputs XLA:CPU sums
# 16 rows in another order than 8, and of 960 8 rows in another than 4 (tests/m1_jax_tiles_test.py).
matmul_tile = jax.make_user_context(0)
# Names of the outputs of `gate` and `up`, for rematerialisation. Each is M rows of F numbers.
GATE_NAME, UP_NAME = layer_stack.EXPERT_PRODUCT_NAMES


@jax.custom_vjp
@jax.named_scope("experts")
def grouped_mlp(
    rows: Float[Array, "M D"],
    gate: Float[Array, "E D F"] | quantize.QuantizedMatrices,
    up: Float[Array, "E D F"] | quantize.QuantizedMatrices,
    down: Float[Array, "E F D"] | quantize.QuantizedMatrices,
    group_sizes: Int[Array, "E"],
    weights: Float[Array, "M"],
) -> Float[Array, "M D"]:
    """Return w down_e(silu(gate_e x) * up_e x), rows sorted by expert e, group_sizes[e] rows each.

    Rows past the last group have an undefined output, and add nothing to the experts' gradients as
    long as they are finite. A row's float32 weight is applied before `down`: its gradient then
    needs no saved output. Quantized experts have no gradient.

    TPU and GPU run `jax.lax.ragged_dot`. On CPU that costs a dense product with every expert (13x
    slower measured at 8 experts), so a loop over tiles runs there. The choice is made when the
    program is lowered, so ahead-of-time compiles get the target's.
    """
    return jax.lax.platform_dependent(
        rows,
        gate,
        up,
        down,
        group_sizes,
        weights,
        cpu=lambda *arguments: _run_expert_tiles(*arguments, keep_residuals=False)[0],
        tpu=lambda *arguments: _grouped_mlp_ragged(
            *arguments, kernel_takes_int8=sharding.kernels_take_int8()
        )[0],
        default=lambda *arguments: _grouped_mlp_ragged(*arguments)[0],
    )


@jax.named_scope("experts")
def grouped_mlp_with_residuals(
    rows, gate, up, down, group_sizes, weights
) -> tuple[Float[Array, "M D"], Float[Array, "M F"], Float[Array, "M F"]]:
    """Return `grouped_mlp`, and the outputs of `gate` and `up`, which its gradients need.

    The latter have names for rematerialisation. A policy that saves them spares the backward pass
    two of its eight products.
    """
    y, gate_out, up_out = jax.lax.platform_dependent(
        rows,
        gate,
        up,
        down,
        group_sizes,
        weights,
        cpu=functools.partial(_run_expert_tiles, keep_residuals=True),
        default=_grouped_mlp_ragged,
    )
    return (
        y,
        ad_checkpoint.checkpoint_name(gate_out, GATE_NAME),
        ad_checkpoint.checkpoint_name(up_out, UP_NAME),
    )


@jax.named_scope("experts")
def grouped_mlp_gradients(
    rows, gate, up, down, group_sizes, weights, gate_out, up_out, grad
) -> tuple[Any, ...]:
    """Return the gradients of rows, gate, up, down and weights, given that of the output."""
    return jax.lax.platform_dependent(
        rows,
        gate,
        up,
        down,
        group_sizes,
        weights,
        gate_out,
        up_out,
        grad,
        cpu=_expert_tile_gradients,
        default=_ragged_gradients,
    )


def _grouped_mlp_fwd(*arguments):
    y, gate_out, up_out = grouped_mlp_with_residuals(*arguments)
    return y, (*arguments, gate_out, up_out)


def _grouped_mlp_bwd(residuals: Any, grad):
    *d_inputs, d_weights = grouped_mlp_gradients(*residuals, grad=grad)
    return *d_inputs, None, d_weights


grouped_mlp.defvjp(_grouped_mlp_fwd, _grouped_mlp_bwd)


@jax.named_scope("experts")
def grouped_mlp_stacked(
    rows: Float[Array, "M D"],
    gate: Float[Array, "R J E D F"] | quantize.QuantizedMatrices,
    up: Float[Array, "R J E D F"] | quantize.QuantizedMatrices,
    down: Float[Array, "R J E F D"] | quantize.QuantizedMatrices,
    stack_index: layer_stack.StackIndex,
    group_sizes: Int[Array, "E"],
    weights: Float[Array, "M"],
) -> Float[Array, "M D"]:
    """Return `grouped_mlp` of one layer of experts that are stacked over layers.

    There is no gradient. On CPU and TPU only the matrices of experts with rows are read. A layer
    sliced out in a loop over layers would be copied in full, once for every token decoded.
    """

    def run_tiled(rows, gate, up, down, stack_index, group_sizes, weights):
        arguments = (rows, gate, up, down, group_sizes, weights)
        return _run_expert_tiles(*arguments, keep_residuals=False, stack_index=stack_index)[0]

    # A kernel's operand must be a buffer. The whole stack is one, and a layer of it is not.
    def run_on_stack(rows, gate, up, down, stack_index, group_sizes, weights):
        def matmul(rows, matrices):
            return _stacked_matmul(rows, matrices, stack_index, group_sizes)

        gate_out, up_out = matmul(rows, gate), matmul(rows, up)
        # Rows outside of all groups stay undefined: without a gradient nothing reads them.
        return matmul(_weighted_hidden(gate_out, up_out, weights), down)

    # `ragged_dot` on GPU may compute a product with every expert of its operand. int8 that the
    # kernel does not take is widened, and that had better be one layer.
    def run_on_slice(rows, gate, up, down, stack_index, group_sizes, weights):
        gate, up, down = (jax.tree.map(lambda a: a[stack_index], x) for x in (gate, up, down))
        return _grouped_mlp_ragged(rows, gate, up, down, group_sizes, weights)[0]

    is_quantized = isinstance(gate, quantize.QuantizedMatrices)
    is_widened = is_quantized and not sharding.kernels_take_int8()
    return jax.lax.platform_dependent(
        rows,
        gate,
        up,
        down,
        stack_index,
        group_sizes,
        weights,
        cpu=run_tiled,
        tpu=run_on_slice if is_widened else run_on_stack,
        default=run_on_slice,
    )


# ---- TPU and GPU: grouped matrix products


def _grouped_mlp_ragged(
    rows, gate, up, down, group_sizes, weights, *, kernel_takes_int8: bool = False
):
    """Return the output, and those of `gate` and `up`."""

    def matmul(rows, matrices):
        return _ragged_matmul(rows, matrices, group_sizes, kernel_takes_int8)

    # The gradient of `down` is a sum over the rows of this hidden layer.
    gate_out, up_out = (_clear_outside(matmul(rows, x), group_sizes) for x in (gate, up))
    return matmul(_weighted_hidden(gate_out, up_out, weights), down), gate_out, up_out


def _ragged_gradients(rows, gate, up, down, group_sizes, weights, gate_out, up_out, grad):
    def pull_back(x, matrices, grad):
        # The product itself is dead code.
        _, pullback = jax.vjp(lambda x, m: jax.lax.ragged_dot(x, m, group_sizes), x, matrices)
        return pullback(grad)

    hidden, pull_back_hidden = jax.vjp(_weighted_hidden, gate_out, up_out, weights)
    d_hidden, d_down = pull_back(hidden, down, grad)
    d_gate_out, d_up_out, d_weights = pull_back_hidden(d_hidden)
    d_rows, d_gate = pull_back(rows, gate, _clear_outside(d_gate_out, group_sizes))
    more_d_rows, d_up = pull_back(rows, up, _clear_outside(d_up_out, group_sizes))
    return d_rows + more_d_rows, d_gate, d_up, d_down, d_weights


def _clear_outside(x, group_sizes):
    """Return rows with zeros outside of all groups, where `ragged_dot` leaves them undefined.

    A NaN there, times 0, would spread in the experts' gradients.
    """
    has_expert = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(has_expert[:, None], x, 0)


def _ragged_matmul(rows, matrices, group_sizes, kernel_takes_int8: bool):
    """Return each row times the matrix [I, O] of its expert, of matrices [E, I, O]."""
    if not isinstance(matrices, quantize.QuantizedMatrices):
        return jax.lax.ragged_dot(rows, matrices, group_sizes)
    # int8 is exact in bfloat16. The TPU's kernel widens each tile in its own memory. Elsewhere the
    # compiler wants operands of one dtype.
    values = matrices.values if kernel_takes_int8 else matrices.values.astype(rows.dtype)
    y = jax.lax.ragged_dot(rows, values, group_sizes, preferred_element_type=jnp.float32)
    return _scale_columns(y, matrices.scale, group_sizes).astype(rows.dtype)


def _stacked_matmul(rows, matrices, stack_index, group_sizes):
    """Return `_ragged_matmul` of one layer of matrices [R, J, E, I, O], without a copy of them.

    The layer is addressed by group sizes: those of all other layers' experts are 0, and the TPU's
    kernel does not read the matrices of empty groups.
    """
    is_quantized = isinstance(matrices, quantize.QuantizedMatrices)
    values = matrices.values if is_quantized else matrices
    num_repeats, num_layers, num_experts = values.shape[:3]
    first = (stack_index[0] * num_layers + stack_index[1]) * num_experts
    sizes = jnp.zeros(num_repeats * num_layers * num_experts, group_sizes.dtype)
    sizes = jax.lax.dynamic_update_slice_in_dim(sizes, group_sizes, first, 0)
    values = values.reshape(-1, *values.shape[3:])
    if not is_quantized:
        return jax.lax.ragged_dot(rows, values, sizes)
    y = jax.lax.ragged_dot(rows, values, sizes, preferred_element_type=jnp.float32)
    return _scale_columns(y, matrices.scale[stack_index], group_sizes).astype(rows.dtype)


def _scale_columns(y, scale, group_sizes):
    """Multiply float32 sums [M, O] with the scales [E, O] of their experts' columns."""
    expert = jnp.arange(scale.shape[0], dtype=jnp.int32)
    expert = jnp.repeat(expert, group_sizes, total_repeat_length=y.shape[0])
    return y * jnp.take(scale, expert, axis=0, mode="clip")


def _weighted_hidden(gate_out, up_out, weights):
    # Float32 until the weight is in, so that hidden units are rounded once.
    hidden = jax.nn.silu(gate_out.astype(jnp.float32)) * up_out.astype(jnp.float32)
    return (hidden * weights[:, None]).astype(gate_out.dtype)


# ---- CPU: a tile of rows stays in cache through all the matmuls of its expert


def _run_expert_tiles(
    rows,
    gate,
    up,
    down,
    group_sizes,
    weights,
    *,
    keep_residuals: bool,
    stack_index: layer_stack.StackIndex | tuple[()] = (),
):
    """Return the output, and with `keep_residuals` those of `gate` and `up`, else empty ones."""
    num_rows, tiles = rows.shape[0], _choose_tiles(*rows.shape, gate.shape[-1])
    starts = jnp.cumsum(group_sizes) - group_sizes
    rows, weights = _pad_rows(rows, tiles), _pad_rows(weights, tiles)
    # Empty buffers keep the carry's structure where nothing is saved.
    residuals = jnp.zeros((rows.shape[0] if keep_residuals else 0, gate.shape[-1]), rows.dtype)

    def run_expert(index, buffers):
        gate_e, up_e, down_e = (
            _make_expert_matmul(x, (*stack_index, index), rows.dtype) for x in (gate, up, down)
        )

        # The last tile runs over into the next expert's rows, which that expert then overwrites.
        def run_tile(buffers, row, tile):
            out, gate_out, up_out = buffers
            first = starts[index] + row
            x = _slice_rows(rows, first, tile)
            g, u = gate_e(x), up_e(x)
            hidden = _weighted_hidden(g, u, _slice_rows(weights, first, tile))
            out = _write_rows(out, down_e(hidden), first)
            if keep_residuals:
                gate_out, up_out = _write_rows(gate_out, g, first), _write_rows(up_out, u, first)
            return out, gate_out, up_out

        return _loop_over_tiles(group_sizes[index], tiles, run_tile, buffers)

    def run_busy_expert(index, buffers):
        # Idle experts are skipped before their weights are read. In decoding most experts are idle.
        return jax.lax.cond(group_sizes[index] > 0, run_expert, lambda _, b: b, index, buffers)

    buffers = (jnp.zeros_like(rows), residuals, residuals)
    out, gate_out, up_out = jax.lax.fori_loop(0, gate.shape[-3], run_busy_expert, buffers)
    return out[:num_rows], gate_out[:num_rows], up_out[:num_rows]


def _expert_tile_gradients(rows, gate, up, down, group_sizes, weights, gate_out, up_out, grad):
    num_rows, tiles = rows.shape[0], _choose_tiles(*rows.shape, gate.shape[-1])
    starts = jnp.cumsum(group_sizes) - group_sizes
    rows, weights, gate_out, up_out, grad = (
        _pad_rows(x, tiles) for x in (rows, weights, gate_out, up_out, grad)
    )

    # A scan over experts: it carries the gradients of rows and weights, and stacks those of the
    # experts' matrices.
    def expert_gradients(carry, xs):
        gate_e, up_e, down_e, start, size = xs

        def add_tile(carry, row, tile):
            d_rows, d_weights, d_gate, d_up, d_down = carry
            first = start + row
            # Rows of the next expert must not reach this expert's matrices.
            is_own = (row + jnp.arange(tile, dtype=jnp.int32) < size)[:, None]
            dy = jnp.where(is_own, _slice_rows(grad, first, tile), 0)
            x = _slice_rows(rows, first, tile)
            inputs = (_slice_rows(a, first, tile) for a in (gate_out, up_out, weights))
            h, pullback = jax.vjp(_weighted_hidden, *inputs)
            dg, du, dw = pullback(dy @ down_e.T)
            d_rows = _write_rows(d_rows, dg @ gate_e.T + du @ up_e.T, first)
            d_weights = _write_rows(d_weights, dw, first)
            return d_rows, d_weights, d_gate + x.T @ dg, d_up + x.T @ du, d_down + h.T @ dy

        zeros = tuple(map(jnp.zeros_like, (gate_e, up_e, down_e)))
        *carry, d_gate, d_up, d_down = _loop_over_tiles(size, tiles, add_tile, (*carry, *zeros))
        return tuple(carry), (d_gate, d_up, d_down)

    xs = (gate, up, down, starts, group_sizes)
    carry = (jnp.zeros_like(rows), jnp.zeros_like(weights))
    (d_rows, d_weights), d_matrices = jax.lax.scan(expert_gradients, carry, xs)
    return d_rows[:num_rows], *d_matrices, d_weights[:num_rows]


def _pad_rows(x, tiles):
    # The last tile may begin at the last row. The largest tile must fit even where it never runs.
    padding = max(tiles[-1], tiles[0] - len(x))
    return jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))


def _make_expert_matmul(matrices, index, dtype):
    """Return one expert's matrix as the function that multiplies with it."""
    if isinstance(matrices, quantize.QuantizedMatrices):
        # Widened here, once an expert, and not in the loop over tiles.
        values, scale = matrices.values[index].astype(dtype), matrices.scale[index]
        return lambda x: quantize.scaled_matmul(x, values, scale)
    matrix = matrices[index]
    return lambda x: x @ matrix


def _slice_rows(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _write_rows(x, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _choose_tiles(num_rows: int, *widths: int) -> tuple[int, ...]:
    """Return the numbers of rows of a matmul, largest first.

    Args:
      widths: inputs of the experts' matrices.
    """
    if size := matmul_tile.value:
        is_mixed = size == 8 and all(width & (width - 1) == 0 for width in widths)
        return (2 * size, size // 2) if is_mixed else (size,)
    if num_rows >= ROW_TILES[0]:
        return ROW_TILES
    return FEW_ROWS_TILES if num_rows >= FEW_ROWS_TILES[0] else (num_rows,)


def _loop_over_tiles(size, tiles, body, carry):
    """Run body(carry, first row, tile) over tiles that cover `size` rows, largest first."""
    start = jnp.zeros((), jnp.int32)
    for tile in tiles:
        remaining = size - start
        # The smallest tile covers the end, and may run past it.
        count = (remaining + tile - 1) // tile if tile == tiles[-1] else remaining // tile

        def run_body(i, carry, tile=tile, start=start):
            return body(carry, start + i * tile, tile)

        carry = jax.lax.fori_loop(0, count, run_body, carry)
        start = start + count * tile
    return carry
