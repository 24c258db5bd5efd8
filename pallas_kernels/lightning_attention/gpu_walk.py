"""The walk of the recurrence over one span of tokens, which every GPU kernel runs.

A program holds one part of the state's columns in registers, float32, and walks the chunks of its
span. The kernels differ in what they load as q, k and v, and in what they write.

Letters in shapes: C tokens of a chunk, H width of a head, P columns of a part.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.lightning_attention import boundaries, gpu_decays, gpu_tiling

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
      block_sizes: block sizes of the call.
      num_spans: spans of a row.
      length: tokens of a row.
      precision: of products, see `dot_precision`.
    """

    block_sizes: gpu_tiling.GpuBlockSizes
    num_spans: int
    length: int
    precision: Any


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


def load_columns(
    ref: Ref, batch: Array, rows: Any, first_column: Any, width: int, is_real: Array | None
) -> Array:
    """Read `width` columns of some rows. Rows that are not real are 0, whatever memory holds."""
    view = ref.at[batch, rows, pl.ds(first_column, width)]
    return plgpu.load(view) if is_real is None else plgpu.load(view, mask=is_real, other=0.0)


def _dot_f32(precision: Any, a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """Contract one axis of each operand with float32 sums."""
    dims = (((contract_a,), (contract_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=F32)


def _load_packed_decays(
    tables: boundaries.BoundaryTables,
    slope: Array,
    batch: Array,
    c: Array,
    rows: Any,
    config: KernelConfig,
    reverse: bool,
) -> tuple[gpu_decays.ChunkDecays, Array]:
    """Return the decays of chunk c and the mask [C, 1] of its rows that lie inside the array."""
    size = config.block_sizes.chunk_tokens
    words = plgpu.load(tables.token_words.at[batch, rows])
    scalar = tables.chunk_scalars[batch, c]
    decays = gpu_decays.packed_chunk_decays(slope, words, scalar, reverse)
    # Words are padded to whole chunks. The arrays are not: the last chunk of a row may be ragged.
    row = c * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return decays, row < config.length


def _attend_chunk(
    dot_f32: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    state: Float[Array, "H P"],
    decays: gpu_decays.ChunkDecays,
    num_halves: int,
) -> Float[Array, "C P"]:
    """Return what the tokens of a chunk read, from each other and from the carried state."""
    scores, finite_v, apply_decay = dot_f32(q, k, 1, 1), v, jnp.multiply
    # A chunk without boundaries is of one document, which NaN need not be kept out of.
    if decays.is_real is not None:
        apply_decay = boundaries.apply_decay
        finite_v, is_bad = boundaries.split_finite(v)
        scores = jnp.where(is_bad.reshape(1, -1), jnp.nan, scores)
    pairs = apply_decay(scores, decays.pair).astype(v.dtype)
    halves = split_halves(state, q.dtype, num_halves)
    carried = sum((dot_f32(q, x, 1, 0) for x in halves[1:]), dot_f32(q, halves[0], 1, 0))
    return dot_f32(pairs, finite_v, 1, 0) + apply_decay(carried, decays.read)


def _advance_state(
    dot_f32: Callable[..., Array],
    k: Array,
    v: Array,
    state: Float[Array, "H P"],
    decays: gpu_decays.ChunkDecays,
    num_halves: int,
) -> Float[Array, "H P"]:
    """Return the state after a chunk."""
    kept = state - decays.forgotten_fraction * state
    added_v = v * decays.add
    if decays.is_real is not None:
        added_v = boundaries.apply_decay(v.astype(F32), decays.add)
        k = jnp.where(decays.add > 0, k, jnp.zeros_like(k))
        # A select: S - S of a document with NaN would be NaN in the next one.
        kept = jnp.where(decays.forgotten_fraction < 1, kept, 0.0)
    # Slow heads: one half of v lambda^n would round the decay of a whole chunk away.
    added = (dot_f32(k, x, 0, 0) for x in split_halves(added_v, v.dtype, num_halves))
    return sum(added, start=kept)


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
    """Run a program's part of the recurrence over its span and return the state it ends with.

    Args:
      load_operands: see `LoadOperands`. q may be None without `write_output`.
      write_output: see `WriteOutput`. None: only the state is wanted.
      state: float32, before the first chunk walked.
      slope: decay rate of the head.
      tables: Refs of the tables, None where all chunks are full.
      row_and_span: indices of the row and of its span.
      config: what the kernel is compiled for.
      reverse: whether to walk from the span's last token to its first.
      num_halves: bfloat16 parts of what a state is read as and of what is added to it.
    """
    (batch, span), size = row_and_span, config.block_sizes.chunk_tokens
    chunks_per_span = config.block_sizes.span_tokens // size
    first = span * chunks_per_span
    # The last span of a row may be shorter.
    num_chunks = jnp.minimum(chunks_per_span, -(-config.length // size) - first)
    # Full chunks share their decays, which are computed once, before the loop.
    full_decays = gpu_decays.full_chunk_decays(slope, size, reverse) if tables is None else None
    dot_f32 = functools.partial(_dot_f32, config.precision)

    def walk_chunk(i, state):
        c = first + (num_chunks - 1 - i if reverse else i)
        rows = pl.ds(c * size, size)
        if full_decays is not None:
            decays, is_inside = full_decays, None
        else:
            assert tables is not None
            decays, is_inside = _load_packed_decays(tables, slope, batch, c, rows, config, reverse)
        q, k, v = load_operands(rows, decays.is_real)
        if write_output is not None:
            write_output(
                rows, is_inside, _attend_chunk(dot_f32, q, k, v, state, decays, num_halves)
            )
        return _advance_state(dot_f32, k, v, state, decays, num_halves)

    return jax.lax.fori_loop(0, num_chunks, walk_chunk, state)


def launch_kernel(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, int, int],
    out_shape: Sequence[jax.ShapeDtypeStruct],
    arguments: Sequence[Any],
    block_sizes: gpu_tiling.GpuBlockSizes,
    interpret: bool,
) -> tuple[Array, ...]:
    """Call a kernel on whole arrays where they lie. For an argument of None it gets None."""
    # No blocks: a program reads its rows and columns in place, so that nothing copies qkv.
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
