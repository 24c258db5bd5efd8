"""Decays of one chunk of one head, as the GPU kernels compute them in registers.

A gradient is the same recurrence walked from the last token to the first (see `gpu_bwd`). So
`reverse` says whether tokens meet later ones, as in a gradient, instead of earlier ones.

Letter in shapes: C tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries

F32 = jnp.float32


class ChunkDecays(NamedTuple):
    """Decays of a chunk of one head, float32.

    Attributes:
      is_real: [C, 1], False for padding. None where all tokens are real.
      pair: [C, C] of the token of a row and the token of a column.
      read: [C, 1] of what a token reads from the carried state.
      add: [C, 1] of what a token adds to the carried state.
      forgotten_fraction: share of the state that the chunk forgets, 0 to 1.
    """

    is_real: Array | None
    pair: Float[Array, "C C"]
    read: Float[Array, "C 1"]
    add: Float[Array, "C 1"]
    forgotten_fraction: Float[Array, ""]


def forgotten_fraction(slope: Array, steps: Array) -> Array:
    """Return the share of a state forgotten after `steps`: all of it where they are negative.

    The share is subtracted from the state. A product with float32 exp(-slope * steps) would
    misstate the slowest slopes.
    """
    fraction = -jnp.expm1(-slope * jnp.maximum(steps, 0).astype(F32))
    return jnp.where(steps < 0, 1.0, fraction)


def full_chunk_decays(slope: Array, size: int, reverse: bool) -> ChunkDecays:
    """Return the decays of a chunk of `size` tokens without boundary or padding."""
    first = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    second = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    # Negative steps mean "never": a pair in the wrong order.
    pair_steps = second - first if reverse else first - second
    steps = pair_steps, column + 1, size - 1 - column
    return _decays_of_steps(slope, None, steps, jnp.int32(size), reverse)


def packed_chunk_decays(
    slope: Array, words: Int[Array, "C"], scalar: Array, reverse: bool
) -> ChunkDecays:
    """Return the decays of a chunk with documents or padding, from its words and its scalar."""
    is_real, *steps = boundaries.expand_word_pairs(
        words[:, None], words[None, :], scalar, reverse=reverse
    )
    # A scalar above the mask counts a document that starts inside, which forgets the whole state.
    total = jnp.where(scalar > boundaries.COUNT_MASK, -1, scalar & boundaries.COUNT_MASK)
    return _decays_of_steps(slope, is_real, steps, total, reverse)


def _decays_of_steps(slope, is_real, steps, total, reverse) -> ChunkDecays:
    """Turn (pair steps, steps from the state, steps to the end) and the chunk's steps to decays."""
    pair_steps, *ends = steps
    # A gradient walks from the last token: what a token reads of dS has passed the tokens after it,
    # and what it adds will pass the tokens before it.
    read, add = (boundaries.masked_decay(slope, n) for n in (reversed(ends) if reverse else ends))
    pair = boundaries.masked_decay(slope, pair_steps)
    return ChunkDecays(is_real, pair, read, add, forgotten_fraction(slope, total))
