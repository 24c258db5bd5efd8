"""Softmax attention of serving: keys and values in pages of one chunk that sequences own or share.

All rows' keys and values are written first. Masks go by position, so that a query sees nothing of
the rows after it. Tiles then no longer depend on each other, and several are computed at a time.

A tile of queries goes over its sequence's pages in blocks of a fixed number of keys, with a
running softmax. The order of the blocks depends on the position alone, and keys after a query weigh
exactly 0. A block that lies after all of a tile's queries changes no bit of it, even if the tile's
neighbours have longer sequences. So a query's numbers do not depend on the other rows of the batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import layer_stack, measured_choices, ring_attention, sharding
from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib
from pallas_kernels.paged_attention import tpu as tpu_kernel

BLOCK_KEYS = 256  # keys that a tile of queries attends to at a time


def attend_pages(
    q: Float[Array, "M N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    batch: ragged_batch.RaggedBatch,
    group_state: state_lib.PagedKVCache,
    stack_index: layer_stack.StackIndex,
    implementation: str | None = None,
) -> tuple[Float[Array, "M N H"], state_lib.PagedKVCache]:
    """Append rows to their sequences' pages, and attend to all of the sequence up to each row.

    Args:
      stack_index: where the layer lies in the group's stack.
      implementation: "xla", "tpu" (the kernel), "tpu_interpret", or None: the kernel where it is
        lowered for TPU, the shapes fit, and m1-selfcheck did not find it wanting there, else "xla".
        A row has the same bits in any batch of one implementation, and other last bits in the
        other.

    Raises:
      ValueError: another implementation.

    Precision: scores, softmax and sums are float32. Probabilities are cast to v's dtype.
    """
    num_tiles, num_kv = len(batch.slots), k.shape[1]
    cache = state_lib.PagedKVCache(
        _write_rows(group_state.keys, k, batch, stack_index),
        _write_rows(group_state.values, v, batch, stack_index),
    )
    # [I, t, N, H] -> [I, K, G, t, H]
    tiles = batch.to_tiles(q)
    tiles = jnp.moveaxis(tiles.reshape(*tiles.shape[:2], num_kv, -1, tiles.shape[3]), 1, 3)
    o = _choose_implementation(implementation, tiles, cache)(tiles, batch, cache, stack_index)
    o = jnp.moveaxis(o, 3, 1).reshape(num_tiles, batch.attention_tile, *q.shape[1:])
    return batch.to_rows(o), cache


def _choose_implementation(implementation: str | None, q, cache) -> Callable:
    """Return the function that attends with tiles [I, K, G, t, H]."""
    if implementation == "xla":
        return _attend_tiles
    if implementation in ("tpu", "tpu_interpret"):
        return functools.partial(_attend_on_tpu, interpret=implementation == "tpu_interpret")
    if implementation is not None:
        raise ValueError(
            f"implementation: got {implementation!r}; wanted None, 'xla', 'tpu' or 'tpu_interpret'"
        )
    prefers_xla = measured_choices.find_choice("serving_softmax", sharding.target_device()) == "xla"
    if prefers_xla or not tpu_kernel.supports_shapes(_join_queries(q), cache.keys):
        return _attend_tiles
    # Decided at lowering, so that programs compiled ahead of time get the target's.
    return functools.partial(jax.lax.platform_dependent, default=_attend_tiles, tpu=_attend_on_tpu)


def _join_queries(q: Float[Array, "I K G t H"]) -> Float[Array, "I K Gt H"]:
    return q.reshape(*q.shape[:2], -1, q.shape[-1])


def _attend_on_tpu(
    q: Float[Array, "I K G t H"],
    batch: ragged_batch.RaggedBatch,
    cache: state_lib.PagedKVCache,
    stack_index: layer_stack.StackIndex,
    interpret: bool = False,
) -> Float[Array, "I K G t H"]:
    """Attend by the kernel, in which each tile has its own loop over its own pages."""
    tile = batch.attention_tile
    last = jnp.max(batch.tile_positions(), axis=1)
    # A tile begins at a multiple of its length.
    first = jnp.maximum(last, 0) // tile * tile
    o = tpu_kernel.attend_pages(
        _join_queries(q),
        first,
        last,
        batch.pages,
        jnp.stack([jnp.asarray(index, jnp.int32) for index in stack_index]),
        cache.keys,
        cache.values,
        tile=tile,
        interpret=interpret,
    )
    return o.reshape(q.shape)


def _attend_tiles(
    q: Float[Array, "I K G t H"],
    batch: ragged_batch.RaggedBatch,
    cache: state_lib.PagedKVCache,
    stack_index: layer_stack.StackIndex,
) -> Float[Array, "I K G t H"]:
    """Attend a group of tiles at a time, up to the last key that any of them sees."""
    chunk = cache.keys.shape[4]
    pages_per_block = max(BLOCK_KEYS // chunk, 1)
    block_keys = pages_per_block * chunk
    offsets = jnp.arange(block_keys, dtype=jnp.int32)
    # The padded list of pages is always longer than one block. A single block's pages would be the
    # same in every step of the loop, so XLA:CPU would read them before the loop, fuse that with the
    # write, and copy the whole cache.
    padding = pages_per_block - batch.pages.shape[1] % pages_per_block

    def attend_group(_, pages, positions, q):
        pages = jnp.pad(pages, ((0, 0), (0, padding)))
        last = jnp.max(positions, axis=1)

        def attend_key_block(i, partial):
            ids = jax.lax.dynamic_slice_in_dim(pages, i * pages_per_block, pages_per_block, axis=1)
            key_positions = (i * block_keys + offsets)[None]
            k, v = (
                _read_pages(x, (*stack_index, ids), q.dtype) for x in (cache.keys, cache.values)
            )
            # Positions that are not written yet hold anything, NaN too, and NaN times 0 is NaN.
            # Scores of such keys are replaced.
            v = jnp.where((key_positions <= last[:, None])[:, None, :, None], v, 0)
            mask = (key_positions[None] <= positions[:, :, None])[:, None, None]
            merged = ring_attention.merge_partials(
                partial, ring_attention.attend_block(q, k, v, mask)
            )
            # A select: adding 0 would turn -0 into 0 in a tile whose neighbours see more blocks.
            is_seen = (i * block_keys <= last)[:, None, None, None, None]
            return jax.tree.map(lambda new, old: jnp.where(is_seen, new, old), merged, partial)

        partial = ring_attention.empty_partials(q.shape)
        num_blocks = jnp.max(last) // block_keys + 1
        partial = jax.lax.fori_loop(0, num_blocks, attend_key_block, partial)
        o = partial.total / ring_attention.replace_zeros_with_ones(partial.scale)
        return o.astype(q.dtype)

    return ragged_batch.map_tile_groups(attend_group, batch, q)


def _write_rows(
    cache: Float[Array, "R J pages K C H"],
    rows: Float[Array, "M K H"],
    batch: ragged_batch.RaggedBatch,
    stack_index: layer_stack.StackIndex,
) -> Float[Array, "R J pages K C H"]:
    """Return the keys or values with all rows written, those of padding into page 0."""
    page, offset = batch.row_pages(cache.shape[4])
    # Heads are among the indices, so that a window is one head's row. Where a window spans several
    # heads, XLA:TPU moves the heads beside the rows, and copies the cache for it.
    kv_heads = jnp.arange(rows.shape[1], dtype=jnp.int32)[None]
    index = (*stack_index, page[:, None], kv_heads, offset[:, None])
    return cache.at[index].set(rows.astype(cache.dtype))


def _read_pages(
    cache: Float[Array, "R J pages K C H"],
    index: tuple[*layer_stack.StackIndex, Int[Array, "G n"]],
    dtype: jnp.dtype,
) -> Float[Array, "G K S H"]:
    """Return the keys or values of each tile's list of pages as one sequence of S keys."""
    pages = jnp.moveaxis(cache[index], 1, 2)
    return pages.reshape(*pages.shape[:2], -1, pages.shape[-1]).astype(dtype)
