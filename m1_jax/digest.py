"""One number of all bits of an array, the same on every mesh: to see that weights are the same."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt

_WORD_DTYPES = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by the bytes of an element


def sum_array_bits(array: Shaped[Array, "..."]) -> UInt[Array, ""]:
    """Return the sum of an array's words, each times an odd number of its position, modulo 2^32.

    Integers add up in any order, so the sum does not depend on how the array is sharded. The odd
    factors differ by position, so that two values that changed places do not cancel.
    """
    word_dtype = _WORD_DTYPES[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, word_dtype).astype(jnp.uint32)
    for dim in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        # Knuth's multiplier, 2^32 over the golden ratio; each dimension has an offset of its own.
        words = words * (index * jnp.uint32(2654435761) + jnp.uint32(2 * dim + 1) | 1)
    return jnp.sum(words, dtype=jnp.uint32)
