"""Softmax attention of serving: keys and values in pages of one chunk that sequences own or share.

A tile of queries goes over its sequence's pages in blocks of a fixed number of keys, with a
running softmax, in an order that depends on the position alone. Keys past a query weigh exactly 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m1_jax import ring_attention
from m1_jax.serving import lightning as serving_lightning
from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib

BLOCK_KEYS = 256


def attend_pages(
    q: Float[Array, "M N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    batch: ragged_batch.RaggedBatch,
    pool: state_lib.PagedKVCache,
    stack_index: tuple[Any, ...],
) -> tuple[Float[Array, "M N H"], state_lib.PagedKVCache]:
    """Append rows to their sequences' pages, and attend to all of the sequence up to each row.

    place: of the layer in the pool (repeat, number).

    Precision: scores, softmax and sums in float32; probabilities are cast to v's dtype.
    """
    num_kv, chunk, size = pool.keys.shape[3:]
    number = max(BLOCK_KEYS // chunk, 1)  # pages a block
    order = jnp.arange(number * chunk, dtype=jnp.int32)
    # More than one block, also where one would do: it would be read before the loop, and XLA:CPU
    # would fuse that with the write and copy the pool for every tile.
    more = number - batch.pages.shape[1] % number

    def tile(_, pages, places, qkv, pool):
        q, k, v = qkv
        pages = jnp.pad(pages, (0, more))
        last, first = jnp.max(places), serving_lightning.first_position(places)
        index = (*stack_index, jnp.where(last >= 0, pages[first // chunk], 0))
        k, v = (jnp.moveaxis(x, 1, 0) for x in (k, v))
        keys = serving_lightning.write_rows(pool.keys, index, first % chunk, k, places)
        values = serving_lightning.write_rows(pool.values, index, first % chunk, v, places)
        q = jnp.moveaxis(q.reshape(len(places), num_kv, -1, size), 0, 2)[None]

        def block(i, partial):
            ids = jax.lax.dynamic_slice_in_dim(pages, i * number, number)
            at = i * number * chunk + order
            k, v = (
                jnp.moveaxis(x[(*stack_index, ids)], 1, 0)
                .reshape(1, num_kv, -1, size)
                .astype(q.dtype)
                for x in (keys, values)
            )
            # Places that are not written yet hold anything, NaN too.
            k, v = (jnp.where((at <= last)[None, None, :, None], x, 0) for x in (k, v))
            seen = (at[None] <= places[:, None])[None, None, None]
            return ring_attention.merge_partials(
                partial, ring_attention.attend_block(q, k, v, seen)
            )

        shape = (*q.shape[:-1], 1)
        start = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.full(shape, -jnp.inf, jnp.float32),
        )
        count = last // (number * chunk) + 1
        total, scale, _ = jax.lax.fori_loop(0, count, block, start)
        o = jnp.moveaxis(
            (total / ring_attention.replace_zeros_with_ones(scale))[0].astype(q.dtype), 2, 0
        )
        return o.reshape(len(places), -1, size), state_lib.PagedKVCache(keys, values)

    arrays = tuple(batch.to_tiles(x) for x in (q, k, v))
    o, pool = ragged_batch.scan_attention_tiles(tile, batch, arrays, pool)
    return batch.to_rows(o), pool
