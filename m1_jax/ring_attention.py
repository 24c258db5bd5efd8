"""Softmax attention block by block: no [T, S] array, and keys that travel a ring of devices.

Every block of queries keeps a running softmax, a `SoftmaxPartial`, over the blocks of keys that it
can see. Other blocks are skipped. The backward pass computes the scores again from the saved
log-sum-exp (Dao, arXiv 2307.08691).

Where the length is split over devices, keys and values go round the ring, one neighbour a step
(Liu, arXiv 2310.01889). In the backward pass their gradients go with them. Each device works on an
early and a late part of the row there, so that all devices have the same number of keys to see.

Letters of shapes: B rows, T queries, S keys, N heads, K kv heads, G = N / K query heads of a kv
head, H the size of a head. Inside of this file q is [B, K, G, T, H], and k and v are [B, K, S, H].
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from m1_jax import collectives, sharding

# Queries of a block, and keys of a block. On TPU a longer block keeps the matrix unit busier.
# Elsewhere it gains nothing, and would change the order of sums and so the bits of results.
BLOCK_TOKENS, TPU_BLOCK_TOKENS = 256, 512
# Up to either limit a single block does all: pairs of a query and a key, and queries.
MAX_DIRECT_PAIRS, MAX_DIRECT_QUERIES = 2**16, 8
# Gathering the keys and values of a sequence moves as many bytes as the ring, in one step instead
# of a step for each device. So it is faster as long as it fits: 512 MiB is 128k tokens of the
# release in bfloat16, 1M where eight devices share the heads.
MAX_GATHER_BYTES = 2**29
PADDING_POSITION = np.iinfo(np.int32).max  # position of a padded key, after every query


class SoftmaxPartial(NamedTuple):
    """The softmax of queries over the keys that were seen so far, float32."""

    total: Float[Array, "*rows T H"]  # sum of exp(score - top) v
    scale: Float[Array, "*rows T 1"]  # sum of exp(score - top)
    top: Float[Array, "*rows T 1"]  # the largest score, -inf without a key


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_positions: Int[Array, "#B T"],
    k_positions: Int[Array, "#B S"],
    q_segment_ids: Int[Array, "B T"] | None = None,
    k_segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from each query to the keys at its position or before, in its document.

    Query head n reads kv head n // (N / K). Inside of `sharding.run_sharded`, queries and keys are
    this device's parts of rows whose length may be split. Positions tell what comes before what.

    Precision: scores, softmax and sums are float32. Probabilities are cast to v's dtype.
    """
    batch, length, num_heads, size = q.shape
    num_kv = k.shape[1]
    q = jnp.moveaxis(q.reshape(batch, length, num_kv, num_heads // num_kv, size), 1, 3)
    if q_segment_ids is None:
        q_segment_ids, k_segment_ids = jnp.ones_like(q_positions), jnp.ones_like(k_positions)
    assert k_segment_ids is not None
    queries, keys = (q_positions, q_segment_ids), (k_positions, k_segment_ids)
    num_devices = collectives.axis_size("length")
    # In plain order the last device of a causal row would have nearly twice the average work.
    balance = num_devices > 1 and length == k.shape[2] and length % 2 == 0
    if balance:
        q = collectives.permute_zigzag(q, "length", 3)
        queries = tuple(collectives.permute_zigzag(x, "length", 1) for x in queries)
    # In the ring, keys are permuted too, so that each turn's blocks are as many on every device.
    # Gathered keys need not be: a device that has all of them skips what it cannot see.
    if balance and not should_gather_keys(k, num_devices):
        k, v = (
            collectives.permute_zigzag(k, "length", 2),
            collectives.permute_zigzag(v, "length", 2),
        )
        keys = tuple(collectives.permute_zigzag(x, "length", 1) for x in keys)
    if num_devices > 1 and should_gather_keys(k, num_devices):
        k, v = collectives.all_gather(k, "length", 2), collectives.all_gather(v, "length", 2)
        keys = tuple(collectives.all_gather(x, "length", 1) for x in keys)
        num_devices = 1
    if num_devices == 1 and (
        length * k.shape[2] <= MAX_DIRECT_PAIRS or length <= MAX_DIRECT_QUERIES
    ):
        partial = attend_block(q, k, v, _attention_mask(queries, keys))
        o = partial.total / replace_zeros_with_ones(partial.scale)
    else:
        # Any, since pyright does not see through custom_vjp.
        outputs: Any = _blockwise_attention(
            num_devices, _choose_block_tokens(), q, k, v, queries, keys
        )
        o, _ = outputs
    if balance:
        o = collectives.permute_zigzag(o, "length", 3, inverse=True)
    return _move_heads_last(o, v.dtype)


def sharded_key_attention(q, k, v, q_positions, k_positions) -> Float[Array, "B T N H"]:
    """Return `causal_attention` where each device has all (few) queries, and a part of the keys."""
    batch, length, num_heads, size = q.shape
    q = jnp.moveaxis(q.reshape(batch, length, k.shape[1], -1, size), 1, 3)
    mask = (k_positions[:, None, :] <= q_positions[:, :, None])[:, None, None]
    partial = attend_block(q, k, v, mask)
    # A partial softmax of each device, joined as `merge_partials` joins two.
    highest = collectives.pmax(partial.top, "length")
    share = jnp.exp(partial.top - jnp.where(jnp.isfinite(highest), highest, 0.0))
    total, scale = (collectives.psum(x * share, "length") for x in (partial.total, partial.scale))
    return _move_heads_last(total / replace_zeros_with_ones(scale), v.dtype)


def _move_heads_last(o, dtype) -> Float[Array, "B T N H"]:
    o = jnp.moveaxis(o.astype(dtype), 3, 1)
    return o.reshape(*o.shape[:2], -1, o.shape[-1])


def _choose_block_tokens() -> int:
    """Return the tokens of a block for the devices that the program is traced for."""
    device = sharding.target_device()
    return TPU_BLOCK_TOKENS if device is not None and device.platform == "tpu" else BLOCK_TOKENS


def should_gather_keys(k: Float[Array, "B K S H"], num_devices: int) -> bool:
    """Say whether the keys and values of all devices are gathered, or go round the ring."""
    return 2 * num_devices * k.size * k.dtype.itemsize <= MAX_GATHER_BYTES


def _attention_mask(queries, keys) -> Bool[Array, "#B 1 1 t s"]:
    """Return which keys a query sees. `queries` and `keys` are (positions, segment ids)."""
    (q_positions, q_segment_ids), (k_positions, k_segment_ids) = queries, keys
    is_causal = k_positions[:, None, :] <= q_positions[:, :, None]
    is_same_segment = q_segment_ids[:, :, None] == k_segment_ids[:, None, :]
    return (is_causal & is_same_segment)[:, None, None]


def _masked_scores(q, k, mask):
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores / math.sqrt(q.shape[-1]), -jnp.inf)


def attend_block(
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "#B 1 1 T S"],
) -> SoftmaxPartial:
    """Return the partial softmax of each query over the keys of one block."""
    scores = _masked_scores(q, k, mask)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # A query without any key (padding) would give exp(-inf + inf).
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return SoftmaxPartial(total, jnp.sum(weights, axis=-1, keepdims=True), top)


