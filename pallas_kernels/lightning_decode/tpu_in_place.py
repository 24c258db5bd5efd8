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

ROWS = 8  # sequences a step: one sublane tile, the smallest block of a batch
HEADS = 8  # heads a step: one sublane tile; 4 MiB in flight with 8 sequences of 128 x 128 heads
BUFFERS = 3  # one loading, one computing, one storing
VMEM_SLACK = 8 * 2**20  # bytes for pipelined blocks, relayouts and the compiler's own use


def heads_per_block(num_heads: int, head_dim: int, limit: int = HEADS) -> int:
    """Return the most heads up to `limit` that divide all heads and whose values fill lanes."""
    for heads in range(min(limit, num_heads), 0, -1):
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
    grid = Grid(batch, num_heads, head_dim)
    rows, heads = grid.rows, grid.heads
    slots = jnp.pad(slots, (0, grid.padding), constant_values=-1)

    def block(chain, step, *_):
        return grid.where(chain, step)

    states = (BUFFERS, rows, heads, head_dim, head_dim)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    o, pool = pl.pallas_call(
        functools.partial(_kernel, grid=grid),
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
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        input_output_aliases={3: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=4 * BUFFERS * rows * heads * head_dim * max(head_dim, 128)
            + VMEM_SLACK,
        ),
        interpret=interpret,
    )(slots, -jnp.expm1(-slopes), qkv, pool)
    return o, pool


class Grid:
    """How a decoding batch is cut into steps: chains of (tile of rows, block of heads)."""

    def __init__(self, batch: int, num_heads: int, head_dim: int, limit: int = HEADS):
        self.heads = heads_per_block(num_heads, head_dim, limit)
        self.blocks = num_heads // self.heads
        self.rows = min(ROWS, batch)
        self.tiles = pl.cdiv(batch, self.rows)
        # One chain for each TensorCore of a v5p; elsewhere they run one after the other.
        self.chains = 2 if self.blocks % 2 == 0 else 1
        self.per_chain = self.blocks // self.chains
        self.shape = (self.chains, self.tiles * self.per_chain)
        self.padding = self.tiles * self.rows - batch

    def where(self, chain, step):
        """Return the tile of rows and the block of heads of a step."""
        block = chain * self.per_chain + jax.lax.rem(step, self.per_chain)
        return jax.lax.div(step, self.per_chain), block

    def each_row(self, slots, chain, step, act):
        """Call act(row, its index in the batch, slot, block) for every active row of a step."""
        tile, block = self.where(chain, step)

        def visit(row, carry):
            index = tile * self.rows + row

            @pl.when(slots[index] >= 0)
            def _():
                act(row, index, slots[index], block)

            return carry

        jax.lax.fori_loop(0, self.rows, visit, 0)


def rotate(step, num_steps, load, store, compute) -> None:
    """Run a grid step on its buffer, step mod `BUFFERS`, while its neighbours' buffers move.

    load(step, act) and store(step, act) build that step's copies and call act on each.
    """

    @pl.when(step == 0)
    def _():
        load(step, start)

    @pl.when(step >= BUFFERS - 1)  # the next step loads where this one stored from
    def _():
        store(step - (BUFFERS - 1), wait)

    @pl.when(step + 1 < num_steps)
    def _():
        load(step + 1, start)

    load(step, wait)
    compute()
    store(step, start)

    @pl.when(step == num_steps - 1)
    def _():
        for back in reversed(range(BUFFERS - 1)):

            @pl.when(step >= back)
            def _(back=back):
                store(step - back, wait)


def start(copy) -> None:
    copy.start()


def wait(copy) -> None:
    copy.wait()


def unfuse(x, qkv) -> None:
    """Turn lanes into sublanes: rows [rows, heads*3*H] into float32 tiles [rows, 3, heads, H]."""
    heads, head_dim = qkv.shape[2:]
    for head in range(heads):
        for part in range(3):
            first = (3 * head + part) * head_dim
            qkv[:, part, head, :] = x[:, first : first + head_dim].astype(jnp.float32)


def fuse(out, o) -> None:
    """Turn sublanes back into lanes: float32 tiles [rows, heads, H] into rows [rows, heads*H]."""
    heads, head_dim = out.shape[1:]
    for head in range(heads):
        o[:, head * head_dim : (head + 1) * head_dim] = out[:, head, :].astype(o.dtype)


def _kernel(slots, loss, x, _, o, pool, qkv, out, states, loads, stores, *, grid):
    """One step. `loss` is c per head; `pool` is the aliased output, the only name it has here."""
    heads = grid.heads
    # Read once: program ids are not to be had inside branches in interpret mode.
    chain, step = pl.program_id(0), pl.program_id(1)

    def ends(row, slot, block, step):
        buffer = jax.lax.rem(step, BUFFERS)
        return pool.at[slot, pl.ds(block * heads, heads)], states.at[buffer, row], buffer

    def load(step, act):
        def copy(row, index, slot, block):
            there, here, buffer = ends(row, slot, block, step)
            act(pltpu.make_async_copy(there, here, loads.at[buffer]))

        grid.each_row(slots, chain, step, copy)

    def store(step, act):
        def copy(row, index, slot, block):
            there, here, buffer = ends(row, slot, block, step)
            act(pltpu.make_async_copy(here, there, stores.at[buffer]))

        grid.each_row(slots, chain, step, copy)

    def compute():
        buffer = jax.lax.rem(step, BUFFERS)
        unfuse(x, qkv)
        out[...] = jnp.zeros_like(out)

        def update(row, index, slot, block):
            # Columns, so that a head's k and q vary along the rows of its state.
            parts = 1 if x.dtype == jnp.bfloat16 else 3
            q, k = (_columns(qkv[row, part], parts) for part in range(2))
            v = qkv[row, 2]
            for head in range(heads):
                state = states[buffer, row, head]
                state = state - loss[block * heads + head] * state
                state = state + _spread(k, head, heads) * v[head : head + 1]
                states[buffer, row, head] = state
                out[row, head : head + 1] = jnp.sum(
                    _spread(q, head, heads) * state, axis=0, keepdims=True
                )

        grid.each_row(slots, chain, step, update)
        fuse(out, o)

    rotate(step, pl.num_programs(1), load, store, compute)


def _columns(x, parts):
    """Turn rows [heads, H] into bfloat16 columns [H, parts*heads] that add up to them."""
    pieces = []
    for _ in range(parts):
        pieces.append(x.astype(jnp.bfloat16).astype(jnp.float32))
        x = x - pieces[-1]
    return jnp.concatenate(pieces, axis=0).T.astype(jnp.bfloat16)


def _spread(columns, head, heads):
    """Repeat a head's column along H lanes, exactly: a product with ones in that head's rows."""
    head_dim, count = columns.shape
    row = jax.lax.broadcasted_iota(jnp.int32, (count, head_dim), 0)
    ones = functools.reduce(jnp.logical_or, [row == i for i in range(head, count, heads)])
    return jnp.dot(columns, ones.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
