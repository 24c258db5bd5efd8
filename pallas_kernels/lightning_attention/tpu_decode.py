"""One token of lightning attention per sequence, its state updated in place in a pool (Mosaic TPU).

Per sequence and head, with c = 1 - lambda = -expm1(-s):

    S <- S - c S + k^T v          o = q S

S - c S and not lambda S: float32 lambda misstates the slowest slope by 2.5e-4 of itself.
Source: M1 section 2; kernels.md 5.5, first kernel.

A grid step owns `rows` sequences and a block of heads. Their states (the bulk of all bytes) move
by hand between the pool in HBM and three VMEM buffers: while step i computes in its own buffer,
step i + 1 loads into the second and step i - 1 stores from the third. Everything else is small and
left to Pallas' own pipeline. All arithmetic is float32 on the vector unit: a matrix unit would
have to split S into three bfloat16 parts, and the vector unit already keeps up with HBM.
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
    qkv: Float[Array, "B N*3*H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "B"],
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B N*H"], Float[Array, "slots N H H"]]:
    """Advance the named slots by one token. See `decode_api.lightning_decode`.

    The returned pool is the donated one: no byte of an unnamed slot is read or written.
    """
    batch = qkv.shape[0]
    _, num_heads, head_dim, _ = pool.shape
    heads = heads_per_block(num_heads, head_dim)
    blocks = num_heads // heads
    rows = min(ROWS, batch)
    tiles = pl.cdiv(batch, rows)
    # Two chains of steps, one for each TensorCore of a v5p; elsewhere they run one after the other.
    chains = 2 if blocks % 2 == 0 else 1
    per_chain = blocks // chains
    slots = jnp.pad(slots, (0, tiles * rows - batch), constant_values=-1)

    def block(chain, step, *_):
        return jax.lax.div(step, per_chain), chain * per_chain + jax.lax.rem(step, per_chain)

    states = (BUFFERS, rows, heads, head_dim, head_dim)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    o, pool = pl.pallas_call(
        functools.partial(_kernel, rows=rows, per_chain=per_chain),
        name="lightning_decode",
        out_shape=(
            jax.ShapeDtypeStruct((batch, num_heads * head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(chains, tiles * per_chain),
            in_specs=[pl.BlockSpec((rows, heads * 3 * head_dim), block), anywhere],
            out_specs=[pl.BlockSpec((rows, heads * head_dim), block), anywhere],
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


def _kernel(slots, loss, x, _, o, pool, qkv, out, states, loads, stores, *, rows, per_chain):
    """One step. `loss` is c per head; `pool` is the aliased output, the only name it has here."""
    chain, step = pl.program_id(0), pl.program_id(1)
    num_steps = pl.num_programs(1)
    heads, head_dim = out.shape[1:]

    def where(step):
        """Return the step's tile of rows, its block of heads and its buffer."""
        block = chain * per_chain + jax.lax.rem(step, per_chain)
        return jax.lax.div(step, per_chain), block, jax.lax.rem(step, BUFFERS)

    def each_state(step, act):
        """Call act(state in the pool, state in VMEM, buffer) for every active row of a step."""
        tile, block, buffer = where(step)

        def row_copies(row, carry):
            slot = slots[tile * rows + row]

            @pl.when(slot >= 0)
            def _():
                act(pool.at[slot, pl.ds(block * heads, heads)], states.at[buffer, row], buffer)

            return carry

        jax.lax.fori_loop(0, rows, row_copies, 0)

    def load(there, here, buffer):
        return pltpu.make_async_copy(there, here, loads.at[buffer])

    def store(there, here, buffer):
        return pltpu.make_async_copy(here, there, stores.at[buffer])

    @pl.when(step == 0)
    def _():
        each_state(step, lambda *state: load(*state).start())

    @pl.when(step >= BUFFERS - 1)  # the next step loads where this one stored from
    def _():
        each_state(step - (BUFFERS - 1), lambda *state: store(*state).wait())

    @pl.when(step + 1 < num_steps)
    def _():
        each_state(step + 1, lambda *state: load(*state).start())

    # Lanes to sublanes: a head's q, k and v become rows of (heads, head_dim) tiles.
    for head in range(heads):
        for part in range(3):
            start = (3 * head + part) * head_dim
            qkv[:, part, head, :] = x[:, start : start + head_dim].astype(jnp.float32)
    out[...] = jnp.zeros_like(out)
    each_state(step, lambda *state: load(*state).wait())
    tile, block, buffer = where(step)

    def row_update(row, carry):
        @pl.when(slots[tile * rows + row] >= 0)
        def _():
            # Columns, so that a head's k and q vary along the rows of its state.
            q, k, v = qkv[row, 0].T, qkv[row, 1].T, qkv[row, 2]
            for head in range(heads):
                state = states[buffer, row, head]
                state = state - loss[block * heads + head] * state
                state = state + k[:, head : head + 1] * v[head : head + 1]
                states[buffer, row, head] = state
                out[row, head : head + 1] = jnp.sum(
                    q[:, head : head + 1] * state, axis=0, keepdims=True
                )

        return carry

    jax.lax.fori_loop(0, rows, row_update, 0)
    each_state(step, lambda *state: store(*state).start())
    for head in range(heads):
        o[:, head * head_dim : (head + 1) * head_dim] = out[:, head, :].astype(o.dtype)

    @pl.when(step == num_steps - 1)
    def _():
        for before in reversed(range(BUFFERS - 1)):

            @pl.when(step >= before)
            def _(before=before):
                each_state(step - before, lambda *state: store(*state).wait())
