"""Running each expert on its own rows, by the best way of each backend."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import quantize

# Rows per CPU matmul: big tiles first, small ones for what is left. Each costs compile time.
ROW_TILES, FEW_ROWS_TILES = (256, 32), (16, 4)
# Set (`with fixed_tile(rows)`), every CPU matmul has that many rows, or twice and half as many
# where that is known to change nothing: a row's numbers then do not depend on how many others its
# expert has. XLA:CPU gives a row the same bits in any product of 2 to 32 rows; 1 row, or 64 and
# more, take other ways (tests/m1_jax_tiles_test.py).
matmul_tile = jax.make_user_context(0)


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

    Rows past the last group come out as anything, and have no gradient for the experts. A row's
    float32 weight is applied before `down`, where its gradient needs no output. TPU and GPU run
    `jax.lax.ragged_dot`; on CPU that costs a dense product with every expert (13x slower measured
    at 8 experts), so a loop over tiles runs there. The choice is made when the program is lowered,
    so ahead-of-time compiles get the target's. Quantized experts have no gradient.
    """
    return jax.lax.platform_dependent(
        rows,
        gate,
        up,
        down,
        group_sizes,
        weights,
        cpu=_grouped_mlp_tiled,
        default=_grouped_mlp_ragged,
    )


@jax.named_scope("experts")
def grouped_mlp_stacked(
    rows, gate, up, down, stack_index, group_sizes, weights
) -> Float[Array, "M D"]:
    """Return `grouped_mlp` of the layer at `place` of experts that are stacked over layers; no
    gradient.

    On CPU only the matrices of busy experts are read: a layer sliced out in a loop over layers
    would be copied whole, once for every token decoded.
    """

    def whole(rows, gate, up, down, place, group_sizes, weights):
        gate, up, down = (jax.tree.map(lambda a: a[place], x) for x in (gate, up, down))
        return _grouped_mlp_ragged(rows, gate, up, down, group_sizes, weights)

    def tiled(rows, gate, up, down, place, group_sizes, weights):
        arguments = (rows, gate, up, down, group_sizes, weights)
        return _run_expert_tiles(*arguments, keep_residuals=False, stack_index=place)[0]

    return jax.lax.platform_dependent(
        rows, gate, up, down, stack_index, group_sizes, weights, cpu=tiled, default=whole
    )


def _grouped_mlp_ragged(rows, gate, up, down, group_sizes, weights):
    matmul = functools.partial(_ragged_matmul, group_sizes=group_sizes)
    # What no group computes may be NaN, and NaN times 0 in the experts' gradients would spread.
    real = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
    gated, upped = (jnp.where(real, matmul(rows, x), 0) for x in (gate, up))
    return matmul(_weighted_hidden(gated, upped, weights), down)


def _ragged_matmul(rows, matrices, group_sizes):
    if not isinstance(matrices, quantize.QuantizedMatrices):
        return jax.lax.ragged_dot(rows, matrices, group_sizes)
    # int8 is exact in bfloat16; scales apply to the float32 sums.
    values = matrices.values.astype(rows.dtype)
    y = jax.lax.ragged_dot(rows, values, group_sizes, preferred_element_type=jnp.float32)
    expert = jnp.arange(matrices.shape[0], dtype=jnp.int32)
    expert = jnp.repeat(expert, group_sizes, total_repeat_length=rows.shape[0])
    return (y * jnp.take(matrices.scale, expert, axis=0)).astype(rows.dtype)


def _weighted_hidden(gated, up, weights):
    # Rounded once, after the weight.
    hidden = jax.nn.silu(gated.astype(jnp.float32)) * up.astype(jnp.float32) * weights[:, None]
    return hidden.astype(gated.dtype)


# ---- CPU: a tile of rows stays in cache through all the matmuls of its expert


@jax.custom_vjp
def _grouped_mlp_tiled(rows, gate, up, down, group_sizes, weights):
    return _run_expert_tiles(rows, gate, up, down, group_sizes, weights, keep_residuals=False)[0]


