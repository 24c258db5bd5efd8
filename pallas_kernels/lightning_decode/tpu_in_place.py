"""One token of lightning attention per sequence, its state updated in place in a pool (Mosaic TPU).

Per sequence and head, with c = 1 - lambda = -expm1(-s):

    S <- S - c S + k^T v          o = q S

S - c S and not lambda S: float32 lambda misstates the slowest slope by 2.5e-4 of itself.
Source: M1 section 2; kernels.md 5.5, first kernel.

A grid step owns `rows` sequences and a block of heads. Their states (the bulk of all bytes) move
by hand between the pool in HBM and three VMEM buffers: while step i computes in its own buffer,
step i + 1 loads into the second and step i - 1 stores from the third. Everything else is small and
left to Pallas' own pipeline.

All sums are float32 on the vector unit: a matrix unit would have to split S into three bfloat16
parts. It serves to spread k and q over the lanes of a state, exactly; doing that with the permute
unit cost 1.3 (v5e) to 1.8 (v6e, tpu7x) times the bundles. A NaN in one head of a row therefore
reaches the row's other heads, and no other row.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

ROWS_PER_STEP = 8  # sequences a step: one sublane tile, the smallest block of a batch
HEADS_PER_STEP = (
    8  # heads a step: one sublane tile; 4 MiB in flight with 8 sequences of 128 x 128 heads
)
NUM_BUFFERS = 3  # one loading, one computing, one storing
VMEM_SLACK_BYTES = 8 * 2**20  # bytes for pipelined blocks, relayouts and the compiler's own use


def heads_per_block(num_heads: int, head_dim: int, max_heads: int = HEADS_PER_STEP) -> int:
    """Return the most heads up to `limit` that divide all heads and whose values fill lanes."""
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
    """Advance the named slots by one token. See `decode_api.lightning_decode`.

    The returned pool is the donated one: no byte of an unnamed slot is read or written.
    """
    batch = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.shape
    grid = DecodeGrid(batch, num_heads, head_dim)
    rows, heads = grid.rows_per_step, grid.block_heads
    slots = jnp.pad(slots, (0, grid.padding_rows), constant_values=-1)

    def block(chain, step, *_):
        return grid.locate_step(chain, step)

    states = (NUM_BUFFERS, rows, heads, head_dim, head_dim)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
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
            in_specs=[pl.BlockSpec((rows, heads * 3 * head_dim), block), in_hbm],
            out_specs=[pl.BlockSpec((rows, heads * head_dim), block), in_hbm],
            scratch_shapes=[
                pltpu.VMEM((rows, 3, heads, head_dim), jnp.float32),
                pltpu.VMEM((rows, heads, head_dim), jnp.float32),
                pltpu.VMEM(states, jnp.float32),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
                pltpu.SemaphoreType.DMA((NUM_BUFFERS,)),
            ],
        ),
        input_output_aliases={3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=4 * NUM_BUFFERS * rows * heads * head_dim * max(head_dim, 128)
            + VMEM_SLACK_BYTES,
        ),
        interpret=interpret,
    )(slots, -jnp.expm1(-slopes), qkv, pool)
    return o, pool


class DecodeGrid:
    """How a decoding batch is cut into steps: chains of (tile of rows, block of heads)."""

    def __init__(self, batch: int, num_heads: int, head_dim: int, max_heads: int = HEADS_PER_STEP):
        self.block_heads = heads_per_block(num_heads, head_dim, max_heads)
        self.num_blocks = num_heads // self.block_heads
        self.rows_per_step = min(ROWS_PER_STEP, batch)
        self.num_row_tiles = pl.cdiv(batch, self.rows_per_step)
        # One chain for each TensorCore of a v5p; elsewhere they run one after the other.
        self.num_chains = 2 if self.num_blocks % 2 == 0 else 1
        self.blocks_per_chain = self.num_blocks // self.num_chains
        self.shape = (self.num_chains, self.num_row_tiles * self.blocks_per_chain)
        self.padding_rows = self.num_row_tiles * self.rows_per_step - batch

    def locate_step(self, chain, step):
        """Return the tile of rows and the block of heads of a step."""
        block = chain * self.blocks_per_chain + jax.lax.rem(step, self.blocks_per_chain)
        return jax.lax.div(step, self.blocks_per_chain), block

    def for_each_row(self, slots, chain, step, act):
        """Call act(row, its index in the batch, slot, block) for every active row of a step."""
        tile, block = self.locate_step(chain, step)

        def visit(row, carry):
            index = tile * self.rows_per_step + row

            @pl.when(slots[index] >= 0)
            def _():
                act(row, index, slots[index], block)

            return carry

        jax.lax.fori_loop(0, self.rows_per_step, visit, 0)


def rotate_buffers(step, num_steps, load, store, compute) -> None:
    """Run a grid step on its buffer, step mod `NUM_BUFFERS`, while its neighbours' buffers move.

    load(step, act) and store(step, act) build that step's copies and call act on each.
    """

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

    @pl.when(step == num_steps - 1)
    def _():
        for back in reversed(range(NUM_BUFFERS - 1)):

            @pl.when(step >= back)
            def _(back=back):
                store(step - back, wait_for_copy)


def start_copy(copy) -> None:
    copy.start()


def wait_for_copy(copy) -> None:
    copy.wait()


def unfuse_heads(x, qkv) -> None:
    """Turn lanes into sublanes: rows [rows, heads*3*H] into float32 tiles [rows, 3, heads, H]."""
    heads, head_dim = qkv.shape[2:]
    for head in range(heads):
        for part in range(3):
            first = (3 * head + part) * head_dim
            qkv[:, part, head, :] = x[:, first : first + head_dim].astype(jnp.float32)


def fuse_heads(out, o) -> None:
    """Turn sublanes back into lanes: float32 tiles [rows, heads, H] into rows [rows, heads*H]."""
    heads, head_dim = out.shape[1:]
    for head in range(heads):
        o[:, head * head_dim : (head + 1) * head_dim] = out[:, head, :].astype(o.dtype)


def _decode_kernel(
    slots, forgotten_fractions, x, _, o, pool, qkv, out, states, loads, stores, *, grid
):
    """One step. `loss` is c per head; `pool` is the aliased output, the only name it has here."""
    heads = grid.block_heads
    # Read once: program ids are not to be had inside branches in interpret mode.
    chain, step = pl.program_id(0), pl.program_id(1)

    def ends(row, slot, block, step):
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        return pool.at[slot, pl.ds(block * heads, heads)], states.at[buffer, row], buffer

    def load(step, act):
        def copy(row, index, slot, block):
            there, here, buffer = ends(row, slot, block, step)
            act(pltpu.make_async_copy(there, here, loads.at[buffer]))

        grid.for_each_row(slots, chain, step, copy)

    def store(step, act):
        def copy(row, index, slot, block):
            there, here, buffer = ends(row, slot, block, step)
            act(pltpu.make_async_copy(here, there, stores.at[buffer]))

        grid.for_each_row(slots, chain, step, copy)

    def compute():
        buffer = jax.lax.rem(step, NUM_BUFFERS)
        unfuse_heads(x, qkv)
        out[...] = jnp.zeros_like(out)

        def update(row, index, slot, block):
            # Columns, so that a head's k and q vary along the rows of its state.
            parts = 1 if x.dtype == jnp.bfloat16 else 3
            q, k = (_split_into_columns(qkv[row, part], parts) for part in range(2))
            v = qkv[row, 2]
            for head in range(heads):
                state = states[buffer, row, head]
                state = state - forgotten_fractions[block * heads + head] * state
                state = state + _spread_column(k, head, heads) * v[head : head + 1]
                states[buffer, row, head] = state
                out[row, head : head + 1] = jnp.sum(
                    _spread_column(q, head, heads) * state, axis=0, keepdims=True
                )

        grid.for_each_row(slots, chain, step, update)
        fuse_heads(out, o)

    rotate_buffers(step, pl.num_programs(1), load, store, compute)


def _split_into_columns(x, num_parts):
    """Turn rows [heads, H] into bfloat16 columns [H, parts*heads] that add up to them."""
    pieces = []
    for _ in range(num_parts):
        pieces.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - pieces[-1]
    return jnp.concatenate(pieces, axis=0).T.astype(jnp.bfloat16)


def _spread_column(columns, head, num_heads):
    """Repeat a head's column along H lanes, exactly: a product with ones in that head's rows."""
    head_dim, count = columns.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (count, head_dim), 0)
    ones = functools.reduce(jnp.logical_or, [row == i for i in range(head, count, num_heads)])
    return jnp.dot(columns, ones.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
