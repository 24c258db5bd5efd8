"""Lightning attention forward in Pallas for TPU: one pass over the fused projection.

For a chunk of n real tokens that enters with state S (M1 report, section 2; docs/kernels.md,
"Forward"):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

The grid walks batch rows, head blocks and superblocks. S stays in VMEM scratch, float32, from one
superblock to the next. The state that each superblock enters with is the only residual.

Chunks without boundary or padding run through `pipeline.run_pipeline` in three stages. Products
are laid side by side where they share an operand, because a matrix unit 256 wide is half idle on
128 columns: q [k^T, S], [P, q] [v; S], and the k^T v of two heads as one block-diagonal product.
Queries read S as a high bfloat16 half and a low one (what the high half rounds away).

Letters in shapes: N heads of a block, C tokens of a chunk, H width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, pipeline, tiling

F32, BF16 = jnp.float32, jnp.bfloat16
COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"),
    vmem_limit_bytes=tiling.VMEM_LIMIT_BYTES,
    # The compiler's default scheduler hoists loads until registers spill. This one, which splash
    # attention calls `use_experimental_scheduler`, spills none.
    flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True},
)


class ChunkWeights(NamedTuple):
    """Decays of a full chunk, float32: constants of a head, filled once a row and head block."""

    pair_decay: jax.Ref  # [N, C, C] lambda^(i - j), 0 above the diagonal
    query_ramp: jax.Ref  # [N, C, H] lambda^i along rows, i from 1
    key_ramp_t: jax.Ref  # [N, H, C] lambda^(C - j) along columns, for keys that stand transposed
    # [N, 1, H] 1 - lambda^C. A row, because scalars would all be spread over registers before the
    # loop starts.
    forgotten_fraction: jax.Ref


class ForwardScratch(NamedTuple):
    """VMEM of the forward kernel. A slot hands a result of one head from stage to stage."""

    state: jax.Ref  # [N, H, H] float32, S
    weights: ChunkWeights
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
        with. None where nobody asked for the residual.
    """

    o: jax.Array
    final_state: jax.Array
    superblock_states: jax.Array | None


def dot_f32(a: Array, b: Array, contract_a: int, contract_b: int) -> Float[Array, "..."]:
    """Contract one axis of each with float32 sums.

    bfloat16 operands enter the matrix unit as they are; float32 operands are multiplied in full.
    """
    precision = "highest" if a.dtype == F32 else "default"
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def read_state(q: Array, state: Float[Array, "H H"]) -> Float[Array, "C H"]:
    """q S. bfloat16 queries read the float32 state as two halves, high and low."""
    if q.dtype == F32:
        return dot_f32(q, state, 1, 0)
    high = state.astype(BF16)
    low = (state - high.astype(F32)).astype(BF16)
    return dot_f32(q, high, 1, 0) + dot_f32(q, low, 1, 0)


def head_iota(ref: jax.Ref, axis: int) -> Array:
    """Indices along an axis of one head's part of a scratch buffer."""
    return jax.lax.broadcasted_iota(jnp.int32, ref.shape[1:], axis)


def fill_weights(
    slopes: jax.Ref, forgotten_fractions: jax.Ref, first_head: jax.Array, weights: ChunkWeights
) -> None:
    """Write the weights of a chunk without boundary.

    A loop over heads and not an unrolled one: unrolled, the heads' tiles are all live at once and
    registers spill.
    """
    heads, size, _ = weights.pair_decay.shape

    def fill_head(h: jax.Array, _: None) -> None:
        slope = slopes[first_head + h]
        rows, columns = (head_iota(weights.pair_decay, axis) for axis in (0, 1))
        weights.pair_decay[h] = boundaries.masked_decay(slope, rows - columns)
        weights.query_ramp[h] = boundaries.masked_decay(slope, head_iota(weights.query_ramp, 0) + 1)
        weights.key_ramp_t[h] = boundaries.masked_decay(
            slope, size - 1 - head_iota(weights.key_ramp_t, 1)
        )
        fraction = forgotten_fractions[(first_head + h) * (size + 1) + size]
        weights.forgotten_fraction[h] = jnp.full(weights.forgotten_fraction.shape[1:], fraction)

    jax.lax.fori_loop(0, heads, fill_head, None)


