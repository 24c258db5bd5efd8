"""Grouped-query softmax attention with partial RoPE, in memory linear in the length."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m1_jax import config as config_lib
from m1_jax import layers
from m1_jax import state as state_lib

BLOCK = 256  # queries and keys per step of the blockwise form; skips what is not causal
DIRECT_PAIRS, DIRECT_QUERIES = 2**16, 8  # up to either, one block does it all
NEVER = np.iinfo(np.int32).max  # the place of a padded key, after every query


class SoftmaxAttention(nnx.Module):
    """o = out(softmax(rope(q) rope(k)^T / sqrt(H)) v); softmax in float32."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs, *, param_dtype):
        embed, size = config.hidden_size, config.head_dim
        width, kv_width = config.num_attention_heads * size, config.num_key_value_heads * size
        kwargs = {"std": config.initializer_range, "param_dtype": param_dtype}
        self.query = layers.Linear(rngs, embed, width, ("embed", "heads"), **kwargs)
        self.key = layers.Linear(rngs, embed, kv_width, ("embed", "kv_heads"), **kwargs)
        self.value = layers.Linear(rngs, embed, kv_width, ("embed", "kv_heads"), **kwargs)
        self.out = layers.Linear(rngs, width, embed, ("heads", "embed"), **kwargs)
        self.head_dim, self.rotary_dim = size, config.rotary_dim
        self.rope_theta = config.rope_theta

    def __call__(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        documents: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Attend to the earlier tokens of the same document (`documents`: 0 is padding)."""
        q, k, v = self._project(h, positions)
        place = jnp.arange(h.shape[1], dtype=jnp.int32).reshape(1, -1)
        k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
        return self._output(attend(q, k, v, place, place, documents, documents))

    def extend(
        self,
        h: Float[Array, "B T D"],
        places: Int[Array, "B T"],
        cache: state_lib.KVCache,
        repeat: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], state_lib.KVCache]:
        """Append to the cache of the unit's given repeat, then attend to all of it.

        A place at or past the cache's end is not written: that is how padding is left out.
        """
        q, k, v = self._project(h, places)
        rows = jnp.arange(h.shape[0], dtype=jnp.int32).reshape(-1, 1)

        def write(buffer, new):
            return buffer.at[repeat, rows, :, places].set(new.astype(buffer.dtype), mode="drop")

        cache = state_lib.KVCache(write(cache.keys, k), write(cache.values, v))
        key_places = jnp.arange(cache.max_length, dtype=jnp.int32).reshape(1, -1)
        keys, values = cache.keys[repeat].astype(h.dtype), cache.values[repeat].astype(h.dtype)
        return self._output(attend(q, keys, values, places, key_places)), cache

    def _project(self, h, positions):
        def heads(x):
            return x.reshape(*h.shape[:2], -1, self.head_dim)

        rope = functools.partial(
            layers.rotate, positions=positions, rotary_dim=self.rotary_dim, theta=self.rope_theta
        )
        return rope(heads(self.query(h))), rope(heads(self.key(h))), heads(self.value(h))

    def _output(self, o: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.out(o.reshape(*o.shape[:2], -1))


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_place: Int[Array, "#B T"],
    k_place: Int[Array, "#B S"],
    q_document: Int[Array, "B T"] | None = None,
    k_document: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of each query to the keys at its place or before, in its document.

    Long inputs go block by block with a running softmax, so no [T, S] array exists; the
    backward pass recomputes each block. Query head n reads kv head n // (N / K).

    Precision: scores, softmax and sums in float32; probabilities are cast to v's dtype.
    """
    batch, length, num_heads, size = q.shape
    num_kv = k.shape[1]
    q = jnp.moveaxis(q.reshape(batch, length, num_kv, num_heads // num_kv, size), 1, 3)
    if q_document is None:
        q_document, k_document = jnp.ones_like(q_place), jnp.ones_like(k_place)
    assert k_document is not None
    queries, keys = (q_place, q_document), (k_place, k_document)
    if length * k.shape[2] <= DIRECT_PAIRS or length <= DIRECT_QUERIES:
        total, scale, _ = _block(q, k, v, _mask(queries, keys))
        o = total / _positive(scale)
    else:
        o = _blockwise(q, k, v, queries, keys)
    return jnp.moveaxis(o.astype(v.dtype), 3, 1).reshape(batch, length, num_heads, size)


def _mask(queries, keys) -> Bool[Array, "#B 1 1 t s"]:
    (q_place, q_document), (k_place, k_document) = queries, keys
    seen = k_place[:, None, :] <= q_place[:, :, None]
    same = q_document[:, :, None] == k_document[:, None, :]
    return (seen & same)[:, None, None]


def _block(q, k, v, mask):
    """Return sums of exp(score - top) v and of exp(score - top), and top, per query."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores / math.sqrt(q.shape[-1]), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    # A query without any key (padding) would give exp(-inf + inf).
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.einsum(
        "bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return total, jnp.sum(weights, axis=-1, keepdims=True), top


def _positive(scale):
    return jnp.where(scale > 0, scale, 1.0)


def _blockwise(q, k, v, queries, keys):
    """`attend` for long inputs: every block of queries meets every block of keys it can see."""
    length = q.shape[3]

    def blocks(x, axis, fill=0):
        pad = [(0, -x.shape[axis] % BLOCK if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad, constant_values=fill)
        split = (*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(split), axis, 0)

    key_blocks = (blocks(k, 2), blocks(v, 2), blocks(keys[0], 1, NEVER), blocks(keys[1], 1))

    @jax.checkpoint
    def over_queries(_, query_block):
        q, place, document = query_block

        @jax.checkpoint
        def over_keys(carry, key_block):
            k, v, key_place, key_document = key_block
            mask = _mask((place, document), (key_place, key_document))
            return jax.lax.cond(
                jnp.any(mask), lambda: _merge(carry, _block(q, k, v, mask)), lambda: carry
            ), None

        shape = (*q.shape[:-1], 1)
        start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros(shape), jnp.full(shape, -jnp.inf))
        (total, scale, _), _ = jax.lax.scan(over_keys, start, key_blocks)
        return None, (total / _positive(scale)).astype(v.dtype)

    query_blocks = (blocks(q, 3), blocks(queries[0], 1, -1), blocks(queries[1], 1))
    _, o = jax.lax.scan(over_queries, None, query_blocks)
    o = jnp.moveaxis(o, 0, 3)
    return o.reshape(*o.shape[:3], -1, o.shape[-1])[:, :, :, :length]


def _merge(one, two):
    """Join two partial softmax sums (total, scale, top) of the same queries."""
    top = jnp.maximum(one[2], two[2])
    safe = jnp.where(jnp.isfinite(top), top, 0.0)
    first, second = jnp.exp(one[2] - safe), jnp.exp(two[2] - safe)
    return one[0] * first + two[0] * second, one[1] * first + two[1] * second, top
