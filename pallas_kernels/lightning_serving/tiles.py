"""What a call of the kernel knows about its tiles: tables of integers, made in XLA.

Neighbouring tiles of one slot are a run. The kernel loads a run's memory once.

Letters in shapes: I tiles, t rows of a tile, C tokens of a chunk.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class TileTables(NamedTuple):
    """Integers of a call, int32, for SMEM.

    Attributes:
      tiles: for each tile its run (-1: padding), the row of the chunk that its first row goes to,
        the row of its last token (-1: padding), a bit for each of its rows that is a token, and
        whether it is the first of its run.
      runs: for each run its slot (-1: none), and whether it starts from a zero state.
    """

    tiles: Int[Array, "fields I"]
    runs: Int[Array, "fields runs"]


def make_tile_tables(
    slots: Int[Array, "I"], positions: Int[Array, "I t"], chunk: int
) -> TileTables:
    """Return the tables of tiles, as `tpu.attend_tiles` describes them."""
    num_tiles, tile = positions.shape
    last = jnp.max(positions, axis=1)
    is_active = last >= 0
    # A tile's rows are consecutive from a multiple of `tile` on, so its last token tells the first.
    first_row = jnp.maximum(last, 0) % chunk // tile * tile
    last_row = jnp.where(is_active, last % chunk, -1)
    bits = jnp.left_shift(1, jnp.arange(tile, dtype=jnp.int32))
    token_bits = jnp.sum(jnp.where(positions >= 0, bits[None], 0), axis=1)
    continues = is_active[1:] & is_active[:-1] & (slots[1:] == slots[:-1])
    opens_run = is_active & ~jnp.pad(continues, (1, 0))
    run = jnp.where(is_active, jnp.cumsum(opens_run) - 1, -1)
    # By comparison, not by scatter: the compiler would send so small a scatter to the SparseCore.
    # One run more than tiles, so that every run has a next one.
    is_first = opens_run[None] & (run[None] == jnp.arange(num_tiles + 1)[:, None])
    run_slots = jnp.sum(jnp.where(is_first, slots[None] + 1, 0), axis=1) - 1
    is_fresh = jnp.any(is_first & (last < chunk)[None], axis=1)
    fields = (run, first_row, last_row, token_bits, opens_run)
    return TileTables(
        jnp.stack([field.astype(jnp.int32) for field in fields]),
        jnp.stack([run_slots.astype(jnp.int32), is_fresh.astype(jnp.int32)]),
    )
