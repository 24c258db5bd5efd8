"""Documents and padding as the kernels read them: one scalar a chunk, one word a token.

A chunk's scalar is `(document << 10) | total`: how many documents start inside it, and how many
real tokens it holds. It equals the chunk size in a chunk without a boundary or padding, which
then takes the fast path; it is 0 in one of only padding, which is skipped. A token's word is
`(document << 10) | count`: documents started in its chunk up to it, and real tokens of the chunk
up to and with it; negative for padding. Counts give the exponents, so a hole inside a document
costs no decay.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.lightning_attention import documents

COUNT_BITS = 10
COUNT_MASK = (1 << COUNT_BITS) - 1


def build_boundary_tables(
    segment_ids: Int[Array, "B T"], chunk_tokens: int, superblock_tokens: int
) -> tuple[Int[Array, "B S 1 C"], Int[Array, "B 1 P"]]:
    """Return the scalar of each chunk, by superblock, and the word of each token.

    The words are padded to whole superblocks (4 bytes a token, shared by all heads; qkv is not).
    """
    batch, length = segment_ids.shape
    pad = -length % superblock_tokens
    start = jnp.pad(documents.document_starts(segment_ids), ((0, 0), (0, pad)))
    real = jnp.pad(segment_ids > 0, ((0, 0), (0, pad)))

    def by_chunk(x):
        return x.reshape(batch, -1, chunk_tokens).astype(jnp.int32)

    word = (jnp.cumsum(by_chunk(start), 2) << COUNT_BITS) + jnp.cumsum(by_chunk(real), 2)
    chunks = word[:, :, -1].reshape(batch, -1, 1, superblock_tokens // chunk_tokens)
    words = jnp.where(by_chunk(real) > 0, word, -1)
    return chunks, words.reshape(batch, 1, length + pad)


def expand_words(words: Int[Array, "1 C"], scalar):
    """Expand the words of a chunk, inside a kernel, to what every head of it shares.

    Returns:
      (real [C, 1]; gap [C, C], negative for pairs that do not meet; query steps [C, 1] since the
      carried state, negative where another document hides it; key steps [C, 1] to the end of the
      chunk, negative where another document follows.)
    """
    size = words.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    col = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    # The column form is the diagonal of the row form: no second table, no transpose.
    column = jnp.sum(jnp.where(row == col, words, 0), axis=1, keepdims=True)
    return expand_word_pairs(column, words, scalar)


def expand_word_pairs(
    column: Int[Array, "C 1"], row: Int[Array, "1 C"], scalar, *, reverse: bool = False
):
    """Do the work of `expand_words` on words given both ways.

    Args:
      column: words of a chunk, one a row.
      row: the same words, one a column.
      scalar: scalar of the chunk.
      reverse: whether tokens meet later ones, as in a gradient, instead of earlier ones.
    """
    size = row.shape[1]
    first = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    second = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    real = column >= 0
    same = (column >> COUNT_BITS) == (row >> COUNT_BITS)
    if reverse:
        gap = jnp.where((first <= second) & same & real, row - column, -1)
    else:
        gap = jnp.where((first >= second) & same & real, column - row, -1)
    count, total = column & COUNT_MASK, scalar & COUNT_MASK
    query_steps = jnp.where((column >> COUNT_BITS) == 0, count, -1)
    key_steps = jnp.where((column >> COUNT_BITS) == (scalar >> COUNT_BITS), total - count, -1)
    return real, gap, query_steps, key_steps


def masked_decay(slope, steps):
    """exp(-slope * steps), 0 for negative steps; the exponent is masked, never the product."""
    power = jnp.exp(-slope * jnp.maximum(steps, 0).astype(jnp.float32))
    return jnp.where(steps >= 0, power, 0.0)


def forgotten_fraction_table(slopes, chunk_tokens: int):
    """Return 1 - exp(-slope n) for n = 0..chunk, flat: head h, n steps at h (chunk + 1) + n.

    Subtracted from the state: float32 exp(-slope) itself misstates the slowest slopes.
    """
    steps = jnp.arange(chunk_tokens + 1, dtype=jnp.float32)
    return -jnp.expm1(-slopes[:, None] * steps[None]).reshape(-1)
