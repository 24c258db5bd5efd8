"""Lightning attention of serving: the state moves on at multiples of the chunk length alone.

A sequence has a state S, exact as of its last multiple of C tokens, and a ring with the keys and
values of the open chunk. For the token at place i of the chunk, n = i + 1,

    o_i = lambda^n q_i S + sum_{j <= i} lambda^(i - j) (q_i . k_j) v_j

and with the chunk's last token S becomes what `chunked.py` makes of a full chunk. This happens at
the same places by the same product of one shape, whether a prompt is read or tokens are written,
so a state taken at a multiple of C can be kept and used again without changing a bit; and tokens
of the open chunk can be taken back by forgetting that they were there.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib


def attend_slots(
    qkv: Float[Array, "M N3H"],
    slopes: Float[Array, "N"],
    batch: ragged_batch.RaggedBatch,
    pool: state_lib.LightningSlots,
    stack_index: tuple[Any, ...],
) -> tuple[Float[Array, "M NH"], state_lib.LightningSlots]:
    """Append rows to their sequences' rings, and return what they read.

    place: of the layer in the pool (repeat, number).

    Precision: all products and sums in float32; ring and output have qkv's dtype.
    """
    heads = qkv.reshape(qkv.shape[0], slopes.shape[0], 3, -1)
    chunk = pool.keys.shape[4]
    # lambda^0 to lambda^C
    powers = jnp.exp(-slopes[:, None] * jnp.arange(chunk + 1, dtype=jnp.float32)[None])
    loss = -jnp.expm1(-slopes * chunk)

    def tile(slot, _, places, heads, pool):
        index = (*stack_index, slot)
        rows, start = places % chunk, first_position(places) % chunk
        q, k, v = jnp.moveaxis(heads, 0, 2).transpose(1, 0, 2, 3)  # [N, t, H] each
        keys = write_rows(pool.keys, index, start, k, places)
        values = write_rows(pool.values, index, start, v, places)
        # Rows that are not written yet hold anything, NaN too.
        last = jnp.max(jnp.where(places >= 0, rows, -1))
        written = (jnp.arange(chunk, dtype=jnp.int32) <= last)[None, :, None]
        k, v = (jnp.where(written, x[index].astype(jnp.float32), 0) for x in (keys, values))
        state = jnp.where(jnp.max(places) < chunk, 0.0, pool.states[index])
        q = q.astype(jnp.float32)
        gap = rows[:, None] - jnp.arange(chunk, dtype=jnp.int32)[None]
        weights = jnp.where((gap >= 0)[None], powers[:, jnp.maximum(gap, 0)], 0.0)
        within = _einsum_highest("nij,njv->niv", _einsum_highest("nik,njk->nij", q, k) * weights, v)
        o = within + powers[:, rows + 1][:, :, None] * _einsum_highest("nik,nkv->niv", q, state)

        def full(state):
            ramp = powers[:, chunk - 1 :: -1][:, :, None]
            return (
                state - loss[:, None, None] * state + _einsum_highest("njk,njv->nkv", k * ramp, v)
            )

        state = jax.lax.cond(last == chunk - 1, full, lambda state: state, state)
        states = pool.states.at[index].set(state)
        o = jnp.moveaxis(o, 0, 1).astype(qkv.dtype).reshape(len(places), -1)
        return o, state_lib.LightningSlots(states, keys, values)

    o, pool = ragged_batch.scan_attention_tiles(tile, batch, batch.to_tiles(heads), pool)
    return batch.to_rows(o), pool


def first_position(positions):
    """Return the position of a tile's first row, padding or not."""
    order = jnp.arange(len(positions), dtype=jnp.int32)
    return jnp.maximum(jnp.max(jnp.where(positions >= 0, positions - order, -1)), 0)


def _einsum_highest(formula, a, b):
    return jnp.einsum(formula, a, b, precision="highest")


def write_rows(pool, index: tuple[Any, ...], offset, rows: Float[Array, "N t H"], positions):
    """Return a pool [*index, N, C, H] with a tile's real rows written from `place` on."""
    start = (*index, 0, offset, 0)
    size = (*(1,) * len(index), *rows.shape)
    before = jax.lax.dynamic_slice(pool, start, size)
    rows = jnp.where(
        (positions >= 0)[None, :, None], rows.astype(pool.dtype), before.reshape(rows.shape)
    )
    return jax.lax.dynamic_update_slice(pool, rows.reshape(size), start)
