"""One token per sequence, the state written only every W tokens (Mosaic TPU).

`ring` has the equations, the pool and its bookkeeping. `tpu_in_place` has the steps, their buffers
and their order. Per sequence and head this kernel reads a bfloat16 plane and a ring of R tokens,
where the in-place kernel reads and writes a float32 matrix.

The matrix unit computes q hi. The products are exact, because hi is bfloat16 and a float32 q enters
as three bfloat16 parts. The vector unit attends the ring in float32, because every head has keys of
its own: a token of 16 heads is two vector registers of k and two of v.

Letters in shapes: N heads of a block, H width of a head, R tokens of a ring.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import tpu_chunk
from pallas_kernels.lightning_decode import ring as decode_ring
from pallas_kernels.lightning_decode import tpu_in_place
from pallas_kernels.lightning_decode.tpu_in_place import Ref
from pallas_kernels.lightning_decode.tpu_prefill import expm1_nonpositive

NUM_BUFFERS = tpu_in_place.NUM_BUFFERS
# Heads of 128 a step. 8 would be too few: a row's copies cost as many bundles as their arithmetic.
HEADS_PER_STEP = 16


class RingScalars(NamedTuple):
    """Integers of a call, as arrays outside the kernel and as Refs in SMEM inside.

    B is the batch padded to whole tiles of rows. Rows of padding hold -1.

    Attributes:
      slots: [B] slot of a row. A row with a negative slot is inactive.
      newest_rows: [B] row of the ring that the new token goes to, 0 to R - 1.
      steps_since_base: [B * blocks] tokens of the ring that come before the new one, 0 to R - 1.
      flush_tokens: [B * blocks] tokens that the state absorbs after this step, 0 in most steps.
    """

    slots: Ref
    newest_rows: Ref
    steps_since_base: Ref
    flush_tokens: Ref


class RingScratch(NamedTuple):
    """VMEM and semaphores of the kernel."""

    qkv: Ref  # [rows, 3, N, H] float32, this step's q, k, v with heads along sublanes
    out: Ref  # [rows, N, H] float32, this step's o
    decayed: Ref  # [R, N, 2 H] float32, lambda^n k | v of a flush
    hi: Ref  # [NUM_BUFFERS, rows, N, H, H] bfloat16, a plane of S
    lo: Ref  # [NUM_BUFFERS, rows, N, H, H] bfloat16, the other plane
    ring: Ref  # [NUM_BUFFERS, rows, R, N, 2 H] bfloat16, k | v
    loads: Ref  # DMA semaphores of the copies from the pool, one a buffer
    stores: Ref  # DMA semaphores of the copies to the pool, one a buffer


class RingPlanes(NamedTuple):
    """Arrays of a pool, whole or of one row."""

    hi: Ref
    lo: Ref
    ring: Ref


def heads_per_block(num_heads: int, head_dim: int) -> int:
    """Return how many heads share a step, and so a point of the flush grid."""
    # Wider heads: fewer of them, so that a step's rows are as wide as at H = 128.
    max_heads = HEADS_PER_STEP * 128 // max(head_dim, 128)
    return tpu_in_place.heads_per_block(num_heads, head_dim, max_heads)


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: decode_ring.RingPool,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B NH"], decode_ring.RingPool]:
    """Advance the named slots by one token. See `api.lightning_decode_ring`."""
    batch = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.hi.shape
    grid = tpu_in_place.DecodeGrid(batch, num_heads, head_dim, heads_per_block(num_heads, head_dim))
    rows, heads = grid.rows_per_step, grid.block_heads
    if pool.base.shape[1] != grid.num_blocks:
        raise ValueError(f"pool.base: got {pool.base.shape[1]} blocks; wanted {grid.num_blocks}")
    base = pool.base[jnp.maximum(slots, 0)]
    flush_tokens = decode_ring.tokens_to_flush(base, positions, pool.window, pool.rollback_tokens)
    in_specs, out_specs = _ring_block_specs(grid, head_dim)
    o, hi, lo, ring = pl.pallas_call(
        functools.partial(_ring_decode_kernel, grid=grid),
        name="lightning_decode_ring",
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads * head_dim), qkv.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (pool.hi, pool.lo, pool.ring)),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid.shape,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[_ring_buffers(rows, heads, head_dim, pool.ring.shape[1])],
        ),
        # hi, lo and ring are arguments 6 to 8, after four prefetched vectors, qkv and slopes. They
        # are outputs 1 to 3, after o.
        input_output_aliases={6: 1, 7: 2, 8: 3},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(rows, heads, head_dim, pool.ring.shape[1]),
        ),
        interpret=interpret,
    )(
        *_ring_scalars(pool, slots, positions, base, flush_tokens, grid.padding_rows),
        qkv,
        # A slope in every lane of its head's row: the kernel's exponents are rows.
        jnp.broadcast_to(slopes[:, None], (num_heads, head_dim)),
        pool.hi,
        pool.lo,
        pool.ring,
    )
    base = decode_ring.advance_bases(pool.base, slots, flush_tokens)
    return o, dataclasses.replace(pool, hi=hi, lo=lo, ring=ring, base=base)


def _ring_block_specs(
    grid: tpu_in_place.DecodeGrid, head_dim: int
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
    """Return block specs of (qkv, slopes, hi, lo, ring) and of (o, hi, lo, ring)."""
    rows, heads = grid.rows_per_step, grid.block_heads

    def block_index(chain, step, *_):
        return grid.locate_step(chain, step)

    def slope_index(chain, step, *_):
        return grid.locate_step(chain, step)[1], 0

    # The pool stays in HBM: the kernel copies the rows' parts of it by hand.
    pool_specs = [pl.BlockSpec(memory_space=pltpu.HBM)] * 3
    in_specs = [
        pl.BlockSpec((rows, heads * 3 * head_dim), block_index),
        pl.BlockSpec((heads, head_dim), slope_index),
        *pool_specs,
    ]
    return in_specs, [pl.BlockSpec((rows, heads * head_dim), block_index), *pool_specs]


def _ring_scalars(
    pool: decode_ring.RingPool,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
    base: Int[Array, "B blocks"],
    flush_tokens: Int[Array, "B blocks"],
    padding_rows: int,
) -> RingScalars:
    """Pad the batch's integers to whole tiles of rows, and flatten them for SMEM."""

    def pad_and_flatten(x: Int[Array, "B *blocks"]) -> Int[Array, "padded"]:
        pad = ((0, padding_rows),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad, constant_values=-1).reshape(-1)

    return RingScalars(
        slots=pad_and_flatten(slots),
        newest_rows=pad_and_flatten(positions % pool.ring.shape[1]),
        steps_since_base=pad_and_flatten(positions[:, None] - base),
        flush_tokens=pad_and_flatten(flush_tokens),
    )


