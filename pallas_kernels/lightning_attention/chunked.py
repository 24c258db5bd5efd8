"""Lightning attention by chunks in plain XLA: differentiable, any length, runs everywhere.

For a chunk of tokens that enters with state S, n_i counts the real tokens up to and with token i:

    o_i = lambda^n_i q_i S + sum_{j <= i} lambda^(n_i - n_j) (q_i . k_j) v_j
    S'  = lambda^n_C S + sum_j lambda^(n_C - n_j) k_j^T v_j

where lambda = exp(-s). The sums run over tokens of one document. Exponents are masked before exp,
because exp of a masked pair's exponent overflows for the fast heads. In packed rows the products
are masked as well, because NaN of one document must not reach another.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries, documents

MIN_CHUNK_TOKENS = 64
_einsum = functools.partial(jnp.einsum, precision="highest")


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
    """Attend one chunk without boundary. `weights` are as `_dense_weights` returns them.

    state: [B, N, H, H] float32. xs: qkv of the chunk alone, [B, C, N * 3 * H].
    """
    (qkv,) = xs
    tile, query_ramp, key_ramp, loss = weights
    q, k, v = _split_heads(qkv, slopes.shape[0])
    within = _einsum("bnij,bnjv->bniv", _einsum("bnik,bnjk->bnij", q, k) * tile, v)
    o = within + query_ramp * _einsum("bnik,bnkv->bniv", q, state)
    # S - (1 - lambda^n) S instead of lambda^n S: for the slowest heads float32 lambda itself is off
    # by 2.5e-4 of s.
    state = state - loss * state + _einsum("bnjk,bnjv->bnkv", k * key_ramp, v)
    return state, _join_heads(o, qkv)


def _split_heads(qkv, num_heads: int):
    """Return float32 q, k and v, [B, N, C, H] each."""
    batch, size, _ = qkv.shape
    heads = qkv.astype(jnp.float32).reshape(batch, size, num_heads, 3, -1)
    return [jnp.moveaxis(heads[:, :, :, i], 2, 1) for i in range(3)]


def _join_heads(o, qkv):
    """Return o of shape [B, N, C, H] as [B, C, N * H] in qkv's dtype."""
    batch, size, width = qkv.shape
    return jnp.moveaxis(o, 1, 2).reshape(batch, size, width // 3).astype(qkv.dtype)


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
    loss = -jnp.expm1(-rate * total[:, :, None, None])

    # Selects on both sides of each product: what one document holds reaches no other, be it NaN.
    q, k, v = _split_heads(qkv, slopes.shape[0])
    within = _attend_pairs(q, k, v, tile)
    carried = _einsum("bnik,bnkv->bniv", _select(query_ramp, q), state)
    o = within + boundaries.apply_decay(carried, query_ramp)
    gain = _einsum("bnjk,bnjv->bnkv", boundaries.apply_decay(k, key_ramp), _select(key_ramp, v))
    unbroken = (last == 0)[:, :, None, None]
    state = jnp.where(unbroken, state - loss * state, 0.0) + gain
    return state, jnp.where(real[:, :, None], _join_heads(o, qkv), 0)


def _select(decay, x):
    """Return x, and 0 where the decay is 0."""
    return jnp.where(decay > 0, x, 0.0)


@jax.custom_vjp
def _attend_pairs(q, k, v, tile):
    """Return sum_j tile_ij (q_i . k_j) v_j, [B, N, C, H]. A tile of 0 keeps i and j apart.

    The rule of differentiation is written out, because a product with the gradient of another
    document's NaN would spread it.
    """
    v, is_bad = _split_finite(v)
    return _einsum("bnij,bnjv->bniv", _pair_scores(q, k, is_bad, None, tile), v)


def _pair_scores(a, b, bad_column, bad_row, tile):
    """Return tile_ij (a_i . b_j), and NaN where j is of `bad_column` or i of `bad_row`."""
    scores = _einsum("bnik,bnjk->bnij", a, b)
    if bad_column is not None:
        scores = jnp.where(jnp.swapaxes(bad_column, 2, 3), jnp.nan, scores)
    if bad_row is not None:
        scores = jnp.where(bad_row, jnp.nan, scores)
    return boundaries.apply_decay(scores, tile)


def _split_finite(x):
    """Return x [B, N, C, H] with 0 for all that is not finite, and its bad tokens [B, N, C, 1]."""
    is_finite = jnp.isfinite(x)
    return jnp.where(is_finite, x, 0.0), ~jnp.all(is_finite, axis=3, keepdims=True)


def _attend_pairs_fwd(q, k, v, tile):
    return _attend_pairs(q, k, v, tile), (q, k, v, tile)


def _attend_pairs_bwd(residuals, d_o):
    q, k, v, tile = residuals
    (finite_q, bad_q), (finite_k, bad_k), (finite_d, bad_d) = map(_split_finite, (q, k, d_o))
    scores = _pair_scores(q, k, None, bad_d, tile)
    d_scores = _pair_scores(d_o, v, bad_k, bad_q, tile)
    d_q = _einsum("bnij,bnjk->bnik", d_scores, finite_k)
    d_k = _einsum("bnij,bnik->bnjk", d_scores, finite_q)
    d_v = _einsum("bnij,bniv->bnjv", scores, finite_d)
    # Slopes are constants of the model, so the tile has no gradient.
    return d_q, d_k, d_v, jnp.zeros_like(tile)


_attend_pairs.defvjp(_attend_pairs_fwd, _attend_pairs_bwd)
