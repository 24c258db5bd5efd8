"""Grouped-query softmax attention with partial RoPE, in memory linear in the length."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import (
    collectives,
    layer_stack,
    layers,
    measured_choices,
    ring_attention,
    sharding,
    splash_attention,
)
from m1_jax import config as config_lib
from m1_jax import state as state_lib


class SoftmaxAttention(nnx.Module):
    """o = out(softmax(rope(q) rope(k)^T / sqrt(H)) v), with a float32 softmax."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs, *, param_dtype):
        embed, size = config.hidden_size, config.head_dim
        # Grouped queries: num_attention_heads / num_key_value_heads query heads share a kv head.
        width, kv_width = config.num_attention_heads * size, config.num_key_value_heads * size
        kwargs = {"std": config.initializer_range, "param_dtype": param_dtype}
        self.query = layers.Linear(rngs, embed, width, ("embed", "heads"), **kwargs)
        self.key = layers.Linear(rngs, embed, kv_width, ("embed", "kv_heads"), **kwargs)
        self.value = layers.Linear(rngs, embed, kv_width, ("embed", "kv_heads"), **kwargs)
        self.out = layers.Linear(rngs, width, embed, ("heads_in", "embed_out"), **kwargs)
        self.head_dim, self.rotary_dim = size, config.rotary_dim
        self.rope_theta = config.rope_theta
        self.implementation = config.softmax_implementation

    def __call__(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Attend from each token to itself and the earlier tokens of its document.

        Args:
          positions: positions for RoPE.
          segment_ids: number of each token's document, 0 for padding. None: one document a row.
        """
        q, k, v = self._project_qkv(h, positions)
        return self._project_heads(attend_whole_rows(q, k, v, segment_ids, self.implementation))

    def extend(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: state_lib.KVCache,
        stack_index: layer_stack.StackIndex,
        length_sharded: bool,
    ) -> tuple[Float[Array, "B T D"], state_lib.KVCache]:
        """Append to the cache of one layer, then attend to all of it.

        A position at or past the cache's end is not written. That leaves padding out.

        Args:
          positions: position of each token in its sequence, for RoPE and in the cache.
          cache: cache of all layers of the group.
          stack_index: where the layer lies in it.
          length_sharded: whether the context axis, where there is one, splits the tokens. It always
            splits the cache.
        """
        q, k, v = self._project_qkv(h, positions)
        rows = jnp.arange(h.shape[0], dtype=jnp.int32).reshape(-1, 1, 1)
        key_positions = _local_positions(cache.max_length)
        # Each device writes the tokens that fall into its part of the cache, so it needs them all.
        targets = positions
        if length_sharded:
            k, v, targets = (collectives.all_gather(x, "length", 1) for x in (k, v, positions))
        targets = targets - key_positions[:, :1]
        # A negative index would count from the end. One past the end is dropped.
        targets = jnp.where(targets < 0, cache.max_length, targets)[:, None, :]

        # Heads are indexed like rows and tokens, so that a vector [H] is written at a time. If a
        # slice took all heads, XLA would lay the cache out with heads beside H, and so copy the
        # whole cache at the beginning and the end of the program.
        def write(buffer, rows_of_tokens):
            heads = jnp.arange(buffer.shape[3], dtype=jnp.int32).reshape(1, -1, 1)
            return buffer.at[(*stack_index, rows, heads, targets)].set(
                jnp.moveaxis(rows_of_tokens, 2, 1).astype(buffer.dtype), mode="drop"
            )

        cache = state_lib.KVCache(write(cache.keys, k), write(cache.values, v))
        keys, values = (x[stack_index].astype(h.dtype) for x in (cache.keys, cache.values))
        # Few queries (decoding) are on every device, and then only the keys are split.
        attend = (
            ring_attention.causal_attention
            if length_sharded or collectives.axis_size("length") == 1
            else ring_attention.sharded_key_attention
        )
        return self._project_heads(attend(q, keys, values, positions, key_positions)), cache

    # The two parts that serving calls work on rows [M, ...], as of one long sequence.

    def project_inputs(self, h: Float[Array, "M D"], positions: Int[Array, "M"]):
        """Return rotated queries, rotated keys and values of rows [M, heads, H]."""
        return tuple(x[0] for x in self._project_qkv(h[None], positions[None]))

    def project_output(self, h, o: Float[Array, "M N H"]) -> Float[Array, "M D"]:
        """Return the block's output, given the attention output `o`."""
        return self._project_heads(o[None])[0]

    def _project_qkv(self, h, positions):
        """Return rotated queries, rotated keys, and values, [B, T, heads, H] each."""

        def heads(x):
            return x.reshape(*h.shape[:2], -1, self.head_dim)

        rope = functools.partial(
            layers.apply_rope,
            positions=positions,
            rotary_dim=self.rotary_dim,
            theta=self.rope_theta,
        )
        return rope(heads(self.query(h))), rope(heads(self.key(h))), heads(self.value(h))

    def _project_heads(self, o: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return self.out(o.reshape(*o.shape[:2], -1))


def attend_whole_rows(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    implementation: str | None,
) -> Float[Array, "B T N H"]:
    """Attend from each token to itself and the earlier tokens of its document.

    Args:
      segment_ids: see `SoftmaxAttention.__call__`.
      implementation: see `ModelConfig.softmax_implementation`.

    Raises:
      ValueError: "splash" for shapes that its kernels do not take.
    """
    fits = splash_attention.supports_shapes(q, k)
    if implementation == "splash" and not fits:
        raise ValueError(
            f"softmax_implementation: got splash for q {q.shape} and k {k.shape} on a device, with "
            f"context={collectives.axis_size('length')}; wanted a head_dim of a multiple of "
            f"{splash_attention.LANES}, rows of at least as many tokens and at most "
            "MAX_GATHER_BYTES, and heads that the context axis can share; or xla"
        )
    target = sharding.target_device()
    # Where m1-selfcheck measured that XLA is to run, that is what None stands for.
    if implementation is None and measured_choices.find_choice("softmax", target) == "xla":
        implementation = "xla"
    if implementation == "splash" or (implementation is None and fits and _is_tpu(target)):
        return splash_attention.attend_local_rows(q, k, v, segment_ids)
    if implementation == "xla" or not fits or target is not None:
        return _attend_by_xla(q, k, v, segment_ids)
    # Without a mesh, the platform is known when the program is lowered.
    return jax.lax.platform_dependent(
        q, k, v, segment_ids, tpu=splash_attention.attend_local_rows, default=_attend_by_xla
    )


def _is_tpu(target: sharding.TargetDevice | None) -> bool:
    return target is not None and target.platform == "tpu"


def _attend_by_xla(q, k, v, segment_ids) -> Float[Array, "B T N H"]:
    # What comes before what is decided by the index in the row. Positions start again in every
    # document, and a caller may choose them freely.
    index = _local_positions(q.shape[1])
    k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    return ring_attention.causal_attention(q, k, v, index, index, segment_ids, segment_ids)


def _local_positions(length: int) -> Int[Array, "1 T"]:
    """Return the positions in the row of this device's tokens."""
    start = collectives.axis_index("length") * length
    return (start + jnp.arange(length, dtype=jnp.int32)).reshape(1, -1)
