"""One token of lightning attention per sequence, its state updated in place in a pool (Mosaic TPU).

Per sequence and head, with c = 1 - lambda = -expm1(-s):

    S <- S - c S + k^T v          o = q S

The update subtracts c S, because float32 lambda misstates the slowest slope by 2.5e-4 of itself.
Source: M1 report, section 2; docs/kernels.md, "Decode".

A grid step owns `rows_per_step` sequences and a block of heads. Their states are the bulk of all
bytes. Explicit copies move them between the pool in HBM and three VMEM buffers: while step i
computes in its own buffer, step i + 1 loads into the second and step i - 1 stores from the third.
All other operands are small and left to Pallas' own pipeline.

All sums are float32 on the vector unit, because a matrix unit would have to split S into three
bfloat16 parts. The matrix unit spreads k and q over the lanes of a state, which is exact. The
permute unit would take 1.3 (v5e) to 1.8 (v6e, tpu7x) times the bundles for it. A NaN in one head of
a row therefore reaches the row's other heads, and no other row.

Letters in shapes: N heads of a block, H width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, BFloat16, Float, Int

ROWS_PER_STEP = 8  # sequences a step: one sublane tile, the smallest block of a batch
# Heads a step: one sublane tile. With 8 sequences of heads of 128 that is 4 MiB in flight.
HEADS_PER_STEP = 8
NUM_BUFFERS = 3  # one loading, one computing, one storing
VMEM_SLACK_BYTES = 8 * 2**20  # bytes for pipelined blocks, relayouts and the compiler's own use

# A Ref of a kernel, or a view of one. `jax.Ref` has no usable `at` for a type checker.
Ref = Any
# An asynchronous copy between HBM and VMEM, of `pltpu.make_async_copy`.
AsyncCopy = Any
# `start_copy` or `wait_for_copy`. A wait builds the same copy again, so one builder serves both.
StartOrWait = Callable[[AsyncCopy], None]
# (step, start_or_wait) -> builds the copies of that step and calls start_or_wait on each.
StepCopies = Callable[[jax.Array, StartOrWait], None]


class DecodeScratch(NamedTuple):
    """VMEM and semaphores of the kernel."""

    qkv: Ref  # [rows, 3, N, H] float32, this step's q, k, v with heads along sublanes
    out: Ref  # [rows, N, H] float32, this step's o
    states: Ref  # [NUM_BUFFERS, rows, N, H, H] float32
    loads: Ref  # DMA semaphores of the copies from the pool, one a buffer
    stores: Ref  # DMA semaphores of the copies to the pool, one a buffer


def heads_per_block(num_heads: int, head_dim: int, max_heads: int = HEADS_PER_STEP) -> int:
    """Return the most heads up to `max_heads` that divide all heads and whose values fill lanes."""
    for heads in range(min(max_heads, num_heads), 0, -1):
        if num_heads % heads == 0 and heads * head_dim % 128 == 0:
            return heads
    return num_heads  # such a block is the whole row, which may have any width


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "B"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B NH"], Float[Array, "slots N H H"]]:
    """Advance the named slots by one token. See `api.lightning_decode`.

    The returned pool is the donated one. No byte of an unnamed slot is read or written.
    """
    batch = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.shape
    grid = DecodeGrid(batch, num_heads, head_dim)
    rows, heads = grid.rows_per_step, grid.block_heads
    slots = jnp.pad(slots, (0, grid.padding_rows), constant_values=-1)

    def block_index(chain, step, *_):
        return grid.locate_step(chain, step)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    # A row of a state takes whole tiles of 128 lanes.
    buffer_bytes = 4 * NUM_BUFFERS * rows * heads * head_dim * max(head_dim, 128)
    semaphores = pltpu.SemaphoreType.DMA((NUM_BUFFERS,))
    o, pool = pl.pallas_call(
        functools.partial(_decode_kernel, grid=grid),
        name="lightning_decode",
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads * head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid.shape,
            in_specs=[pl.BlockSpec((rows, heads * 3 * head_dim), block_index), in_hbm],
            out_specs=[pl.BlockSpec((rows, heads * head_dim), block_index), in_hbm],
            # A NamedTuple in the list: the kernel gets it as one argument, with Refs for fields.
            scratch_shapes=[
                DecodeScratch(
                    qkv=pltpu.VMEM((rows, 3, heads, head_dim), jnp.float32),
                    out=pltpu.VMEM((rows, heads, head_dim), jnp.float32),
                    states=pltpu.VMEM((NUM_BUFFERS, rows, heads, head_dim, head_dim), jnp.float32),
                    loads=semaphores,
                    stores=semaphores,
                )
            ],
        ),
        # Argument 3, the pool, is output 1. Both prefetched vectors count as arguments.
        input_output_aliases={3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=buffer_bytes + VMEM_SLACK_BYTES,
        ),
        interpret=interpret,
    )(slots, -jnp.expm1(-slopes), qkv, pool)
    return o, pool


class DecodeGrid:
    """Cut of a decoding batch into grid steps: chains of (tile of rows, block of heads).

    Attributes:
      block_heads: heads of a block.
      num_blocks: blocks of heads.
      rows_per_step: sequences of a tile.
      num_row_tiles: tiles of sequences; the last one may be padded.
      num_chains: 2, or 1 where the number of blocks is odd. The two TensorCores of a v5p take a
        chain each. Elsewhere chains run one after the other.
      blocks_per_chain: blocks of heads of a chain.
      shape: the grid of the kernel, (chains, steps of a chain).
      padding_rows: sequences that the last tile lacks, 0 to rows_per_step - 1.
    """

    def __init__(self, batch: int, num_heads: int, head_dim: int, max_heads: int = HEADS_PER_STEP):
        self.block_heads = heads_per_block(num_heads, head_dim, max_heads)
        self.num_blocks = num_heads // self.block_heads
        self.rows_per_step = min(ROWS_PER_STEP, batch)
        self.num_row_tiles = pl.cdiv(batch, self.rows_per_step)
        self.num_chains = 2 if self.num_blocks % 2 == 0 else 1
        self.blocks_per_chain = self.num_blocks // self.num_chains
        self.shape = (self.num_chains, self.num_row_tiles * self.blocks_per_chain)
        self.padding_rows = self.num_row_tiles * self.rows_per_step - batch

    def locate_step(self, chain: Any, step: Any) -> tuple[Any, Any]:
        """Return the tile of rows and the block of heads of a step."""
        # Blocks run fastest, tiles of rows slowest.
        block = chain * self.blocks_per_chain + jax.lax.rem(step, self.blocks_per_chain)
        return jax.lax.div(step, self.blocks_per_chain), block

    def for_each_row(
        self,
        slots: Ref,
        chain: jax.Array,
        step: jax.Array,
        visit_row: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], None],
    ) -> None:
        """Call visit_row(row of the tile, row of the batch, slot, block) for every active row."""
        tile, block = self.locate_step(chain, step)

        def visit(row, carry):
            index = tile * self.rows_per_step + row

            # Padding and inactive rows have slot -1: they move no byte and cost no arithmetic.
            @pl.when(slots[index] >= 0)
            def _():
                visit_row(row, index, slots[index], block)

            return carry

        # Not unrolled: a body of all rows times all heads would take long to compile.
        jax.lax.fori_loop(0, self.rows_per_step, visit, 0)


def rotate_buffers(
    step: jax.Array,
    num_steps: int | jax.Array,
    load: StepCopies,
    store: StepCopies,
    compute: Callable[[], None],
) -> None:
    """Run a grid step on its buffer, step mod `NUM_BUFFERS`, while its neighbours' buffers move."""

    @pl.when(step == 0)
    def _():
        load(step, start_copy)

    @pl.when(step >= NUM_BUFFERS - 1)  # the next step loads where this one stored from
    def _():
        store(step - (NUM_BUFFERS - 1), wait_for_copy)

    @pl.when(step + 1 < num_steps)
    def _():
        load(step + 1, start_copy)

    load(step, wait_for_copy)
    compute()
    store(step, start_copy)

    # The kernel must not end before its last stores do. Earlier steps waited for the others.
    @pl.when(step == num_steps - 1)
    def _():
        for steps_back in reversed(range(NUM_BUFFERS - 1)):

            @pl.when(step >= steps_back)
            def _(steps_back=steps_back):
                store(step - steps_back, wait_for_copy)


