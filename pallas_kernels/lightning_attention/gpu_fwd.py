"""Lightning attention forward in Pallas for GPU, lowered through Triton.

For a chunk of n real tokens that enters with state S (M1 section 2; kernels.md section 1):

    o_i = lambda^i q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j       i, j from 1
    S'  = S - (1 - lambda^n) S + sum_j lambda^(n - j) k_j^T v_j

A column of v meets its own column of S and no other. So one program walks the chunks of one row,
one head and one part of the columns, with its part of S in registers, float32, and reads q, k and
v in place from the fused projection. Rows too few to fill the GPU are cut into spans: a first
launch sums each span's own k^T v, and a span's program folds the sums of the spans before it into
the state it starts from. Nothing but these sums is kept for the backward pass. Triton indexes
arrays of more than 4 GiB by 64 bits, and lays out and pipelines the loads.

Bytes of memory traffic per token and head at H = 128 in bfloat16: 1,024 where the parts of a head
share q and k through the L2 cache (they run side by side), 1,536 where they do not; spans add 512
and, per 1,024 tokens of a span, 128.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lightning_attention import boundaries

F32 = jnp.float32


def dot_precision(dtype, interpret: bool):
    """Return how products are formed: bfloat16 as it is, float32 as three products of TF32.

    Float32 in full has no matrix instruction on a GPU; XLA on CPU, which interprets the kernels,
    has no TF32.
    """
    if dtype != F32:
        return "default"
    return "highest" if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def split_halves(x, dtype, num_halves: int):
    """Return float32 x as itself or, for bfloat16 products, as its first one or two halves."""
    high = x.astype(dtype)
    if dtype == F32 or num_halves == 1:
        return (high,)
    return high, (x - high.astype(F32)).astype(dtype)


def forgotten_fraction(slope, steps):
    """Return the share of a state forgotten after `steps`: all of it where they are negative.

    Subtracted from the state: float32 exp(-slope) itself misstates the slowest slopes.
    """
    lost = -jnp.expm1(-slope * jnp.maximum(steps, 0).astype(F32))
    return jnp.where(steps < 0, 1.0, lost)


def chunk_weights(slope, words, scalar, size: int, reverse: bool):
    """Return (real or None, decay [C, C], ramps [C, 1] of reading and adding, loss) of a chunk."""
    if words is None:
        first = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
        second = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
        column = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        real, gap = None, second - first if reverse else first - second
        steps, total = (column + 1, size - 1 - column), jnp.int32(size)
    else:
        real, gap, *steps = boundaries.expand_word_pairs(
            words[:, None], words[None, :], scalar, reverse=reverse
        )
        total = jnp.where(scalar > boundaries.COUNT_MASK, -1, scalar & boundaries.COUNT_MASK)
    read, add = (boundaries.masked_decay(slope, n) for n in (reversed(steps) if reverse else steps))
    return real, boundaries.masked_decay(slope, gap), read, add, forgotten_fraction(slope, total)


def load_columns(ref, batch, rows, first_column, width: int, token_mask):
    """Read `width` columns of some rows; 0, whatever memory holds, in rows that are not real."""
    at = ref.at[batch, rows, pl.ds(first_column, width)]
    return plgpu.load(at) if token_mask is None else plgpu.load(at, mask=token_mask, other=0.0)


def walk_span(
    load_operands,
    write_output,
    state,
    slope,
    tables,
    row_and_span,
    *,
    block_sizes,
    length,
    reverse,
    precision,
    num_halves,
):
    """Run a program's part of the recurrence over its span; return the state it ends with.

    Args:
      operands: (rows, real) -> q [C, H], k [C, H] and the part of v [C, P]; q is not used, and
        may be None, without `write`.
      write: (rows, inside, part of o [C, P]) -> None, or None for the state alone; `inside` masks
        the rows that exist, and is None where all do.
      state: [H, P] float32, before the first chunk walked.
      slope: of the head.
      tables: refs of the scalars [B, chunks] and words [B, tokens], or (None, None).
      place: row and span.
      blocks: block sizes.
      length: tokens of a row.
      reverse: whether to walk from the span's last token to its first.
      precision: of products.
      halves: bfloat16 parts of what a state is read as and of what is added to it.
    """

    def dot(a, b, contract_a, contract_b):
        dims = (((contract_a,), (contract_b,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)

    (batch, span), (scalars, words), size = row_and_span, tables, block_sizes.chunk_tokens
    first = span * (block_sizes.span_tokens // size)
    num = jnp.minimum(block_sizes.span_tokens // size, -(-length // size) - first)
    fixed = chunk_weights(slope, None, None, size, reverse) if words is None else None

    def step(i, state):
        c = first + (num - 1 - i if reverse else i)
        rows = pl.ds(c * size, size)
        inside = None
        if fixed is None:
            assert words is not None
            chunk = plgpu.load(words.at[batch, rows]), scalars[batch, c]
            real, decay, read, add, lost = chunk_weights(slope, *chunk, size, reverse)
            inside = c * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) < length
        else:
            real, decay, read, add, lost = fixed
        q, k, v = load_operands(rows, real)
        if write_output is not None:
            pairs = (dot(q, k, 1, 1) * decay).astype(v.dtype)
            carried = sum(dot(q, x, 1, 0) for x in split_halves(state, q.dtype, num_halves))
            write_output(rows, inside, dot(pairs, v, 1, 0) + read * carried)
        # Slow heads: one half of v lambda^n would round the decay of a whole chunk away.
        added = (dot(k, x, 0, 0) for x in split_halves(v * add, v.dtype, num_halves))
        return sum(added, start=state - lost * state)

    return jax.lax.fori_loop(0, num, step, state)


def fold_span_sums(state, load_sum, counts, slope, row_and_span, num_spans: int, *, reverse: bool):
    """Bring a row's first state to the span of a program, over the sums of the spans between.

    Args:
      state: [H, P] float32, before the first span walked.
      sums: i -> part of the i-th sum that `compute_span_sums` wrote, [H, P].
      counts: ref of `count_span_tokens`.
      slope: of the head.
      place: row and span.
      spans: of a row.
      reverse: as in `walk_span`.
    """
    batch, span = row_and_span

    def step(i, state):
        other = num_spans - 1 - i if reverse else i
        return (
            state
            - forgotten_fraction(slope, counts[batch, other]) * state
            + load_sum(other - int(reverse))
        )

    return jax.lax.fori_loop(0, num_spans - 1 - span if reverse else span, step, state)


def count_span_tokens(tables, batch: int, length: int, block_sizes):
    """Return the real tokens of each span, int32[B, S]; -1 where a document starts inside."""
    spans = -(-length // block_sizes.span_tokens)
    if tables[0] is None:
        ends = jnp.minimum(jnp.arange(1, spans + 1) * block_sizes.span_tokens, length)
        counts = ends - jnp.arange(spans) * block_sizes.span_tokens
        return jnp.broadcast_to(counts.astype(jnp.int32), (batch, spans))
    scalars = tables[0]
    pad = -scalars.shape[1] % (block_sizes.span_tokens // block_sizes.chunk_tokens)
    scalars = jnp.pad(scalars, ((0, 0), (0, pad))).reshape(batch, spans, -1)
    counts = jnp.sum(scalars & boundaries.COUNT_MASK, axis=2)
    return jnp.where(jnp.any(scalars > boundaries.COUNT_MASK, axis=2), -1, counts)


def whole_array_specs(num_arrays: int):
    """Return specs that hand a kernel `count` arrays where they lie."""
    return [pl.BlockSpec(memory_space=pl.ANY)] * num_arrays


def launch_kernel(kernel, name, grid, out_shape, arguments, block_sizes, interpret):
    """Call a kernel on whole arrays; leave out the boundary tables where they are None."""
    arguments = [x for x in arguments if x is not None]
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=whole_array_specs(len(arguments)),
        out_specs=whole_array_specs(len(out_shape)),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=block_sizes.num_warps, num_stages=block_sizes.num_stages
        ),
        interpret=interpret,
    )(*arguments)


def _span_sums_kernel(slopes, *refs, block_sizes, num_spans, length, packed, precision, reverse):
    *tables, keys, values, sums = refs if packed else (None, None, *refs)
    part, batch = pl.program_id(0), pl.program_id(2)
    head, index = pl.program_id(1) // (num_spans - 1), pl.program_id(1) % (num_spans - 1)
    width = sums.shape[3]
    # Forward k^T v, both of the projection; reverse q^T do.
    key, value = (3 * head, head) if reverse else (3 * head + 1, 3 * head + 2)

    def operands(rows, real):
        k = load_columns(keys, batch, rows, key * width, width, real)
        v = load_columns(
            values,
            batch,
            rows,
            value * width + part * block_sizes.part_columns,
            block_sizes.part_columns,
            real,
        )
        return None, k, v

    state = walk_span(
        operands, None, jnp.zeros((width, block_sizes.part_columns), F32), slopes[head], tables,
        (batch, index + int(reverse)), block_sizes=block_sizes, length=length, reverse=reverse,
        precision=precision, num_halves=1 if reverse else 2,
    )  # fmt: skip
    plgpu.store(
        sums.at[
            batch, head, index, :, pl.ds(part * block_sizes.part_columns, block_sizes.part_columns)
        ],
        state,
    )


def compute_span_sums(keys, values, slopes, tables, *, width, block_sizes, reverse, interpret):
    """Return what each span but the last walked adds to the state, float32[B, N, S - 1, H, H].

    Args:
      keys: the projection, whose k is read forwards and whose q in reverse.
      values: the projection, whose v is read forwards, or in reverse the gradient of o.
      slopes: float32[N].
      tables: as `lightning_forward` takes them.
      width: of a head.
      blocks: block sizes.
      reverse: as in `walk_span`.
      interpret: as `lightning_forward` takes it.
    """
    batch, length, _ = keys.shape
    num_heads, spans = slopes.shape[0], -(-length // block_sizes.span_tokens)
    if spans == 1:
        return None
    out = jax.ShapeDtypeStruct((batch, num_heads, spans - 1, width, width), F32)
    kernel = functools.partial(
        _span_sums_kernel, block_sizes=block_sizes, num_spans=spans, length=length,
        packed=tables[0] is not None, precision=dot_precision(keys.dtype, interpret),
        reverse=reverse,
    )  # fmt: skip
    name = "lightning_gpu_sums_reverse" if reverse else "lightning_gpu_sums"
    grid = (width // block_sizes.part_columns, num_heads * (spans - 1), batch)
    return launch_kernel(
        kernel, name, grid, [out], [slopes, *tables, keys, values], block_sizes, interpret
    )[0]  # fmt: skip


def _forward_kernel(slopes, *refs, block_sizes, num_spans, packed, precision):
    tables, refs = (refs[:2], refs[2:]) if packed else ((None, None), refs)
    qkv, initial, *refs, o, final = refs
    part, batch = pl.program_id(0), pl.program_id(2)
    head, span = pl.program_id(1) // num_spans, pl.program_id(1) % num_spans
    slope, length, width = slopes[head], qkv.shape[1], initial.shape[3]
    columns = pl.ds(part * block_sizes.part_columns, block_sizes.part_columns)

    def operands(rows, real):
        q, k = (
            load_columns(qkv, batch, rows, (3 * head + i) * width, width, real) for i in range(2)
        )
        v = load_columns(
            qkv, batch, rows, (3 * head + 2) * width + part * block_sizes.part_columns,
            block_sizes.part_columns, real
        )  # fmt: skip
        return q, k, v

    def write(rows, inside, out):
        column = pl.ds(head * width + part * block_sizes.part_columns, block_sizes.part_columns)
        plgpu.store(o.at[batch, rows, column], out.astype(o.dtype), mask=inside)

    state = plgpu.load(initial.at[batch, head, :, columns])
    if num_spans > 1:
        counts, sums = refs
        state = fold_span_sums(
            state, lambda i: plgpu.load(sums.at[batch, head, i, :, columns]), counts, slope,
            (batch, span), num_spans, reverse=False,
        )  # fmt: skip
    state = walk_span(
        operands, write, state, slope, tables, (batch, span),
        block_sizes=block_sizes, length=length, reverse=False, precision=precision, num_halves=2,
    )  # fmt: skip

    @pl.when(span == num_spans - 1)
    def _():
        plgpu.store(final.at[batch, head, :, columns], state)


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_forward(qkv, slopes, tables, initial_state, *, block_sizes, interpret=False):
    """Return (o, final state, sums of the spans or None where a row is one span).

    Args:
      qkv: [B, T, N * 3 * H], bfloat16 or float32; T is any length.
      slopes: float32[N].
      tables: scalars [B, chunks] and words [B, tokens] of `boundaries.build_boundary_tables`, or
        (None, None) for full chunks of one document.
      initial_state: float32[B, N, H, H].
      blocks: block sizes.
      interpret: run the kernel's Python on any backend, for tests.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    spans = -(-length // block_sizes.span_tokens)
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
    o, final = launch_kernel(
        functools.partial(
            _forward_kernel,
            block_sizes=block_sizes,
            num_spans=spans,
            packed=tables[0] is not None,
            precision=dot_precision(qkv.dtype, interpret),
        ),
        "lightning_gpu_fwd",
        (width // block_sizes.part_columns, num_heads * spans, batch),
        [
            jax.ShapeDtypeStruct((batch, length, num_heads * width), qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
        ],
        [slopes, *tables, qkv, initial_state, counts, sums],
        block_sizes,
        interpret,
    )
    return o, final, sums
