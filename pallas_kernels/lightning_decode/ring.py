"""Decoding that writes the state only every W tokens: the pool, its bookkeeping and the XLA form.

A slot holds the state S of its first `base` tokens as two bfloat16 planes, hi = bf16(S) and
lo = bf16(S - hi). A ring holds k and v of the tokens since then. The token at position p, with
n = p - base, reads hi and the ring, and not lo:

    o = lambda^(n+1) q hi + sum_{a <= n} lambda^a (q . k_(p-a)) v_(p-a)

A flush absorbs the m oldest tokens of the ring into S. No other operation touches lo:

    S <- S + expm1(-s m) S + sum_{i < m} lambda^(m-1-i) k_(base+i)^T v_(base+i),   base += m

base lies on a fixed grid of absolute positions, multiples of W, and rollbacks do not move the grid.
The grid is shifted from one block of heads to the next. So every step flushes about 1/W of the
heads, and no step flushes all of them.

A flush waits until the newest token that it absorbs is `rollback_tokens` tokens old. So that many
tokens can always be taken back: the caller passes an earlier position with the next token, and
nothing has to be restored.

Source: docs/kernels.md, "The decode ring".

Letters in shapes: B sequences, N heads, H width of a head, R rows of a ring.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int

from pallas_kernels.lightning_decode import reference as decode_reference


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingPool:
    """States of many sequences by slot.

    Attributes:
      hi: S rounded to bfloat16.
      lo: what hi rounds away, in bfloat16.
      ring: k | v of the token at position p, in row p mod R, where R = window + rollback_tokens.
        Heads lie inside rows, so that appending a token is one contiguous write.
      base: how many tokens S holds, for each block of heads.
      window: W, tokens between two flushes of a block, at least 1.
    """

    hi: BFloat16[Array, "slots N H H"]
    lo: BFloat16[Array, "slots N H H"]
    ring: BFloat16[Array, "slots R N 2*H"]
    base: Int[Array, "slots blocks"]
    window: int = dataclasses.field(metadata={"static": True})

    @property
    def rollback_tokens(self) -> int:
        """Number of newest tokens that a slot can always take back."""
        return self.ring.shape[1] - self.window


def bytes_per_step(head_dim: int, window: int, rollback_tokens: int = 0) -> float:
    """Return the bytes of the pool that move for a head and token, averaged over a window.

    A step reads hi and the ring, and writes one row of the ring. Every `window` tokens a flush
    reads lo and writes both planes.
    """
    plane, row = 2 * head_dim**2, 4 * head_dim  # bytes of bfloat16 [H, H] and k | v
    return plane + (window + rollback_tokens) * row + row + 3 * plane / window


def bytes_per_step_in_place(head_dim: int) -> float:
    """Return the bytes that `api.lightning_decode` moves instead: float32 S, read and written."""
    return 8 * head_dim**2


def split_into_planes(
    state: Float[Array, "*B"],
) -> tuple[BFloat16[Array, "*B"], BFloat16[Array, "*B"]]:
    """Return bfloat16 hi and lo with hi + lo = state to 2^-17 of its magnitude."""
    # Not a cast: XLA may drop a cast to bfloat16 and back, and lo would be zero.
    hi = jax.lax.reduce_precision(state, exponent_bits=8, mantissa_bits=7)
    return hi.astype(jnp.bfloat16), (state - hi).astype(jnp.bfloat16)


def init_pool(
    num_slots, num_heads, head_dim, *, window=16, rollback_tokens=0, num_blocks=8
) -> RingPool:
    """Return a pool of empty sequences. `num_blocks` must be the kernel's blocks of heads."""
    plane = jnp.zeros((num_slots, num_heads, head_dim, head_dim), jnp.bfloat16)
    ring = jnp.zeros((num_slots, window + rollback_tokens, num_heads, 2 * head_dim), jnp.bfloat16)
    return RingPool(plane, plane, ring, jnp.zeros((num_slots, num_blocks), jnp.int32), window)


def write_states(
    pool: RingPool,
    slots: Int[Array, "B"],
    states: Float[Array, "B N H H"],
    lengths: Int[Array, "B"],
) -> RingPool:
    """Put states after `lengths` tokens, as a prefill leaves them, into slots.

    The rings keep their bytes: with base = length, no earlier token of the ring is read.
    """
    hi, lo = split_into_planes(states)
    base = jnp.broadcast_to(lengths[:, None], (len(slots), pool.base.shape[1]))
    return dataclasses.replace(
        pool,
        hi=pool.hi.at[slots].set(hi),
        lo=pool.lo.at[slots].set(lo),
        base=pool.base.at[slots].set(base),
    )


def read_states(
    pool: RingPool, slopes: Float[Array, "N"], slots: Int[Array, "B"], lengths: Int[Array, "B"]
) -> Float[Array, "B N H H"]:
    """Return the float32 states after `lengths` tokens, for a snapshot or another prefill."""
    num_ring_tokens = lengths[:, None] - pool.base[slots]
    return _absorb_ring_tokens(
        pool, slopes, slots, lengths - 1, num_ring_tokens - 1, num_ring_tokens
    )


