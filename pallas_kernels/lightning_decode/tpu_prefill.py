"""Lightning attention over many sequences in one call, states in a slot pool (Mosaic TPU).

The tokens of all sequences lie one after another in a flat array. Cuts divide the array at every
multiple of the chunk size and wherever a sequence starts or ends. A tile is the rows between two
cuts, so it lies inside one block of the array and belongs to one sequence or to none. For a tile of
rows lo..hi-1 with m = hi - lo, and the state S of its sequence before row lo:

    o_i = lambda^(i-lo+1) q_i S + sum_{lo <= j <= i} lambda^(i-j) (q_i . k_j) v_j
    S  <- S + expm1(-s m) S + sum_j lambda^(hi-1-j) k_j^T v_j

Source: M1 report, section 2; docs/kernels.md, "Serving prefill".

Starts are exact to the token. Still Pallas' own pipeline loads every block, and loads none twice:
neighbouring tiles of one block share it, and each writes its own rows of the output. A select
zeroes the rows of other tiles.

Where a sequence starts at a multiple of the chunk size, its tiles do not depend on what else is in
the call. So its results are bit-exact, alone or among others.

Letters in shapes: N heads of a block, C rows of a block of tokens, H width of a head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_attention import tpu_chunk
from pallas_kernels.lightning_decode import reference, tpu_in_place
from pallas_kernels.lightning_decode.tpu_in_place import Ref, StartOrWait

# Side of the matrix unit on v5e and v5p. All generations take it, so that they agree in their cuts.
CHUNK_TOKENS = 128
HEADS_PER_STEP = 16  # heads a step: 2,048 token-heads, which outlast the overhead of a step
HEADS_PER_GROUP = 4  # heads unrolled together, to hide each other's latency
NUM_BUFFERS = 3  # states of one sequence load, one computes, one stores
VMEM_SLACK_BYTES = 24 * 2**20  # bytes for pipelined blocks, relayouts and the compiler's own use


class PrefillScratch(NamedTuple):
    """VMEM and semaphores of the kernel."""

    pair_decay: Ref  # [N, C, C] float32, lambda^(i - j) on and below the diagonal, else 0
    states: Ref  # [NUM_BUFFERS, N, H, H] float32, one sequence a buffer
    loads: Ref  # DMA semaphores of the copies from the pool, one a buffer
    stores: Ref  # DMA semaphores of the copies to the pool, one a buffer


def lightning_prefill(
    qkv: Float[Array, "T N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    fresh: Bool[Array, "R"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "T NH"], Float[Array, "slots N H H"]]:
    """Run every sequence from its slot's state. See `api.lightning_prefill`.

    Precision: operands keep qkv's dtype. Sums, decays and states are float32. In bfloat16 masked
    scores and decayed keys are rounded to bfloat16, and queries read the state as two halves.
    """
    num_tokens = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.shape
    heads = tpu_in_place.heads_per_block(num_heads, head_dim, HEADS_PER_STEP)
    chunk = min(CHUNK_TOKENS, num_tokens)
    tiles, order = reference.cut_prefill_tiles(slots, starts, lengths, num_tokens, chunk)
    # [2, R] in the order of the tokens: slot (-1 for a sequence without work), fresh as 0 or 1.
    sequences = jnp.stack([jnp.where(lengths > 0, slots, -1), fresh.astype(jnp.int32)])[:, order]

    def block_index(head_block, tile, tiles, *_):
        # Successive tiles of one block have the same index, so Pallas loads the block once.
        return tiles[0, tile], head_block

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    heads_per_group = tpu_in_place.heads_per_block(heads, head_dim, HEADS_PER_GROUP)
    o, pool = pl.pallas_call(
        functools.partial(_prefill_kernel, heads_per_group=heads_per_group),
        name="lightning_prefill",
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_heads * head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_heads // heads, tiles.shape[1]),
            in_specs=[pl.BlockSpec((chunk, heads * 3 * head_dim), block_index), in_hbm],
            out_specs=[pl.BlockSpec((chunk, heads * head_dim), block_index), in_hbm],
            # A NamedTuple in the list: the kernel gets it as one argument, with Refs for fields.
            scratch_shapes=[_prefill_buffers(heads, chunk, head_dim)],
        ),
        # Argument 4, the pool, is output 1. The three prefetched arrays count as arguments.
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(heads, chunk, head_dim),
        ),
        interpret=interpret,
    )(tiles, sequences, slopes, qkv, pool)
    return o, pool


def _prefill_buffers(heads: int, chunk: int, head_dim: int) -> PrefillScratch:
    semaphores = pltpu.SemaphoreType.DMA((NUM_BUFFERS,))
    return PrefillScratch(
        pair_decay=pltpu.VMEM((heads, chunk, chunk), jnp.float32),
        states=pltpu.VMEM((NUM_BUFFERS, heads, head_dim, head_dim), jnp.float32),
        loads=semaphores,
        stores=semaphores,
    )


def _vmem_bytes(heads: int, chunk: int, head_dim: int) -> int:
    """Return the kernel's limit of VMEM: scratch padded to 128 lanes, and slack."""
    decay_bytes = 4 * heads * chunk * max(chunk, 128)
    state_bytes = 4 * heads * head_dim * max(head_dim, 128)
    return decay_bytes + NUM_BUFFERS * state_bytes + VMEM_SLACK_BYTES


