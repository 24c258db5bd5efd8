"""Softmax attention of serving: keys and values in pages of one chunk that sequences own or share.

A tile of queries goes over its sequence's pages in blocks of a fixed number of keys, with a
running softmax. The order of the blocks depends on the position alone, and keys after a query weigh
exactly 0. So a query's numbers do not depend on the other rows of the batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import layer_stack, ring_attention
from m1_jax.serving import lightning as serving_lightning
from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib

BLOCK_KEYS = 256  # keys that a tile of queries attends to at a time


def attend_pages(
    q: Float[Array, "M N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.PagedKVCache,
    stack_index: layer_stack.StackIndex,
) -> tuple[Float[Array, "M N H"], state_lib.PagedKVCache]:
    """Append rows to their sequences' pages, and attend to all of the sequence up to each row.

    Args:
      stack_index: where the layer lies in the group's stack.

    Precision: scores, softmax and sums are float32. Probabilities are cast to v's dtype.
    """
    num_kv, chunk, size = group_state.keys.shape[3:]
    pages_per_block = max(BLOCK_KEYS // chunk, 1)
    offsets = jnp.arange(pages_per_block * chunk, dtype=jnp.int32)  # of a block's keys
    # The padded list of pages is always longer than one block. A single block's pages would be the
    # same in every step of the loop, so XLA:CPU would read them before the loop, fuse that with the
    # write, and copy the whole cache for every tile.
    padding = pages_per_block - batch.pages.shape[1] % pages_per_block

    def attend_tile(_, pages, positions, qkv, group_state):
        q, k, v = qkv  # [t, heads, H] each
        pages = jnp.pad(pages, (0, padding))
        last, first = jnp.max(positions), serving_lightning.first_position(positions)
        # The tile lies in one page. A tile of padding alone writes page 0.
        index = (*stack_index, jnp.where(last >= 0, pages[first // chunk], 0))
        k, v = (jnp.moveaxis(x, 1, 0) for x in (k, v))
        # Written before they are read: a query attends to itself and to the tile's earlier rows.
        keys = serving_lightning.write_rows(group_state.keys, index, first % chunk, k, positions)
        values = serving_lightning.write_rows(
            group_state.values, index, first % chunk, v, positions
        )
        q = jnp.moveaxis(q.reshape(len(positions), num_kv, -1, size), 0, 2)[None]

        def attend_key_block(i, partial):
            ids = jax.lax.dynamic_slice_in_dim(pages, i * pages_per_block, pages_per_block)
            key_positions = i * pages_per_block * chunk + offsets
            k, v = (_read_pages(x, (*stack_index, ids), q.dtype) for x in (keys, values))
            # Positions that are not written yet hold anything, NaN too, and NaN times 0 is NaN.
            k, v = (jnp.where((key_positions <= last)[None, None, :, None], x, 0) for x in (k, v))
            mask = (key_positions[None] <= positions[:, None])[None, None, None]
            return ring_attention.merge_partials(
                partial, ring_attention.attend_block(q, k, v, mask)
            )

        partial = ring_attention.empty_partials(q.shape)
        num_blocks = last // (pages_per_block * chunk) + 1
        partial = jax.lax.fori_loop(0, num_blocks, attend_key_block, partial)
        o = partial.total / ring_attention.replace_zeros_with_ones(partial.scale)
        o = jnp.moveaxis(o[0].astype(q.dtype), 2, 0)
        return o.reshape(len(positions), -1, size), state_lib.PagedKVCache(keys, values)

    tiles = tuple(batch.to_tiles(x) for x in (q, k, v))
    o, group_state = ragged_batch.scan_attention_tiles(attend_tile, batch, tiles, group_state)
    return batch.to_rows(o), group_state


def _read_pages(
    cache: Float[Array, "R J pages K C H"],
    index: tuple[*layer_stack.StackIndex, Int[Array, "n"]],
    dtype: jnp.dtype,
) -> Float[Array, "1 K S H"]:
    """Return the keys or values of a list of pages as one sequence of S keys."""
    pages = jnp.moveaxis(cache[index], 1, 0)
    return pages.reshape(1, pages.shape[0], -1, pages.shape[-1]).astype(dtype)
