"""Decoding and serving prefill in plain XLA: the reference of the TPU kernels and the CPU path."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_attention import chunked

CHUNK_TOKENS = 64  # rows of a prefill tile; `tpu_prefill.CHUNK_TOKENS` is the kernel's
# Flags of a prefill tile, combined by |: a sequence's first tile and its last one (a sequence of
# one tile has both flags), and the first tile of a block of rows.
FIRST_TILE, LAST_TILE, OPENS_BLOCK = 1, 2, 4


def split_heads(qkv: Float[Array, "*B N3H"], num_heads: int):
    """Return q, k and v [..., N, H] in float32 from fused rows, each head q | k | v."""
    heads = qkv.astype(jnp.float32).reshape(*qkv.shape[:-1], num_heads, 3, -1)
    return heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "B"],
) -> tuple[Float[Array, "B NH"], Float[Array, "slots N H H"]]:
    """Gather, S <- S - c S + k^T v, o = q S, scatter. See `api.lightning_decode`."""
    num_slots, num_heads = pool.shape[:2]
    active = slots >= 0
    # Selects, so that a NaN in an inactive row goes nowhere. Inactive rows read slot 0, which may
    # hold a NaN as well.
    q, k, v = split_heads(jnp.where(active[:, None], qkv, 0), num_heads)
    state = jnp.where(active[:, None, None, None], pool[jnp.maximum(slots, 0)], 0)
    # S - c S and not exp(-s) S: float32 exp(-s) misstates the slowest slopes by 2.5e-4 of them.
    state = state + jnp.expm1(-slopes).reshape(1, -1, 1, 1) * state
    state = state + k[:, :, :, None] * v[:, :, None, :]
    o = jnp.einsum("bnk,bnkv->bnv", q, state, precision="highest")
    target_slots = jnp.where(active, slots, num_slots)  # one past the end: dropped
    # Not unique: all inactive rows have the same target.
    pool = pool.at[target_slots].set(state, mode="drop", unique_indices=False)
    return o.reshape(o.shape[0], -1).astype(qkv.dtype), pool


def cut_prefill_tiles(
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    num_tokens: int,
    chunk_tokens: int,
) -> tuple[Int[Array, "5 tiles"], Int[Array, "R"]]:
    """Cut flat tokens at multiples of `chunk_tokens` and where sequences start and end.

    The number of tiles is static: blocks + 2 R, whatever the sequences.

    Returns:
      (tiles, order). A tile is (block, low, high, sequence, flags), and tiles stand in the order of
      their tokens. `order` sorts the sequences by start, inactive ones last. Rows low..high-1 of
      the block belong to sequence order[sequence]. A tile with low == high has no work. Every block
      appears, and its first tile has the flag `OPENS_BLOCK`. The first and the last tile of a
      sequence have the flags `FIRST_TILE` and `LAST_TILE`.
    """
    active = (slots >= 0) & (lengths > 0)
    # Inactive sequences start behind the last token, so they sort behind the active ones.
    starts = jnp.where(active, starts, num_tokens)
    order = jnp.argsort(starts)
    ends = jnp.where(active, starts + lengths, num_tokens)[order]
    starts = starts[order]
    num_blocks = -(-num_tokens // chunk_tokens)
    cuts = jnp.concatenate([jnp.arange(num_blocks, dtype=jnp.int32) * chunk_tokens, starts, ends])
    cuts = jnp.sort(cuts.astype(jnp.int32))
    until = jnp.append(cuts[1:], num_tokens)

    # A cut at num_tokens, where the last block is full, would open a block that does not exist.
    block = jnp.minimum(cuts // chunk_tokens, num_blocks - 1)
    sequence = jnp.searchsorted(starts, cuts, side="right") - 1
    sequence = jnp.maximum(sequence, 0).astype(jnp.int32)
    # Equal cuts make empty tiles: only the last one of them has rows.
    inside = (cuts >= starts[sequence]) & (cuts < ends[sequence]) & (until > cuts)
    opens = jnp.diff(block, prepend=-1) != 0
    flags = FIRST_TILE * (inside & (cuts == starts[sequence]))
    flags += LAST_TILE * (inside & (until == ends[sequence]))
    flags += OPENS_BLOCK * opens
    low = cuts - block * chunk_tokens
    high = jnp.where(inside, until - block * chunk_tokens, low)
    return jnp.stack([block, low, high, sequence, flags]).astype(jnp.int32), order


def lightning_prefill(
    qkv: Float[Array, "T N3H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    fresh: Bool[Array, "R"],
) -> tuple[Float[Array, "T NH"], Float[Array, "slots N H H"]]:
    """Scan over tiles, one masked chunk each. See `api.lightning_prefill`."""
    num_tokens, num_slots = qkv.shape[0], pool.shape[0]
    chunk = min(CHUNK_TOKENS, num_tokens)
    tiles, order = cut_prefill_tiles(slots, starts, lengths, num_tokens, chunk)
    slots, fresh = slots[order], fresh[order]
    padded = jnp.pad(qkv, ((0, -num_tokens % chunk), (0, 0)))
    row = jnp.arange(chunk)
    attend_chunk = functools.partial(chunked.lightning_attention, chunk_tokens=chunk)

    def attend_tile(carry, tile):
        # state is [N, H, H], of the sequence whose tile came last; pool and o as returned.
        state, pool, o = carry
        block, low, high, sequence, flags = tile
        slot = slots[sequence]
        first = (flags & FIRST_TILE) != 0
        entry_state = jnp.where(fresh[sequence], 0, pool[jnp.maximum(slot, 0)])
        state = jnp.where(first, entry_state, state)
        rows = jax.lax.dynamic_slice_in_dim(padded, block * chunk, chunk)
        valid = (row >= low) & (row < high)
        # Segment id 0 is padding: rows outside the tile leave the state alone.
        out, states = attend_chunk(rows[None], slopes, valid[None].astype(jnp.int32), state[None])
        state = states[0]
        earlier_out = jax.lax.dynamic_slice_in_dim(o, block * chunk, chunk)
        out = jnp.where(valid[:, None], out[0], earlier_out)
        o = jax.lax.dynamic_update_slice_in_dim(o, out, block * chunk, 0)
        target_slot = jnp.where((flags & LAST_TILE) != 0, slot, num_slots)
        return (state, pool.at[target_slot].set(state, mode="drop"), o), None

    o = jnp.zeros((padded.shape[0], qkv.shape[1] // 3), qkv.dtype)
    carry = jnp.zeros(pool.shape[1:], pool.dtype), pool, o
    (_, pool, o), _ = jax.lax.scan(attend_tile, carry, tiles.T)
    return o[:num_tokens], pool
