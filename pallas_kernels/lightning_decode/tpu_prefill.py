"""Lightning attention over many sequences in one call, states in a slot pool (Mosaic TPU).

The tokens of all sequences lie one after another in a flat array. It is cut at every multiple of
the chunk size and wherever a sequence starts or ends; a tile is what lies between two cuts, so it
sits inside one block of the array and belongs to one sequence or to none. For a tile of rows
lo..hi-1 with m = hi - lo, that its sequence enters with state S:

    o_i = lambda^(i-lo+1) q_i S + sum_{lo <= j <= i} lambda^(i-j) (q_i . k_j) v_j
    S  <- S + expm1(-s m) S + sum_j lambda^(hi-1-j) k_j^T v_j

Source: M1 section 2; kernels.md 5.6. Starts are exact to the token, yet every block is loaded by
Pallas' own pipeline and none is loaded twice: neighbouring tiles of one block share it, and each
writes its own rows of the output. Rows of other tiles enter as zeros, by a select.

Where a sequence starts at a multiple of the chunk size, its tiles, and so the bits of its
results, do not depend on what else is in the call.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_decode import reference as decode_reference
from pallas_kernels.lightning_decode import tpu_in_place

CHUNK_TOKENS = (
    128  # a matrix unit's side on v5e and v5p; the same everywhere, so that results agree
)
HEADS_PER_STEP = 16  # heads a step: 2,048 token-heads, which outlast the overhead of a step
HEADS_PER_GROUP = 4  # heads unrolled together, to hide each other's latency
NUM_BUFFERS = 3  # states of one sequence loading, one in use, one storing


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
    """Run every sequence from its slot's state. See `decode_api.lightning_prefill`.

    Precision: operands as they come, sums, decays and states in float32. For bfloat16 the masked
    scores and decayed keys are rounded to bfloat16, and the state is read as two halves.
    """
    num_tokens = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.shape
    heads = tpu_in_place.heads_per_block(num_heads, head_dim, HEADS_PER_STEP)
    chunk = min(CHUNK_TOKENS, num_tokens)
    tiles, order = decode_reference.cut_prefill_tiles(slots, starts, lengths, num_tokens, chunk)
    sequences = jnp.stack([jnp.where(lengths > 0, slots, -1), fresh.astype(jnp.int32)])[:, order]

    def block(head_block, tile, tiles, *_):
        return tiles[0, tile], head_block

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    table_bytes = 4 * heads * chunk * max(chunk, 128)
    state_bytes = 4 * heads * head_dim * max(head_dim, 128)
    o, pool = pl.pallas_call(
        functools.partial(
            _prefill_kernel,
            heads_per_group=tpu_in_place.heads_per_block(heads, head_dim, HEADS_PER_GROUP),
        ),
        name="lightning_prefill",
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_heads * head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(num_heads // heads, tiles.shape[1]),
            in_specs=[pl.BlockSpec((chunk, heads * 3 * head_dim), block), in_hbm],
            out_specs=[pl.BlockSpec((chunk, heads * head_dim), block), in_hbm],
            scratch_shapes=[
                pltpu.VMEM((heads, chunk, chunk), jnp.float32),
                pltpu.VMEM((NUM_BUFFERS, heads, head_dim, head_dim), jnp.float32),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
            ],
        ),
        input_output_aliases={4: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=table_bytes + NUM_BUFFERS * state_bytes + 24 * 2**20,
        ),
        interpret=interpret,
    )(tiles, sequences, slopes, qkv, pool)
    return o, pool


def _prefill_kernel(
    tiles, sequences, slopes, x, _, o, pool, decay, states, loads, stores, *, heads_per_group
):
    """One tile of one block of heads; its state travels between pool and VMEM once a sequence."""
    head_block, tile = pl.program_id(0), pl.program_id(1)
    heads = decay.shape[0]
    _, low, high, sequence, flags = (tiles[field, tile] for field in range(5))
    buffer = jax.lax.rem(sequence, NUM_BUFFERS)

    def state_refs(sequence):
        slot = sequences[0, sequence]
        buffer = jax.lax.rem(sequence, NUM_BUFFERS)
        return pool.at[slot, pl.ds(head_block * heads, heads)], states.at[buffer], buffer

    def load(sequence, act):
        @pl.when((sequences[0, sequence] >= 0) & (sequences[1, sequence] == 0))
        def _():
            there, here, buffer = state_refs(sequence)
            act(pltpu.make_async_copy(there, here, loads.at[buffer]))

    def store(sequence, act):
        there, here, buffer = state_refs(sequence)
        act(pltpu.make_async_copy(here, there, stores.at[buffer]))

    def start(copy):
        copy.start()

    def wait(copy):
        copy.wait()

    @pl.when(tile == 0)
    def _():
        load(0, start)

        def fill(head, carry):
            decay[head] = _decay_tile(slopes[head_block * heads + head], decay.shape[1])
            return carry

        jax.lax.fori_loop(0, heads, fill, 0)

    @pl.when((flags & decode_reference.OPENS_BLOCK) != 0)
    def _():
        o[...] = jnp.zeros_like(o)

    @pl.when((flags & decode_reference.FIRST_TILE) != 0)
    def _():
        @pl.when(sequence >= NUM_BUFFERS - 1)  # the next sequence loads where this one stored from
        def _():
            store(sequence - (NUM_BUFFERS - 1), wait)

        @pl.when(sequence + 1 < sequences.shape[1])
        def _():
            load(sequence + 1, start)

        load(sequence, wait)

        @pl.when(sequences[1, sequence] != 0)
        def _():
            states[buffer] = jnp.zeros_like(states[buffer])

    @pl.when(high > low)
    def _():
        def head_group(index, carry):
            first = head_block * heads + index * heads_per_group
            rates = [slopes[first + head] for head in range(heads_per_group)]
            _attend_head_group(
                x, o, decay, states.at[buffer], index * heads_per_group, rates, low, high
            )
            return carry

        jax.lax.fori_loop(0, heads // heads_per_group, head_group, 0)

    @pl.when((flags & decode_reference.LAST_TILE) != 0)
    def _():
        store(sequence, start)

    @pl.when(tile == pl.num_programs(1) - 1)
    def _():
        count = jax.lax.fori_loop(
            0, sequences.shape[1], lambda i, n: n + (sequences[0, i] >= 0).astype(jnp.int32), 0
        )
        for back in reversed(range(1, NUM_BUFFERS)):

            @pl.when(count >= back)
            def _(back=back):
                store(count - back, wait)


def _decay_tile(rate, size):
    """lambda^(i-j) on and below the diagonal; the exponent is masked, so it cannot overflow."""
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    col = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    gap = jnp.maximum(row - col, 0).astype(jnp.float32)
    return jnp.where(row >= col, jnp.exp(-rate * gap), 0.0)


def _attend_head_group(x, o, decay, states, first_head, rates, low, high):
    """Advance heads `first`, `first` + 1, ... of the block by rows low..high-1."""
    size, head_dim = x.shape[0], states.shape[1]
    group, dtype = len(rates), x.dtype
    mm = functools.partial(dot, exact=dtype == jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, (size, head_dim), 0)
    valid = (row >= low) & (row < high)
    # Masked exponents again: rows outside the tile would give lambda^-n.
    since = jnp.maximum(row - low + 1, 0).astype(jnp.float32)
    until = jnp.maximum(high - 1 - row, 0).astype(jnp.float32)
    length = jnp.full((1, head_dim), high - low, jnp.int32).astype(jnp.float32)

    def columns(ref, width):
        """View the group's columns; each head has `width` of them."""
        if group * head_dim % 128 != 0:
            return ref  # such a group is the whole row
        return ref.at[:, pl.ds(pl.multiple_of(first_head * width, 128), group * width)]

    x, o = columns(x, 3 * head_dim), columns(o, head_dim)
    for head, rate in enumerate(rates):
        parts = range(3 * head, 3 * head + 3)
        q, k, v = (jnp.where(valid, x[:, pl.ds(i * head_dim, head_dim)], 0) for i in parts)
        state = states[first_head + head]
        scores = (mm(q, k, 1, 1) * decay[first_head + head]).astype(dtype)
        if dtype == jnp.float32:
            carried = mm(q, state, 1, 0)
        else:
            half = state.astype(dtype)
            rest = (state - half.astype(jnp.float32)).astype(dtype)
            carried = mm(q, half, 1, 0) + mm(q, rest, 1, 0)
        out = mm(scores, v, 1, 0) + jnp.exp(-rate * since) * carried
        faded = (k.astype(jnp.float32) * jnp.exp(-rate * until)).astype(dtype)
        states[first_head + head] = (
            state + expm1_nonpositive(-rate * length) * state + mm(faded, v, 0, 0)
        )
        where = pl.ds(head * head_dim, head_dim)
        o[:, where] = jnp.where(valid, out.astype(dtype), o[:, where])


def expm1_nonpositive(x):
    """exp(x) - 1 for x <= 0 without the cancellation near 0; relative error below 1e-6."""
    small = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return jnp.where(x > -0.5, small, jnp.exp(x) - 1)


def dot(a, b, a_axis, b_axis, *, exact):
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