def empty_partials(shape: tuple[int, ...]) -> SoftmaxPartial:
    """Return the partial softmax over no keys. `shape` is that of the outputs, [..., H]."""
    scalars = (*shape[:-1], 1)
    return SoftmaxPartial(
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(scalars, jnp.float32),
        jnp.full(scalars, -jnp.inf, jnp.float32),
    )


def replace_zeros_with_ones(scale):
    """Return a divisor for totals. A query that sees no key (padding) has total 0 and scale 0."""
    return jnp.where(scale > 0, scale, 1.0)


def merge_partials(left: SoftmaxPartial, right: SoftmaxPartial) -> SoftmaxPartial:
    """Join the partial softmaxes of the same queries over two sets of keys."""
    top = jnp.maximum(left.top, right.top)
    # exp(-inf + inf) is NaN, where neither part has seen a key.
    finite_top = jnp.where(jnp.isfinite(top), top, 0.0)
    left_share, right_share = jnp.exp(left.top - finite_top), jnp.exp(right.top - finite_top)
    total = left.total * left_share + right.total * right_share
    return SoftmaxPartial(total, left.scale * left_share + right.scale * right_share, top)


# The block is an argument, because a backward pass is traced where the target is not known.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blockwise_attention(num_devices: int, block: int, q, k, v, queries, keys) -> Any:
    """Attend to the keys of all devices of a ring, with arguments as `_attention_mask` has them.

    Returns the outputs, and the log of each softmax's sum, which has no gradient.
    """
    length = q.shape[3]
    # Masks depend on positions alone. Without the barrier, JAX would compute the masks of all pairs
    # of blocks once, outside of the loop over layers, and keep them.
    q, k, v, queries, keys = jax.lax.optimization_barrier((q, k, v, queries, keys))
    q_blocks = (_split_blocks(block, q, 3), *_split_query_ids(block, queries))

    # Three loops: over the devices of the ring, over blocks of queries, over blocks of keys. The
    # first carries the partial softmax of all queries, and the keys that are here at its turn.
    def over_devices(carry, _):
        partial, key_blocks = carry

        def over_queries(_, xs):
            (q, *queries), partial = xs

            def over_keys(partial, key_block):
                k, v, *keys = key_block
                mask = _attention_mask(queries, keys)
                # A conditional skips the products of a block that no query here sees.
                return jax.lax.cond(
                    jnp.any(mask),
                    lambda: merge_partials(partial, attend_block(q, k, v, mask)),
                    lambda: partial,
                ), None

            return None, jax.lax.scan(over_keys, partial, key_blocks)[0]

        _, partial = jax.lax.scan(over_queries, None, (q_blocks, partial))
        return (partial, _send_to_next_device(num_devices, key_blocks)), None

    carry = (empty_partials(q_blocks[0].shape), _split_key_blocks(block, k, v, keys))
    (partial, _), _ = jax.lax.scan(over_devices, carry, None, length=num_devices)
    scale = partial.scale
    o = (partial.total / replace_zeros_with_ones(scale)).astype(v.dtype)
    lse = jnp.where(scale > 0, partial.top + jnp.log(replace_zeros_with_ones(scale)), 0.0)
    return _join_blocks(o, length), _join_blocks(lse, length)


