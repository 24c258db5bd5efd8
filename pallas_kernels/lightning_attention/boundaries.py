"""Documents and padding as the kernels read them: one scalar a chunk, one word a token.

The scalar of a chunk is `(documents << 10) | tokens`: how many documents start inside the chunk,
and how many real tokens it holds. A chunk without a boundary or padding has the chunk size as its
scalar, and takes the fast path. A chunk of only padding has 0, and is skipped.

The word of a token is `(documents << 10) | count`: how many documents started in its chunk up to
this token, and how many real tokens the chunk holds up to and with this one. Padding has a negative
word. Exponents come from the counts and not from positions, so a hole inside a document costs no
decay.

docs/kernels.md, "Tables", shows both by an example.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_attention import documents

# Low bits of scalars and words: a chunk may hold up to 1,023 tokens.
COUNT_BITS = 10
COUNT_MASK = (1 << COUNT_BITS) - 1
# An int32 array. Inside a kernel its Ref, and in a call's `in_specs` its BlockSpec.
Table = Any


class BoundaryTables(NamedTuple):
    """Tables that `build_boundary_tables` makes.

    Attributes:
      chunk_scalars: one int32 a chunk, [B, superblocks, 1, chunks of a superblock] for the TPU
        kernels, [B, chunks] for the GPU kernels.
      token_words: one int32 a token, [B, 1, P] for the TPU kernels, [B, P] for the GPU kernels. P
        is the length of a row, padded to whole superblocks (GPU: chunks).
    """

    chunk_scalars: Table
    token_words: Table


class ChunkSteps(NamedTuple):
    """What all heads of a packed chunk share: exponents of the decay. Negative steps mean "never".

    Attributes:
      is_real: [C, 1], False for padding.
      pair_steps: [C, C] from the token of a column to that of a row.
      query_steps: [C, 1] from the carried state to the token. Negative where a document started
        in between.
      key_steps: [C, 1] from the token to the end of the chunk. Negative where another document
        starts in between.
    """

    is_real: Bool[Array, "C 1"]
    pair_steps: Int[Array, "C C"]
    query_steps: Int[Array, "C 1"]
    key_steps: Int[Array, "C 1"]


def build_boundary_tables(
    segment_ids: Int[Array, "B T"], chunk_tokens: int, superblock_tokens: int
) -> BoundaryTables:
    """Return the tables of a batch in the layout of the TPU kernels.

    The words are padded to whole superblocks: 4 bytes a token, shared by all heads. qkv is not
    padded.
    """
    batch, length = segment_ids.shape
    pad = -length % superblock_tokens
    is_start = jnp.pad(documents.document_starts(segment_ids), ((0, 0), (0, pad)))
    is_real = jnp.pad(segment_ids > 0, ((0, 0), (0, pad)))

    def split_into_chunks(x: Array) -> Array:
        return x.reshape(batch, -1, chunk_tokens).astype(jnp.int32)

    # Both counts stay below 2^10 inside a chunk, so one sum of shifted numbers holds the two.
    started = jnp.cumsum(split_into_chunks(is_start), 2) << COUNT_BITS
    word = started + jnp.cumsum(split_into_chunks(is_real), 2)
    # The last word of a chunk counts the whole chunk.
    scalars = word[:, :, -1].reshape(batch, -1, 1, superblock_tokens // chunk_tokens)
    words = jnp.where(split_into_chunks(is_real) > 0, word, -1)
    return BoundaryTables(scalars, words.reshape(batch, 1, length + pad))


def expand_words(words: Int[Array, "1 C"], scalar: Int[Array, ""]) -> ChunkSteps:
    """Expand the words of a chunk, inside a TPU kernel, to what every head of it shares."""
    size = words.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    col = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    # The column form is the diagonal of the row form: no second table, no transpose.
    column = jnp.sum(jnp.where(row == col, words, 0), axis=1, keepdims=True)
    return expand_word_pairs(column, words, scalar)


def expand_word_pairs(
    column: Int[Array, "C 1"],
    row: Int[Array, "1 C"],
    scalar: Int[Array, ""],
    *,
    reverse: bool = False,
) -> ChunkSteps:
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
    is_real = column >= 0
    # A negative word keeps its sign under >>, so padding belongs to no document. Real words of one
    # document differ by the real tokens between them.
    same_document = (column >> COUNT_BITS) == (row >> COUNT_BITS)
    if reverse:
        pair_steps = jnp.where((first <= second) & same_document & is_real, row - column, -1)
    else:
        pair_steps = jnp.where((first >= second) & same_document & is_real, column - row, -1)
    count, total = column & COUNT_MASK, scalar & COUNT_MASK
    # Only tokens before the chunk's first start read the carried state. Only tokens after its last
    # start reach the end of the chunk.
    query_steps = jnp.where((column >> COUNT_BITS) == 0, count, -1)
    key_steps = jnp.where((column >> COUNT_BITS) == (scalar >> COUNT_BITS), total - count, -1)
    return ChunkSteps(is_real, pair_steps, query_steps, key_steps)


def masked_decay(slope: Float[Array, ""], steps: Int[Array, "..."]) -> Float[Array, "..."]:
    """Return exp(-slope * steps), and 0 for negative steps.

    The exponent is masked and not the product: exp(-slope * steps) of negative steps overflows
    for the fast heads, and infinity times 0 is NaN.
    """
    power = jnp.exp(-slope * jnp.maximum(steps, 0).astype(jnp.float32))
    return jnp.where(steps >= 0, power, 0.0)


def apply_decay(x: Float[Array, "..."], decay: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x * decay, and 0 where the decay is 0, whatever x holds.

    A product alone would bring NaN and infinity of one document into another, since 0 * NaN is NaN.
    """
    return jnp.where(decay > 0, x * decay, 0.0)


def split_finite(x: Float[Array, "C columns"]) -> tuple[Array, Bool[Array, "C 1"]]:
    """Return x with 0 in place of all that is not finite, and which rows hold such.

    A product over the tokens of a chunk meets tokens of other documents with weights of 0. They
    must be finite there. Whoever uses this marks the pairs of a bad token by NaN instead, so that
    its own document does not look whole.
    """
    # Float32, because not every chip compares bfloat16. The comparison is false for NaN.
    is_finite = jnp.abs(x.astype(jnp.float32)) < jnp.inf
    bad = jnp.max(jnp.where(is_finite, 0.0, 1.0), axis=1, keepdims=True) > 0
    return jnp.where(is_finite, x, jnp.zeros_like(x)), bad


def forgotten_fraction_table(
    slopes: Float[Array, "N"], chunk_tokens: int
) -> Float[Array, "entries"]:
    """Return 1 - exp(-slope n) for n = 0..C, flat: head h, n steps at h (C + 1) + n.

    Kernels subtract this share from the state instead of multiplying by exp(-slope n): float32
    exp(-slope) itself misstates the slowest slopes by 2.5e-4. Flat, because a kernel reads it as
    scalars from SMEM.
    """
    steps = jnp.arange(chunk_tokens + 1, dtype=jnp.float32)
    return -jnp.expm1(-slopes[:, None] * steps[None]).reshape(-1)
