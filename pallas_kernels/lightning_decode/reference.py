"""Decoding and serving prefill in plain XLA: what the TPU kernels must equal, and the CPU path."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.lightning_attention import chunked

CHUNK_TOKENS = 64  # rows of a prefill tile here; the kernel has its own
FIRST_TILE, LAST_TILE, OPENS_BLOCK = 1, 2, 4  # flags of a prefill tile


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
    """Gather, S <- S - c S + k^T v, o = q S, scatter. See `decode_api.lightning_decode`."""
    num_slots, num_heads = pool.shape[:2]
    active = slots >= 0
    # Selects, so that a NaN in an inactive row or in slot 0 goes nowhere.
    q, k, v = split_heads(jnp.where(active[:, None], qkv, 0), num_heads)
    state = jnp.where(active[:, None, None, None], pool[jnp.maximum(slots, 0)], 0)
    state = state + jnp.expm1(-slopes).reshape(1, -1, 1, 1) * state
    state = state + k[:, :, :, None] * v[:, :, None, :]
    o = jnp.einsum("bnk,bnkv->bnv", q, state, precision="highest")
    where = jnp.where(active, slots, num_slots)  # one past the end: dropped
    pool = pool.at[where].set(state, mode="drop", unique_indices=False)
    return o.reshape(o.shape[0], -1).astype(qkv.dtype), pool


def cut_prefill_tiles(
    slots: Int[Array, "R"],
    starts: Int[Array, "R"],
    lengths: Int[Array, "R"],
    num_tokens: int,
    chunk_tokens: int,
) -> tuple[Int[Array, "5 tiles"], Int[Array, "R"]]:
    """Cut flat tokens at multiples of `chunk` and where sequences start and end.

    Returns:
      Per tile (block, low, high, sequence, flags), in the order of the tokens, and the order of
      the sequences. Rows low..high-1 of its block belong to the sequence of that rank; low ==
      high marks a tile without work. Each block appears, its first tile flagged `OPENS_BLOCK`;
      a sequence's first and last tile are flagged `FIRST_TILE` and `LAST_TILE`.
    """
    active = (slots >= 0) & (lengths > 0)
    starts = jnp.where(active, starts, num_tokens)
    order = jnp.argsort(starts)
    ends = jnp.where(active, starts + lengths, num_tokens)[order]
    starts = starts[order]
    num_blocks = -(-num_tokens // chunk_tokens)
    cuts = jnp.concatenate([jnp.arange(num_blocks, dtype=jnp.int32) * chunk_tokens, starts, ends])
    cuts = jnp.sort(cuts.astype(jnp.int32))
    until = jnp.append(cuts[1:], num_tokens)

    block = jnp.minimum(cuts // chunk_tokens, num_blocks - 1)
    sequence = jnp.searchsorted(starts, cuts, side="right") - 1
    sequence = jnp.maximum(sequence, 0).astype(jnp.int32)
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
    """Scan over tiles, one masked chunk each. See `decode_api.lightning_prefill`."""
    num_tokens, num_slots = qkv.shape[0], pool.shape[0]
    chunk = min(CHUNK_TOKENS, num_tokens)
    tiles, order = cut_prefill_tiles(slots, starts, lengths, num_tokens, chunk)
    slots, fresh = slots[order], fresh[order]
    padded = jnp.pad(qkv, ((0, -num_tokens % chunk), (0, 0)))
    row = jnp.arange(chunk)
    whole = functools.partial(chunked.lightning_attention, chunk_tokens=chunk)

    def step(carry, tile):
        state, pool, o = carry
        block, low, high, sequence, flags = tile
        slot = slots[sequence]
        first = (flags & FIRST_TILE) != 0
        old = jnp.where(fresh[sequence], 0, pool[jnp.maximum(slot, 0)])
        state = jnp.where(first, old, state)
        rows = jax.lax.dynamic_slice_in_dim(padded, block * chunk, chunk)
        valid = (row >= low) & (row < high)
        out, after = whole(rows[None], slopes, valid[None].astype(jnp.int32), state[None])
        state = after[0]
        before = jax.lax.dynamic_slice_in_dim(o, block * chunk, chunk)
        out = jnp.where(valid[:, None], out[0], before)
        o = jax.lax.dynamic_update_slice_in_dim(o, out, block * chunk, 0)
        where = jnp.where((flags & LAST_TILE) != 0, slot, num_slots)
        return (state, pool.at[where].set(state, mode="drop"), o), None

    o = jnp.zeros((padded.shape[0], qkv.shape[1] // 3), qkv.dtype)
    carry = jnp.zeros(pool.shape[1:], pool.dtype), pool, o
    (_, pool, o), _ = jax.lax.scan(step, carry, tiles.T)
    return o[:num_tokens], pool