def _blockwise_attention_fwd(num_devices, block, q, k, v, queries, keys):
    # The function calls itself, since a function with a custom rule stays whole. Were its loops
    # written out here, jax.checkpoint would take their conditionals apart and keep the sums of all
    # pairs of blocks.
    outputs: Any = _blockwise_attention(num_devices, block, q, k, v, queries, keys)
    return outputs, (q, k, v, queries, keys, *outputs)


def _blockwise_attention_bwd(num_devices, block, residuals, gradients):
    d_o, _ = gradients  # the log-sum-exp has no gradient
    q, k, v, queries, keys, o, lse = residuals
    length, key_length = q.shape[3], k.shape[2]
    sqrt_head_dim = math.sqrt(q.shape[-1])
    # The softmax's gradient is weights * (d_weights - delta), delta = sum_h d_o o.
    delta = jnp.sum(d_o.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    q_blocks = tuple(_split_blocks(block, x, 3) for x in (q, d_o, lse, delta))
    q_blocks += _split_query_ids(block, queries)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    # The loops are nested the other way round than in the forward pass: blocks of keys outside, so
    # that a block's gradient is finished before it moves on.
    def over_devices(carry, _):
        d_q, key_blocks, d_keys = carry

        def over_keys(d_q, xs):
            (k, v, *keys), d_key = xs

            def over_queries(d_key, xs):
                (q, d_o, lse, delta, *queries), d_q = xs
                mask = _attention_mask(queries, keys)

                def add_block():
                    # Normalised probabilities: lse holds the top score and the log of the sum.
                    weights = jnp.exp(_masked_scores(q, k, mask) - lse)
                    d_v = einsum("bkgts,bkgth->bksh", weights.astype(d_o.dtype), d_o)
                    d_weights = einsum("bkgth,bksh->bkgts", d_o, v)
                    d_scores = (weights * (d_weights - delta) / sqrt_head_dim).astype(q.dtype)
                    d_k = einsum("bkgts,bkgth->bksh", d_scores, q)
                    d_q_block = einsum("bkgts,bksh->bkgth", d_scores, k)
                    return (d_key[0] + d_k, d_key[1] + d_v), d_q + d_q_block

                return jax.lax.cond(jnp.any(mask), add_block, lambda: (d_key, d_q))

            d_key, d_q = jax.lax.scan(over_queries, d_key, (q_blocks, d_q))
            return d_q, d_key

        d_q, d_keys = jax.lax.scan(over_keys, d_q, (key_blocks, d_keys))
        return (d_q, *_send_to_next_device(num_devices, (key_blocks, d_keys))), None

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    key_blocks = _split_key_blocks(block, k, v, keys)
    d_keys = (zeros(key_blocks[0]), zeros(key_blocks[1]))
    # After a full turn every block of keys is back on its own device, with all of its gradient.
    carry = (zeros(q_blocks[0]), key_blocks, d_keys)
    (d_q, _, (d_k, d_v)), _ = jax.lax.scan(over_devices, carry, None, length=num_devices)
    d_k, d_v = (_join_blocks(x, key_length, 2).astype(y.dtype) for x, y in ((d_k, k), (d_v, v)))
    return _join_blocks(d_q, length).astype(q.dtype), d_k, d_v, None, None


_blockwise_attention.defvjp(_blockwise_attention_fwd, _blockwise_attention_bwd)


def _send_to_next_device(num_devices, tree):
    if num_devices == 1:
        return tree
    return jax.tree.map(lambda x: collectives.ppermute_next(x, "length"), tree)


def _split_query_ids(block, queries):
    # Padded queries, at -1, see no key.
    return _split_blocks(block, queries[0], 1, -1), _split_blocks(block, queries[1], 1)


def _split_key_blocks(block, k, v, keys):
    # Padding comes after every query and is never seen.
    return (
        _split_blocks(block, k, 2),
        _split_blocks(block, v, 2),
        _split_blocks(block, keys[0], 1, PADDING_POSITION),
        _split_blocks(block, keys[1], 1),
    )


def _split_blocks(block: int, x, axis: int, fill=0):
    """Cut an axis into blocks of `block` on a new leading axis. `fill` pads the last one."""
    pad = [(0, -x.shape[axis] % block if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _join_blocks(x, length: int, axis: int = 3):
    """Undo `_split_blocks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
