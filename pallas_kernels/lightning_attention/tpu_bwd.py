"""Lightning attention backward in Pallas for TPU: one reverse pass.

With P and dP the masked, decayed products q k^T and do v^T of a chunk, i and j from 1:

    dq = dP k   + lambda^i do S^T           dv = P^T do + lambda^(n - j) k dS
    dk = dP^T q + lambda^(n - j) v dS^T     dS <- dS - (1 - lambda^n) dS + sum_i lambda^i q_i^T do_i

Superblocks run backwards, and each reads q, k, v and do once. The states at its chunks are
recomputed into VMEM from the float32 state saved for the superblock. Then its chunks run backwards
with dS in scratch. Slopes are constants of the model and get no gradient.

Chunks without boundary or padding run through `pipeline.run_pipeline`, with products side by side
as in the forward pass: do [v^T, S^T], k [q^T, dS], v [do^T, dS^T], then P^T do with dP^T q and
dP k with q^T do. P is computed transposed from the start, and dP both ways. This is one product
more than a transposition would take, and still faster (docs/log.md, "Training kernels").

Letters in shapes as in `tpu_fwd`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, pipeline, tiling, tpu_blocks, tpu_chunk

F32 = jnp.float32
dot_f32 = tpu_chunk.dot_f32
advance_state, chunk_rows = tpu_chunk.advance_state, tpu_chunk.chunk_rows
# The work on one head of a chunk with a boundary: (head, [q, k, v, do] with padding zeroed,
# [pair decay, query ramp, key ramp], share of the state forgotten).
BoundaryHead = Callable[[int, list[jax.Array], list[jax.Array], jax.Array], None]


class TransposedWeights(NamedTuple):
    """The weights of `ChunkWeights` for tokens that meet later ones, float32."""

    pair_decay_t: jax.Ref  # [N, C, C] lambda^(i - j) at row j, column i
    query_ramp_t: jax.Ref  # [N, H, C] lambda^i along columns, for queries that stand transposed
    key_ramp: jax.Ref  # [N, C, H] lambda^(C - j) along rows


class BackwardScratch(NamedTuple):
    """VMEM of the backward kernel. A slot hands a result of one head from stage to stage."""

    state: jax.Ref  # [N, H, H] float32, S of the recomputation
    d_state: jax.Ref  # [N, H, H] float32, dS
    chunk_states: jax.Ref  # [chunks, N, H, H] in qkv's dtype, S at the start of each chunk
    weights: tpu_chunk.ChunkWeights
    weights_t: TransposedWeights
    queries_t: jax.Ref  # slot [N, H, C] in qkv's dtype, q^T
    # slot [N, H, C] in qkv's dtype: k^T lambda^(C - j) while states are recomputed, then
    # q^T lambda^i.
    ramped_t: jax.Ref
    d_scores: jax.Ref  # slot [N, C, C] in qkv's dtype, dP
    scores_t: jax.Ref  # slot [N, C, C] in qkv's dtype, P^T
    d_scores_t: jax.Ref  # slot [N, C, C] in qkv's dtype, dP^T
    dq_carried: jax.Ref  # slot [N, C, H] float32, lambda^i do S^T
    dk_carried: jax.Ref  # slot [N, C, H] float32, lambda^(C - j) v dS^T
    dv_carried: jax.Ref  # slot [N, C, H] float32, lambda^(C - j) k dS


class _ChunkAccess(NamedTuple):
    """What both walks over the chunks of a superblock share.

    Attributes:
      load: (chunk, head) -> [q, k, v, do], each [C, H].
      run_boundary_heads: (chunk, scalar, run) calls run for each head of a chunk with a boundary.
      scalars: `chunk_scalars` of the superblock, or None where all chunks are full.
      dtype: dtype of qkv, and of the operands of products.
      block_sizes: block sizes of the call.
    """

    load: Callable[[pipeline.ChunkIndex, int], list[jax.Array]]
    run_boundary_heads: Callable[[pipeline.ChunkIndex, jax.Array, BoundaryHead], None]
    scalars: jax.Ref | None
    dtype: Any
    block_sizes: tiling.TpuBlockSizes

    @property
    def num_chunks(self) -> int:
        """Chunks of a superblock."""
        return self.block_sizes.superblock_tokens // self.block_sizes.chunk_tokens


def _fill_transposed_weights(
    slopes: jax.Ref, first_head: jax.Array, weights_t: TransposedWeights
) -> None:
    """Write the transposed weights of a full chunk for every head of the block."""
    heads, size, _ = weights_t.pair_decay_t.shape

    def fill_head(h: jax.Array, _: None) -> None:
        slope = slopes[first_head + h]
        rows, columns = (tpu_chunk.head_iota(weights_t.pair_decay_t, axis) for axis in (0, 1))
        weights_t.pair_decay_t[h] = boundaries.masked_decay(slope, columns - rows)
        weights_t.query_ramp_t[h] = boundaries.masked_decay(
            slope, tpu_chunk.head_iota(weights_t.query_ramp_t, 1) + 1
        )
        weights_t.key_ramp[h] = boundaries.masked_decay(
            slope, size - 1 - tpu_chunk.head_iota(weights_t.key_ramp, 0)
        )

    # A loop and not an unrolled one, as in `tpu_chunk.fill_weights`.
    jax.lax.fori_loop(0, heads, fill_head, None)


def _recompute_chunk_states(access: _ChunkAccess, scratch: BackwardScratch) -> None:
    """Walk the superblock forwards and write the state at the start of each of its chunks.

    bfloat16 copies are enough here: the gradients read S in products with bfloat16 operands. The
    state that is carried stays float32.
    """
    load, state, weights = access.load, scratch.state, scratch.weights
    block_sizes, dtype = access.block_sizes, access.dtype
    is_paired = block_sizes.has_paired_products and block_sizes.block_heads % 2 == 0
    keys_t = scratch.ramped_t  # free until the chunks run backwards

    def transpose_keys(c, h):
        keys_t[h] = (load(c, h)[1].T * weights.key_ramp_t[h]).astype(dtype)

    def advance(c, h):
        scratch.chunk_states[c, h] = state[h].astype(dtype)
        # An even head waits for the odd one: the two k^T v run as one block-diagonal product.
        if is_paired and h % 2:
            gains = tpu_chunk.two_products(
                keys_t[h - 1], load(c, h - 1)[2], keys_t[h], load(c, h)[2], True
            )
            advance_state(state, h - 1, weights.forgotten_fraction[h - 1], gains[0])
            advance_state(state, h, weights.forgotten_fraction[h], gains[1])
        elif not is_paired:
            fraction = weights.forgotten_fraction[h]
            advance_state(state, h, fraction, dot_f32(keys_t[h], load(c, h)[2], 1, 0))

    def advance_boundary_chunk(c, scalar):
        scratch.chunk_states[c] = state[...].astype(dtype)

        def advance_head(h, operands, decays, forgotten_fraction):
            (_, k, v, _), key_ramp = operands, decays[2]
            added_k = boundaries.apply_decay(k.astype(F32), key_ramp).astype(dtype)
            gain = dot_f32(added_k, jnp.where(key_ramp > 0, v, 0), 0, 0)
            tpu_chunk.advance_packed_state(state, h, forgotten_fraction, scalar, gain)

        # A chunk of only padding leaves the state alone.
        pl.when(scalar != 0)(lambda: access.run_boundary_heads(c, scalar, advance_head))

    pipeline.run_pipeline(
        access.num_chunks,
        block_sizes.block_heads,
        (transpose_keys, advance),
        scalars=access.scalars,
        full_scalar=block_sizes.chunk_tokens,
        handle_boundary=advance_boundary_chunk,
    )


def _store_gradients(
    access: _ChunkAccess,
    d_qkv: jax.Ref,
    c: pipeline.ChunkIndex,
    h: int,
    gradients: tuple[Array, Array, Array],
) -> None:
    """Write (dq, dk, dv) of head h of chunk c, each [C, H]."""
    rows, width = chunk_rows(c, access.block_sizes.chunk_tokens), gradients[0].shape[1]
    for i, x in enumerate(gradients):
        d_qkv[0, rows, pl.ds((3 * h + i) * width, width)] = x.astype(d_qkv.dtype)


def _boundary_gradients(
    access: _ChunkAccess, scratch: BackwardScratch, d_qkv: jax.Ref
) -> pipeline.BoundaryHandler:
    """Return what handles a chunk with a boundary or padding in the backward walk."""
    d_state, dtype = scratch.d_state, access.dtype

    def finish_head(c, scalar, h, operands, decays, forgotten_fraction):
        q, k, v, d_o = operands
        pair_decay, query_ramp, key_ramp = decays
        (finite_q, bad_q), (finite_k, bad_k), (finite_d, bad_d) = map(
            boundaries.split_finite, (q, k, d_o)
        )
        p = tpu_chunk.packed_pairs(q, k, pair_decay, bad_d).astype(dtype)
        dp = tpu_chunk.packed_pairs(d_o, v, pair_decay, bad_q, bad_k).astype(dtype)
        # A copy of dS from before this chunk's gain: keys meet the tokens after the chunk in it.
        d_next = d_state[h].astype(dtype)
        dq = dot_f32(dp, finite_k, 1, 0)
        dq += boundaries.apply_decay(dot_f32(d_o, scratch.chunk_states[c, h], 1, 1), query_ramp)
        dk = dot_f32(dp, finite_q, 0, 0) + boundaries.apply_decay(
            dot_f32(v, d_next, 1, 1), key_ramp
        )
        dv = dot_f32(p, finite_d, 0, 0) + boundaries.apply_decay(dot_f32(k, d_next, 1, 0), key_ramp)
        added_q = boundaries.apply_decay(q.astype(F32), query_ramp).astype(dtype)
        gain = dot_f32(added_q, jnp.where(query_ramp > 0, d_o, 0), 0, 0)
        tpu_chunk.advance_packed_state(d_state, h, forgotten_fraction, scalar, gain)
        _store_gradients(access, d_qkv, c, h, (dq, dk, dv))

    def finish_chunk(c, scalar):
        @pl.when(scalar == 0)
        def _():
            # A chunk of only padding: its gradients are 0, and dS stays.
            size = access.block_sizes.chunk_tokens
            d_qkv[0, chunk_rows(c, size)] = jnp.zeros((size, d_qkv.shape[2]), d_qkv.dtype)

        finish = functools.partial(finish_head, c, scalar)
        pl.when(scalar != 0)(lambda: access.run_boundary_heads(c, scalar, finish))

    return finish_chunk


def _walk_gradients(access: _ChunkAccess, scratch: BackwardScratch, d_qkv: jax.Ref) -> None:
    """Walk the superblock backwards: write d_qkv [1, superblock, N * 3 * H] and carry dS."""
    load, d_state, block_sizes = access.load, scratch.d_state, access.block_sizes
    dtype, size = access.dtype, block_sizes.chunk_tokens
    weights, weights_t = scratch.weights, scratch.weights_t

    # The three stages of a full chunk. Stages of different heads interleave, see `pipeline`.

    def transpose_queries(c, h):
        q_t = load(c, h)[0].T
        scratch.queries_t[h] = q_t
        scratch.ramped_t[h] = (q_t * weights_t.query_ramp_t[h]).astype(dtype)

    def score(c, h):
        _, k, v, d_o = load(c, h)
        d_next = d_state[h].astype(dtype)
        # do [v^T, S^T]
        products = dot_f32(d_o, jnp.concatenate([v, scratch.chunk_states[c, h]], 0), 1, 1)
        scratch.d_scores[h] = (products[:, :size] * weights.pair_decay[h]).astype(dtype)
        scratch.dq_carried[h] = weights.query_ramp[h] * products[:, size:]
        # k [q^T, dS]
        products = dot_f32(k, jnp.concatenate([scratch.queries_t[h], d_next], 1), 1, 0)
        scratch.scores_t[h] = (products[:, :size] * weights_t.pair_decay_t[h]).astype(dtype)
        scratch.dv_carried[h] = weights_t.key_ramp[h] * products[:, size:]
        # v [do^T, dS^T]
        products = dot_f32(v, jnp.concatenate([d_o, d_next], 0), 1, 1)
        scratch.d_scores_t[h] = (products[:, :size] * weights_t.pair_decay_t[h]).astype(dtype)
        scratch.dk_carried[h] = weights_t.key_ramp[h] * products[:, size:]

    def finish(c, h):
        q, k, _, d_o = load(c, h)
        # Pairs within one head, so that an odd number of heads is no trouble here.
        dv, dk = tpu_chunk.two_products(
            scratch.scores_t[h], d_o, scratch.d_scores_t[h], q, block_sizes.has_paired_products
        )
        dq, gain = tpu_chunk.two_products(
            scratch.d_scores[h], k, scratch.ramped_t[h], d_o, block_sizes.has_paired_products
        )
        advance_state(d_state, h, weights.forgotten_fraction[h], gain)
        gradients = (
            dq + scratch.dq_carried[h],
            dk + scratch.dk_carried[h],
            dv + scratch.dv_carried[h],
        )
        _store_gradients(access, d_qkv, c, h, gradients)

    pipeline.run_pipeline(
        access.num_chunks,
        block_sizes.block_heads,
        (transpose_queries, score, finish),
        reverse=True,
        scalars=access.scalars,
        full_scalar=size,
        handle_boundary=_boundary_gradients(access, scratch, d_qkv),
    )


def _backward_kernel(
    slopes: jax.Ref,  # [heads] in SMEM
    forgotten_fractions: jax.Ref,  # in SMEM, see `boundaries.forgotten_fraction_table`
    tables: boundaries.BoundaryTables | None,
    qkv: jax.Ref,  # [1, superblock, N * 3 * H]
    d_o: jax.Ref,  # [1, superblock, N * H]
    superblock_states: jax.Ref,  # [1, N, 1, H, H]
    d_final: jax.Ref,  # [1, N, H, H]
    d_qkv: jax.Ref,  # [1, superblock, N * 3 * H]
    d_initial: jax.Ref,  # [1, N, H, H]
    scratch: BackwardScratch,
    *,
    block_sizes: tiling.TpuBlockSizes,
) -> None:
    """Differentiate one superblock of one head block of one row."""
    size, heads, width = block_sizes.chunk_tokens, block_sizes.block_heads, d_final.shape[2]
    first_head = pl.program_id(1) * heads

    # Superblocks are the innermost axis of the grid and run backwards: this is the last of a row.
    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch.d_state[...] = d_final[0]
        tpu_chunk.fill_weights(slopes, forgotten_fractions, first_head, scratch.weights)
        _fill_transposed_weights(slopes, first_head, scratch.weights_t)

    scratch.state[...] = superblock_states[0, :, 0]

    def load(c: pipeline.ChunkIndex, h: int) -> list[Array]:
        rows = chunk_rows(c, size)
        return tpu_chunk.load_head_slices(qkv, rows, h, width, 3) + tpu_chunk.load_head_slices(
            d_o, rows, h, width, 1
        )

    def run_boundary_heads(c: pipeline.ChunkIndex, scalar: Array, run: BoundaryHead) -> None:
        assert tables is not None
        rows = chunk_rows(c, size)
        steps = boundaries.expand_words(tables.token_words[0, :, rows], scalar)
        for h in range(heads):
            # A select, so that NaN in padding reaches neither gradients nor states.
            operands = [jnp.where(steps.is_real, x, 0) for x in load(c, h)]
            decays = [boundaries.masked_decay(slopes[first_head + h], n) for n in steps[1:]]
            fraction = tpu_chunk.packed_forgotten_fraction(
                forgotten_fractions, first_head + h, scalar, size
            )
            run(h, operands, decays, fraction)

    scalars = None if tables is None else tables.chunk_scalars
    access = _ChunkAccess(load, run_boundary_heads, scalars, qkv.dtype, block_sizes)
    _recompute_chunk_states(access, scratch)
    _walk_gradients(access, scratch, d_qkv)
    # Written at every superblock: the block of d_initial stays in VMEM until the row is done.
    d_initial[0] = scratch.d_state[...]


def _backward_buffers(block_sizes: tiling.TpuBlockSizes, width: int, dtype: Any) -> Any:
    """Ask for the VMEM of `BackwardScratch`. The kernel gets the same tuple, with Refs in it."""
    buffer, size = tpu_blocks.per_head_buffer(block_sizes), block_sizes.chunk_tokens
    chunks = block_sizes.superblock_tokens // size
    chunk_states: Any = pltpu.VMEM((chunks, block_sizes.block_heads, width, width), dtype)
    return BackwardScratch(
        state=buffer(width, width),
        d_state=buffer(width, width),
        chunk_states=chunk_states,
        weights=tpu_blocks.chunk_weight_buffers(block_sizes, width),
        weights_t=TransposedWeights(
            pair_decay_t=buffer(size, size),
            query_ramp_t=buffer(width, size),
            key_ramp=buffer(size, width),
        ),
        queries_t=buffer(width, size, dtype),
        ramped_t=buffer(width, size, dtype),
        d_scores=buffer(size, size, dtype),
        scores_t=buffer(size, size, dtype),
        d_scores_t=buffer(size, size, dtype),
        dq_carried=buffer(size, width),
        dk_carried=buffer(size, width),
        dv_carried=buffer(size, width),
    )


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_backward(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    tables: boundaries.BoundaryTables | None,
    superblock_states: Float[Array, "B N S H H"],
    d_o: Float[Array, "B T NH"],
    d_final: Float[Array, "B N H H"],
    *,
    block_sizes: tiling.TpuBlockSizes,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N3H"], Float[Array, "B N H H"]]:
    """Return (d_qkv in qkv's dtype, d_initial_state float32).

    Args:
      qkv, slopes, tables, block_sizes, interpret: as in `tpu_fwd.lightning_forward`.
      superblock_states: of `tpu_fwd.lightning_forward` with the same `block_sizes`.
      d_o: gradient of o, in its dtype.
      d_final: gradient of the final state, float32.
    """
    batch, length, _ = qkv.shape
    num_heads, num_superblocks, width = superblock_states.shape[1:4]

    def superblock_at(t):
        return num_superblocks - 1 - t  # the last superblock of a row first

    qkv_spec, o_spec = (
        tpu_blocks.token_block_spec(block_sizes, width, n, superblock_at) for n in (3, 1)
    )
    state_spec = tpu_blocks.state_block_spec(block_sizes, width)
    saved_spec = tpu_blocks.saved_states_spec(block_sizes, width, superblock_at)
    table_specs = tpu_blocks.boundary_table_specs(tables, block_sizes, superblock_at)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    fractions = boundaries.forgotten_fraction_table(slopes, block_sizes.chunk_tokens)
    d_qkv, d_initial = pl.pallas_call(
        functools.partial(_backward_kernel, block_sizes=block_sizes),
        name="lightning_bwd",
        grid=(batch, num_heads // block_sizes.block_heads, num_superblocks),
        in_specs=[smem, smem, table_specs, qkv_spec, o_spec, saved_spec, state_spec],
        out_specs=(qkv_spec, state_spec),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, 3 * num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(d_final.shape, F32),
        ),
        scratch_shapes=[_backward_buffers(block_sizes, width, qkv.dtype)],
        compiler_params=tpu_blocks.COMPILER_PARAMS,
        interpret=interpret,
    )(slopes, fractions, tables, qkv, d_o, superblock_states, d_final)
    return d_qkv, d_initial
