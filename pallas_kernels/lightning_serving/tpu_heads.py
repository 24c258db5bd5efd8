"""What the serving kernel computes for a tile, head by head.

Letters in shapes: N heads of a block, t rows of a tile, C tokens of a chunk, H width of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import tiling, tpu_chunk

# A Ref of a kernel, or a view of one. `jax.Ref` has no usable `at` for a type checker.
Ref = Any


class SlotArrays(NamedTuple):
    """The memory of all slots of a group of layers: R repeats of J layers.

    Attributes:
      states: [R, J, slots, N, H, H] float32.
      keys: [R, J, slots, N, C, H] in the model's dtype, of the open chunk.
      values: likewise.
    """

    states: Any
    keys: Any
    values: Any


def attend_heads(
    qkv: Ref,
    o: Ref,
    slot: SlotArrays,
    slopes: list[jax.Array],
    first_row: jax.Array,
    last_row: jax.Array,
    token_bits: jax.Array,
) -> None:
    """Put a tile's tokens into the open chunk, and attend, head by head.

    Args:
      qkv: [t, N * 3 * H].
      o: [t, N * H].
      slot: [N, H, H] and [N, C, H] of the tile's sequence.
      slopes: one for each head.
      first_row, last_row, token_bits: see `tiles.TileTables`.
    """
    tile_rows, (chunk, head_dim) = qkv.shape[0], slot.keys.shape[1:]
    row = jax.lax.broadcasted_iota(jnp.int32, (chunk, head_dim), 0)
    in_tile = (row >= first_row) & (row < first_row + tile_rows)
    bit = jnp.right_shift(token_bits, jnp.clip(row - first_row, 0, tile_rows - 1)) & 1
    is_new, is_written = in_tile & (bit != 0), row <= last_row
    # From each query back to each key of the chunk. Negative: the key comes after the query.
    query_row = first_row + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, chunk), 0)
    gap = query_row - jax.lax.broadcasted_iota(jnp.int32, (tile_rows, chunk), 1)
    # The exponent is masked, not the product: lambda^-n may overflow.
    steps = jnp.maximum(gap, 0).astype(jnp.float32)
    entry_steps = first_row + jax.lax.broadcasted_iota(jnp.int32, (tile_rows, head_dim), 0) + 1
    entry_steps = entry_steps.astype(jnp.float32)
    for head, slope in enumerate(slopes):
        q, k, v = (qkv[:, pl.ds((3 * head + i) * head_dim, head_dim)] for i in range(3))
        # Keys that are not written yet may be anything: their scores are masked.
        keys = jnp.where(is_new, _repeat_rows(k, chunk), slot.keys[head].astype(jnp.float32))
        keys = keys.astype(k.dtype)
        # Values are selected, not multiplied by 0: they may be NaN.
        values = jnp.where(is_written, slot.values[head].astype(jnp.float32), 0.0)
        values = jnp.where(is_new, _repeat_rows(v, chunk), values).astype(v.dtype)
        slot.keys[head], slot.values[head] = keys, values
        scores = tpu_chunk.dot_f32(q, keys, 1, 1)
        scores = jnp.where(gap >= 0, scores * jnp.exp(-slope * steps), 0.0)
        out = _multiply_scores(scores, values)
        out += jnp.exp(-slope * entry_steps) * _read_state(q, slot.states[head])
        o[:, pl.ds(head * head_dim, head_dim)] = out.astype(o.dtype)


def _repeat_rows(rows: Float[Array, "t H"], chunk: int) -> Float[Array, "C H"]:
    """Return a tile's rows at every place of the chunk that a tile may have."""
    # In float32, whose rows are whole sublanes on every chip. The way there and back is exact.
    return jnp.concatenate([rows.astype(jnp.float32)] * (chunk // rows.shape[0]), axis=0)


def close_chunk(slot: SlotArrays, head: int, slope: jax.Array, loss: jax.Array) -> None:
    """S <- S - (1 - lambda^C) S + sum_j lambda^(C-1-j) k_j^T v_j."""
    keys, state = slot.keys[head].astype(jnp.float32), slot.states[head]
    row = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 0)
    ramp = jnp.exp(-slope * (keys.shape[0] - 1 - row).astype(jnp.float32))
    gain = _add_outer_products(keys * ramp, slot.values[head])
    slot.states[head] = state - loss * state + gain


def _multiply_scores(scores: Float[Array, "t C"], values: Float[Array, "C H"]) -> Array:
    """Return scores times values, with exact products and float32 sums."""
    if values.dtype == jnp.float32:
        return tpu_chunk.dot_f32(scores, values, 1, 0)
    # The parts of the scores as rows of one product, so that the values enter the matrix unit once.
    # They are stacked in float32, in which 8 rows are a whole register.
    parts = [part.astype(jnp.float32) for part in _split_into_parts(scores)]
    stacked = jnp.concatenate(parts, axis=0).astype(values.dtype)
    products = tpu_chunk.dot_f32(stacked, values, 1, 0)
    high, middle, low = jnp.split(products, 3, axis=0)
    return low + middle + high


def _read_state(q: Array, state: Float[Array, "H H"]) -> Float[Array, "t H"]:
    """Return q S, with exact products and float32 sums."""
    if q.dtype == jnp.float32:
        return tpu_chunk.dot_f32(q, state, 1, 0)
    parts = _split_into_parts(state)
    if tiling.MATRIX_UNIT_SIDES[tiling.current_generation() or "v5p"] <= q.shape[1]:
        high, middle, low = (tpu_chunk.dot_f32(q, part, 1, 0) for part in parts)
        return low + middle + high
    # The parts of S one below the other fill a matrix unit that is deeper than one of them.
    return tpu_chunk.dot_f32(
        jnp.concatenate([q] * len(parts), axis=1), jnp.concatenate(parts, axis=0), 1, 0
    )


def _add_outer_products(keys: Float[Array, "C H"], values: Array) -> Float[Array, "H H"]:
    """Return the sum of k_j^T v_j over the rows, with exact products and float32 sums."""
    if values.dtype == jnp.float32:
        return tpu_chunk.dot_f32(keys, values, 0, 0)
    parts = _split_into_parts(keys)
    return tpu_chunk.dot_f32(
        jnp.concatenate(parts, axis=0), jnp.concatenate([values] * len(parts), axis=0), 0, 0
    )


def _split_into_parts(x: Float[Array, "..."]) -> list[Array]:
    """Return three bfloat16 arrays whose sum is x: 8 bits of its 24 in each.

    Where the other operand is bfloat16, three products take half the passes of the matrix unit that
    two float32 operands would take.
    """
    parts = []
    for _ in range(3):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts
