"""Lightning attention one token at a time, in float32: the oracle of every other form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import documents


def lightning_attention(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B N H H"],
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Run S_t = exp(-s) S_(t-1) + k_t^T v_t and o_t = q_t S_t. See `api.lightning_attention`."""
    batch, length, _ = qkv.shape
    num_heads, head_dim = initial_state.shape[1:3]
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    real, start = segment_ids > 0, documents.document_starts(segment_ids)
    # A select, so that whatever padding holds (NaN too) reaches no value and no gradient.
    heads = jnp.where(real[:, :, None], qkv, 0).astype(jnp.float32)
    heads = heads.reshape(batch, length, num_heads, 3, head_dim)
    decay = jnp.exp(-slopes).reshape(1, num_heads, 1, 1)

    # state: [B, N, H, H]. token: qkv [B, N, 3, H], and two flags [B].
    def step(state, token):
        qkv_t, real_t, start_t = token
        q, k, v = qkv_t[:, :, 0], qkv_t[:, :, 1], qkv_t[:, :, 2]
        real_t = real_t.reshape(batch, 1, 1, 1)
        carried = jnp.where(start_t.reshape(batch, 1, 1, 1), 0.0, decay * state)
        next_state = carried + k[:, :, :, None] * v[:, :, None, :]
        # Padding leaves the state alone: it costs no decay.
        state = jnp.where(real_t, next_state, state)
        o = jnp.einsum("bnk,bnkv->bnv", q, state, precision="highest")
        return state, jnp.where(real_t[:, :, :, 0], o, 0.0)

    time_major = (jnp.moveaxis(heads, 1, 0), real.T, start.T)
    state, o = jax.lax.scan(step, initial_state, time_major)
    return jnp.moveaxis(o, 0, 1).reshape(batch, length, -1).astype(qkv.dtype), state
