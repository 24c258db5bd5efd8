"""Lightning attention backward in Pallas for TPU: one reverse pass.

With P and dP the masked, decayed products q k^T and do v^T of a chunk, i and j from 1:

    dq = dP k   + lambda^i do S^T           dv = P^T do + lambda^(n - j) k dS
    dk = dP^T q + lambda^(n - j) v dS^T     dS <- dS - (1 - lambda^n) dS + sum_i lambda^i q_i^T do_i

Superblocks run backwards, each reading q, k, v and do once: from its saved float32 state the
states at its chunks are computed again into VMEM, then its chunks run backwards with dS in
scratch. Slopes are constants of the model and get no gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import boundaries, tiling, tpu_fwd

F32 = jnp.float32
dot = tpu_fwd.dot


def _kernel(slopes, losses, *refs, tile: tiling.Tiling, packed: bool):
    scalars, words, *refs = refs if packed else (None, None, *refs)
    qkv, d_o, saved, d_final, d_qkv, d_initial, *refs = refs
    state, d_state, states, pair_decay, query_ramp, key_ramp = refs
    size, heads, width = tile.chunk, tile.heads, state.shape[2]
    first_head, num = pl.program_id(1) * heads, tile.superblock // size

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = d_final[0]
        tpu_fwd.fill_weights(slopes, first_head, pair_decay, query_ramp, key_ramp)

    state[...] = saved[0, :, 0]

    def per_head(c, kind, scalar, run):
        """Call run(h, q k v do, decays, loss) for the heads of a chunk."""
        rows = tpu_fwd.chunk_rows(c, size)
        masks = None
        if kind == "general":
            assert words is not None
            real, *masks = boundaries.pair_masks(words[0, :, rows], scalar)
        for h in range(heads):
            parts = tpu_fwd.load_heads(qkv, rows, h, width, 3)
            parts += tpu_fwd.load_heads(d_o, rows, h, width, 1)
            if masks is None:
                decays = pair_decay[h], query_ramp[h], key_ramp[h]
                loss = losses[(first_head + h) * (size + 1) + size]
            else:
                parts = [jnp.where(real, x, 0) for x in parts]
                decays = [boundaries.decay(slopes[first_head + h], n) for n in masks]
                loss = tpu_fwd.packed_loss(losses, first_head + h, scalar, size)
            run(h, parts, decays, loss)

    def recompute(c, kind, scalar):
        states[c] = state[...].astype(states.dtype)

        def run(h, parts, decays, loss):
            _, k, v, _ = parts
            added = dot((k * decays[2]).astype(k.dtype), v, 0, 0)
            state[h] = state[h] - loss * state[h] + added

        if kind != "empty":
            per_head(c, kind, scalar, run)

    def chunk(c, kind, scalar):
        rows = tpu_fwd.chunk_rows(c, size)

        def run(h, parts, decays, loss):
            q, k, v, d = parts
            decay, ramp_q, ramp_k = decays
            p, dp = ((x * decay).astype(q.dtype) for x in (dot(q, k, 1, 1), dot(d, v, 1, 1)))
            d_next = d_state[h].astype(q.dtype)
            dq = dot(dp, k, 1, 0) + ramp_q * dot(d, states[c, h], 1, 1)
            dk = dot(dp, q, 0, 0) + ramp_k * dot(v, d_next, 1, 1)
            dv = dot(p, d, 0, 0) + ramp_k * dot(k, d_next, 1, 0)
            added = dot((q * ramp_q).astype(q.dtype), d, 0, 0)
            d_state[h] = d_state[h] - loss * d_state[h] + added
            for i, x in enumerate((dq, dk, dv)):
                d_qkv[0, rows, pl.ds((3 * h + i) * width, width)] = x.astype(d_qkv.dtype)

        if kind == "empty":
            d_qkv[0, rows] = jnp.zeros((size, 3 * heads * width), d_qkv.dtype)
        else:
            per_head(c, kind, scalar, run)

    tpu_fwd.for_each_chunk(num, recompute, scalars, size)
    tpu_fwd.for_each_chunk(num, chunk, scalars, size, reverse=True)
    d_initial[0] = d_state[...]


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def backward(qkv, slopes, tables, saved, d_o, d_final, *, tile, interpret=False):
    """Return (d_qkv in qkv's dtype, d_initial_state float32). Arguments as in `tpu_fwd.forward`.

    Args:
      saved: states at superblock starts, from `forward` with the same `tile`.
      d_o: gradient of o, in its dtype.
      d_final: gradient of the final state, float32.
    """
    batch, length, _ = qkv.shape
    num_heads, steps, width = saved.shape[1:4]

    def order(t):
        return steps - 1 - t

    def tokens(n):
        return pl.BlockSpec(
            (1, tile.superblock, n * tile.heads * width), lambda b, h, t: (b, order(t), h)
        )

    state = pl.BlockSpec((1, tile.heads, width, width), lambda b, h, t: (b, h, 0, 0))
    checkpoint = pl.BlockSpec(
        (1, tile.heads, 1, width, width), lambda b, h, t: (b, h, order(t), 0, 0)
    )
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    packed = tables[0] is not None
    states = (tile.superblock // tile.chunk, tile.heads, width, width)
    carried = pltpu.VMEM((tile.heads, width, width), F32)
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile, packed=packed),
        name="lightning_bwd",
        grid=(batch, num_heads // tile.heads, steps),
        in_specs=[smem, smem, *tpu_fwd.table_specs(tables[0], tile, order),
                  tokens(3), tokens(1), checkpoint, state],
        out_specs=[tokens(3), state],
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, 3 * num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(d_final.shape, F32),
        ],
        scratch_shapes=[carried, carried, pltpu.VMEM(states, qkv.dtype),
                        *tpu_fwd.weight_scratch(tile, width)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiling.VMEM_BYTES,
        ),
        interpret=interpret,
    )(slopes, boundaries.losses(slopes, tile.chunk), *(tables if packed else ()),
      qkv, d_o, saved, d_final)  # fmt: skip
