"""Lightning attention forward in Pallas for TPU: one pass over the fused projection.

For a chunk of n real tokens that enters with state S (M1 section 2; kernels.md section 1):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

The grid walks batch rows, head blocks and superblocks; S stays in VMEM scratch, float32, from
one superblock to the next. The state each superblock enters with is the only residual.

Chunks without boundary or padding run through `pipeline.run_pipeline` in three stages. Products are
laid side by side where they share an operand, because a matrix unit 256 wide is half idle on 128
columns: q [k^T, S], [P, q] [v; S], and the k^T v of two heads as one block-diagonal product.
Queries read S as a high bfloat16 half and a low one (what the high half rounds away).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import boundaries, pipeline, tiling

F32, BF16 = jnp.float32, jnp.bfloat16
COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    vmem_limit_bytes=tiling.VMEM_LIMIT_BYTES,
    # The compiler's default scheduler hoists loads until registers spill. This one, which splash
    # attention calls `use_experimental_scheduler`, spills none.
    flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True},
)


def dot(a, b, contract_a: int, contract_b: int):
    """Contract one axis of each in float32: bfloat16 operands as they are, float32 in full."""
    precision = "highest" if a.dtype == F32 else "default"
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def read_state(q, state):
    """q S; a float32 state is read by bfloat16 queries as two halves, high and low."""
    if q.dtype == F32:
        return dot(q, state, 1, 0)
    high = state.astype(BF16)
    low = (state - high.astype(F32)).astype(BF16)
    return dot(q, high, 1, 0) + dot(q, low, 1, 0)


def iota(ref, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape[1:], axis)


def fill_weights(
    slopes,
    forgotten_fractions,
    first_head,
    pair_decay,
    query_ramp,
    key_ramp,
    full_forgotten_fraction,
):
    """Write the weights of a chunk without boundary: constants of a head, made once a block.

    pair_decay [N, C, C] at (i, j), query_ramp [N, C, H] along rows, key_ramp [N, H, C] along
    columns, for keys that stand transposed; full_loss [N, 1, H], the share of the state that is
    forgotten, as rows because scalars would all be spread over registers before the loop starts.
    """
    heads, size, _ = pair_decay.shape

    def fill(h, _):
        slope = slopes[first_head + h]
        pair_decay[h] = boundaries.masked_decay(slope, iota(pair_decay, 0) - iota(pair_decay, 1))
        query_ramp[h] = boundaries.masked_decay(slope, iota(query_ramp, 0) + 1)
        key_ramp[h] = boundaries.masked_decay(slope, size - 1 - iota(key_ramp, 1))
        loss = forgotten_fractions[(first_head + h) * (size + 1) + size]
        full_forgotten_fraction[h] = jnp.full(full_forgotten_fraction.shape[1:], loss)

    jax.lax.fori_loop(0, heads, fill, None)


def two_products(a, b, c, d, block_diagonal: bool):
    """Return (a b, c d), as one product with a block-diagonal right side if `wide`."""
    if not block_diagonal:
        return dot(a, b, 1, 0), dot(c, d, 1, 0)
    zero = jnp.zeros_like(b)
    rows = jnp.concatenate([b, zero], 1), jnp.concatenate([zero, d], 1)
    both = dot(jnp.concatenate([a, c], 1), jnp.concatenate(rows, 0), 1, 0)
    return both[:, : b.shape[1]], both[:, b.shape[1] :]


def advance_state(state, h: int, forgotten_fraction, gain) -> None:
    """Carry the state of head h over a chunk; loss is a scalar or a row."""
    state[h] = state[h] - forgotten_fraction * state[h] + gain


def load_head_slices(ref, rows, h: int, width: int, num_slices: int):
    """Read the `parts` lane slices of head h: q, k, v of the projection, or o alone."""
    return [ref[0, rows, pl.ds((num_slices * h + i) * width, width)] for i in range(num_slices)]


def chunk_rows(c, size: int):
    return pl.ds(pl.multiple_of(c * size, size), size)


def _forward_kernel(
    slopes,
    forgotten_fractions,
    *refs,
    block_sizes: tiling.TpuBlockSizes,
    packed: bool,
    save_superblock_states: bool,
):
    scalars, words, *refs = refs if packed else (None, None, *refs)
    qkv, initial, o, final, *refs = refs
    saved, refs = (refs[0], refs[1:]) if save_superblock_states else (None, refs)
    state, pair_decay, query_ramp, key_ramp, full_loss, *refs = refs
    keys_t, added_keys, scores, carried, low_ramp = refs
    size, heads, width = block_sizes.chunk_tokens, block_sizes.block_heads, state.shape[2]
    dtype, split = qkv.dtype, qkv.dtype == BF16
    first_head = pl.program_id(1) * heads
    paired = block_sizes.has_paired_products and heads % 2 == 0

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[0]
        fill_weights(
            slopes, forgotten_fractions, first_head, pair_decay, query_ramp, key_ramp, full_loss
        )
        low_ramp[...] = query_ramp[...].astype(dtype)  # exact enough for what S rounds away

    if saved is not None:
        saved[0, :, 0] = state[...]

    def load(c, h):
        return load_head_slices(qkv, chunk_rows(c, size), h, width, 3)

    def store(c, h, out):
        o[0, chunk_rows(c, size), pl.ds(h * width, width)] = out.astype(o.dtype)

    def transpose(c, h):
        k_t = load(c, h)[1].T
        keys_t[h] = k_t
        added_keys[h] = (k_t * key_ramp[h]).astype(dtype)

    def score(c, h):
        q = load(c, h)[0]
        high = state[h].astype(dtype)
        both = dot(q, jnp.concatenate([keys_t[h], high], 1), 1, 0)
        scores[h] = (both[:, :size] * pair_decay[h]).astype(dtype)
        carried[h] = query_ramp[h] * both[:, size:]

    def finish(c, h):
        q, _, v = load(c, h)
        if split:
            low = (state[h] - state[h].astype(dtype).astype(F32)).astype(dtype)
            left = jnp.concatenate([scores[h], q * low_ramp[h]], 1)
            out = dot(left, jnp.concatenate([v, low], 0), 1, 0)
        else:
            out = dot(scores[h], v, 1, 0)
        store(c, h, out + carried[h])
        if paired and h % 2:
            gains = two_products(added_keys[h - 1], load(c, h - 1)[2], added_keys[h], v, True)
            advance_state(state, h - 1, full_loss[h - 1], gains[0])
            advance_state(state, h, full_loss[h], gains[1])
        elif not paired:
            advance_state(state, h, full_loss[h], dot(added_keys[h], v, 1, 0))

    def boundary(c, scalar):
        rows = chunk_rows(c, size)

        @pl.when(scalar == 0)
        def _():
            o[0, rows] = jnp.zeros((size, heads * width), o.dtype)

        @pl.when(scalar != 0)
        def _():
            assert words is not None
            real, *masks = boundaries.expand_words(words[0, :, rows], scalar)
            for h in range(heads):
                # A select, so that NaN in padding reaches neither output nor state.
                q, k, v = (jnp.where(real, x, 0) for x in load(c, h))
                decay, ramp_q, ramp_k = (
                    boundaries.masked_decay(slopes[first_head + h], n) for n in masks
                )
                pairs = (dot(q, k, 1, 1) * decay).astype(dtype)
                store(c, h, dot(pairs, v, 1, 0) + ramp_q * read_state(q, state[h]))
                gain = dot((k * ramp_k).astype(dtype), v, 0, 0)
                advance_state(
                    state,
                    h,
                    packed_forgotten_fraction(forgotten_fractions, first_head + h, scalar, size),
                    gain,
                )

    pipeline.run_pipeline(
        block_sizes.superblock_tokens // size,
        heads,
        (transpose, score, finish),
        chunks_per_loop=block_sizes.chunks_per_loop,
        scalars=scalars,
        full_scalar=size,
        handle_boundary=boundary,
    )
    final[0] = state[...]


def packed_forgotten_fraction(forgotten_fractions, head, scalar, size: int):
    """Return the share of the state that a chunk forgets: all of it where a document starts."""
    kept = forgotten_fractions[head * (size + 1) + (scalar & boundaries.COUNT_MASK)]
    return jnp.where(scalar > boundaries.COUNT_MASK, 1.0, kept)


def boundary_table_specs(scalars, block_sizes: tiling.TpuBlockSizes, order):
    """Return block specs of the boundary tables; none where there are no boundaries."""
    if scalars is None:
        return []
    num = block_sizes.superblock_tokens // block_sizes.chunk_tokens
    return [
        pl.BlockSpec((1, 1, 1, num), lambda b, h, t: (b, order(t), 0, 0),
                     memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, block_sizes.superblock_tokens), lambda b, h, t: (b, 0, order(t))),
    ]  # fmt: skip


def scratch_buffers(block_sizes: tiling.TpuBlockSizes, shapes: str, width: int, dtype):
    """Return VMEM of [heads, rows, columns] arrays, named by their sides: "CH" is chunk by width.

    R is one row. Capitals are float32, small letters `dtype`.
    """
    sides = {"c": block_sizes.chunk_tokens, "h": width, "r": 1}
    return [
        pltpu.VMEM(
            (block_sizes.block_heads, *(sides[side] for side in shape.lower())),
            F32 if shape.isupper() else dtype,
        )
        for shape in shapes.split()
    ]


@functools.partial(jax.jit, static_argnames=("block_sizes", "save_superblock_states", "interpret"))
def lightning_forward(
    qkv, slopes, tables, initial_state, *, block_sizes, save_superblock_states, interpret=False
):
    """Return (o, final state, states at superblock starts [B, N, S, H, H] or None).

    Args:
      qkv: [B, T, N * 3 * H], bfloat16 or float32; T is any length.
      slopes: float32[N].
      tables: `boundaries.build_boundary_tables`, or (None, None) for full superblocks of one
        document.
      initial_state: float32[B, N, H, H].
      tile: block sizes.
      checkpoints: whether to save the states the backward pass starts from.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    steps = -(-length // block_sizes.superblock_tokens)

    def tokens(n):
        return pl.BlockSpec(
            (1, block_sizes.superblock_tokens, n * block_sizes.block_heads * width),
            lambda b, h, t: (b, t, h),
        )

    state = pl.BlockSpec((1, block_sizes.block_heads, width, width), lambda b, h, t: (b, h, 0, 0))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    packed = tables[0] is not None
    out_specs = [tokens(1), state]
    out_shape = [
        jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
        jax.ShapeDtypeStruct(initial_state.shape, F32),
    ]
    if save_superblock_states:
        saved = (1, block_sizes.block_heads, 1, width, width)
        out_specs.append(pl.BlockSpec(saved, lambda b, h, t: (b, h, t, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, num_heads, steps, width, width), F32))
    o, final, *saved = pl.pallas_call(
        functools.partial(
            _forward_kernel, block_sizes=block_sizes, packed=packed,
            save_superblock_states=save_superblock_states,
        ),
        name="lightning_fwd",
        grid=(batch, num_heads // block_sizes.block_heads, steps),
        in_specs=[smem, smem, *boundary_table_specs(tables[0], block_sizes, lambda t: t),
                  tokens(3), state],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch_buffers(
            block_sizes, "HH CC CH HC RH hc hc cc CH ch", width, qkv.dtype
        ),
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )(slopes, boundaries.forgotten_fraction_table(slopes, block_sizes.chunk_tokens),
      *(tables if packed else ()),
      qkv, initial_state)  # fmt: skip
    return o, final, saved[0] if saved else None