def start_copy(copy: AsyncCopy) -> None:
    """Start a copy; it runs while the kernel computes."""
    copy.start()


def wait_for_copy(copy: AsyncCopy) -> None:
    """Wait for a copy that was started, here or in an earlier step, with the same ends."""
    copy.wait()


def unfuse_heads(fused: Ref, qkv: Ref) -> None:
    """Move heads from lanes to sublanes: [rows, N * 3 * H] to float32 [rows, 3, N, H]."""
    heads, head_dim = qkv.shape[2:]
    for head in range(heads):
        for part in range(3):
            first = (3 * head + part) * head_dim
            qkv[:, part, head, :] = fused[:, first : first + head_dim].astype(jnp.float32)


def fuse_heads(out: Ref, o: Ref) -> None:
    """Move heads from sublanes back to lanes: float32 [rows, N, H] to [rows, N * H]."""
    heads, head_dim = out.shape[1:]
    for head in range(heads):
        o[:, head * head_dim : (head + 1) * head_dim] = out[:, head, :].astype(o.dtype)


def _decode_kernel(
    slots: Ref,
    forgotten_fractions: Ref,
    qkv: Ref,
    _: Ref,
    o: Ref,
    pool: Ref,
    scratch: DecodeScratch,
    *,
    grid: DecodeGrid,
) -> None:
    """Run one step: slots [B] and forgotten_fractions [heads] in SMEM, qkv [rows, N * 3 * H].

    `pool` is the aliased output, and the kernel reads and writes it alone. `_` is the input, the
    same memory.
    """
    heads, states = grid.block_heads, scratch.states
    # Read here, because interpret mode has no program ids inside branches.
    chain, step = pl.program_id(0), pl.program_id(1)

    def state_ends(row, slot, block, step):
        """Return a row's states in the pool and in VMEM, and the number of its buffer."""
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        return pool.at[slot, pl.ds(block * heads, heads)], states.at[buffer, row], buffer

    def load(step, start_or_wait):
        def load_row(row, index, slot, block):
            in_pool, in_vmem, buffer = state_ends(row, slot, block, step)
            start_or_wait(pltpu.make_async_copy(in_pool, in_vmem, scratch.loads.at[buffer]))

        grid.for_each_row(slots, chain, step, load_row)

    def store(step, start_or_wait):
        def store_row(row, index, slot, block):
            in_pool, in_vmem, buffer = state_ends(row, slot, block, step)
            start_or_wait(pltpu.make_async_copy(in_vmem, in_pool, scratch.stores.at[buffer]))

        grid.for_each_row(slots, chain, step, store_row)

    def compute():
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        unfuse_heads(qkv, scratch.qkv)
        # Inactive rows are skipped below, and their output must be zero.
        scratch.out[...] = jnp.zeros_like(scratch.out)

        def update_row(row, index, slot, block):
            # Columns, so that a head's k and q vary along the rows of its state.
            num_parts = 1 if qkv.dtype == jnp.bfloat16 else 3
            q, k = (_split_into_columns(scratch.qkv[row, part], num_parts) for part in range(2))
            v = scratch.qkv[row, 2]
            for head in range(heads):
                state = states[buffer, row, head]
                state = state - forgotten_fractions[block * heads + head] * state
                state = state + _spread_column(k, head, heads) * v[head : head + 1]
                states[buffer, row, head] = state
                scratch.out[row, head : head + 1] = jnp.sum(
                    _spread_column(q, head, heads) * state, axis=0, keepdims=True
                )

        grid.for_each_row(slots, chain, step, update_row)
        fuse_heads(scratch.out, o)

    rotate_buffers(step, pl.num_programs(1), load, store, compute)


def _split_into_columns(x: Float[Array, "N H"], num_parts: int) -> BFloat16[Array, "H columns"]:
    """Turn a row a head into `num_parts` bfloat16 columns a head, whose sum is the row.

    Three parts of 8 bits hold all 24 bits of a float32. One part is enough for bfloat16 input.
    """
    parts = []
    for _ in range(num_parts):
        parts.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - parts[-1]
    return jnp.concatenate(parts, axis=0).T.astype(jnp.bfloat16)


def _spread_column(
    columns: BFloat16[Array, "H columns"], head: int, num_heads: int
) -> Float[Array, "H H"]:
    """Repeat a head's column along H lanes, exactly: a product with ones in that head's rows."""
    head_dim, count = columns.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (count, head_dim), 0)
    ones = functools.reduce(jnp.logical_or, [row == i for i in range(head, count, num_heads)])
    return jnp.dot(columns, ones.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
