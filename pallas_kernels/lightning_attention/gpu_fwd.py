"""Lightning attention forward in Pallas for GPU, lowered through Triton.

For a chunk of n real tokens that enters with state S (M1 report, section 2; docs/kernels.md,
"Forward"):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

A column of v meets its own column of S and no other. So one program walks the chunks of one row,
one head and one part of the columns, with its part of S in registers, float32, and reads q, k and
v in place from the fused projection. Rows too few to fill the GPU are cut into spans: a first
launch sums each span's own k^T v, and a span's program folds the sums of the spans before it into
the state it starts from. Nothing but these sums is kept for the backward pass. Triton indexes
arrays of more than 4 GiB by 64 bits, and lays out and pipelines the loads.

Bytes of memory traffic per token and head at H = 128 in bfloat16: 1,024 where the parts of a head
share q and k through the L2 cache (they run side by side), 1,536 where they do not. Spans add 512
and, per 1,024 tokens of a span, 128.

Letters in shapes: C tokens of a chunk, H width of a head, P columns of a part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries, gpu_tiling

F32 = jnp.float32
# A Ref of a kernel. `jax.Ref` has no usable `at` for a type checker, and these kernels read and
# write by nothing else.
Ref = Any
# (rows of the array, is_real [C, 1] or None) -> q [C, H], k [C, H] and the part of v [C, P].
LoadOperands = Callable[[Any, Array | None], tuple[Any, Array, Array]]
# (rows of the array, mask [C, 1] of rows that exist or None where all do, part of o [C, P])
WriteOutput = Callable[[Any, Array | None, Array], None]


class KernelConfig(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      block_sizes: block sizes.
      num_spans: spans of a row.
      length: tokens of a row.
      precision: of products, see `dot_precision`.
    """

    block_sizes: gpu_tiling.GpuBlockSizes
    num_spans: int
    length: int
    precision: Any


class ChunkDecays(NamedTuple):
    """Decays of a chunk of one head, float32.

    Attributes:
      is_real: [C, 1], False for padding. None where all tokens are real.
      pair: [C, C] of the token of a row and the token of a column.
      read: [C, 1] of what a token reads from the carried state.
      add: [C, 1] of what a token adds to the carried state.
      forgotten_fraction: share of the state that the chunk forgets.
    """

    is_real: Array | None
    pair: Float[Array, "C C"]
    read: Float[Array, "C 1"]
    add: Float[Array, "C 1"]
    forgotten_fraction: Float[Array, ""]


def dot_precision(dtype: Any, interpret: bool) -> Any:
    """Return how products are formed: bfloat16 as it is, float32 as three products of TF32.

    Float32 in full has no matrix instruction on a GPU. XLA on CPU, which interprets the kernels,
    has no TF32.
    """
    if dtype != F32:
        return "default"
    return "highest" if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def split_halves(x: Float[Array, "..."], dtype: Any, num_halves: int) -> tuple[Array, ...]:
    """Return float32 x as itself or, for bfloat16 products, as its first one or two halves."""
    high = x.astype(dtype)
    if dtype == F32 or num_halves == 1:
        return (high,)
    return high, (x - high.astype(F32)).astype(dtype)


def forgotten_fraction(slope: Array, steps: Array) -> Array:
    """Return the share of a state forgotten after `steps`: all of it where they are negative.

    Subtracted from the state: float32 exp(-slope) itself misstates the slowest slopes.
    """
    fraction = -jnp.expm1(-slope * jnp.maximum(steps, 0).astype(F32))
    return jnp.where(steps < 0, 1.0, fraction)


def full_chunk_decays(slope: Array, size: int, reverse: bool) -> ChunkDecays:
    """Return the decays of a chunk without boundary or padding.

    Args:
      slope: of the head.
      size: tokens of a chunk.
      reverse: whether tokens meet later ones, as in a gradient, instead of earlier ones.
    """
    first = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    second = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    column = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    pair_steps = second - first if reverse else first - second
    steps = pair_steps, column + 1, size - 1 - column
    return _decays(slope, None, steps, jnp.int32(size), reverse)