def _ring_buffers(rows: int, heads: int, head_dim: int, ring_rows: int) -> RingScratch:
    plane = pltpu.VMEM((NUM_BUFFERS, rows, heads, head_dim, head_dim), jnp.bfloat16)
    semaphores = pltpu.SemaphoreType.DMA((NUM_BUFFERS,))
    return RingScratch(
        qkv=pltpu.VMEM((rows, 3, heads, head_dim), jnp.float32),
        out=pltpu.VMEM((rows, heads, head_dim), jnp.float32),
        decayed=pltpu.VMEM((ring_rows, heads, 2 * head_dim), jnp.float32),
        hi=plane,
        lo=plane,
        ring=pltpu.VMEM((NUM_BUFFERS, rows, ring_rows, heads, 2 * head_dim), jnp.bfloat16),
        loads=semaphores,
        stores=semaphores,
    )


def _vmem_bytes(rows: int, heads: int, head_dim: int, ring_rows: int) -> int:
    """Return the kernel's limit of VMEM: buffers padded to whole tiles, and slack."""
    # bfloat16 of 2 bytes. Rows of a plane and k | v take at least 128 lanes, heads 8 sublanes.
    plane_bytes = 2 * NUM_BUFFERS * rows * heads * head_dim * max(head_dim, 128)
    ring_bytes = 4 * NUM_BUFFERS * rows * ring_rows * max(heads, 8) * max(head_dim, 64)
    return 2 * plane_bytes + ring_bytes + tpu_in_place.VMEM_SLACK_BYTES


