"""Softmax attention block by block: no [T, S] array, and keys that travel a ring of devices.

Every block of queries keeps a running softmax (sum of exp(score - top) v, sum of exp(score - top),
top) over the blocks of keys it can see; blocks that it cannot see are skipped. The backward pass
computes the scores again from the saved log-sum-exp (Dao, arXiv 2307.08691). Where the length is
split over devices, keys and values go round the ring, one neighbour a step (Liu, arXiv 2310.01889),
and in the backward pass their gradients go with them. There each device works on an early and a
late part of the row, so that all have the same number of keys to look at.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m1_jax import collectives

BLOCK_TOKENS = 256  # queries and keys of a block
MAX_DIRECT_PAIRS, MAX_DIRECT_QUERIES = 2**16, 8  # up to either, one block does it all
# Gathering the keys and values of a sequence costs as many bytes as the ring and one step instead
# of as many as there are devices, so it is faster as long as it fits: 512 MiB is 128k tokens of the
# release in bfloat16, 1M where eight devices share the heads.
MAX_GATHER_BYTES = 2**29
PADDING_POSITION = np.iinfo(np.int32).max  # the place of a padded key, after every query


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "#B T"],
    k_positions: Int[Array, "#B S"],
    q_segment_ids: Int[Array, "B T"] | None = None,
    k_segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query to the keys at its place or before, in its document.

    Query head n reads kv head n // (N / K). Inside of `sharding.run_sharded`, queries and keys are
    this device's parts of rows whose length may be split; their places say what comes before what.

    Precision: scores, softmax and sums in float32; probabilities are cast to v's dtype.
    """
    batch, length, num_heads, size = q.shape
    num_kv = k.shape[1]
    q = jnp.moveaxis(q.reshape(batch, length, num_kv, num_heads // num_kv, size), 1, 3)
    if q_segment_ids is None:
        q_segment_ids, k_segment_ids = jnp.ones_like(q_positions), jnp.ones_like(k_positions)
    assert k_segment_ids is not None
    queries, keys = (q_positions, q_segment_ids), (k_positions, k_segment_ids)
    devices = collectives.axis_size("length")
    # The last device of a causal row would have nearly twice the work of the average.
    balance = devices > 1 and length == k.shape[2] and length % 2 == 0
    if balance:
        q = collectives.permute_zigzag(q, "length", 3)
        queries = tuple(collectives.permute_zigzag(x, "length", 1) for x in queries)
    if balance and not should_gather_keys(k, devices):
        k, v = (
            collectives.permute_zigzag(k, "length", 2),
            collectives.permute_zigzag(v, "length", 2),
        )
        keys = tuple(collectives.permute_zigzag(x, "length", 1) for x in keys)
    if devices > 1 and should_gather_keys(k, devices):
        k, v = collectives.all_gather(k, "length", 2), collectives.all_gather(v, "length", 2)
        keys = tuple(collectives.all_gather(x, "length", 1) for x in keys)
        devices = 1
    if devices == 1 and (length * k.shape[2] <= MAX_DIRECT_PAIRS or length <= MAX_DIRECT_QUERIES):
        total, scale, _ = attend_block(q, k, v, _attention_mask(queries, keys))
        o = total / replace_zeros_with_ones(scale)
    else:
        made: Any = _blockwise_attention(devices, q, k, v, queries, keys)
        o, _ = made
    if balance:
        o = collectives.permute_zigzag(o, "length", 3, inverse=True)
    return _move_heads_last(o, v.dtype)


def sharded_key_attention(q, k, v, q_positions, k_positions) -> Float[Array, "B T N H"]:
    """`causal_attention` where every device has all (few) queries, and its own part of the keys."""
    batch, length, num_heads, size = q.shape
    q = jnp.moveaxis(q.reshape(batch, length, k.shape[1], -1, size), 1, 3)
    mask = (k_positions[:, None, :] <= q_positions[:, :, None])[:, None, None]
    total, scale, top = attend_block(q, k, v, mask)
    highest = collectives.pmax(top, "length")
    share = jnp.exp(top - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total, scale = (collectives.psum(x * share, "length") for x in (total, scale))
    return _move_heads_last(total / replace_zeros_with_ones(scale), v.dtype)


def _move_heads_last(o, dtype) -> Float[Array, "B T N H"]:
    o = jnp.moveaxis(o.astype(dtype), 3, 1)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])


def should_gather_keys(k: Float[Array, "B K S H"], devices: int) -> bool:
    """Say whether the keys and values of all devices are gathered; else they go round the ring."""
    return 2 * devices * k.size * k.dtype.itemsize <= MAX_GATHER_BYTES


def _attention_mask(queries, keys) -> Bool[Array, "#B 1 1 t s"]:
    (q_place, q_document), (k_place, k_document) = queries, keys
    seen = k_place[:, None, :] <= q_place[:, :, None]
    same = q_document[:, :, None] == k_document[:, None, :]
    return (seen & same)[:, None, None]


def _masked_scores(q, k, mask):
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores / math.sqrt(q.shape[-1]), -jnp.inf)


def attend_block(q, k, v, mask):
    """Return sums of exp(score - top) v and of exp(score - top), and top, per query."""
    scores = _masked_scores(q, k, mask)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # A query without any key (padding) would give exp(-inf + inf).
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return total, jnp.sum(weights, axis=-1, keepdims=True), top


def replace_zeros_with_ones(scale):
    return jnp.where(scale > 0, scale, 1.0)