def packed_chunk_decays(
    slope: Array, words: Int[Array, "C"], scalar: Array, reverse: bool
) -> ChunkDecays:
    """Return the decays of a chunk with documents or padding, from its words and its scalar."""
    is_real, *steps = boundaries.expand_word_pairs(
        words[:, None], words[None, :], scalar, reverse=reverse
    )
    total = jnp.where(scalar > boundaries.COUNT_MASK, -1, scalar & boundaries.COUNT_MASK)
    return _decays(slope, is_real, steps, total, reverse)


def _decays(slope, is_real, steps, total, reverse) -> ChunkDecays:
    pair_steps, *ends = steps
    # A gradient walks from the last token: what a token reads of dS has passed the tokens after it,
    # and what it adds will pass the tokens before it.
    read, add = (boundaries.masked_decay(slope, n) for n in (reversed(ends) if reverse else ends))
    pair = boundaries.masked_decay(slope, pair_steps)
    return ChunkDecays(is_real, pair, read, add, forgotten_fraction(slope, total))


def load_columns(
    ref: Ref, batch: Array, rows: Any, first_column: Any, width: int, is_real: Array | None
) -> Array:
    """Read `width` columns of some rows; 0, whatever memory holds, in rows that are not real."""
    view = ref.at[batch, rows, pl.ds(first_column, width)]
    return plgpu.load(view) if is_real is None else plgpu.load(view, mask=is_real, other=0.0)