def _prefill_kernel(
    tiles: Ref,
    sequences: Ref,
    slopes: Ref,
    qkv: Ref,
    _: Ref,
    o: Ref,
    pool: Ref,
    scratch: PrefillScratch,
    *,
    heads_per_group: int,
) -> None:
    """Attend one tile of one block of heads. A state moves between pool and VMEM once a sequence.

    tiles [5, tiles] of `reference.cut_prefill_tiles`, sequences [2, R] and slopes [heads] lie in
    SMEM. qkv is [C, N * 3 * H] and o [C, N * H]. `pool` is the aliased output, and the kernel reads
    and writes it alone. `_` is the input, the same memory.
    """
    head_block, tile = pl.program_id(0), pl.program_id(1)
    heads = scratch.pair_decay.shape[0]
    _, low, high, sequence, flags = (tiles[field, tile] for field in range(5))
    buffer = jax.lax.rem(sequence, NUM_BUFFERS)

    def state_ends(sequence):
        """Return a sequence's states in the pool and in VMEM, and the number of its buffer."""
        slot = sequences[0, sequence]
        buffer = jax.lax.rem(sequence, NUM_BUFFERS)
        in_pool = pool.at[slot, pl.ds(head_block * heads, heads)]
        return in_pool, scratch.states.at[buffer], buffer

    def load(sequence: jax.Array | int, start_or_wait: StartOrWait) -> None:
        @pl.when((sequences[0, sequence] >= 0) & (sequences[1, sequence] == 0))
        def _():
            in_pool, in_vmem, buffer = state_ends(sequence)
            start_or_wait(pltpu.make_async_copy(in_pool, in_vmem, scratch.loads.at[buffer]))

    def store(sequence: jax.Array, start_or_wait: StartOrWait) -> None:
        in_pool, in_vmem, buffer = state_ends(sequence)
        start_or_wait(pltpu.make_async_copy(in_vmem, in_pool, scratch.stores.at[buffer]))

    start, wait = tpu_in_place.start_copy, tpu_in_place.wait_for_copy

    # Tiles are the innermost axis of the grid: this is the first tile of a block of heads.
    @pl.when(tile == 0)
    def _():
        load(0, start)

        # A loop over heads and not an unrolled one, so that one head's decays are live at a time.
        def fill_head(head, carry):
            slope = slopes[head_block * heads + head]
            scratch.pair_decay[head] = _decay_tile(slope, scratch.pair_decay.shape[1])
            return carry

        jax.lax.fori_loop(0, heads, fill_head, 0)

    # Tiles of a block follow each other, so its output stays in VMEM while they write to it.
    @pl.when((flags & reference.OPENS_BLOCK) != 0)
    def _():
        o[...] = jnp.zeros_like(o)

    @pl.when((flags & reference.FIRST_TILE) != 0)
    def _():
        # The next sequence loads into the buffer that this earlier one stores from.
        @pl.when(sequence >= NUM_BUFFERS - 1)
        def _():
            store(sequence - (NUM_BUFFERS - 1), wait)

        @pl.when(sequence + 1 < sequences.shape[1])
        def _():
            load(sequence + 1, start)

        load(sequence, wait)

        # A fresh sequence loads nothing, because its slot may hold NaN.
        @pl.when(sequences[1, sequence] != 0)
        def _():
            scratch.states[buffer] = jnp.zeros_like(scratch.states[buffer])

    @pl.when(high > low)
    def _():
        def attend_group(index, carry):
            first = head_block * heads + index * heads_per_group
            group_slopes = [slopes[first + head] for head in range(heads_per_group)]
            _attend_head_group(
                qkv,
                o,
                scratch.pair_decay,
                scratch.states.at[buffer],
                index * heads_per_group,
                group_slopes,
                low,
                high,
            )
            return carry

        jax.lax.fori_loop(0, heads // heads_per_group, attend_group, 0)

    @pl.when((flags & reference.LAST_TILE) != 0)
    def _():
        store(sequence, start)

    # The kernel must not end before its last stores do. Active sequences come first in the order:
    # the last of them has number num_active - 1.
    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        num_active = jax.lax.fori_loop(
            0, sequences.shape[1], lambda i, n: n + (sequences[0, i] >= 0).astype(jnp.int32), 0
        )
        for sequences_back in reversed(range(1, NUM_BUFFERS)):

            @pl.when(num_active >= sequences_back)
            def _(sequences_back=sequences_back):
                store(num_active - sequences_back, wait)


def _decay_tile(slope: Float[Array, ""], size: int) -> Float[Array, "C C"]:
    """lambda^(i-j) on and below the diagonal, 0 above it."""
    # The exponent is masked before exp: above the diagonal it would overflow for fast heads, and
    # infinity times 0 is NaN.
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    col = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    steps = jnp.maximum(row - col, 0).astype(jnp.float32)
    return jnp.where(row >= col, jnp.exp(-slope * steps), 0.0)


def _attend_head_group(
    qkv: Ref,
    o: Ref,
    pair_decay: Ref,
    states: Ref,
    first_head: jax.Array,
    slopes: list[jax.Array],
    low: jax.Array,
    high: jax.Array,
) -> None:
    """Advance heads `first_head`, `first_head` + 1, ... of the block by rows low..high-1."""
    size, head_dim = qkv.shape[0], states.shape[1]
    num_heads, dtype = len(slopes), qkv.dtype
    row = jax.lax.broadcasted_iota(jnp.int32, (size, head_dim), 0)
    in_tile = (row >= low) & (row < high)
    # Exponents are masked as in `_decay_tile`: rows outside the tile would give lambda^-n.
    query_steps = jnp.maximum(row - low + 1, 0).astype(jnp.float32)
    key_steps = jnp.maximum(high - 1 - row, 0).astype(jnp.float32)
    # m as a row, so that exp runs on the vector unit, along the lanes of a state.
    length = jnp.full((1, head_dim), high - low, jnp.int32).astype(jnp.float32)

    def group_columns(ref, width):
        """View the group's columns, `width` for each head."""
        # Such a group is the whole row: `heads_per_block` cuts only at multiples of 128 lanes.
        if num_heads * head_dim % 128 != 0:
            return ref
        return ref.at[:, pl.ds(pl.multiple_of(first_head * width, 128), num_heads * width)]

    qkv, o = group_columns(qkv, 3 * head_dim), group_columns(o, head_dim)
    for head, slope in enumerate(slopes):
        slices = range(3 * head, 3 * head + 3)
        q, k, v = (jnp.where(in_tile, qkv[:, pl.ds(i * head_dim, head_dim)], 0) for i in slices)
        state = states[first_head + head]
        scores = (tpu_chunk.dot_f32(q, k, 1, 1) * pair_decay[first_head + head]).astype(dtype)
        carried = tpu_chunk.read_state(q, state)
        out = tpu_chunk.dot_f32(scores, v, 1, 0) + jnp.exp(-slope * query_steps) * carried
        decayed_k = (k.astype(jnp.float32) * jnp.exp(-slope * key_steps)).astype(dtype)
        states[first_head + head] = (
            state
            + expm1_nonpositive(-slope * length) * state
            + tpu_chunk.dot_f32(decayed_k, v, 0, 0)
        )
        columns = pl.ds(head * head_dim, head_dim)
        # Rows of other tiles keep the output that those tiles write.
        o[:, columns] = jnp.where(in_tile, out.astype(dtype), o[:, columns])


def expm1_nonpositive(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) - 1 for x <= 0 without cancellation near 0, to a relative error below 1e-6.

    Mosaic has no expm1. Near 0 the Taylor series to x^7 / 7! replaces it.
    """
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return jnp.where(x > -0.5, small, jnp.exp(x) - 1)
