"""One token per sequence, the state written every W tokens only (Mosaic TPU).

The equations, the pool and its bookkeeping are in `decode_ring`; the steps, their buffers and
their order in `tpu_decode`. Per sequence and head this kernel reads a bfloat16 plane and a ring of
W tokens where the in-place kernel reads and writes a float32 matrix.

q hi runs on the matrix unit: the products are exact, because hi is bfloat16 and a float32 q enters
as three bfloat16 parts in rows that the unit would otherwise leave empty. The ring is a few tokens
for 16 heads at a time, which is two vector registers each: it stays on the vector unit, in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_decode import ring as decode_ring
from pallas_kernels.lightning_decode import tpu_in_place, tpu_prefill

NUM_BUFFERS = tpu_in_place.NUM_BUFFERS
HEADS_PER_STEP = (
    16  # heads of 128 a step: a row's copies cost as many bundles as 8 heads' arithmetic
)


def heads_per_block(num_heads: int, head_dim: int) -> int:
    """Return how many heads share a step, and so a point of the flush grid."""
    return tpu_in_place.heads_per_block(
        num_heads, head_dim, HEADS_PER_STEP * 128 // max(head_dim, 128)
    )


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: decode_ring.RingPool,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B NH"], decode_ring.RingPool]:
    """Advance the named slots by one token. See `decode_api.lightning_decode_ring`."""
    batch = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.hi.shape
    size = pool.ring.shape[1]
    grid = tpu_in_place.DecodeGrid(batch, num_heads, head_dim, heads_per_block(num_heads, head_dim))
    rows, heads = grid.rows_per_step, grid.block_heads
    if pool.base.shape[1] != grid.num_blocks:
        raise ValueError(f"pool.base: got {pool.base.shape[1]} blocks; wanted {grid.num_blocks}")
    base = pool.base[jnp.maximum(slots, 0)]
    spans = decode_ring.tokens_to_flush(base, positions, pool.window, pool.rollback_tokens)
    held = positions[:, None] - base

    def scalars(x):
        pad = ((0, grid.padding_rows),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=-1).reshape(-1)

    def block(chain, step, *_):
        return grid.locate_step(chain, step)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    planes = pltpu.VMEM((NUM_BUFFERS, rows, heads, head_dim, head_dim), jnp.bfloat16)
    plane_bytes = 2 * NUM_BUFFERS * rows * heads * head_dim * max(head_dim, 128)
    ring_bytes = 4 * NUM_BUFFERS * rows * size * max(heads, 8) * max(head_dim, 64)
    o, hi, lo, ring = pl.pallas_call(
        functools.partial(_ring_decode_kernel, grid=grid, ring_rows=size),
        name="lightning_decode_ring",
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads * head_dim), qkv.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pool.hi, pool.lo, pool.ring)),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid.shape,
            in_specs=[
                pl.BlockSpec((rows, heads * 3 * head_dim), block),
                pl.BlockSpec((heads, head_dim), lambda chain, step, *_: (block(chain, step)[1], 0)),
                *[in_hbm] * 3,
            ],
            out_specs=[pl.BlockSpec((rows, heads * head_dim), block), *[in_hbm] * 3],
            scratch_shapes=[
                pltpu.VMEM((rows, 3, heads, head_dim), jnp.float32),
                pltpu.VMEM((rows, heads, head_dim), jnp.float32),
                pltpu.VMEM((size, heads, 2 * head_dim), jnp.float32),
                planes,
                planes,
                pltpu.VMEM((NUM_BUFFERS, rows, size, heads, 2 * head_dim), jnp.bfloat16),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
            ],
        ),
        input_output_aliases={6: 1, 7: 2, 8: 3},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=2 * plane_bytes + ring_bytes + tpu_in_place.VMEM_SLACK_BYTES,
        ),
        interpret=interpret,
    )(
        scalars(slots),
        scalars(positions % size),
        scalars(held),
        scalars(spans),
        qkv,
        jnp.broadcast_to(slopes[:, None], (num_heads, head_dim)),
        pool.hi,
        pool.lo,
        pool.ring,
    )
    base = decode_ring.advance_bases(pool.base, slots, spans)
    return o, dataclasses.replace(pool, hi=hi, lo=lo, ring=ring, base=base)


def _ring_decode_kernel(
    slots,
    newest,
    steps_since_base,
    spans,
    x,
    rates,
    *refs,
    grid,
    ring_rows,
):
    """One step; a row's hi and ring come in, its newest token and, after a flush, S go out."""
    o, hi, lo, ring, qkv, out, faded, his, los, rings, loads, stores = refs[3:]
    heads = grid.block_heads
    chain, step = pl.program_id(0), pl.program_id(1)

    def plane_copies(step, row, slot, block):
        """Ends in the pool and in VMEM of hi and of lo."""
        buffer, mine = jax.lax.rem(step, NUM_BUFFERS), pl.ds(block * heads, heads)
        return [
            (there.at[slot, mine], here.at[buffer, row]) for there, here in ((hi, his), (lo, los))
        ]

    def load(step, act):
        buffer = jax.lax.rem(step, NUM_BUFFERS)

        def copy(row, index, slot, block):
            (hi_there, hi_here), (lo_there, lo_here) = plane_copies(step, row, slot, block)
            tokens = ring.at[slot, :, pl.ds(block * heads, heads)]
            act(pltpu.make_async_copy(hi_there, hi_here, loads.at[buffer]))
            act(pltpu.make_async_copy(tokens, rings.at[buffer, row], loads.at[buffer]))

            @pl.when(spans[index * grid.num_blocks + block] > 0)
            def _():
                act(pltpu.make_async_copy(lo_there, lo_here, loads.at[buffer]))

        grid.for_each_row(slots, chain, step, copy)

    def store(step, act):
        buffer = jax.lax.rem(step, NUM_BUFFERS)

        def copy(row, index, slot, block):
            there = ring.at[slot, newest[index], pl.ds(block * heads, heads)]
            here = rings.at[buffer, row, newest[index]]
            act(pltpu.make_async_copy(here, there, stores.at[buffer]))

            @pl.when(spans[index * grid.num_blocks + block] > 0)
            def _():
                for there, here in plane_copies(step, row, slot, block):
                    act(pltpu.make_async_copy(here, there, stores.at[buffer]))

        grid.for_each_row(slots, chain, step, copy)

    def compute():
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        tpu_in_place.unfuse_heads(x, qkv)
        out[...] = jnp.zeros_like(out)
        rate = rates[...]

        def update(row, index, slot, block):
            entered, span = (
                steps_since_base[index * grid.num_blocks + block],
                spans[index * grid.num_blocks + block],
            )
            tokens = rings.at[buffer, row]
            kv = jnp.concatenate([qkv[row, 1], qkv[row, 2]], axis=1)
            tokens[newest[index]] = kv.astype(jnp.bfloat16)
            exact = x.dtype == jnp.bfloat16
            carried = _read_carried_state(
                qkv[row, 0], his.at[buffer, row], num_parts=1 if exact else 3
            )
            out[row] = _clamped_decay(rate, entered + 1) * carried
            out[row] += _attend_ring(qkv[row, 0], tokens, rate, newest[index], entered)

            @pl.when(span > 0)
            def _():
                planes = his.at[buffer, row], los.at[buffer, row]
                _flush_ring(tokens, faded, *planes, rate, newest[index], entered, span)

        grid.for_each_row(slots, chain, step, update)
        tpu_in_place.fuse_heads(out, o)

    tpu_in_place.rotate_buffers(step, pl.num_programs(1), load, store, compute)


