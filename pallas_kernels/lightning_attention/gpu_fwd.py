"""Lightning attention forward in Pallas for GPU, lowered through Triton.

For a chunk of n real tokens that enters with state S (M1 report, section 2, and docs/kernels.md,
"Forward"):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

A column of v meets its own column of S and no other. So one program walks the chunks of one row,
one head and one part of the columns (`gpu_walk`), with its part of S in registers, float32. It
reads q, k and v in place from the fused projection. Rows too few to fill the GPU are cut into
spans (`gpu_spans`), and the sums of the spans are all that is kept for the backward pass. Triton
indexes arrays of more than 4 GiB by 64 bits, and lays out and pipelines the loads.

Bytes of memory traffic per token and head at H = 128 in bfloat16: 1,024 where the parts of a head
share q and k through the L2 cache (they run side by side), 1,536 where they do not. Spans add 512
and, per 1,024 tokens of a span, 128.

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


def _forward_kernel(
    slopes: Ref,  # [heads]
    tables: boundaries.BoundaryTables | None,
    qkv: Ref,  # [B, T, N * 3 * H]
    initial_state: Ref,  # [B, N, H, H] float32
    counts: Ref,  # [B, S], see `gpu_spans.count_span_tokens`
    sums: Ref,  # [B, N, S - 1, H, H] float32, see `gpu_spans.compute_span_sums`
    o: Ref,  # [B, T, N * H]
    final_state: Ref,  # [B, N, H, H] float32
    *,
    config: gpu_walk.KernelConfig,
) -> None:
    """Attend one span of one head and write one part of its columns.

    Every Ref is a whole array. counts and sums are None where a row is one span.
    """
    num_spans, part_columns = config.num_spans, config.block_sizes.part_columns
    # Parts are the fastest axis of the grid: those of a head run side by side and share q and k.
    part, batch = pl.program_id(0), pl.program_id(2)
    head, span = pl.program_id(1) // num_spans, pl.program_id(1) % num_spans
    slope, width = slopes[head], initial_state.shape[3]
    columns = pl.ds(part * part_columns, part_columns)

    def load_operands(rows, is_real):
        q, k = (
            gpu_walk.load_columns(qkv, batch, rows, (3 * head + i) * width, width, is_real)
            for i in range(2)
        )
        first_column = (3 * head + 2) * width + part * part_columns
        v = gpu_walk.load_columns(qkv, batch, rows, first_column, part_columns, is_real)
        return q, k, v

    def write_output(rows, inside, out):
        column = pl.ds(head * width + part * part_columns, part_columns)
        plgpu.store(o.at[batch, rows, column], out.astype(o.dtype), mask=inside)

    state = plgpu.load(initial_state.at[batch, head, :, columns])
    if num_spans > 1:
        state = gpu_spans.fold_span_sums(
            state,
            lambda i: plgpu.load(sums.at[batch, head, i, :, columns]),
            counts,
            slope,
            (batch, span),
            num_spans,
            reverse=False,
        )
    state = gpu_walk.walk_span(
        load_operands,
        write_output,
        state,
        slope,
        tables,
        (batch, span),
        config,
        reverse=False,
        num_halves=2,
    )

    # Only the last span has walked all of the row.
    @pl.when(span == num_spans - 1)
    def _():
        plgpu.store(final_state.at[batch, head, :, columns], state)


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_forward(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    tables: boundaries.BoundaryTables | None,
    initial_state: Float[Array, "B N H H"],
    *,
    block_sizes: gpu_tiling.GpuBlockSizes,
    interpret: bool = False,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"], Float[Array, "B N sums H H"] | None]:
    """Return (o, final state, sums of the spans or None where a row is one span).

    Args:
      qkv: fused projection, bfloat16 or float32. T is any length.
      slopes: decay rates, one per head.
      tables: [B, chunks] and [B, tokens], see `boundaries.BoundaryTables`. None: full chunks of one
        document.
      initial_state: float32 state that the row's first document continues.
      block_sizes: block sizes of the call.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    num_spans = -(-length // block_sizes.span_tokens)
    sums = gpu_spans.compute_span_sums(
        qkv,
        qkv,
        slopes,
        tables,
        width=width,
        block_sizes=block_sizes,
        reverse=False,
        interpret=interpret,
    )
    counts = None
    if sums is not None:
        counts = gpu_spans.count_span_tokens(tables, batch, length, block_sizes)
    precision = gpu_walk.dot_precision(qkv.dtype, interpret)
    config = gpu_walk.KernelConfig(block_sizes, num_spans, length, precision)
    o, final_state = gpu_walk.launch_kernel(
        functools.partial(_forward_kernel, config=config),
        "lightning_gpu_fwd",
        (width // block_sizes.part_columns, num_heads * num_spans, batch),
        [
            jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
        ],
        [slopes, tables, qkv, initial_state, counts, sums],
        block_sizes,
        interpret,
    )
    return o, final_state, sums
