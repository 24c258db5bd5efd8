"""What the TPU kernels compute for one head of one chunk, forwards and backwards.

The carried state S advances over a chunk of n real tokens by

    S' = S - (1 - lambda^n) S + gain

The share 1 - lambda^n is subtracted because a product with float32 lambda^n would misstate the
slowest decays (see `boundaries.forgotten_fraction_table`).

Letters in shapes: N heads of a block, C tokens of a chunk, H width of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, pipeline

F32, BF16 = jnp.float32, jnp.bfloat16


class ChunkWeights(NamedTuple):
    """Decays of a full chunk, float32: constants of a head, filled once a row and head block."""

    pair_decay: jax.Ref  # [N, C, C] lambda^(i - j), 0 above the diagonal
    query_ramp: jax.Ref  # [N, C, H] lambda^i along rows, i from 1
    key_ramp_t: jax.Ref  # [N, H, C] lambda^(C - j) along columns, for keys that stand transposed
    # [N, 1, H] 1 - lambda^C. A row, because scalars would all be spread over registers before the
    # loop starts.
    forgotten_fraction: jax.Ref


def dot_f32(a: Array, b: Array, contract_a: int, contract_b: int) -> Float[Array, "..."]:
    """Contract one axis of each operand with float32 sums.

    bfloat16 operands enter the matrix unit as they are. float32 operands are multiplied in full.
    """
    # The default precision would round float32 operands to bfloat16.
    precision = "highest" if a.dtype == F32 else "default"
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def read_state(q: Array, state: Float[Array, "H H"]) -> Float[Array, "C H"]:
    """Compute q S. bfloat16 queries read the float32 state as two halves, high and low."""
    if q.dtype == F32:
        return dot_f32(q, state, 1, 0)
    high = state.astype(BF16)
    low = (state - high.astype(F32)).astype(BF16)
    return dot_f32(q, high, 1, 0) + dot_f32(q, low, 1, 0)


def two_products(
    a: Array, b: Array, c: Array, d: Array, block_diagonal: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return (a b, c d), as one product with a block-diagonal right side if `block_diagonal`.

    The zeros cost nothing on a matrix unit 256 wide: 128 columns would leave half of it idle.
    """
    if not block_diagonal:
        return dot_f32(a, b, 1, 0), dot_f32(c, d, 1, 0)
    zero = jnp.zeros_like(b)
    right = jnp.concatenate([b, zero], 1), jnp.concatenate([zero, d], 1)
    products = dot_f32(jnp.concatenate([a, c], 1), jnp.concatenate(right, 0), 1, 0)
    return products[:, : b.shape[1]], products[:, b.shape[1] :]


def advance_state(state: jax.Ref, h: int, forgotten_fraction: Array, gain: Array) -> None:
    """Carry the state of head h over a chunk. `forgotten_fraction` is a scalar or a row."""
    state[h] = state[h] - forgotten_fraction * state[h] + gain


def advance_packed_state(
    state: jax.Ref, h: int, fraction: Array, scalar: jax.Array, gain: Array
) -> None:
    """Carry the state of head h over a chunk with a boundary or padding."""
    # A select where a document starts: S - S of a document with NaN would be NaN in the next one.
    kept = jnp.where(scalar > boundaries.COUNT_MASK, 0.0, state[h] - fraction * state[h])
    state[h] = kept + gain


def packed_forgotten_fraction(
    forgotten_fractions: jax.Ref, head: jax.Array, scalar: jax.Array, size: int
) -> Array:
    """Return the share of the state that a chunk without a document's start forgets."""
    # The scalar's low bits count the chunk's real tokens.
    return forgotten_fractions[head * (size + 1) + (scalar & boundaries.COUNT_MASK)]


def packed_pairs(
    a: Array,
    b: Array,
    pair_decay: Float[Array, "C C"],
    bad_rows: Array | None = None,
    bad_columns: Array | None = None,
) -> Float[Array, "C C"]:
    """Return decayed a b^T of a chunk with boundaries, and NaN for the pairs of bad tokens.

    `bad_rows` and `bad_columns` are [C, 1] each, as `boundaries.split_finite` returns them.
    """
    scores = dot_f32(a, b, 1, 1)
    if bad_rows is not None:
        scores = jnp.where(bad_rows, jnp.nan, scores)
    if bad_columns is not None:
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        # The row form is the diagonal of the column form: no transpose.
        on_diagonal = jnp.where((row == column) & bad_columns, 1.0, 0.0)
        scores = jnp.where(jnp.sum(on_diagonal, axis=0, keepdims=True) > 0, jnp.nan, scores)
    return boundaries.apply_decay(scores, pair_decay)


def load_head_slices(ref: jax.Ref, rows: Any, h: int, width: int, num_slices: int) -> list[Array]:
    """Read the lane slices of head h: three of the projection (q, k, v), one of o."""
    return [ref[0, rows, pl.ds((num_slices * h + i) * width, width)] for i in range(num_slices)]


def chunk_rows(c: pipeline.ChunkIndex, size: int) -> Any:
    """Return the slice of a superblock's rows that holds chunk c."""
    # The compiler has to know that the start is aligned: c is traced.
    return pl.ds(pl.multiple_of(c * size, size), size)


def head_iota(ref: jax.Ref, axis: int) -> Array:
    """Return indices along an axis of one head's part of a scratch buffer."""
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape[1:], axis)


def fill_weights(
    slopes: jax.Ref, forgotten_fractions: jax.Ref, first_head: jax.Array, weights: ChunkWeights
) -> None:
    """Write the weights of a chunk without boundary for every head of the block."""
    heads, size, _ = weights.pair_decay.shape

    def fill_head(h: jax.Array, _: None) -> None:
        slope = slopes[first_head + h]
        rows, columns = (head_iota(weights.pair_decay, axis) for axis in (0, 1))
        weights.pair_decay[h] = boundaries.masked_decay(slope, rows - columns)
        weights.query_ramp[h] = boundaries.masked_decay(slope, head_iota(weights.query_ramp, 0) + 1)
        weights.key_ramp_t[h] = boundaries.masked_decay(
            slope, size - 1 - head_iota(weights.key_ramp_t, 1)
        )
        # Entry C of the head's part of the table: a full chunk of C tokens.
        fraction = forgotten_fractions[(first_head + h) * (size + 1) + size]
        weights.forgotten_fraction[h] = jnp.full(weights.forgotten_fraction.shape[1:], fraction)

    # A loop and not an unrolled one: unrolled, the heads' tiles are all live at once and registers
    # spill.
    jax.lax.fori_loop(0, heads, fill_head, None)