def _clamped_decay(rate, steps):
    """exp(-rate * steps) of a scalar number of steps, at least 0."""
    return jnp.exp(-rate * jnp.maximum(steps, 0).astype(jnp.float32))


def _token_age(newest, row, ring_rows):
    """Age of the token in a ring row, the newest token being in row `newest`."""
    return newest - row + jnp.where(row > newest, ring_rows, 0)


def _read_carried_state(q, hi, *, num_parts):
    """q hi for every head: one product each for all rows of q, of which the head's own is kept."""
    heads, head_dim = q.shape
    pieces = []
    for _ in range(num_parts):
        pieces.append(q.astype(jnp.bfloat16))
        q = q - pieces[-1].astype(jnp.float32)
    which = jax.lax.broadcasted_iota(jnp.int32, (heads, head_dim), 0)
    carried = jnp.zeros((heads, head_dim), jnp.float32)
    for head in range(heads):
        products = [jnp.dot(p, hi[head], preferred_element_type=jnp.float32) for p in pieces]
        carried = jnp.where(which == head, sum(products), carried)
    return carried


def _attend_ring(q, tokens, rate, newest, entered):
    """sum_a lambda^a (q . k) v over the tokens since the last flush, this one included."""
    size, head_dim = tokens.shape[0], q.shape[1]
    total = jnp.zeros_like(q)
    for row in range(size):
        age = _token_age(newest, row, size)
        # A select and not a product: rows of an earlier sequence may hold anything.
        token = jnp.where(age <= entered, tokens[row].astype(jnp.float32), 0)
        score = jnp.sum(q * token[:, :head_dim], axis=1, keepdims=True)
        total += _clamped_decay(rate, age) * score * token[:, head_dim:]
    return total


def _flush_ring(tokens, faded, hi, lo, rate, newest, entered, span):
    """S <- S + expm1(-s m) S + sum_{i<m} lambda^(m-1-i) k_i^T v_i, over the m oldest tokens."""
    size, heads, head_dim = tokens.shape[0], hi.shape[0], hi.shape[1]
    for row in range(size):
        since = entered - _token_age(newest, row, size)
        taken = (since >= 0) & (since < span)
        token = jnp.where(taken, tokens[row].astype(jnp.float32), 0)
        faded[row, :, :head_dim] = token[:, :head_dim] * _clamped_decay(rate, span - 1 - since)
        faded[row, :, head_dim:] = token[:, head_dim:]
    loss = tpu_prefill.expm1_nonpositive(-rate * span.astype(jnp.float32))
    for head in range(heads):
        state = hi[head].astype(jnp.float32) + lo[head].astype(jnp.float32)
        update = tpu_prefill.dot(
            faded[:, head, :head_dim], faded[:, head, head_dim:], 0, 0, exact=True
        )
        state = state + loss[head : head + 1] * state + update
        hi[head] = state.astype(jnp.bfloat16)
        lo[head] = (state - hi[head].astype(jnp.float32)).astype(jnp.bfloat16)
