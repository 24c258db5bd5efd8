"""Lightning attention of serving over tiles of many sequences, in one call (Mosaic TPU).

A tile is t consecutive tokens of one sequence, or fewer, in one chunk of C. The sequence's slot has
the state S as of the chunk's start, and the keys and values of the chunk's tokens so far. For the
token in row i of the chunk, and where the chunk's last token is in the tile:

    o_i = lambda^(i+1) q_i S + sum_{j <= i} lambda^(i-j) (q_i . k_j) v_j
    S  <- S - (1 - lambda^C) S + sum_j lambda^(C-1-j) k_j^T v_j

Source: M1 report, section 2; docs/kernels.md, "Serving".

A tile takes the same products of the same shapes in prefill, in decoding and in verification: q S,
q K^T and P V over all C rows of the chunk. So a token gets the same bits in all of them, whatever
the other tiles of the call are.

The slots of all layers stay in HBM. Neighbouring tiles of one sequence are a run, whose S, keys and
values are loaded once. While a run computes in one of three buffers, the next one loads into the
second, and the last one stores from the third. A tile stores the rows of keys and values around its
own, and S where it ends the chunk: a token of a decoding sequence reads S and writes it every C
tokens.

Letters in shapes: I tiles, G tiles of a grid step, N heads of a block, t rows of a tile, C tokens
of a chunk, H width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import tiling
from pallas_kernels.lightning_serving import tiles as tiles_lib
from pallas_kernels.lightning_serving import tpu_heads

TILES_PER_STEP = 16  # tiles of a grid step: enough bytes to outlast the overhead of a step
MAX_BLOCK_HEADS = 8  # heads of a block, unrolled to hide each other's latency
NUM_BUFFERS = 3  # one run loads, one computes, one stores
VMEM_SLACK_BYTES = 16 * 2**20  # bytes for pipelined blocks and the compiler's own use
# What `supports_sizes` demands, for messages.
SIZES = (
    "float32 or bfloat16 throughout, heads of a multiple of 128, tiles of 8, 16 or 32 rows, chunks "
    "of a multiple of 16 tokens and of the tile, on TPU v5e or later"
)

Ref = tpu_heads.Ref
SlotArrays = tpu_heads.SlotArrays
# Takes an asynchronous copy and starts it, or waits for it. A wait builds the same copy again.
StartOrWait = Callable[[Any], None]


class ServingScratch(NamedTuple):
    """VMEM and semaphores of the kernel."""

    slots: SlotArrays  # [NUM_BUFFERS, N, H, H] and [NUM_BUFFERS, N, C, H], one run a buffer
    loads: Ref  # DMA semaphores of the copies from HBM, one a buffer
    stores: Ref  # DMA semaphore of the copies to HBM


class ServingScalars(NamedTuple):
    """What lies in SMEM.

    Attributes:
      stack_index: [2] where the layer lies in the stack.
      tiles, runs: see `tiles.TileTables`.
      slopes: [heads] s, where lambda = exp(-s).
      losses: [heads] 1 - lambda^C.
    """

    stack_index: Ref
    tiles: Ref
    runs: Ref
    slopes: Ref
    losses: Ref


def supports_sizes(tile: int, chunk: int, head_dim: int, dtype: jax.typing.DTypeLike) -> bool:
    """Return whether the kernel takes these sizes, on the TPU that is compiled for: `SIZES`.

    Args:
      tile: rows of a tile.
      chunk: tokens of a chunk.
      head_dim: width of a head.
      dtype: of qkv, and of the slots' keys and values.
    """
    if tiling.current_generation() is None or jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return False
    is_tile = tile in (8, 16, 32)  # whole sublanes, and a bit of an integer for each row
    return is_tile and head_dim % 128 == 0 and chunk % _stored_rows(tile, dtype) == 0


def attend_tiles(
    qkv: Float[Array, "I t N3H"],
    slopes: Float[Array, "N"],
    slots: Int[Array, "I"],
    positions: Int[Array, "I t"],
    slot_arrays: SlotArrays,
    stack_index: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "I t NH"], SlotArrays]:
    """Append tiles to their sequences' open chunks, and return what attention reads there.

    Args:
      qkv: q | k | v of every head, by tile.
      slots: slot of each tile. The tiles of a slot are neighbours, in the order of their positions.
      positions: position of each row in its sequence, -1 for padding. Those of a tile are
        consecutive from a multiple of t on.
      slot_arrays: donate them to the surrounding jit, or XLA copies them.
      stack_index: repeat and layer.

    Returns:
      (o in qkv's dtype, zero in tiles of padding; the memory with the tiles in it). No byte of
      another slot is read or written.

    Precision: all products and sums are float32, and S is read in full.
    """
    num_tiles, chunk = len(qkv), slot_arrays.keys.shape[4]
    padding = -num_tiles % min(TILES_PER_STEP, num_tiles)
    # Padded with tiles of padding: their positions, of 0 before the shift, are -1.
    slots, positions, qkv = (
        jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1))) for x in (slots, positions + 1, qkv)
    )
    tables = tiles_lib.make_tile_tables(slots, positions - 1, chunk)
    scalars = ServingScalars(
        jnp.stack([jnp.asarray(index, jnp.int32) for index in stack_index]),
        *tables,
        slopes,
        # By expm1: small slopes would lose digits in the difference.
        -jnp.expm1(-slopes * chunk),
    )
    o, slot_arrays = _call_kernel(scalars, qkv, slot_arrays, interpret)
    return o[:num_tiles], slot_arrays


def _call_kernel(
    scalars: ServingScalars,
    qkv: Float[Array, "I t N3H"],
    slot_arrays: SlotArrays,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "I t NH"], SlotArrays]:
    """Run the kernel on whole steps of tiles."""
    num_tiles, tile, _ = qkv.shape
    num_heads, _, head_dim = slot_arrays.keys.shape[3:]
    heads, step_tiles = block_heads(num_heads), min(TILES_PER_STEP, num_tiles)

    def block_index(head_block, step, *_):
        return step, 0, head_block

    in_hbm = [pl.BlockSpec(memory_space=pltpu.HBM)] * len(slot_arrays)
    o, *outputs = pl.pallas_call(
        functools.partial(_serving_kernel, heads=heads),
        name="lightning_serving",
        out_shape=(
            jax.ShapeDtypeStruct((num_tiles, tile, num_heads * head_dim), qkv.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in slot_arrays),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_heads // heads, num_tiles // step_tiles),
            in_specs=[pl.BlockSpec((step_tiles, tile, heads * 3 * head_dim), block_index), *in_hbm],
            out_specs=[pl.BlockSpec((step_tiles, tile, heads * head_dim), block_index), *in_hbm],
            scratch_shapes=[_make_scratch(heads, slot_arrays)],
        ),
        # The arguments after the scalars and qkv are the outputs after o.
        input_output_aliases={len(scalars) + 1 + i: 1 + i for i in range(len(slot_arrays))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=_vmem_bytes(heads, slot_arrays),
            # Slots are the scheduler's, all within the memory, and none is copied for padding.
            disable_bounds_checks=True,
        ),
        cost_estimate=_estimate_cost(num_tiles, tile, slot_arrays),
        interpret=interpret,
    )(*scalars, qkv, *slot_arrays)
    return o, SlotArrays(*outputs)


def block_heads(num_heads: int) -> int:
    """Return the heads of a block, which divide all heads."""
    # A block for each of v5p's two cores. The others have one.
    num_cores = 2 if tiling.current_generation() == "v5p" else 1
    limit = min(MAX_BLOCK_HEADS, max(num_heads // num_cores, 1))
    return next(heads for heads in range(limit, 0, -1) if num_heads % heads == 0)


def _stored_rows(tile: int, dtype: jax.typing.DTypeLike) -> int:
    """Return how many rows of keys a tile stores: whole tiles of the memory's layout."""
    return max(tile, 32 // jnp.dtype(dtype).itemsize)


def _make_scratch(heads: int, slot_arrays: SlotArrays) -> ServingScratch:
    return ServingScratch(
        slots=SlotArrays(
            *(pltpu.VMEM((NUM_BUFFERS, heads, *x.shape[4:]), x.dtype) for x in slot_arrays)
        ),
        loads=pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
        stores=pltpu.SemaphoreType.DMA,
    )


def _vmem_bytes(heads: int, slot_arrays: SlotArrays) -> int:
    """Return the kernel's limit of VMEM: the buffers of runs, and slack."""
    run_bytes = sum(x.shape[4] * x.shape[5] * x.dtype.itemsize for x in slot_arrays) * heads
    return NUM_BUFFERS * run_bytes + VMEM_SLACK_BYTES


def bytes_per_tile(tile: int, chunk: int, head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Return the bytes that a tile of a run of its own moves for a head, as in decoding.

    S is read; keys and values are read whole and stored in part; q, k, v and o are the tile's. What
    every C tokens adds is left out: S is stored.
    """
    rows = 2 * (chunk + _stored_rows(tile, dtype)) + 4 * tile
    return 4 * head_dim**2 + jnp.dtype(dtype).itemsize * rows * head_dim


def _estimate_cost(num_tiles: int, tile: int, slot_arrays: SlotArrays) -> pl.CostEstimate:
    """Return the cost of tiles that are a run each."""
    num_heads, chunk, head_dim = slot_arrays.keys.shape[3:]
    count = num_tiles * num_heads
    return pl.CostEstimate(
        flops=count * 2 * tile * head_dim * (head_dim + 2 * chunk),
        bytes_accessed=count * bytes_per_tile(tile, chunk, head_dim, slot_arrays.keys.dtype),
        transcendentals=count * tile * (chunk + head_dim),
    )


def _serving_kernel(*refs: Any, heads: int) -> None:
    """Attend the tiles of a step for one block of heads, one after another.

    qkv is [G, t, N * 3 * H] and o [G, t, N * H]. The memory of slots is read and written through
    the aliased outputs alone. The inputs are the same memory.
    """
    scalars, (qkv, _, _, _, o, states, keys, values, scratch) = ServingScalars(*refs[:5]), refs[5:]
    in_hbm, in_vmem = SlotArrays(states, keys, values), scratch.slots
    head_block, step = pl.program_id(0), pl.program_id(1)
    step_tiles, tile_rows, _ = qkv.shape
    num_tiles = pl.num_programs(1) * step_tiles
    chunk = keys.shape[4]
    repeat, layer = scalars.stack_index[0], scalars.stack_index[1]
    block = pl.ds(head_block * heads, heads)

    def load(run: jax.Array | int, start_or_wait: StartOrWait) -> None:
        slot, buffer = scalars.runs[0, run], jax.lax.rem(run, NUM_BUFFERS)

        def copy(source, target):
            source, target = source.at[repeat, layer, slot, block], target.at[buffer]
            start_or_wait(pltpu.make_async_copy(source, target, scratch.loads.at[buffer]))

        @pl.when(slot >= 0)
        def _():
            copy(in_hbm.keys, in_vmem.keys)
            copy(in_hbm.values, in_vmem.values)

            # A fresh sequence loads no state: its slot still holds that of its previous owner.
            @pl.when(scalars.runs[1, run] == 0)
            def _():
                copy(in_hbm.states, in_vmem.states)

    def store(tile: jax.Array, start_or_wait: StartOrWait) -> None:
        run = scalars.tiles[0, tile]
        slot, buffer = scalars.runs[0, jnp.maximum(run, 0)], jax.lax.rem(run, NUM_BUFFERS)
        rows = _stored_rows(tile_rows, keys.dtype)
        # Not `//`, whose signs Mosaic can only lower where there is a TPU to ask about.
        first_row = pl.multiple_of(jax.lax.div(scalars.tiles[1, tile], rows) * rows, rows)

        @pl.when(run >= 0)
        def _():
            for source, target in zip(in_vmem[1:], in_hbm[1:], strict=True):
                source = source.at[buffer, :, pl.ds(first_row, rows)]
                target = target.at[repeat, layer, slot, block, pl.ds(first_row, rows)]
                start_or_wait(pltpu.make_async_copy(source, target, scratch.stores))

            @pl.when(scalars.tiles[2, tile] == chunk - 1)
            def _():
                target = in_hbm.states.at[repeat, layer, slot, block]
                source = in_vmem.states.at[buffer]
                start_or_wait(pltpu.make_async_copy(source, target, scratch.stores))

    @pl.when(step == 0)
    def _():
        load(0, _start_copy)

    def attend(index, carry):
        tile = step * step_tiles + index
        run, first_row, last_row, token_bits, opens_run = (scalars.tiles[i, tile] for i in range(5))
        buffer = jax.lax.rem(jnp.maximum(run, 0), NUM_BUFFERS)
        views = SlotArrays(*(x.at[buffer] for x in in_vmem))

        @pl.when(opens_run != 0)
        def _():
            # Its buffer is that of two runs ago, whose stores the tile before this one awaited.
            load(run + 1, _start_copy)
            load(run, _wait_for_copy)

            @pl.when(scalars.runs[1, run] != 0)
            def _():
                views.states[...] = jnp.zeros_like(views.states)

        @pl.when(run >= 0)
        def _():
            slopes = [scalars.slopes[head_block * heads + head] for head in range(heads)]
            tpu_heads.attend_heads(
                qkv.at[index], o.at[index], views, slopes, first_row, last_row, token_bits
            )

        @pl.when(run < 0)
        def _():
            o[index] = jnp.zeros_like(o[index])

        @pl.when(last_row == chunk - 1)
        def _():
            # A loop, not unrolled: it is rare, and several heads' matrices would spill registers.
            def close_head(head, carry):
                row = head_block * heads + head
                tpu_heads.close_chunk(views, head, scalars.slopes[row], scalars.losses[row])
                return carry

            jax.lax.fori_loop(0, heads, close_head, 0)

        @pl.when(tile > 0)
        def _():
            store(tile - 1, _wait_for_copy)

        store(tile, _start_copy)

        # The kernel must not end before its last stores do.
        @pl.when(tile == num_tiles - 1)
        def _():
            store(tile, _wait_for_copy)

        return carry

    jax.lax.fori_loop(0, step_tiles, attend, 0)


def _start_copy(copy: Any) -> None:
    copy.start()


def _wait_for_copy(copy: Any) -> None:
    copy.wait()
