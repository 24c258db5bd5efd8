"""Lightning attention by chunks in plain XLA: differentiable, any length, runs everywhere.

For a chunk of tokens that enters with state S, n_i counts the real tokens up to and with token i:

    o_i = lambda^n_i q_i S + sum_{j <= i} lambda^(n_i - n_j) (q_i . k_j) v_j
    S'  = lambda^n_C S + sum_j lambda^(n_C - n_j) k_j^T v_j

where lambda = exp(-s). The sums run over tokens of one document. Exponents are masked before exp,
and never the product after it, because exp of a masked pair's exponent overflows for the fast
heads.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import documents

MIN_CHUNK_TOKENS = 64


def lightning_attention(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B N H H"],
    chunk_tokens: int | None = None,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Scan over chunks, carrying the state in float32. See `api.lightning_attention`.

    Precision: all products and sums in float32, whatever the input. Memory is linear in T, because
    the backward pass keeps one state per chunk and recomputes the rest.
    """
    batch, length, width = qkv.shape
    # A chunk as long as a head is wide balances its two products, C x C and H x H.
    chunk_tokens = chunk_tokens or max(MIN_CHUNK_TOKENS, initial_state.shape[2])
    full = length // chunk_tokens * chunk_tokens
    outputs, state = [], initial_state
    # Full chunks in one scan, then the ragged tail as one chunk of its own size.
    for start, stop, size in ((0, full, chunk_tokens), (full, length, length - full)):
        if start == stop:
            continue
        num = (stop - start) // size

        # [B, tokens, ...] -> [chunks, B, tokens of a chunk, ...], as scan takes it. Defaults bind
        # the variables of this pass of the loop.
        def split(x, start=start, stop=stop, num=num, size=size):
            return jnp.moveaxis(x[:, start:stop].reshape(batch, num, size, *x.shape[2:]), 1, 0)

        if segment_ids is None:
            body = functools.partial(_attend_chunk, slopes, weights=_dense_weights(slopes, size))
            xs = (split(qkv),)
        else:
            body = functools.partial(_attend_packed_chunk, slopes)
            xs = (split(qkv), split(segment_ids), split(documents.document_starts(segment_ids)))
        if num == 1:
            # One chunk needs no loop.
            state, o = body(state, jax.tree.map(lambda x: x[0], xs))
            o = o[None]
        else:
            # The checkpoint keeps the carried states alone for the backward pass.
            state, o = jax.lax.scan(jax.checkpoint(body), state, xs)
        outputs.append(jnp.moveaxis(o, 0, 1).reshape(batch, stop - start, width // 3))
    o = jnp.concatenate(outputs, axis=1) if outputs else qkv[:, :, : width // 3]
    return o, state


def _dense_weights(slopes: Float[Array, "N"], size: int):
    """Return the weights of a chunk without boundary.

    They are the decay tile [1, N, C, C], the two ramps [1, N, C, 1] and the share of the state that
    the chunk forgets [1, N, 1, 1].
    """
    count = jnp.arange(1, size + 1, dtype=jnp.float32)
    rate = slopes.reshape(1, -1, 1, 1)
    gap = count.reshape(-1, 1) - count.reshape(1, -1)
    tile = _decay_weights(rate, jnp.where(gap >= 0, gap, jnp.inf)[None, None])
    query_ramp = _decay_weights(rate, count.reshape(1, 1, -1, 1))
    key_ramp = _decay_weights(rate, (size - count).reshape(1, 1, -1, 1))
    return tile, query_ramp, key_ramp, -jnp.expm1(-rate * size)


def _decay_weights(rate, steps):
    """Return exp(-rate * steps). Infinite steps mean "never" and give 0, whatever the rate."""
    # 0 * inf is NaN, so the infinity is replaced before the product.
    finite = jnp.isfinite(steps)
    return jnp.where(finite, jnp.exp(-rate * jnp.where(finite, steps, 0.0)), 0.0)


def _attend_chunk(slopes, state, xs, *, weights):
    """Attend one chunk. `weights` are as `_dense_weights` returns them, of 1 or B rows.

    state: [B, N, H, H] float32. xs: qkv of the chunk alone, [B, C, N * 3 * H].
    """
    (qkv,) = xs
    tile, query_ramp, key_ramp, loss = weights
    batch, size, width = qkv.shape
    num_heads = slopes.shape[0]
    heads = qkv.astype(jnp.float32).reshape(batch, size, num_heads, 3, -1)
    q, k, v = (jnp.moveaxis(heads[:, :, :, i], 2, 1) for i in range(3))
    einsum = functools.partial(jnp.einsum, precision="highest")
    within = einsum("bnij,bnjv->bniv", einsum("bnik,bnjk->bnij", q, k) * tile, v)
    o = within + query_ramp * einsum("bnik,bnkv->bniv", q, state)
    # S - (1 - lambda^n) S instead of lambda^n S: for the slowest heads float32 lambda itself is off
    # by 2.5e-4 of s.
    state = state - loss * state + einsum("bnjk,bnjv->bnkv", k * key_ramp, v)
    o = jnp.moveaxis(o, 1, 2).reshape(batch, size, width // 3)
    return state, o.astype(qkv.dtype)


def _attend_packed_chunk(slopes, state, xs):
    """Attend one chunk with padding and document starts inside it.

    xs: (qkv, segment ids, document starts) of the chunk.
    """
    qkv, segment_ids, start = xs
    real = segment_ids > 0
    # A select, so that NaN in padding reaches neither output nor state.
    qkv = jnp.where(real[:, :, None], qkv, 0)
    count = jnp.cumsum(real.astype(jnp.float32), axis=1)
    document = jnp.cumsum(start.astype(jnp.int32), axis=1)
    total, last = count[:, -1:], document[:, -1:]
    rate = slopes.reshape(1, -1, 1, 1)

    gap = count[:, :, None] - count[:, None, :]
    causal = jnp.tril(jnp.ones((count.shape[1],) * 2, bool))[None]
    pair = causal & (document[:, :, None] == document[:, None, :])
    # Infinite steps where tokens belong to two documents, or the state to a document before.
    tile = _decay_weights(rate, jnp.where(pair, gap, jnp.inf)[:, None])
    query_ramp = _decay_weights(rate, jnp.where(document == 0, count, jnp.inf)[:, None, :, None])
    key_ramp = _decay_weights(
        rate, jnp.where(document == last, total - count, jnp.inf)[:, None, :, None]
    )
    unbroken = (last == 0)[:, :, None, None]
    loss = jnp.where(unbroken, -jnp.expm1(-rate * total[:, :, None, None]), 1.0)

    state, o = _attend_chunk(slopes, state, (qkv,), weights=(tile, query_ramp, key_ramp, loss))
    return state, jnp.where(real[:, :, None], o, 0)