def _run_expert_tiles(
    rows, gate, up, down, group_sizes, weights, *, keep_residuals, stack_index=()
):
    """Return the output, and where `keep`, what `gate` and `up` gave: the backward's residuals."""
    num_rows, tiles = rows.shape[0], _choose_tiles(rows.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    rows, weights = _pad_rows(rows, tiles), _pad_rows(weights, tiles)
    kept = jnp.zeros((rows.shape[0] if keep_residuals else 0, gate.shape[-1]), rows.dtype)

    def expert(index, buffers):
        gate_e, up_e, down_e = (
            _make_expert_matmul(x, (*stack_index, index), rows.dtype) for x in (gate, up, down)
        )

        # The last tile runs over into the next expert's rows, which that one then overwrites.
        def body(buffers, row, tile):
            out, gated, upped = buffers
            at = starts[index] + row
            x = _slice_rows(rows, at, tile)
            g, u = gate_e(x), up_e(x)
            out = _write_rows(
                out, down_e(_weighted_hidden(g, u, _slice_rows(weights, at, tile))), at
            )
            return (
                (out, _write_rows(gated, g, at), _write_rows(upped, u, at))
                if keep_residuals
                else (out, gated, upped)
            )

        return _loop_over_tiles(group_sizes[index], tiles, body, buffers)

    def step(index, buffers):
        # Idle experts are skipped before their weights are read: most of them, in decoding.
        return jax.lax.cond(group_sizes[index] > 0, expert, lambda _, b: b, index, buffers)

    buffers = (jnp.zeros_like(rows), kept, kept)
    out, gated, upped = jax.lax.fori_loop(0, gate.shape[-3], step, buffers)
    return out[:num_rows], gated, upped


def _grouped_mlp_tiled_fwd(*arguments):
    out, gated, upped = _run_expert_tiles(*arguments, keep_residuals=True)
    return out, (*arguments, gated, upped)


def _grouped_mlp_tiled_bwd(residuals, grad):
    rows, gate, up, down, group_sizes, weights, gated, upped = residuals
    num_rows, tiles = rows.shape[0], _choose_tiles(rows.shape[0])
    starts = jnp.cumsum(group_sizes) - group_sizes
    rows, grad, weights = (_pad_rows(x, tiles) for x in (rows, grad, weights))

    def expert(carry, xs):
        gate_e, up_e, down_e, start, size = xs

        def body(carry, row, tile):
            rows_grad, weights_grad, d_gate, d_up, d_down = carry
            at = start + row
            # Rows of the next expert must not reach this one's weights.
            mine = (row + jnp.arange(tile, dtype=jnp.int32) < size)[:, None]
            dy = jnp.where(mine, _slice_rows(grad, at, tile), 0)
            x = _slice_rows(rows, at, tile)
            kept = (_slice_rows(of, at, tile) for of in (gated, upped, weights))
            h, pull = jax.vjp(_weighted_hidden, *kept)
            dg, du, dw = pull(dy @ down_e.T)
            rows_grad = _write_rows(rows_grad, dg @ gate_e.T + du @ up_e.T, at)
            weights_grad = _write_rows(weights_grad, dw, at)
            return rows_grad, weights_grad, d_gate + x.T @ dg, d_up + x.T @ du, d_down + h.T @ dy

        zeros = tuple(map(jnp.zeros_like, (gate_e, up_e, down_e)))
        *carry, d_gate, d_up, d_down = _loop_over_tiles(size, tiles, body, (*carry, *zeros))
        return tuple(carry), (d_gate, d_up, d_down)

    xs = (gate, up, down, starts, group_sizes)
    carry = (jnp.zeros_like(rows), jnp.zeros_like(weights))
    (rows_grad, weights_grad), grads = jax.lax.scan(expert, carry, xs)
    return rows_grad[:num_rows], *grads, None, weights_grad[:num_rows]


_grouped_mlp_tiled.defvjp(_grouped_mlp_tiled_fwd, _grouped_mlp_tiled_bwd)


def _pad_rows(x, tiles):
    # The largest tile must fit even where it never runs.
    more = max(tiles[-1], tiles[0] - len(x))
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))


def _make_expert_matmul(matrices, index, dtype):
    """Return one expert's matrix as the function that multiplies with it."""
    if isinstance(matrices, quantize.QuantizedMatrices):
        # Widened here and not in the loop over tiles.
        values, scale = matrices.values[index].astype(dtype), matrices.scale[index]
        return lambda x: quantize.scaled_matmul(x, values, scale)
    matrix = matrices[index]
    return lambda x: x @ matrix


def _slice_rows(x, start, size):
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _write_rows(x, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _choose_tiles(num_rows: int) -> tuple[int, ...]:
    if (size := matmul_tile.value) in (4, 8, 16):
        return (2 * size, size // 2)
    if size:
        return (size,)
    if num_rows >= ROW_TILES[0]:
        return ROW_TILES
    return FEW_ROWS_TILES if num_rows >= FEW_ROWS_TILES[0] else (num_rows,)


def _loop_over_tiles(size, tiles, body, carry):
    """Run body(carry, first row, tile) over tiles that cover `size` rows, largest first."""
    done = jnp.zeros((), jnp.int32)
    for tile in tiles:
        left = size - done
        count = (left + tile - 1) // tile if tile == tiles[-1] else left // tile

        def step(i, carry, tile=tile, done=done):
            return body(carry, done + i * tile, tile)

        carry = jax.lax.fori_loop(0, count, step, carry)
        done = done + count * tile
    return carry
