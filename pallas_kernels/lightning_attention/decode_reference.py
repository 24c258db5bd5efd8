"""Decoding and serving prefill in plain XLA: what the TPU kernels must equal, and the CPU path."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def split_heads(qkv: Float[Array, "*B N*3*H"], num_heads: int):
    """Return q, k and v [..., N, H] in float32 from fused rows, each head q | k | v."""
    heads = qkv.astype(jnp.float32).reshape(*qkv.shape[:-1], num_heads, 3, -1)
    return heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]


def lightning_decode(
    qkv: Float[Array, "B N*3*H"],
    slopes: Float[Array, "N"],
    pool: Float[Array, "slots N H H"],
    slots: Int[Array, "B"],
) -> tuple[Float[Array, "B N*H"], Float[Array, "slots N H H"]]:
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
