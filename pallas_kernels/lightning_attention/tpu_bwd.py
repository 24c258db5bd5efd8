"""Lightning attention backward in Pallas for TPU: one reverse pass.

With P and dP the masked, decayed products q k^T and do v^T of a chunk, i and j from 1:

    dq = dP k   + lambda^i do S^T           dv = P^T do + lambda^(n - j) k dS
    dk = dP^T q + lambda^(n - j) v dS^T     dS <- dS - (1 - lambda^n) dS + sum_i lambda^i q_i^T do_i

Superblocks run backwards, each reading q, k, v and do once: from its saved float32 state the
states at its chunks are computed again into VMEM, then its chunks run backwards with dS in
scratch. Slopes are constants of the model and get no gradient.

Chunks without boundary or padding run through `pipeline.run_pipeline`, with products side by side
as in the forward pass: do [v^T, S^T], k [q^T, dS], v [do^T, dS^T], then P^T do with dP^T q and dP k
with q^T do. P is computed transposed from the start, dP both ways: cheaper than a transposition.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import boundaries, pipeline, tiling, tpu_fwd

F32 = jnp.float32
dot, advance_state = tpu_fwd.dot, tpu_fwd.advance_state


def _backward_kernel(
    slopes, forgotten_fractions, *refs, block_sizes: tiling.TpuBlockSizes, packed: bool
):
    scalars, words, *refs = refs if packed else (None, None, *refs)
    qkv, d_o, saved, d_final, d_qkv, d_initial, *refs = refs
    state, d_state, states, *refs = refs
    decay, query_ramp, key_ramp_t, full_loss, decay_t, query_ramp_t, key_ramp, *refs = refs
    queries_t, ramped_t, d_scores, scores_t, d_scores_t, dq_carried, dk_carried, dv_carried = refs
    size, heads, width = block_sizes.chunk_tokens, block_sizes.block_heads, state.shape[2]
    dtype, first_head, num = (
        qkv.dtype,
        pl.program_id(1) * heads,
        block_sizes.superblock_tokens // size,
    )
    paired = block_sizes.has_paired_products and heads % 2 == 0
    keys_t = ramped_t  # a slot that only the recomputation uses before the chunks run backwards

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_final[0]
        tpu_fwd.fill_weights(
            slopes, forgotten_fractions, first_head, decay, query_ramp, key_ramp_t, full_loss
        )

        def fill(h, _):
            slope = slopes[first_head + h]
            row, col = tpu_fwd.iota(decay_t, 0), tpu_fwd.iota(decay_t, 1)
            decay_t[h] = boundaries.masked_decay(slope, col - row)
            query_ramp_t[h] = boundaries.masked_decay(slope, tpu_fwd.iota(query_ramp_t, 1) + 1)
            key_ramp[h] = boundaries.masked_decay(slope, size - 1 - tpu_fwd.iota(key_ramp, 0))

        jax.lax.fori_loop(0, heads, fill, None)

    state[...] = saved[0, :, 0]

    def load(c, h):
        rows = tpu_fwd.chunk_rows(c, size)
        return tpu_fwd.load_head_slices(qkv, rows, h, width, 3) + tpu_fwd.load_head_slices(
            d_o, rows, h, width, 1
        )

    def store(c, h, gradients):
        rows = tpu_fwd.chunk_rows(c, size)
        for i, x in enumerate(gradients):
            d_qkv[0, rows, pl.ds((3 * h + i) * width, width)] = x.astype(d_qkv.dtype)

    def with_masks(c, scalar, run):
        """Call run(h, q k v do, decays, loss) for the heads of a chunk with a boundary."""
        rows = tpu_fwd.chunk_rows(c, size)
        assert words is not None
        real, *masks = boundaries.expand_words(words[0, :, rows], scalar)
        for h in range(heads):
            parts = [jnp.where(real, x, 0) for x in load(c, h)]
            decays = [boundaries.masked_decay(slopes[first_head + h], n) for n in masks]
            run(
                h,
                parts,
                decays,
                tpu_fwd.packed_forgotten_fraction(
                    forgotten_fractions, first_head + h, scalar, size
                ),
            )

    # States at the starts of chunks.

    def transpose_keys(c, h):
        keys_t[h] = (load(c, h)[1].T * key_ramp_t[h]).astype(dtype)

    def advance(c, h):
        states[c, h] = state[h].astype(dtype)
        if paired and h % 2:
            gains = tpu_fwd.two_products(
                keys_t[h - 1], load(c, h - 1)[2], keys_t[h], load(c, h)[2], True
            )
            advance_state(state, h - 1, full_loss[h - 1], gains[0])
            advance_state(state, h, full_loss[h], gains[1])
        elif not paired:
            advance_state(state, h, full_loss[h], dot(keys_t[h], load(c, h)[2], 1, 0))

    def advance_boundary(c, scalar):
        states[c] = state[...].astype(dtype)

        def run(h, parts, decays, loss):
            gain = dot((parts[1] * decays[2]).astype(dtype), parts[2], 0, 0)
            advance_state(state, h, loss, gain)

        pl.when(scalar != 0)(lambda: with_masks(c, scalar, run))

    pipeline.run_pipeline(
        num,
        heads,
        (transpose_keys, advance),
        scalars=scalars,
        full_scalar=size,
        handle_boundary=advance_boundary,
    )

    # Gradients, from the last chunk to the first.

    def transpose_queries(c, h):
        q_t = load(c, h)[0].T
        queries_t[h] = q_t
        ramped_t[h] = (q_t * query_ramp_t[h]).astype(dtype)

    def score(c, h):
        _, k, v, d = load(c, h)
        d_next = d_state[h].astype(dtype)
        both = dot(d, jnp.concatenate([v, states[c, h]], 0), 1, 1)
        d_scores[h] = (both[:, :size] * decay[h]).astype(dtype)
        dq_carried[h] = query_ramp[h] * both[:, size:]
        both = dot(k, jnp.concatenate([queries_t[h], d_next], 1), 1, 0)
        scores_t[h] = (both[:, :size] * decay_t[h]).astype(dtype)
        dv_carried[h] = key_ramp[h] * both[:, size:]
        both = dot(v, jnp.concatenate([d, d_next], 0), 1, 1)
        d_scores_t[h] = (both[:, :size] * decay_t[h]).astype(dtype)
        dk_carried[h] = key_ramp[h] * both[:, size:]

    def finish(c, h):
        q, k, _, d = load(c, h)
        dv, dk = tpu_fwd.two_products(
            scores_t[h], d, d_scores_t[h], q, block_sizes.has_paired_products
        )
        dq, gain = tpu_fwd.two_products(
            d_scores[h], k, ramped_t[h], d, block_sizes.has_paired_products
        )
        advance_state(d_state, h, full_loss[h], gain)
        store(c, h, (dq + dq_carried[h], dk + dk_carried[h], dv + dv_carried[h]))

    def finish_boundary(c, scalar):
        def run(h, parts, decays, loss):
            q, k, v, d = parts
            pair_decay, ramp_q, ramp_k = decays
            p, dp = ((x * pair_decay).astype(dtype) for x in (dot(q, k, 1, 1), dot(d, v, 1, 1)))
            d_next = d_state[h].astype(dtype)
            dq = dot(dp, k, 1, 0) + ramp_q * dot(d, states[c, h], 1, 1)
            dk = dot(dp, q, 0, 0) + ramp_k * dot(v, d_next, 1, 1)
            dv = dot(p, d, 0, 0) + ramp_k * dot(k, d_next, 1, 0)
            gain = dot((q * ramp_q).astype(dtype), d, 0, 0)
            advance_state(d_state, h, loss, gain)
            store(c, h, (dq, dk, dv))

        @pl.when(scalar == 0)
        def _():
            d_qkv[0, tpu_fwd.chunk_rows(c, size)] = jnp.zeros(
                (size, 3 * heads * width), d_qkv.dtype
            )

        pl.when(scalar != 0)(lambda: with_masks(c, scalar, run))

    pipeline.run_pipeline(
        num,
        heads,
        (transpose_queries, score, finish),
        reverse=True,
        scalars=scalars,
        full_scalar=size,
        handle_boundary=finish_boundary,
    )
    d_initial[0] = d_state[...]


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_backward(
    qkv, slopes, tables, superblock_states, d_o, d_final, *, block_sizes, interpret=False
):
    """Return (d_qkv in qkv's dtype, d_initial_state float32). Arguments as in
    `tpu_fwd.lightning_forward`.

    Args:
      saved: states at superblock starts, from `forward` with the same `tile`.
      d_o: gradient of o, in its dtype.
      d_final: gradient of the final state, float32.
    """
    batch, length, _ = qkv.shape
    num_heads, steps, width = superblock_states.shape[1:4]

    def order(t):
        return steps - 1 - t

    def tokens(n):
        return pl.BlockSpec(
            (1, block_sizes.superblock_tokens, n * block_sizes.block_heads * width),
            lambda b, h, t: (b, order(t), h),
        )

    state = pl.BlockSpec((1, block_sizes.block_heads, width, width), lambda b, h, t: (b, h, 0, 0))
    checkpoint = pl.BlockSpec(
        (1, block_sizes.block_heads, 1, width, width), lambda b, h, t: (b, h, order(t), 0, 0)
    )
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    packed = tables[0] is not None
    states = (
        block_sizes.superblock_tokens // block_sizes.chunk_tokens,
        block_sizes.block_heads,
        width,
        width,
    )
    carried = pltpu.VMEM((block_sizes.block_heads, width, width), F32)
    return pl.pallas_call(
        functools.partial(_backward_kernel, block_sizes=block_sizes, packed=packed),
        name="lightning_bwd",
        grid=(batch, num_heads // block_sizes.block_heads, steps),
        in_specs=[smem, smem, *tpu_fwd.boundary_table_specs(tables[0], block_sizes, order),
                  tokens(3), tokens(1), checkpoint, state],
        out_specs=[tokens(3), state],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, 3 * num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(d_final.shape, F32),
        ],
        scratch_shapes=[
            carried,
            carried,
            pltpu.VMEM(states, qkv.dtype),
            *tpu_fwd.scratch_buffers(block_sizes, "CC CH HC RH CC HC CH", width, qkv.dtype),
            *tpu_fwd.scratch_buffers(block_sizes, "hc hc cc cc cc CH CH CH", width, qkv.dtype),
        ],
        compiler_params=tpu_fwd.COMPILER_PARAMS,
        interpret=interpret,
    )(slopes, boundaries.forgotten_fraction_table(slopes, block_sizes.chunk_tokens),
      *(tables if packed else ()),
      qkv, d_o, superblock_states, d_final)  # fmt: skip
