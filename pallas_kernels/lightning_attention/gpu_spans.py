"""Rows cut into spans, where rows and heads alone are too few to fill the GPU.

A first launch sums each span's own k^T v. A span's program then folds the sums of the spans before
it into the state that it starts from. In a gradient the walk is reversed: the sums are q^T do, and
the spans behind come first.

Letters in shapes: S spans of a row, H width of a head, P columns of a part.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries, gpu_decays, gpu_tiling, gpu_walk

F32 = jnp.float32
Ref = gpu_walk.Ref


def fold_span_sums(
    state: Float[Array, "H P"],
    load_sum: Callable[[Array], Array],
    counts: Ref,
    slope: Array,
    row_and_span: tuple[Array, Array],
    num_spans: int,
    *,
    reverse: bool,
) -> Float[Array, "H P"]:
    """Bring a row's first state to the span of a program, over the sums of the spans between.

    Args:
      state: float32, before the first span walked.
      load_sum: i -> part of the i-th sum that `compute_span_sums` wrote, [H, P].
      counts: Ref of the array that `count_span_tokens` returns.
      slope: decay rate of the head.
      row_and_span: indices of the row and of the program's span.
      num_spans: spans of a row.
      reverse: as in `gpu_walk.walk_span`.
    """
    batch, span = row_and_span

    def pass_span(i, state):
        passed = num_spans - 1 - i if reverse else i
        fraction = gpu_decays.forgotten_fraction(slope, counts[batch, passed])
        # In reverse the first span has no sum, so the sums are numbered from the second.
        # A select where a document starts, as in `gpu_walk.walk_span`.
        kept = jnp.where(counts[batch, passed] < 0, 0.0, state - fraction * state)
        return kept + load_sum(passed - int(reverse))

    return jax.lax.fori_loop(0, num_spans - 1 - span if reverse else span, pass_span, state)


def count_span_tokens(
    tables: boundaries.BoundaryTables | None,
    batch: int,
    length: int,
    block_sizes: gpu_tiling.GpuBlockSizes,
) -> Int[Array, "B S"]:
    """Return the real tokens of each span, or -1 where a document starts inside."""
    num_spans = -(-length // block_sizes.span_tokens)
    if tables is None:
        ends = jnp.minimum(jnp.arange(1, num_spans + 1) * block_sizes.span_tokens, length)
        counts = ends - jnp.arange(num_spans) * block_sizes.span_tokens
        return jnp.broadcast_to(counts.astype(jnp.int32), (batch, num_spans))
    scalars = tables.chunk_scalars
    # A chunk that does not exist has the scalar 0, like one of only padding.
    pad = -scalars.shape[1] % (block_sizes.span_tokens // block_sizes.chunk_tokens)
    scalars = jnp.pad(scalars, ((0, 0), (0, pad))).reshape(batch, num_spans, -1)
    counts = jnp.sum(scalars & boundaries.COUNT_MASK, axis=2)
    # High bits of a scalar count the documents that start in its chunk.
    return jnp.where(jnp.any(scalars > boundaries.COUNT_MASK, axis=2), -1, counts)


def _span_sums_kernel(
    slopes: Ref,  # [heads]
    tables: boundaries.BoundaryTables | None,
    keys: Ref,  # [B, T, N * 3 * H]
    values: Ref,  # [B, T, N * 3 * H], in reverse [B, T, N * H]
    sums: Ref,  # [B, N, S - 1, H, H] float32
    *,
    config: gpu_walk.KernelConfig,
    reverse: bool,
) -> None:
    """Sum k^T v (in reverse q^T do) of one span, one head and one part of the columns.

    Every Ref is a whole array.
    """
    part, batch = pl.program_id(0), pl.program_id(2)
    # The last span walked needs no sum: nothing follows it.
    num_sums = config.num_spans - 1
    head, index = pl.program_id(1) // num_sums, pl.program_id(1) % num_sums
    width, part_columns = sums.shape[3], config.block_sizes.part_columns
    # Index of the head's slice that is read: k and v of the projection, in reverse q and do.
    key, value = (3 * head, head) if reverse else (3 * head + 1, 3 * head + 2)

    def load_operands(rows, is_real):
        k = gpu_walk.load_columns(keys, batch, rows, key * width, width, is_real)
        first_column = value * width + part * part_columns
        v = gpu_walk.load_columns(values, batch, rows, first_column, part_columns, is_real)
        return None, k, v

    state = gpu_walk.walk_span(
        load_operands,
        None,  # nothing reads the state here
        jnp.zeros((width, part_columns), F32),
        slopes[head],
        tables,
        (batch, index + int(reverse)),  # in reverse the first span is the one without a sum
        config,
        reverse=reverse,
        num_halves=1 if reverse else 2,
    )
    columns = pl.ds(part * part_columns, part_columns)
    plgpu.store(sums.at[batch, head, index, :, columns], state)


def compute_span_sums(
    keys: Float[Array, "B T N3H"],
    values: Float[Array, "B T columns"],
    slopes: Float[Array, "N"],
    tables: boundaries.BoundaryTables | None,
    *,
    width: int,
    block_sizes: gpu_tiling.GpuBlockSizes,
    reverse: bool,
    interpret: bool,
) -> Float[Array, "B N sums H H"] | None:
    """Return what each span but the last walked adds to the state, float32.

    None where a row is one span.

    Args:
      keys: the projection. Its k is read forwards and its q in reverse.
      values: the projection, whose v is read forwards, or in reverse the gradient of o.
      slopes: decay rates, one per head.
      tables, interpret: as in `gpu_fwd.lightning_forward`.
      width: columns of a head.
      block_sizes: block sizes of the call.
      reverse: as in `gpu_walk.walk_span`.
    """
    batch, length, _ = keys.shape
    num_heads, num_spans = slopes.shape[0], -(-length // block_sizes.span_tokens)
    if num_spans == 1:
        return None
    precision = gpu_walk.dot_precision(keys.dtype, interpret)
    config = gpu_walk.KernelConfig(block_sizes, num_spans, length, precision)
    (sums,) = gpu_walk.launch_kernel(
        functools.partial(_span_sums_kernel, config=config, reverse=reverse),
        "lightning_gpu_sums_reverse" if reverse else "lightning_gpu_sums",
        (width // block_sizes.part_columns, num_heads * (num_spans - 1), batch),
        [jax.ShapeDtypeStruct((batch, num_heads, num_spans - 1, width, width), F32)],
        [slopes, tables, keys, values],
        block_sizes,
        interpret,
    )
    return sums
