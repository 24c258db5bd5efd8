"""Lightning attention backward in Pallas for GPU: three more walks of the same recurrence.

Write L(q, k, v; S) for the o of `gpu_fwd`, and L' for the same from the last token to the first.
With do the gradient of o and dS that of the final state,

    dq = L(do, v, k; S^T)      dk = L'(v, do, q; dS^T)      dv = L'(k, q, do; dS)

where L' weighs a token's own pair by 1, as L does, but decays the carried dS by lambda^(n - j)
and what it adds to dS by lambda^i. Each is split by columns as the forward pass is, so all three
run side by side in one launch and nothing is kept or computed again: no saved states, no state at
every chunk. Slopes are constants of the model and get no gradient.

Bytes of memory traffic per token and head at H = 128 in bfloat16: 2,560 where dk and dv, which
walk side by side, share q and do through the L2 cache, 3,072 where only the parts of a head
share, 4,608 where nothing does; spans add 512 for sums of their own and 128 per 1,024 tokens of a
span. The minimum of a single pass is 1,856; it needs the states of all chunks beside dS, which
registers do not hold, and has a sixth of the programs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.lightning_attention import gpu_fwd

F32 = jnp.float32


def _backward_kernel(slopes, *refs, block_sizes, num_spans, packed, precision):
    tables, refs = (refs[:2], refs[2:]) if packed else ((None, None), refs)
    qkv, d_o, initial, d_final, *refs = refs
    counts, sums, d_sums, d_qkv, d_initial = refs if num_spans > 1 else (None, None, None, *refs)
    parts, batch = initial.shape[3] // block_sizes.part_columns, pl.program_id(2)
    role, part = pl.program_id(0) // parts, pl.program_id(0) % parts
    head, span = pl.program_id(1) // num_spans, pl.program_id(1) % num_spans
    slope, length, width = slopes[head], qkv.shape[1], initial.shape[3]
    start = part * block_sizes.part_columns
    columns = pl.ds(start, block_sizes.part_columns)

    def source(name):
        """Return the array that holds q, k, v or do, and the head's first column there."""
        if name == "o":
            return d_o, head * width
        return qkv, (3 * head + "qkv".index(name)) * width

    def state_part(ref, *at, transpose):
        if transpose:
            return plgpu.load(ref.at[batch, head, *at, columns, :]).T
        return plgpu.load(ref.at[batch, head, *at, :, columns])

    def run(query, key, value, *, reverse, transpose):
        """Walk L or L' and write the gradient of `value`'s place; return the last state."""
        target = "k" if value == "q" else "q" if value == "k" else "v"

        def operands(rows, real):
            (q, q_at), (k, k_at), (v, v_at) = source(query), source(key), source(value)
            return (
                gpu_fwd.load_columns(q, batch, rows, q_at, width, real),
                gpu_fwd.load_columns(k, batch, rows, k_at, width, real),
                gpu_fwd.load_columns(v, batch, rows, v_at + start, block_sizes.part_columns, real),
            )

        def write(rows, inside, out):
            column = pl.ds(source(target)[1] + start, block_sizes.part_columns)
            plgpu.store(d_qkv.at[batch, rows, column], out.astype(d_qkv.dtype), mask=inside)

        state = state_part(d_final if reverse else initial, transpose=transpose)
        if num_spans > 1:
            between = d_sums if reverse else sums
            state = gpu_fwd.fold_span_sums(
                state, lambda i: state_part(between, i, transpose=transpose), counts, slope,
                (batch, span), num_spans, reverse=reverse,
            )  # fmt: skip
        return gpu_fwd.walk_span(
            operands, write, state, slope, tables, (batch, span),
            block_sizes=block_sizes, length=length, reverse=reverse, precision=precision,
            num_halves=1,
        )  # fmt: skip

    @pl.when(role == 0)
    def _():
        run("o", "v", "k", reverse=False, transpose=True)

    @pl.when(role == 1)
    def _():
        run("v", "o", "q", reverse=True, transpose=True)

    @pl.when(role == 2)
    def _():
        state = run("k", "q", "o", reverse=True, transpose=False)

        @pl.when(span == 0)
        def _():
            plgpu.store(d_initial.at[batch, head, :, columns], state)


@functools.partial(jax.jit, static_argnames=("block_sizes", "interpret"))
def lightning_backward(
    qkv, slopes, tables, initial_state, sums, d_o, d_final, *, block_sizes, interpret=False
):
    """Return (d_qkv in qkv's dtype, d_initial_state float32). Arguments as in
    `gpu_fwd.lightning_forward`.

    Args:
      sums: of the spans, from `forward` with the same `blocks`.
      d_o: gradient of o, in its dtype.
      d_final: gradient of the final state, float32.
    """
    batch, length, _ = qkv.shape
    num_heads, width = initial_state.shape[1:3]
    spans = -(-length // block_sizes.span_tokens)
    d_sums = gpu_fwd.compute_span_sums(
        qkv,
        d_o,
        slopes,
        tables,
        width=width,
        block_sizes=block_sizes,
        reverse=True,
        interpret=interpret,
    )
    counts = None if sums is None else gpu_fwd.count_span_tokens(tables, batch, length, block_sizes)
    d_qkv, d_initial = gpu_fwd.launch_kernel(
        functools.partial(
            _backward_kernel,
            block_sizes=block_sizes,
            num_spans=spans,
            packed=tables[0] is not None,
            precision=gpu_fwd.dot_precision(qkv.dtype, interpret),
        ),
        "lightning_gpu_bwd",
        (3 * (width // block_sizes.part_columns), num_heads * spans, batch),
        [
            jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),
            jax.ShapeDtypeStruct(initial_state.shape, F32),
        ],
        [slopes, *tables, qkv, d_o, initial_state, d_final, counts, sums, d_sums],
        block_sizes,
        interpret,
    )
    return d_qkv, d_initial
