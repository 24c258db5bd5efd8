"""Paged softmax attention on TPU: a tile's queries go over its sequence's pages in HBM.

Every (tile, kv head) is a program of its own, which copies the pages of a block of keys to VMEM
while it computes the block before. It keeps a running softmax (Dao, arXiv 2307.08691):

    m' = max(m, max_s x_s)
    l' = e^(m - m') l + sum_s e^(x_s - m')
    a' = e^(m - m') a + sum_s e^(x_s - m') v_s

The cache stays whole in HBM, and pages are the only bytes read: 2 C H numbers a page and kv head.
A program's products have the same shapes for every tile, in prefill and in decoding. It sees
nothing of other tiles. So a query has the same bits in any batch. Only the block of the tile's own
rows is masked: a block before it has no key that a row must not see.

Letters of shapes: I tiles, P pages of a sequence, K kv heads, G query heads of a kv head, t rows of
a tile, C rows of a page, H size of a head. R and J are the axes of the stack of layers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

BLOCK_KEYS = 512  # keys that are copied, and attended to, at a time
F32 = jnp.float32


def supports_shapes(q: Float[Array, "I K Gt H"], keys: Float[Array, "R J pages K C H"]) -> bool:
    """Say whether the kernel takes these arrays."""
    chunk, size = keys.shape[4:]
    # Registers have 128 lanes, and 16 rows of bfloat16.
    fits = size % 128 == 0 and chunk % 16 == 0 and q.shape[2] % 8 == 0
    return fits and q.dtype in (jnp.bfloat16, jnp.float32) and keys.dtype == q.dtype


def _attention_kernel(
    stack_index,
    first_positions,
    last_positions,
    pages,
    q,
    keys,
    values,
    o,
    key_buffers,
    value_buffers,
    semaphores,
    total,
    scale,
    top,
    *,
    tile: int,
):
    """Attend with the queries of one tile to one kv head of its sequence.

    Refs: prefetched scalars [2], [I] and [I]; pages [1, 1, P] in SMEM; q and o [1, 1, G t, H] in
    VMEM; keys and values in HBM; buffers [2, S, H] in VMEM; semaphores [2, 2] of DMA; a [G t, H],
    l [G t, lanes] whose sum over lanes is l, and m [G t, lanes] in VMEM, not in registers, of which
    the scores of a block take half.
    """
    tile_index, head = pl.program_id(0), pl.program_id(1)
    first, last = first_positions[tile_index], last_positions[tile_index]
    (_, block_keys, size), chunk = key_buffers.shape, keys.shape[4]
    pages_per_block = block_keys // chunk

    sides = ((keys, key_buffers), (values, value_buffers))

    def start(block, slot):
        """Start to copy the pages of a block to one of the two buffers."""
        for i in range(pages_per_block):
            page = pages[0, 0, block * pages_per_block + i]
            source = (stack_index[0], stack_index[1], page, head)
            rows = pl.ds(i * chunk, chunk)
            for side, (cache, buffers) in enumerate(sides):
                pltpu.make_async_copy(
                    cache.at[source], buffers.at[slot, rows], semaphores.at[slot, side]
                ).start()

    def wait(slot):
        """Wait for all of a buffer's pages: a semaphore counts bytes, whatever brought them."""
        for side, (_, buffers) in enumerate(sides):
            buffer = buffers.at[slot]
            pltpu.make_async_copy(buffer, buffer, semaphores.at[slot, side]).wait()

    # `//` of a traced number asks for the TPU at hand, and there is none ahead of time.
    num_blocks = jnp.where(last >= 0, jax.lax.div(last, block_keys) + 1, 0)
    pl.when(num_blocks > 0)(lambda: start(0, 0))

    def clear_values(slot, first_key):
        """Write zeros over unwritten rows: they hold anything, NaN too, and NaN times 0 is NaN."""
        for i in range(pages_per_block):
            rows = pl.ds(i * chunk, chunk)
            v = value_buffers[slot, rows]
            positions = first_key + i * chunk + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
            value_buffers[slot, rows] = jnp.where(positions <= last, v, jnp.zeros_like(v))

    def attend_block(block, *, masked: bool):
        slot = jax.lax.rem(block, 2)
        pl.when(block + 1 < num_blocks)(lambda: start(block + 1, 1 - slot))
        wait(slot)
        first_key = block * block_keys
        if masked:
            clear_values(slot, first_key)
        k, v = key_buffers[slot], value_buffers[slot]
        scores = jax.lax.dot_general(
            q[0, 0], k, (((1,), (1,)), ((), ())), preferred_element_type=F32
        ) * (1 / math.sqrt(size))
        if masked:
            # Rows are ordered [G, t]. A row of padding after the last real one sees what that sees.
            row = jax.lax.broadcasted_iota(jnp.int32, (scores.shape[0], 1), 0)
            row_position = jnp.minimum(first + jax.lax.rem(row, tile), last)
            key = jax.lax.broadcasted_iota(jnp.int32, (1, block_keys), 1)
            scores = jnp.where(key <= row_position - first_key, scores, -jnp.inf)
        # Every row sees the sequence's first key, so from the first block on this is finite.
        new_top = jnp.maximum(top[:], jnp.max(scores, axis=1, keepdims=True))
        share = jnp.exp(top[:] - new_top)
        weights = jnp.exp(scores - new_top[:, :1])
        gain = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=F32)
        lanes = scale.shape[1]
        lane_sums = sum(weights[:, i : i + lanes] for i in range(0, block_keys, lanes))
        total[:] = total[:] * share[:, :1] + gain
        scale[:] = scale[:] * share + lane_sums
        top[:] = new_top

    total[:] = jnp.zeros_like(total)
    scale[:] = jnp.zeros_like(scale)
    top[:] = jnp.full(top.shape, -jnp.inf, F32)
    num_whole = jax.lax.div(jnp.minimum(first, last) + 1, block_keys)
    whole, own = (functools.partial(attend_block, masked=masked) for masked in (False, True))
    pl.loop(0, num_whole)(whole)
    pl.loop(num_whole, num_blocks)(own)
    # A tile of padding alone has no block, and its output is 0.
    sums = jnp.sum(scale[:], axis=1, keepdims=True)
    o[0, 0] = (total[:] / jnp.where(sums > 0, sums, 1.0)).astype(o.dtype)


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def attend_pages(
    q: Float[Array, "I K Gt H"],
    first_positions: Int[Array, "I"],
    last_positions: Int[Array, "I"],
    pages: Int[Array, "I P"],
    stack_index: Int[Array, "2"],
    keys: Float[Array, "R J pages K C H"],
    values: Float[Array, "R J pages K C H"],
    *,
    tile: int,
    interpret: bool = False,
) -> Float[Array, "I K Gt H"]:
    """Return what each tile's queries read of their sequence's pages.

    Args:
      q: the queries of each tile and kv head, in the order [G, t].
      first_positions: position of each tile's first row, padding or not.
      last_positions: position of each tile's last real row. -1: none is real.
      pages: pages of each tile's sequence, at least up to its last position.
      stack_index: the layer's place in the stack.
      tile: t.
      interpret: run the kernel's Python on any backend, for tests.

    Precision: products have q's dtype, scores, softmax and sums are float32. Probabilities are cast
    to the dtype of values.
    """
    (num_tiles, num_kv, rows, size), chunk = q.shape, keys.shape[4]
    pages_per_block = max(BLOCK_KEYS // chunk, 1)
    padding = -pages.shape[1] % pages_per_block
    pages = jnp.pad(pages, ((0, 0), (0, padding)))[:, None]
    # `Any`: block specs take index maps of any number of scalars.
    query_spec: Any = pl.BlockSpec((1, 1, rows, size), lambda i, h, *_: (i, h, 0, 0))
    return pl.pallas_call(
        functools.partial(_attention_kernel, tile=tile),
        name="paged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_tiles, num_kv),
            in_specs=[
                # A tile's pages alone: those of 64 long sequences would fill the scalar memory.
                pl.BlockSpec(
                    (1, 1, pages.shape[2]), lambda i, h, *_: (i, 0, 0), memory_space=pltpu.SMEM
                ),
                query_spec,
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=query_spec,
            scratch_shapes=_make_scratch(rows, pages_per_block, chunk, size, keys.dtype),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            # The scheduler's pages are all within the cache. To check each copy's place again takes
            # as many cycles as attending to the block.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
    )(stack_index, first_positions, last_positions, pages, q, keys, values)


def _make_scratch(rows: int, pages_per_block: int, chunk: int, size: int, dtype: Any) -> list[Any]:
    block_keys = pages_per_block * chunk
    buffers = pltpu.VMEM((2, block_keys, size), dtype)
    by_lane = pltpu.VMEM((rows, math.gcd(block_keys, 128)), F32)
    semaphores = pltpu.SemaphoreType.DMA((2, 2))
    return [buffers, buffers, semaphores, pltpu.VMEM((rows, size), F32), by_lane, by_lane]