def merge_partials(left, right):
    """Join two partial softmax sums (total, scale, top) of the same queries."""
    top = jnp.maximum(left[2], right[2])
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    first, second = jnp.exp(left[2] - safe), jnp.exp(right[2] - safe)
    return left[0] * first + right[0] * second, left[1] * first + right[1] * second, top


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise_attention(devices: int, q, k, v, queries, keys) -> Any:
    """Attend to the keys of all devices of a ring; arguments as `attend_block` and
    `_attention_mask` want them.

    Returns the outputs, and the log of each softmax's sum, which has no gradient.
    """
    length = q.shape[3]
    # Masks depend on places alone. Without this, JAX would compute those of all pairs of blocks
    # once, outside of the loop over layers, and keep them.
    q, k, v, queries, keys = jax.lax.optimization_barrier((q, k, v, queries, keys))
    q_blocks = (_split_blocks(q, 3), _split_blocks(queries[0], 1, -1), _split_blocks(queries[1], 1))

    def over_devices(carry, _):
        partial, key_blocks = carry

        def over_queries(_, xs):
            (q, *queries), partial = xs

            def over_keys(partial, key_block):
                k, v, *keys = key_block
                mask = _attention_mask(queries, keys)
                return jax.lax.cond(
                    jnp.any(mask),
                    lambda: merge_partials(partial, attend_block(q, k, v, mask)),
                    lambda: partial,
                ), None

            return None, jax.lax.scan(over_keys, partial, key_blocks)[0]

        _, partial = jax.lax.scan(over_queries, None, (q_blocks, partial))
        return (partial, _send_to_next_device(devices, key_blocks)), None

    shape = (*q_blocks[0].shape[:-1], 1)
    start = (
        jnp.zeros(q_blocks[0].shape, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape, -jnp.inf, jnp.float32),
    )
    carry = (start, _split_key_blocks(k, v, keys))
    ((total, scale, top), _), _ = jax.lax.scan(over_devices, carry, None, length=devices)
    o = (total / replace_zeros_with_ones(scale)).astype(v.dtype)
    lse = jnp.where(scale > 0, top + jnp.log(replace_zeros_with_ones(scale)), 0.0)
    return _join_blocks(o, length), _join_blocks(lse, length)


def _blockwise_attention_fwd(devices, q, k, v, queries, keys):
    # By its own name, as a function with a rule stays whole: were its loops written out here,
    # jax.checkpoint would take their conditionals apart and keep the sums of all pairs of blocks.
    made: Any = _blockwise_attention(devices, q, k, v, queries, keys)
    return made, (q, k, v, queries, keys, *made)


def _blockwise_attention_bwd(devices, residuals, gradients):
    d_o, _ = gradients
    q, k, v, queries, keys, o, lse = residuals
    length, key_length = q.shape[3], k.shape[2]
    root = math.sqrt(q.shape[-1])
    delta = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    q_blocks = tuple(_split_blocks(x, 3) for x in (q, d_o, lse, delta))
    q_blocks += (_split_blocks(queries[0], 1, -1), _split_blocks(queries[1], 1))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def over_devices(carry, _):
        d_q, key_blocks, d_keys = carry

        def over_keys(d_q, xs):
            (k, v, *keys), d_key = xs

            def over_queries(d_key, xs):
                (q, d_o, lse, delta, *queries), d_q = xs
                mask = _attention_mask(queries, keys)

                def visible():
                    weights = jnp.exp(_masked_scores(q, k, mask) - lse)
                    d_v = einsum("bkgts,bkgth->bksh", weights.astype(d_o.dtype), d_o)
                    d_weights = einsum("bkgth,bksh->bkgts", d_o, v)
                    d_scores = (weights * (d_weights - delta) / root).astype(q.dtype)
                    d_k = einsum("bkgts,bkgth->bksh", d_scores, q)
                    more = einsum("bkgts,bksh->bkgth", d_scores, k)
                    return (d_key[0] + d_k, d_key[1] + d_v), d_q + more

                return jax.lax.cond(jnp.any(mask), visible, lambda: (d_key, d_q))

            d_key, d_q = jax.lax.scan(over_queries, d_key, (q_blocks, d_q))
            return d_q, d_key

        d_q, d_keys = jax.lax.scan(over_keys, d_q, (key_blocks, d_keys))
        return (d_q, *_send_to_next_device(devices, (key_blocks, d_keys))), None

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    key_blocks = _split_key_blocks(k, v, keys)
    d_keys = (zeros(key_blocks[0]), zeros(key_blocks[1]))
    # After a full turn every block of keys is home again, with all of its gradient.
    carry = (zeros(q_blocks[0]), key_blocks, d_keys)
    (d_q, _, (d_k, d_v)), _ = jax.lax.scan(over_devices, carry, None, length=devices)
    d_k, d_v = (_join_blocks(x, key_length, 2).astype(y.dtype) for x, y in ((d_k, k), (d_v, v)))
    return _join_blocks(d_q, length).astype(q.dtype), d_k, d_v, None, None


_blockwise_attention.defvjp(_blockwise_attention_fwd, _blockwise_attention_bwd)


def _send_to_next_device(devices, tree):
    if devices == 1:
        return tree
    return jax.tree.map(lambda x: collectives.ppermute_next(x, "length"), tree)


def _split_key_blocks(k, v, keys):
    return (
        _split_blocks(k, 2),
        _split_blocks(v, 2),
        _split_blocks(keys[0], 1, PADDING_POSITION),
        _split_blocks(keys[1], 1),
    )


def _split_blocks(x, axis: int, fill=0):
    """Cut an axis into blocks of `BLOCK_TOKENS` on a new leading axis, the last one filled up."""
    pad = [(0, -x.shape[axis] % BLOCK_TOKENS if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, BLOCK_TOKENS, *x.shape[axis + 1 :]), axis, 0)


def _join_blocks(x, length: int, axis: int = 3):
    """Undo `_split_blocks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