def tokens_to_flush(
    base: Int[Array, "B blocks"], positions: Int[Array, "B"], window: int, rollback_tokens: int
) -> Int[Array, "B blocks"]:
    """Return how many tokens to flush once the token at each position is in the ring.

    The number is 0 in most steps, and W where a block reaches the next point of its grid.
    """
    blocks = base.shape[1]
    shift = (jnp.arange(blocks) * window // blocks).reshape(1, -1)
    span = window - (base + shift) % window  # to the next point of the block's grid
    return jnp.where(positions[:, None] + 1 - (base + span) >= rollback_tokens, span, 0).astype(
        jnp.int32
    )


def advance_bases(
    base: Int[Array, "slots blocks"], slots: Int[Array, "B"], spans: Int[Array, "B blocks"]
) -> Int[Array, "slots blocks"]:
    """Add the flushed tokens to the bases of the named slots."""
    # By comparison, not by scatter: the compiler would send so small a scatter to the SparseCore.
    is_named = slots.reshape(-1, 1, 1) == jnp.arange(base.shape[0]).reshape(1, -1, 1)
    return base + jnp.sum(jnp.where(is_named, spans[:, None, :], 0), axis=0)


def lightning_decode(
    qkv: Float[Array, "B N3H"],
    slopes: Float[Array, "N"],
    pool: RingPool,
    slots: Int[Array, "B"],
    positions: Int[Array, "B"],
) -> tuple[Float[Array, "B NH"], RingPool]:
    """Gather, attend, flush, scatter. See `api.lightning_decode_ring`."""
    num_slots, num_heads = pool.hi.shape[:2]
    # Inactive rows read slot 0 and write nowhere.
    active, source_slots = slots >= 0, jnp.maximum(slots, 0)
    # Selects, so that a NaN in an inactive row goes nowhere.
    q, k, v = decode_reference.split_heads(jnp.where(active[:, None], qkv, 0), num_heads)
    target_slots = jnp.where(active, slots, num_slots)  # one past the end: dropped
    row = jnp.concatenate([k, v], axis=2).astype(jnp.bfloat16)
    size = pool.ring.shape[1]
    ring = pool.ring.at[target_slots, positions % size].set(row, mode="drop")
    pool = dataclasses.replace(pool, ring=ring)

    steps_since_base = positions[:, None] - pool.base[source_slots]
    age, entered = _ring_row_ages(pool, positions, steps_since_base)
    # A select and not a product: rows of an earlier sequence may hold NaN.
    is_live = (age <= entered)[:, :, :, None] & active.reshape(-1, 1, 1, 1)
    rows = jnp.where(is_live, ring[source_slots].astype(jnp.float32), 0)
    keys, values = jnp.split(rows, 2, axis=3)
    rate = slopes.reshape(1, 1, -1)
    weight = jnp.exp(-rate * age) * jnp.einsum("bnk,brnk->brn", q, keys, precision="highest")
    o = jnp.einsum("brn,brnv->bnv", weight, values, precision="highest")
    hi = jnp.where(active.reshape(-1, 1, 1, 1), pool.hi[source_slots], 0).astype(jnp.float32)
    carried = jnp.einsum("bnk,bnkv->bnv", q, hi, precision="highest")
    o = o + jnp.exp(-slopes.reshape(1, -1, 1) * (entered[:, 0, :, None] + 1)) * carried
    o = jnp.where(active.reshape(-1, 1, 1), o, 0)

    base = pool.base[source_slots]
    span = tokens_to_flush(base, positions, pool.window, pool.rollback_tokens)
    # This form computes a flush for every head and keeps the result only where one is due.
    flushed_hi, flushed_lo = split_into_planes(
        _absorb_ring_tokens(pool, slopes, source_slots, positions, steps_since_base, span)
    )
    is_flushed = jnp.repeat(span > 0, num_heads // span.shape[1], axis=1)[:, :, None, None]
    hi = jnp.where(is_flushed, flushed_hi, pool.hi[source_slots])
    lo = jnp.where(is_flushed, flushed_lo, pool.lo[source_slots])
    pool = dataclasses.replace(
        pool,
        hi=pool.hi.at[target_slots].set(hi, mode="drop"),
        lo=pool.lo.at[target_slots].set(lo, mode="drop"),
        base=advance_bases(pool.base, slots, span),
    )
    return o.reshape(o.shape[0], -1).astype(qkv.dtype), pool


def _ring_row_ages(pool, positions, steps_since_base):
    """Return ages of the ring's rows [B, R, N], and tokens since base before the last [B, 1, N].

    The token at `positions` has age 0. A row whose age exceeds the second result is not in use.
    """
    size, num_heads = pool.ring.shape[1:3]
    age = (positions[:, None] - jnp.arange(size).reshape(1, -1)) % size
    entered = jnp.repeat(steps_since_base, num_heads // steps_since_base.shape[1], axis=1)[
        :, None, :
    ]
    return jnp.broadcast_to(age[:, :, None], (*age.shape, num_heads)), entered


def _absorb_ring_tokens(pool, slopes, slots, positions, steps_since_base, span):
    """Return float32 S after its next `span` tokens in a ring whose newest is at `positions`."""
    num_heads = pool.hi.shape[1]
    age, entered = _ring_row_ages(pool, positions, steps_since_base)
    count = jnp.repeat(span, num_heads // span.shape[1], axis=1)[:, None, :]
    index = entered - age  # of the row's token, counted from base
    is_absorbed = (index >= 0) & (index < count)
    rows = jnp.where(is_absorbed[:, :, :, None], pool.ring[slots].astype(jnp.float32), 0)
    keys, values = jnp.split(rows, 2, axis=3)
    # Masked before exp: a negative number of steps would overflow for fast heads.
    steps = jnp.where(is_absorbed, count - 1 - index, 0)
    decayed = keys * jnp.exp(-slopes.reshape(1, 1, -1) * steps)[:, :, :, None]
    state = pool.hi[slots].astype(jnp.float32) + pool.lo[slots].astype(jnp.float32)
    loss = jnp.expm1(-slopes.reshape(1, -1) * count[:, 0])[:, :, None, None]
    gain = jnp.einsum("brnk,brnv->bnkv", decayed, values, precision="highest")
    return state + loss * state + gain