def _ring_decode_kernel(
    slots: Ref,
    newest_rows: Ref,
    steps_since_base: Ref,
    flush_tokens: Ref,
    qkv: Ref,
    slopes: Ref,
    _hi: Ref,
    _lo: Ref,
    _ring: Ref,
    o: Ref,
    hi: Ref,
    lo: Ref,
    ring: Ref,
    scratch: RingScratch,
    *,
    grid: tpu_in_place.DecodeGrid,
) -> None:
    """Run one step: load a row's hi and ring, store its newest token and, after a flush, S.

    The first four Refs are `RingScalars`. qkv is [rows, N * 3 * H] and slopes [N, H]. hi, lo and
    ring are the aliased outputs. The kernel reads and writes the pool through them, and not through
    the inputs `_hi`, `_lo` and `_ring`, which are the same memory.
    """
    scalars = RingScalars(slots, newest_rows, steps_since_base, flush_tokens)
    chain, step = pl.program_id(0), pl.program_id(1)
    load, store = _ring_copies(scalars, RingPlanes(hi, lo, ring), scratch, chain, grid)

    def compute():
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        tpu_in_place.unfuse_heads(qkv, scratch.qkv)
        # Inactive rows are skipped below, and their output must be zero.
        scratch.out[...] = jnp.zeros_like(scratch.out)
        slope = slopes[...]

        def update_row(row, index, slot, block):
            steps = scalars.steps_since_base[index * grid.num_blocks + block]
            num_flushed = scalars.flush_tokens[index * grid.num_blocks + block]
            tokens = scratch.ring.at[buffer, row]
            kv = jnp.concatenate([scratch.qkv[row, 1], scratch.qkv[row, 2]], axis=1)
            # Before the ring is read: a token attends to itself, in the rounding of later reads.
            tokens[scalars.newest_rows[index]] = kv.astype(jnp.bfloat16)
            num_parts = 1 if qkv.dtype == jnp.bfloat16 else 3
            carried = _read_hi(scratch.qkv[row, 0], scratch.hi.at[buffer, row], num_parts=num_parts)
            scratch.out[row] = _clamped_decay(slope, steps + 1) * carried
            scratch.out[row] += _attend_ring(
                scratch.qkv[row, 0], tokens, slope, scalars.newest_rows[index], steps
            )

            # After the output: the token reads S as it was before the flush.
            @pl.when(num_flushed > 0)
            def _():
                planes = RingPlanes(scratch.hi.at[buffer, row], scratch.lo.at[buffer, row], tokens)
                newest = scalars.newest_rows[index]
                _flush_ring(planes, scratch.decayed, slope, newest, steps, num_flushed)

        grid.for_each_row(slots, chain, step, update_row)
        tpu_in_place.fuse_heads(scratch.out, o)

    tpu_in_place.rotate_buffers(step, pl.num_programs(1), load, store, compute)


def _ring_copies(
    scalars: RingScalars,
    pool: RingPlanes,
    scratch: RingScratch,
    chain: jax.Array,
    grid: tpu_in_place.DecodeGrid,
) -> tuple[tpu_in_place.StepCopies, tpu_in_place.StepCopies]:
    """Return builders of a step's copies from the pool, and of those to the pool.

    lo moves only for rows that flush, because only a flush reads or changes it. hi is stored only
    for them. A row's ring is loaded whole, and its newest token alone is stored.
    """
    heads = grid.block_heads

    def plane_ends(step, row, slot, block):
        """Return (view of the pool, view of VMEM) of hi and of lo."""
        buffer, block_heads = jax.lax.rem(step, NUM_BUFFERS), pl.ds(block * heads, heads)
        return [
            (in_pool.at[slot, block_heads], in_vmem.at[buffer, row])
            for in_pool, in_vmem in ((pool.hi, scratch.hi), (pool.lo, scratch.lo))
        ]

    def load(step, start_or_wait):
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        semaphore = scratch.loads.at[buffer]

        def load_row(row, index, slot, block):
            (hi_in_pool, hi_in_vmem), (lo_in_pool, lo_in_vmem) = plane_ends(step, row, slot, block)
            tokens = pool.ring.at[slot, :, pl.ds(block * heads, heads)]
            start_or_wait(pltpu.make_async_copy(hi_in_pool, hi_in_vmem, semaphore))
            start_or_wait(pltpu.make_async_copy(tokens, scratch.ring.at[buffer, row], semaphore))

            @pl.when(scalars.flush_tokens[index * grid.num_blocks + block] > 0)
            def _():
                start_or_wait(pltpu.make_async_copy(lo_in_pool, lo_in_vmem, semaphore))

        grid.for_each_row(scalars.slots, chain, step, load_row)

    def store(step, start_or_wait):
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        semaphore = scratch.stores.at[buffer]

        def store_row(row, index, slot, block):
            in_pool = pool.ring.at[slot, scalars.newest_rows[index], pl.ds(block * heads, heads)]
            in_vmem = scratch.ring.at[buffer, row, scalars.newest_rows[index]]
            start_or_wait(pltpu.make_async_copy(in_vmem, in_pool, semaphore))

            @pl.when(scalars.flush_tokens[index * grid.num_blocks + block] > 0)
            def _():
                for in_pool, in_vmem in plane_ends(step, row, slot, block):
                    start_or_wait(pltpu.make_async_copy(in_vmem, in_pool, semaphore))

        grid.for_each_row(scalars.slots, chain, step, store_row)

    return load, store


