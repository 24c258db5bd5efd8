"""Lightning attention forward in Pallas for TPU: one pass over the fused projection.

For a chunk of n real tokens that enters with state S (M1 section 2; kernels.md section 1):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

The grid walks batch rows, head blocks and superblocks; S stays in VMEM scratch, float32, from
one superblock to the next. The state each superblock enters with is the only residual.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.lightning_attention import boundaries, tiling

F32, BF16 = jnp.float32, jnp.bfloat16


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


def fill_weights(slopes, first_head, tile, query_ramp, key_ramp):
    """Write the weights of a chunk without boundary: constants of a head, made once a block."""
    heads, size, width = query_ramp.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    col = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    step = jax.lax.broadcasted_iota(jnp.int32, (size, width), 0)
    for h in range(heads):
        slope = slopes[first_head + h]
        tile[h] = boundaries.decay(slope, row - col).astype(tile.dtype)
        query_ramp[h] = boundaries.decay(slope, step + 1).astype(query_ramp.dtype)
        key_ramp[h] = boundaries.decay(slope, size - 1 - step).astype(key_ramp.dtype)


def load_heads(ref, rows, h: int, width: int, parts: int):
    """Read the `parts` lane slices of head h: q, k, v of the projection, or o alone."""
    return [ref[0, rows, pl.ds((parts * h + i) * width, width)] for i in range(parts)]


def chunk_rows(c, size: int):
    return pl.ds(pl.multiple_of(c * size, size), size)


def for_each_chunk(num, body, scalars, size: int, *, reverse=False):
    """Run `body(c, kind)` for every chunk; kind is "fast", "general" or "empty".

    Without scalars the call holds neither boundary nor padding, and only "fast" is compiled.
    """

    def step(i, carry):
        c = num - 1 - i if reverse else i
        if scalars is None:
            body(c, "fast", None)
            return carry
        scalar = scalars[0, 0, 0, c]
        pl.when(scalar == size)(lambda: body(c, "fast", scalar))
        pl.when((scalar != size) & (scalar != 0))(lambda: body(c, "general", scalar))
        pl.when(scalar == 0)(lambda: body(c, "empty", scalar))
        return carry

    jax.lax.fori_loop(0, num, step, 0)


def _kernel(slopes, losses, *refs, tile: tiling.Tiling, packed: bool, checkpoints: bool):
    scalars, words, *refs = refs if packed else (None, None, *refs)
    qkv, initial, o, final, *refs = refs
    saved, refs = (refs[0], refs[1:]) if checkpoints else (None, refs)
    state, pair_decay, query_ramp, key_ramp = refs
    size, heads, width = tile.chunk, tile.heads, state.shape[2]
    first_head = pl.program_id(1) * heads

    @pl.when(pl.program_id(2) == 0)
    def _():
        state[...] = initial[0]
        fill_weights(slopes, first_head, pair_decay, query_ramp, key_ramp)

    if saved is not None:
        saved[0, :, 0] = state[...]

    def head(c, h, qkv_h, weights, loss):
        q, k, v = qkv_h
        decay, ramp_q, ramp_k = weights
        pairs = (dot(q, k, 1, 1) * decay).astype(v.dtype)
        out = dot(pairs, v, 1, 0) + ramp_q * read_state(q, state[h])
        added = dot((k * ramp_k).astype(k.dtype), v, 0, 0)
        state[h] = state[h] - loss * state[h] + added
        o[0, chunk_rows(c, size), pl.ds(h * width, width)] = out.astype(o.dtype)

    def chunk(c, kind, scalar):
        rows = chunk_rows(c, size)
        if kind == "empty":
            o[0, rows] = jnp.zeros((size, heads * width), o.dtype)
        elif kind == "fast":
            for h in range(heads):
                weights = pair_decay[h], query_ramp[h], key_ramp[h]
                loss = losses[(first_head + h) * (size + 1) + size]
                head(c, h, load_heads(qkv, rows, h, width, 3), weights, loss)
        else:
            assert words is not None
            real, gap, q_steps, k_steps = boundaries.pair_masks(words[0, :, rows], scalar)
            for h in range(heads):
                # A select, so that NaN in padding reaches neither output nor state.
                parts = [jnp.where(real, x, 0) for x in load_heads(qkv, rows, h, width, 3)]
                weights = [
                    boundaries.decay(slopes[first_head + h], n) for n in (gap, q_steps, k_steps)
                ]
                head(c, h, parts, weights, packed_loss(losses, first_head + h, scalar, size))

    for_each_chunk(tile.superblock // size, chunk, scalars, size)
    final[0] = state[...]


def packed_loss(losses, head, scalar, size: int):
    """Return the share of the state that a chunk forgets: all of it where a document starts."""
    kept = losses[head * (size + 1) + (scalar & boundaries.COUNT)]
    return jnp.where(scalar > boundaries.COUNT, 1.0, kept)


def table_specs(scalars, tile: tiling.Tiling, order):
    """Return block specs of the boundary tables; none where there are no boundaries."""
    if scalars is None:
        return []
    num = tile.superblock // tile.chunk
    return [
        pl.BlockSpec((1, 1, 1, num), lambda b, h, t: (b, order(t), 0, 0),
                     memory_space=pltpu.SMEM),
        pl.BlockSpec((1, 1, tile.superblock), lambda b, h, t: (b, 0, order(t))),
    ]  # fmt: skip


def weight_scratch(tile: tiling.Tiling, width: int):
    """Return scratch for the decay tile and both ramps of every head of a block."""
    ramp = (tile.heads, tile.chunk, width)
    pairs = pltpu.VMEM((tile.heads, tile.chunk, tile.chunk), F32)
    return [pairs, pltpu.VMEM(ramp, F32), pltpu.VMEM(ramp, F32)]


@functools.partial(jax.jit, static_argnames=("tile", "checkpoints", "interpret"))
def forward(qkv, slopes, tables, initial_state, *, tile, checkpoints, interpret=False):
    """Return (o, final state, states at superblock starts [B, N, S, H, H] or None).

    Args:
      qkv: [B, T, N * 3 * H], bfloat16 or float32; T is any length.
      slopes: float32[N].
      tables: `boundaries.tables`, or (None, None) for full superblocks of one document.
      initial_state: float32[B, N, H, H].
      tile: block sizes.
      checkpoints: whether to save the states the backward pass starts from.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    steps = -(-length // tile.superblock)

    def tokens(n):
        return pl.BlockSpec((1, tile.superblock, n * tile.heads * width), lambda b, h, t: (b, t, h))

    state = pl.BlockSpec((1, tile.heads, width, width), lambda b, h, t: (b, h, 0, 0))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    packed = tables[0] is not None
    out_specs = [tokens(1), state]
    out_shape = [
        jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
        jax.ShapeDtypeStruct(initial_state.shape, F32),
    ]
    if checkpoints:
        saved = (1, tile.heads, 1, width, width)
        out_specs.append(pl.BlockSpec(saved, lambda b, h, t: (b, h, t, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, num_heads, steps, width, width), F32))
    o, final, *saved = pl.pallas_call(
        functools.partial(_kernel, tile=tile, packed=packed, checkpoints=checkpoints),
        name="lightning_fwd",
        grid=(batch, num_heads // tile.heads, steps),
        in_specs=[smem, smem, *table_specs(tables[0], tile, lambda t: t),
                  tokens(3), state],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((tile.heads, width, width), F32), *weight_scratch(tile, width)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiling.VMEM_BYTES,
        ),
        interpret=interpret,
    )(slopes, boundaries.losses(slopes, tile.chunk), *(tables if packed else ()),
      qkv, initial_state)  # fmt: skip
    return o, final, saved[0] if saved else None
