"""Lightning attention forward in Pallas for TPU: one pass over the fused projection.

For a chunk of n real tokens that enters with state S (M1 report, section 2, and docs/kernels.md,
"Forward"):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

The grid walks batch rows, head blocks and superblocks. S stays in VMEM scratch, float32, from one
superblock to the next. The state that each superblock enters with is the only residual.

Chunks without boundary or padding run through `pipeline.run_pipeline` in three stages. Products
are laid side by side where they share an operand, because a matrix unit 256 wide is half idle on
128 columns: q [k^T, S], [P, q] [v; S], and the k^T v of two heads as one block-diagonal product.
Queries read S as a high bfloat16 half and a low one, which is what the high half rounds away.

Letters in shapes: N heads of a block, C tokens of a chunk, H width of a head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, pipeline, tiling, tpu_blocks, tpu_chunk

F32, BF16 = tpu_chunk.F32, tpu_chunk.BF16
dot_f32, read_state = tpu_chunk.dot_f32, tpu_chunk.read_state
advance_state, chunk_rows = tpu_chunk.advance_state, tpu_chunk.chunk_rows


class ForwardScratch(NamedTuple):
    """VMEM of the forward kernel. A slot hands a result of one head from stage to stage."""

    state: jax.Ref  # [N, H, H] float32, S
    weights: tpu_chunk.ChunkWeights
    keys_t: jax.Ref  # slot [N, H, C] in qkv's dtype, k^T
    added_keys_t: jax.Ref  # slot [N, H, C] in qkv's dtype, k^T lambda^(C - j)
    scores: jax.Ref  # slot [N, C, C] in qkv's dtype, decayed q k^T
    carried: jax.Ref  # slot [N, C, H] float32, lambda^i q S, of S the high half alone
    low_query_ramp: jax.Ref  # [N, C, H] `query_ramp` in qkv's dtype


class ForwardOutputs(NamedTuple):
    """What `lightning_forward` returns.

    Attributes:
      o: [B, T, N * H] in qkv's dtype.
      final_state: float32[B, N, H, H] after the last token.
      superblock_states: float32[B, N, superblocks, H, H], the state that each superblock enters
        with. None where the caller did not ask for the residual.
    """

    o: jax.Array
    final_state: jax.Array
    superblock_states: jax.Array | None


def _forward_kernel(
    slopes: jax.Ref,  # [heads] in SMEM
    forgotten_fractions: jax.Ref,  # in SMEM, see `boundaries.forgotten_fraction_table`
    tables: boundaries.BoundaryTables | None,
    qkv: jax.Ref,  # [1, superblock, N * 3 * H]
    initial_state: jax.Ref,  # [1, N, H, H]
    o: jax.Ref,  # [1, superblock, N * H]
    final_state: jax.Ref,  # [1, N, H, H]
    superblock_states: jax.Ref | None,  # [1, N, 1, H, H]
    scratch: ForwardScratch,
    *,
    block_sizes: tiling.TpuBlockSizes,
) -> None:
    """Attend one superblock of one head block of one row."""
    state, weights = scratch.state, scratch.weights
    size, heads, width = block_sizes.chunk_tokens, block_sizes.block_heads, state.shape[2]
    dtype = qkv.dtype
    first_head = pl.program_id(1) * heads
    # Two heads finish together, so an odd head would be left over.
    is_paired = block_sizes.has_paired_products and heads % 2 == 0

    # Superblocks are the innermost axis of the grid: this is the first one of a row.
    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial_state[0]
        tpu_chunk.fill_weights(slopes, forgotten_fractions, first_head, weights)
        # A rounded ramp is exact enough for what the high half of S rounds away.
        scratch.low_query_ramp[...] = weights.query_ramp[...].astype(dtype)

    if superblock_states is not None:
        superblock_states[0, :, 0] = state[...]

    def load(c: pipeline.ChunkIndex, h: int) -> list[Array]:
        return tpu_chunk.load_head_slices(qkv, chunk_rows(c, size), h, width, 3)

    def store(c: pipeline.ChunkIndex, h: int, out: Array) -> None:
        o[0, chunk_rows(c, size), pl.ds(h * width, width)] = out.astype(o.dtype)

    # The three stages of a full chunk. Stages of different heads interleave, see `pipeline`.

    def transpose_keys(c, h):
        k_t = load(c, h)[1].T
        scratch.keys_t[h] = k_t
        scratch.added_keys_t[h] = (k_t * weights.key_ramp_t[h]).astype(dtype)

    def score(c, h):
        # q [k^T, S_high]
        q = load(c, h)[0]
        high = state[h].astype(dtype)
        products = dot_f32(q, jnp.concatenate([scratch.keys_t[h], high], 1), 1, 0)
        scratch.scores[h] = (products[:, :size] * weights.pair_decay[h]).astype(dtype)
        scratch.carried[h] = weights.query_ramp[h] * products[:, size:]

    def finish(c, h):
        q, _, v = load(c, h)
        if dtype == BF16:
            # [P, lambda^i q] [v; S_low]. float32 queries have read all of S already.
            low = (state[h] - state[h].astype(dtype).astype(F32)).astype(dtype)
            left_operand = jnp.concatenate([scratch.scores[h], q * scratch.low_query_ramp[h]], 1)
            out = dot_f32(left_operand, jnp.concatenate([v, low], 0), 1, 0)
        else:
            out = dot_f32(scratch.scores[h], v, 1, 0)
        store(c, h, out + scratch.carried[h])
        if is_paired and h % 2:
            # The arguments load from VMEM in this order, which the compiler's scheduler follows.
            added_keys_t = scratch.added_keys_t
            gains = tpu_chunk.two_products(
                added_keys_t[h - 1], load(c, h - 1)[2], added_keys_t[h], v, True
            )
            advance_state(state, h - 1, weights.forgotten_fraction[h - 1], gains[0])
            advance_state(state, h, weights.forgotten_fraction[h], gains[1])
        elif not is_paired:
            fraction = weights.forgotten_fraction[h]
            advance_state(state, h, fraction, dot_f32(scratch.added_keys_t[h], v, 1, 0))

    def attend_boundary_chunk(c, scalar):
        rows = chunk_rows(c, size)

        @pl.when(scalar == 0)
        def _():
            # A chunk of only padding: zeros in o, and the state stays.
            o[0, rows] = jnp.zeros((size, heads * width), o.dtype)

        @pl.when(scalar != 0)
        def _():
            assert tables is not None
            steps = boundaries.expand_words(tables.token_words[0, :, rows], scalar)
            for h in range(heads):
                # A select, so that NaN in padding reaches neither output nor state.
                q, k, v = (jnp.where(steps.is_real, x, 0) for x in load(c, h))
                pair_decay, query_ramp, key_ramp = (
                    boundaries.masked_decay(slopes[first_head + h], n) for n in steps[1:]
                )
                finite_v, is_bad = boundaries.split_finite(v)
                pairs = tpu_chunk.packed_pairs(q, k, pair_decay, bad_columns=is_bad).astype(dtype)
                carried = boundaries.apply_decay(read_state(q, state[h]), query_ramp)
                store(c, h, dot_f32(pairs, finite_v, 1, 0) + carried)
                added_k = boundaries.apply_decay(k.astype(F32), key_ramp).astype(dtype)
                gain = dot_f32(added_k, jnp.where(key_ramp > 0, v, 0), 0, 0)
                fraction = tpu_chunk.packed_forgotten_fraction(
                    forgotten_fractions, first_head + h, scalar, size
                )
                tpu_chunk.advance_packed_state(state, h, fraction, scalar, gain)

    pipeline.run_pipeline(
        block_sizes.superblock_tokens // size,
        heads,
        (transpose_keys, score, finish),
        chunks_per_loop=block_sizes.chunks_per_loop,
        scalars=None if tables is None else tables.chunk_scalars,
        full_scalar=size,
        handle_boundary=attend_boundary_chunk,
    )
    # Written at every superblock: the block of final_state stays in VMEM until the row is done.
    final_state[0] = state[...]


def _forward_buffers(block_sizes: tiling.TpuBlockSizes, width: int, dtype: Any) -> Any:
    """Ask for the VMEM of `ForwardScratch`. The kernel gets the same tuple, with Refs in it."""
    buffer, size = tpu_blocks.per_head_buffer(block_sizes), block_sizes.chunk_tokens
    return ForwardScratch(
        state=buffer(width, width),
        weights=tpu_blocks.chunk_weight_buffers(block_sizes, width),
        keys_t=buffer(width, size, dtype),
        added_keys_t=buffer(width, size, dtype),
        scores=buffer(size, size, dtype),
        carried=buffer(size, width),
        low_query_ramp=buffer(size, width, dtype),
    )


@functools.partial(jax.jit, static_argnames=("block_sizes", "save_superblock_states", "interpret"))
def lightning_forward(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    tables: boundaries.BoundaryTables | None,
    initial_state: Float[Array, "B N H H"],
    *,
    block_sizes: tiling.TpuBlockSizes,
    save_superblock_states: bool,
    interpret: bool = False,
) -> ForwardOutputs:
    """Run the forward kernel.

    Args:
      qkv: fused projection, bfloat16 or float32. T is any length: the last superblock may be
        ragged if `tables` say where its padding starts.
      slopes: decay rates, one per head.
      tables: of `boundaries.build_boundary_tables`. None: full superblocks of one document.
      initial_state: float32 state that the row's first document continues.
      block_sizes: block sizes. `block_heads` divides the number of heads.
      save_superblock_states: whether to return the states that the backward pass starts from.
      interpret: run the kernel's Python on any backend, for tests.
    """
    (batch, length, _), (_, num_heads, width, _) = qkv.shape, initial_state.shape
    num_superblocks = -(-length // block_sizes.superblock_tokens)

    def superblock_at(t):
        return t

    qkv_spec, o_spec = (
        tpu_blocks.token_block_spec(block_sizes, width, n, superblock_at) for n in (3, 1)
    )
    state_spec = tpu_blocks.state_block_spec(block_sizes, width)
    table_specs = tpu_blocks.boundary_table_specs(tables, block_sizes, superblock_at)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    # None stands for an argument or output that this call has not: the kernel gets None there.
    saved_spec = saved_shape = None
    if save_superblock_states:
        saved_spec = tpu_blocks.saved_states_spec(block_sizes, width, superblock_at)
        saved_shape = (batch, num_heads, num_superblocks, width, width)
        saved_shape = jax.ShapeDtypeStruct(saved_shape, F32)
    fractions = boundaries.forgotten_fraction_table(slopes, block_sizes.chunk_tokens)
    outputs = pl.pallas_call(
        functools.partial(_forward_kernel, block_sizes=block_sizes),
        name="lightning_fwd",
        grid=(batch, num_heads // block_sizes.block_heads, num_superblocks),
        in_specs=[smem, smem, table_specs, qkv_spec, state_spec],
        out_specs=(o_spec, state_spec, saved_spec),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
            saved_shape,
        ),
        scratch_shapes=[_forward_buffers(block_sizes, width, qkv.dtype)],
        compiler_params=tpu_blocks.COMPILER_PARAMS,
        interpret=interpret,
    )(slopes, fractions, tables, qkv, initial_state)
    return ForwardOutputs(*outputs)