def _clamped_decay(slope: Float[Array, "N H"], steps: Int[Array, ""]) -> Float[Array, "N H"]:
    """exp(-slope * steps) of a scalar number of steps, at least 0."""
    return jnp.exp(-slope * jnp.maximum(steps, 0).astype(jnp.float32))


def _token_age(newest_row: Int[Array, ""], row: int, ring_rows: int) -> Int[Array, ""]:
    """Return the age of the token in a row of the ring. The newest, in `newest_row`, has age 0."""
    return newest_row - row + jnp.where(row > newest_row, ring_rows, 0)


def _read_hi(q: Float[Array, "N H"], hi: Ref, *, num_parts: int) -> Float[Array, "N H"]:
    """q hi of every head.

    A head's product takes the rows of all heads and keeps its own: one row would fill the matrix
    unit no better. `num_parts` bfloat16 numbers add up to an element of q.
    """
    heads, head_dim = q.shape
    # Each part holds the next 8 bits, which the parts before it round away.
    parts = []
    for _ in range(num_parts):
        parts.append(q.astype(jnp.bfloat16))
        q = q - parts[-1].astype(jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, (heads, head_dim), 0)
    carried = jnp.zeros((heads, head_dim), jnp.float32)
    for head in range(heads):
        products = [jnp.dot(part, hi[head], preferred_element_type=jnp.float32) for part in parts]
        carried = jnp.where(row == head, sum(products), carried)
    return carried


def _attend_ring(
    q: Float[Array, "N H"],
    tokens: Ref,
    slope: Float[Array, "N H"],
    newest_row: Int[Array, ""],
    steps_since_base: Int[Array, ""],
) -> Float[Array, "N H"]:
    """sum_a lambda^a (q . k) v over the tokens since the last flush, this one included."""
    size, head_dim = tokens.shape[0], q.shape[1]
    total = jnp.zeros_like(q)
    for row in range(size):
        age = _token_age(newest_row, row, size)
        # A select and not a product: rows of an earlier sequence may hold NaN.
        token = jnp.where(age <= steps_since_base, tokens[row].astype(jnp.float32), 0)
        score = jnp.sum(q * token[:, :head_dim], axis=1, keepdims=True)
        total += _clamped_decay(slope, age) * score * token[:, head_dim:]
    return total


def _flush_ring(
    planes: RingPlanes,
    decayed: Ref,
    slope: Float[Array, "N H"],
    newest_row: Int[Array, ""],
    steps_since_base: Int[Array, ""],
    num_flushed: Int[Array, ""],
) -> None:
    """S <- S + expm1(-s m) S + sum_{i<m} lambda^(m-1-i) k_i^T v_i, over the m oldest tokens."""
    hi, lo, tokens = planes
    size, heads, head_dim = tokens.shape[0], hi.shape[0], hi.shape[1]
    for row in range(size):
        # Position of the row's token, counted from base. Negative: an earlier sequence's.
        index = steps_since_base - _token_age(newest_row, row, size)
        is_flushed = (index >= 0) & (index < num_flushed)
        token = jnp.where(is_flushed, tokens[row].astype(jnp.float32), 0)
        # k is decayed and v is not. Both go through VMEM: a head below needs all tokens at once.
        decayed[row, :, :head_dim] = token[:, :head_dim] * _clamped_decay(
            slope, num_flushed - 1 - index
        )
        decayed[row, :, head_dim:] = token[:, head_dim:]
    # A row for each head, in every lane the same number; at most 0.
    loss = expm1_nonpositive(-slope * num_flushed.astype(jnp.float32))
    for head in range(heads):
        state = hi[head].astype(jnp.float32) + lo[head].astype(jnp.float32)
        # Exact float32 products: S is rounded nowhere but below, every W tokens.
        gain = tpu_chunk.dot_f32(decayed[:, head, :head_dim], decayed[:, head, head_dim:], 0, 0)
        state = state + loss[head : head + 1] * state + gain
        hi[head] = state.astype(jnp.bfloat16)
        # Read back from VMEM: lo is what the stored hi rounds away.
        lo[head] = (state - hi[head].astype(jnp.float32)).astype(jnp.bfloat16)