def walk_span(
    load_operands: LoadOperands,
    write_output: WriteOutput | None,
    state: Float[Array, "H P"],
    slope: Array,
    tables: boundaries.BoundaryTables | None,
    row_and_span: tuple[Array, Array],
    config: KernelConfig,
    *,
    reverse: bool,
    num_halves: int,
) -> Float[Array, "H P"]:
    """Run a program's part of the recurrence over its span; return the state it ends with.

    Args:
      load_operands: see `LoadOperands`. q may be None without `write_output`.
      write_output: see `WriteOutput`. None: only the state is wanted.
      state: float32, before the first chunk walked.
      slope: of the head.
      tables: Refs of the tables, None where all chunks are full.
      row_and_span: which span of which row.
      config: what the kernel is compiled for.
      reverse: whether to walk from the span's last token to its first.
      num_halves: bfloat16 parts of what a state is read as and of what is added to it.
    """
    (batch, span), size = row_and_span, config.block_sizes.chunk_tokens
    chunks_per_span = config.block_sizes.span_tokens // size
    first = span * chunks_per_span
    # The last span of a row may be shorter.
    num_chunks = jnp.minimum(chunks_per_span, -(-config.length // size) - first)
    full_decays = full_chunk_decays(slope, size, reverse) if tables is None else None

    def dot_f32(a, b, contract_a, contract_b):
        dims = (((contract_a,), (contract_b,)), ((), ()))
        return jax.lax.dot_general(
            a, b, dims, precision=config.precision, preferred_element_type=F32
        )

    def chunk_decays(c, rows):
        """Return the decays of chunk c and the mask of its rows that lie inside the array."""
        if full_decays is not None:
            return full_decays, None
        assert tables is not None
        words = plgpu.load(tables.token_words.at[batch, rows])
        decays = packed_chunk_decays(slope, words, tables.chunk_scalars[batch, c], reverse)
        row = c * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        return decays, row < config.length

    def walk_chunk(i, state):
        c = first + (num_chunks - 1 - i if reverse else i)
        rows = pl.ds(c * size, size)
        decays, inside = chunk_decays(c, rows)
        q, k, v = load_operands(rows, decays.is_real)
        if write_output is not None:
            pairs = (dot_f32(q, k, 1, 1) * decays.pair).astype(v.dtype)
            carried = sum(dot_f32(q, x, 1, 0) for x in split_halves(state, q.dtype, num_halves))
            write_output(rows, inside, dot_f32(pairs, v, 1, 0) + decays.read * carried)
        # Slow heads: one half of v lambda^n would round the decay of a whole chunk away.
        added = (dot_f32(k, x, 0, 0) for x in split_halves(v * decays.add, v.dtype, num_halves))
        return sum(added, start=state - decays.forgotten_fraction * state)

    return jax.lax.fori_loop(0, num_chunks, walk_chunk, state)


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
      counts: Ref of `count_span_tokens`.
      slope: of the head.
      row_and_span: which span of which row.
      num_spans: spans of a row.
      reverse: as in `walk_span`.
    """
    batch, span = row_and_span

    def pass_span(i, state):
        passed = num_spans - 1 - i if reverse else i
        fraction = forgotten_fraction(slope, counts[batch, passed])
        # In reverse the first span has no sum, so the sums are numbered from the second.
        return state - fraction * state + load_sum(passed - int(reverse))

    return jax.lax.fori_loop(0, num_spans - 1 - span if reverse else span, pass_span, state)


def count_span_tokens(
    tables: boundaries.BoundaryTables | None,
    batch: int,
    length: int,
    block_sizes: gpu_tiling.GpuBlockSizes,
) -> Int[Array, "B S"]:
    """Return the real tokens of each span; -1 where a document starts inside."""
    num_spans = -(-length // block_sizes.span_tokens)
    if tables is None:
        ends = jnp.minimum(jnp.arange(1, num_spans + 1) * block_sizes.span_tokens, length)
        counts = ends - jnp.arange(num_spans) * block_sizes.span_tokens
        return jnp.broadcast_to(counts.astype(jnp.int32), (batch, num_spans))
    scalars = tables.chunk_scalars
    pad = -scalars.shape[1] % (block_sizes.span_tokens // block_sizes.chunk_tokens)
    scalars = jnp.pad(scalars, ((0, 0), (0, pad))).reshape(batch, num_spans, -1)
    counts = jnp.sum(scalars & boundaries.COUNT_MASK, axis=2)
    return jnp.where(jnp.any(scalars > boundaries.COUNT_MASK, axis=2), -1, counts)


def launch_kernel(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    arguments: Sequence[Any],
    block_sizes: gpu_tiling.GpuBlockSizes,
    interpret: bool,
) -> tuple[Array, ...]:
    """Call a kernel on whole arrays where they lie; it gets None for an argument that is None."""
    whole_array = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=list(jax.tree.map(lambda _: whole_array, tuple(arguments))),
        out_specs=[whole_array] * len(out_shape),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=block_sizes.num_warps, num_stages=block_sizes.num_stages
        ),
        interpret=interpret,
    )(*arguments)


def _span_sums_kernel(
    slopes: Ref,
    tables: boundaries.BoundaryTables | None,
    keys: Ref,
    values: Ref,
    sums: Ref,
    *,
    config: KernelConfig,
    reverse: bool,
) -> None:
    """Sum k^T v (in reverse q^T do) of one span, one head and one part of the columns."""
    part, batch = pl.program_id(0), pl.program_id(2)
    # The last span walked needs no sum: nothing follows it.
    num_sums = config.num_spans - 1
    head, index = pl.program_id(1) // num_sums, pl.program_id(1) % num_sums
    width, part_columns = sums.shape[3], config.block_sizes.part_columns
    # Forward k^T v, both of the projection; reverse q^T do.
    key, value = (3 * head, head) if reverse else (3 * head + 1, 3 * head + 2)

    def load_operands(rows, is_real):
        k = load_columns(keys, batch, rows, key * width, width, is_real)
        first_column = value * width + part * part_columns
        v = load_columns(values, batch, rows, first_column, part_columns, is_real)
        return None, k, v

    state = walk_span(
        load_operands,
        None,
        jnp.zeros((width, part_columns), F32),
        slopes[head],
        tables,
        (batch, index + int(reverse)),
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
    """Return what each span but the last walked adds to the state, float32; None of one span.

    Args:
      keys: the projection, whose k is read forwards and whose q in reverse.
      values: the projection, whose v is read forwards, or in reverse the gradient of o.
      slopes: decay rates, one per head.
      tables: as `lightning_forward` takes them.
      width: of a head.
      block_sizes: block sizes.
      reverse: as in `walk_span`.
      interpret: as `lightning_forward` takes it.
    """
    batch, length, _ = keys.shape
    num_heads, num_spans = slopes.shape[0], -(-length // block_sizes.span_tokens)
    if num_spans == 1:
        return None
    config = KernelConfig(block_sizes, num_spans, length, dot_precision(keys.dtype, interpret))
    (sums,) = launch_kernel(
        functools.partial(_span_sums_kernel, config=config, reverse=reverse),
        "lightning_gpu_sums_reverse" if reverse else "lightning_gpu_sums",
        (width // block_sizes.part_columns, num_heads * (num_spans - 1), batch),
        [jax.ShapeDtypeStruct((batch, num_heads, num_spans - 1, width, width), F32)],
        [slopes, tables, keys, values],
        block_sizes,
        interpret,
    )
    return sums


def _forward_kernel(
    slopes: Ref,
    tables: boundaries.BoundaryTables | None,
    qkv: Ref,
    initial_state: Ref,
    counts: Ref,
    sums: Ref,
    o: Ref,
    final_state: Ref,
    *,
    config: KernelConfig,
) -> None:
    """Attend one span of one head and write one part of its columns.

    Every Ref is a whole array. counts and sums are None where a row is one span.
    """
    num_spans, part_columns = config.num_spans, config.block_sizes.part_columns
    part, batch = pl.program_id(0), pl.program_id(2)
    head, span = pl.program_id(1) // num_spans, pl.program_id(1) % num_spans
    slope, width = slopes[head], initial_state.shape[3]
    columns = pl.ds(part * part_columns, part_columns)

    def load_operands(rows, is_real):
        q, k = (
            load_columns(qkv, batch, rows, (3 * head + i) * width, width, is_real) for i in range(2)
        )
        first_column = (3 * head + 2) * width + part * part_columns
        v = load_columns(qkv, batch, rows, first_column, part_columns, is_real)
        return q, k, v

    def write_output(rows, inside, out):
        column = pl.ds(head * width + part * part_columns, part_columns)
        plgpu.store(o.at[batch, rows, column], out.astype(o.dtype), mask=inside)

    state = plgpu.load(initial_state.at[batch, head, :, columns])
    if num_spans > 1:
        state = fold_span_sums(
            state,
            lambda i: plgpu.load(sums.at[batch, head, i, :, columns]),
            counts,
            slope,
            (batch, span),
            num_spans,
            reverse=False,
        )
    state = walk_span(
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
      qkv: fused projection, bfloat16 or float32; T is any length.
      slopes: decay rates, one per head.
      tables: [B, chunks] and [B, tokens], see `boundaries.BoundaryTables`. None: full chunks of one
        document.
      initial_state: float32 state that the row's first document continues.
      block_sizes: block sizes.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    num_spans = -(-length // block_sizes.span_tokens)
    sums = compute_span_sums(
        qkv,
        qkv,
        slopes,
        tables,
        width=width,
        block_sizes=block_sizes,
        reverse=False,
        interpret=interpret,
    )
    counts = None if sums is None else count_span_tokens(tables, batch, length, block_sizes)
    config = KernelConfig(block_sizes, num_spans, length, dot_precision(qkv.dtype, interpret))
    o, final_state = launch_kernel(
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
