"""Lightning attention backward in Pallas for GPU: three more walks of the same recurrence.

Write L(q, k, v, S) for the o of `gpu_fwd`, and L' for the same from the last token to the first.
With do the gradient of o and dS the gradient of the final state,

    dq = L(do, v, k, S^T)      dk = L'(v, do, q, dS^T)      dv = L'(k, q, do, dS)

where L' weighs a token's own pair by 1, as L does, but decays the carried dS by lambda^(n - j)
and what it adds to dS by lambda^i. Each walk is split by columns as the forward pass is. So all
three run side by side in one launch, and none needs saved or recomputed states. Slopes are
constants of the model and get no gradient.

Bytes of memory traffic per token and head at H = 128 in bfloat16: 2,560 where dk and dv, which
walk side by side, share q and do through the L2 cache, 3,072 where only the parts of a head
share, 4,608 where nothing does. Spans add 512 for sums of their own and 128 per 1,024 tokens of a
span. The minimum of a single pass is 1,856. A single pass needs the states of all chunks beside
dS, which registers do not hold, and has a sixth of the programs.

Letters in shapes: S spans of a row, H width of a head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, gpu_spans, gpu_tiling, gpu_walk

F32 = jnp.float32
Ref = gpu_walk.Ref


def _backward_kernel(
    slopes: Ref,  # [heads]
    tables: boundaries.BoundaryTables | None,
    qkv: Ref,  # [B, T, N * 3 * H]
    d_o: Ref,  # [B, T, N * H]
    initial_state: Ref,  # [B, N, H, H] float32
    d_final: Ref,  # [B, N, H, H] float32
    counts: Ref,  # [B, S], see `gpu_spans.count_span_tokens`
    sums: Ref,  # [B, N, S - 1, H, H] float32, k^T v of the first spans
    d_sums: Ref,  # [B, N, S - 1, H, H] float32, q^T do of the last spans
    d_qkv: Ref,  # [B, T, N * 3 * H]
    d_initial: Ref,  # [B, N, H, H] float32
    *,
    config: gpu_walk.KernelConfig,
) -> None:
    """Write one part of the columns of dq, dk or dv, for one span of one head.

    The first axis of the grid is (gradient, part). Every Ref is a whole array. `counts`, `sums` and
    `d_sums` are None where a row is one span.
    """
    num_spans, part_columns = config.num_spans, config.block_sizes.part_columns
    num_parts, batch = initial_state.shape[3] // part_columns, pl.program_id(2)
    gradient, part = pl.program_id(0) // num_parts, pl.program_id(0) % num_parts
    head, span = pl.program_id(1) // num_spans, pl.program_id(1) % num_spans
    slope, width = slopes[head], initial_state.shape[3]
    part_start = part * part_columns
    columns = pl.ds(part_start, part_columns)

    def source(name):
        """Return the array that holds q, k, v or do, and the head's first column there."""
        if name == "do":
            return d_o, head * width
        return qkv, (3 * head + "qkv".index(name)) * width

    def state_part(ref, *index, transpose):
        # The program's columns of S^T are rows of S.
        if transpose:
            return plgpu.load(ref.at[batch, head, *index, columns, :]).T
        return plgpu.load(ref.at[batch, head, *index, :, columns])

    def walk(query, key, value, *, target, reverse, transpose):
        """Walk L(query, key, value) or L', write the gradient of `target` and return the state."""

        def load_operands(rows, is_real):
            (q, q_column), (k, k_column), (v, v_column) = map(source, (query, key, value))
            return (
                gpu_walk.load_columns(q, batch, rows, q_column, width, is_real),
                gpu_walk.load_columns(k, batch, rows, k_column, width, is_real),
                gpu_walk.load_columns(v, batch, rows, v_column + part_start, part_columns, is_real),
            )

        def write_output(rows, inside, out):
            column = pl.ds(source(target)[1] + part_start, part_columns)
            plgpu.store(d_qkv.at[batch, rows, column], out.astype(d_qkv.dtype), mask=inside)

        state = state_part(d_final if reverse else initial_state, transpose=transpose)
        if num_spans > 1:
            walked_sums = d_sums if reverse else sums
            state = gpu_spans.fold_span_sums(
                state,
                lambda i: state_part(walked_sums, i, transpose=transpose),
                counts,
                slope,
                (batch, span),
                num_spans,
                reverse=reverse,
            )
        return gpu_walk.walk_span(
            load_operands,
            write_output,
            state,
            slope,
            tables,
            (batch, span),
            config,
            reverse=reverse,
            num_halves=1,  # one bfloat16 part is enough for a gradient
        )

    @pl.when(gradient == 0)
    def _():
        walk("do", "v", "k", target="q", reverse=False, transpose=True)

    @pl.when(gradient == 1)
    def _():
        walk("v", "do", "q", target="k", reverse=True, transpose=True)

    @pl.when(gradient == 2)
    def _():
        state = walk("k", "q", "do", target="v", reverse=True, transpose=False)

        # This walk carries dS untransposed, so it is the one that hands it to the row before.
        @pl.when(span == 0)
        def _():
            plgpu.store(d_initial.at[batch, head, :, columns], state)


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_backward(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    tables: boundaries.BoundaryTables | None,
    initial_state: Float[Array, "B N H H"],
    sums: Float[Array, "B N sums H H"] | None,
    d_o: Float[Array, "B T NH"],
    d_final: Float[Array, "B N H H"],
    *,
    block_sizes: gpu_tiling.GpuBlockSizes,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N3H"], Float[Array, "B N H H"]]:
    """Return (d_qkv in qkv's dtype, d_initial_state float32).

    Args:
      qkv, slopes, tables, initial_state, interpret: as in `gpu_fwd.lightning_forward`.
      sums: of the spans, from `gpu_fwd.lightning_forward` with the same `block_sizes`.
      d_o: gradient of o, in its dtype.
      d_final: gradient of the final state, float32.
      block_sizes: block sizes of the call.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    num_spans = -(-length // block_sizes.span_tokens)
    d_sums = gpu_spans.compute_span_sums(
        qkv,
        d_o,
        slopes,
        tables,
        width=width,
        block_sizes=block_sizes,
        reverse=True,
        interpret=interpret,
    )
    counts = None
    if sums is not None:
        counts = gpu_spans.count_span_tokens(tables, batch, length, block_sizes)
    precision = gpu_walk.dot_precision(qkv.dtype, interpret)
    config = gpu_walk.KernelConfig(block_sizes, num_spans, length, precision)
    d_qkv, d_initial = gpu_walk.launch_kernel(
        functools.partial(_backward_kernel, config=config),
        "lightning_gpu_bwd",
        (3 * (width // block_sizes.part_columns), num_heads * num_spans, batch),
        [
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
        ],
        [slopes, tables, qkv, d_o, initial_state, d_final, counts, sums, d_sums],
        block_sizes,
        interpret,
    )
    return d_qkv, d_initial
