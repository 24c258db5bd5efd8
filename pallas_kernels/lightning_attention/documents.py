"""What `segment_ids` mean: which tokens are real, and where documents start.

0 is padding. A change between two other ids starts a new document.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def document_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Mark each real token whose id differs from that of the real token before it.

    Padding is skipped over, so a document may have holes. The first real token of a row is not
    marked: it continues whatever state the row brings in.
    """
    real = segment_ids > 0
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    # Index of the newest real token up to each token. -1 stands before the first.
    last_real = jax.lax.cummax(jnp.where(real, index.reshape(1, -1), -1), axis=1)
    previous_real = jnp.pad(last_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    # The maximum keeps the index in range where there is no token before.
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(previous_real, 0), axis=1)
    return real & (previous_real >= 0) & (segment_ids != previous)


def document_numbers(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the documents of each row from 1. Padding gets 0."""
    # The first document of a row has no start, so the count of starts is short by 1.
    document_number = 1 + jnp.cumsum(document_starts(segment_ids).astype(jnp.int32), axis=1)
    return jnp.where(segment_ids > 0, document_number, 0)


def document_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Count the real tokens of the same document before each token. Padding gets 0."""
    real = segment_ids > 0
    count = jnp.cumsum(real.astype(jnp.int32), axis=1) - 1
    starts = document_starts(segment_ids)
    # The count at a document's first token. cummax carries it on, because counts never fall.
    base = jax.lax.cummax(jnp.where(starts, count, 0), axis=1)
    return jnp.where(real, count - base, 0)