def two_products(
    a: Array, b: Array, c: Array, d: Array, block_diagonal: bool
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return (a b, c d), as one product with a block-diagonal right side if `block_diagonal`.

    The zeros cost nothing on a matrix unit 256 wide: 128 columns would leave half of it idle.
    """
    if not block_diagonal:
        return dot_f32(a, b, 1, 0), dot_f32(c, d, 1, 0)
    zero = jnp.zeros_like(b)
    right = jnp.concatenate([b, zero], 1), jnp.concatenate([zero, d], 1)
    products = dot_f32(jnp.concatenate([a, c], 1), jnp.concatenate(right, 0), 1, 0)
    return products[:, : b.shape[1]], products[:, b.shape[1] :]


def advance_state(state: jax.Ref, h: int, forgotten_fraction: Array, gain: Array) -> None:
    """Carry the state of head h over a chunk; `forgotten_fraction` is a scalar or a row."""
    state[h] = state[h] - forgotten_fraction * state[h] + gain


def load_head_slices(ref: jax.Ref, rows: Any, h: int, width: int, num_slices: int) -> list[Array]:
    """Read the lane slices of head h: three of the projection (q, k, v), one of o."""
    return [ref[0, rows, pl.ds((num_slices * h + i) * width, width)] for i in range(num_slices)]


def chunk_rows(c: pipeline.ChunkIndex, size: int) -> Any:
    """Return the slice of a superblock's rows that chunk c has."""
    return pl.ds(pl.multiple_of(c * size, size), size)


def packed_forgotten_fraction(
    forgotten_fractions: jax.Ref, head: jax.Array, scalar: jax.Array, size: int
) -> Array:
    """Return the share of the state that a chunk forgets: all of it where a document starts."""
    fraction = forgotten_fractions[head * (size + 1) + (scalar & boundaries.COUNT_MASK)]
    return jnp.where(scalar > boundaries.COUNT_MASK, 1.0, fraction)


def _forward_kernel(
    slopes: jax.Ref,
    forgotten_fractions: jax.Ref,
    tables: boundaries.BoundaryTables | None,
    qkv: jax.Ref,
    initial_state: jax.Ref,
    o: jax.Ref,
    final_state: jax.Ref,
    superblock_states: jax.Ref | None,
    scratch: ForwardScratch,
    *,
    block_sizes: tiling.TpuBlockSizes,
) -> None:
    """Attend one superblock of one head block of one row.

    Refs, as the block specs of `lightning_forward` cut them: slopes [N] and forgotten_fractions in
    SMEM; qkv [1, superblock, N * 3 * H]; o [1, superblock, N * H]; initial_state and final_state
    [1, N, H, H]; superblock_states [1, N, 1, H, H].
    """
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
        fill_weights(slopes, forgotten_fractions, first_head, weights)
        # Exact enough for what the high half of S rounds away.
        scratch.low_query_ramp[...] = weights.query_ramp[...].astype(dtype)

    if superblock_states is not None:
        superblock_states[0, :, 0] = state[...]

    def load(c: pipeline.ChunkIndex, h: int) -> list[Array]:
        return load_head_slices(qkv, chunk_rows(c, size), h, width, 3)

    def store(c: pipeline.ChunkIndex, h: int, out: Array) -> None:
        o[0, chunk_rows(c, size), pl.ds(h * width, width)] = out.astype(o.dtype)

    # The three stages of a full chunk.

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
            left = jnp.concatenate([scratch.scores[h], q * scratch.low_query_ramp[h]], 1)
            out = dot_f32(left, jnp.concatenate([v, low], 0), 1, 0)
        else:
            out = dot_f32(scratch.scores[h], v, 1, 0)
        store(c, h, out + scratch.carried[h])
        if is_paired and h % 2:
            left_v = load(c, h - 1)[2]
            gains = two_products(
                scratch.added_keys_t[h - 1], left_v, scratch.added_keys_t[h], v, True
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
                pairs = (dot_f32(q, k, 1, 1) * pair_decay).astype(dtype)
                store(c, h, dot_f32(pairs, v, 1, 0) + query_ramp * read_state(q, state[h]))
                gain = dot_f32((k * key_ramp).astype(dtype), v, 0, 0)
                fraction = packed_forgotten_fraction(
                    forgotten_fractions, first_head + h, scalar, size
                )
                advance_state(state, h, fraction, gain)

    pipeline.run_pipeline(
        block_sizes.superblock_tokens // size,
        heads,
        (transpose_keys, score, finish),
        chunks_per_loop=block_sizes.chunks_per_loop,
        scalars=None if tables is None else tables.chunk_scalars,
        full_scalar=size,
        handle_boundary=attend_boundary_chunk,
    )
    final_state[0] = state[...]


def boundary_table_specs(
    tables: boundaries.BoundaryTables | None,
    block_sizes: tiling.TpuBlockSizes,
    superblock_at: Callable[[Any], Any],
) -> boundaries.BoundaryTables | None:
    """Return block specs of the tables; None where there are no boundaries.

    Args:
      tables: whether there are boundaries is all that is asked of them.
      block_sizes: block sizes.
      superblock_at: which superblock a step of the grid's last axis works on.
    """
    if tables is None:
        return None
    chunks = block_sizes.superblock_tokens // block_sizes.chunk_tokens
    return boundaries.BoundaryTables(
        chunk_scalars=pl.BlockSpec(
            (1, 1, 1, chunks),
            lambda b, h, t: (b, superblock_at(t), 0, 0),
            memory_space=pltpu.SMEM,
        ),
        token_words=pl.BlockSpec(
            (1, 1, block_sizes.superblock_tokens), lambda b, h, t: (b, 0, superblock_at(t))
        ),
    )


def per_head_buffer(block_sizes: tiling.TpuBlockSizes) -> Callable[..., Any]:
    """Return buffer(rows, columns, dtype=float32), which asks for VMEM of one such array a head."""

    def buffer(rows: int, columns: int, dtype: Any = F32) -> pl.MemoryRef:
        return pltpu.VMEM((block_sizes.block_heads, rows, columns), dtype)

    return buffer


def chunk_weight_buffers(block_sizes: tiling.TpuBlockSizes, width: int) -> Any:
    """Ask for the VMEM of `ChunkWeights`. The kernel gets the same tuple, with Refs in it."""
    buffer, size = per_head_buffer(block_sizes), block_sizes.chunk_tokens
    return ChunkWeights(
        pair_decay=buffer(size, size),
        query_ramp=buffer(size, width),
        key_ramp_t=buffer(width, size),
        forgotten_fraction=buffer(1, width),
    )


def _forward_buffers(block_sizes: tiling.TpuBlockSizes, width: int, dtype: Any) -> Any:
    buffer, size = per_head_buffer(block_sizes), block_sizes.chunk_tokens
    return ForwardScratch(
        state=buffer(width, width),
        weights=chunk_weight_buffers(block_sizes, width),
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
      block_sizes: block sizes; N is a multiple of `block_heads`.
      save_superblock_states: whether to return the states that the backward pass starts from.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    num_superblocks = -(-length // block_sizes.superblock_tokens)
    block_heads = block_sizes.block_heads

    def token_spec(slices_per_head: int):
        columns = slices_per_head * block_heads * width
        return pl.BlockSpec((1, block_sizes.superblock_tokens, columns), lambda b, h, t: (b, t, h))

    state_spec = pl.BlockSpec((1, block_heads, width, width), lambda b, h, t: (b, h, 0, 0))
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    saved_spec = saved_shape = None
    if save_superblock_states:
        saved_spec = pl.BlockSpec(
            (1, block_heads, 1, width, width), lambda b, h, t: (b, h, t, 0, 0)
        )
        saved_shape = (batch, num_heads, num_superblocks, width, width)
        saved_shape = jax.ShapeDtypeStruct(saved_shape, F32)
    # None stands for an argument or output that this call has not: the kernel gets None there.
    outputs = pl.pallas_call(
        functools.partial(_forward_kernel, block_sizes=block_sizes),
        name="lightning_fwd",
        grid=(batch, num_heads // block_heads, num_superblocks),
        in_specs=[
            smem,
            smem,
            boundary_table_specs(tables, block_sizes, lambda t: t),
            token_spec(3),
            state_spec,
        ],
        out_specs=(token_spec(1), state_spec, saved_spec),
        out_shape=(
            jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
            saved_shape,
        ),
        scratch_shapes=[_forward_buffers(block_sizes, width, qkv.dtype)],
        compiler_params=COMPILER_PARAMS,
        interpret=interpret,
    )(
        slopes,
        boundaries.forgotten_fraction_table(slopes, block_sizes.chunk_tokens),
        tables,
        qkv,
        initial_state,
    )
    return ForwardOutputs(*outputs)
