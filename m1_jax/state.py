"""What a sequence leaves behind for its next token, as one pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import config as config_lib
from m1_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys and values of one run of softmax layers in the repeating unit.

    R repeats of the unit, P layers in the run, S the longest sequence. Entries at and past a row's
    length are garbage that is never attended to.
    """

    keys: Float[Array, "R P B K S H"]
    values: Float[Array, "R P B K S H"]

    @property
    def max_length(self) -> int:
        return self.keys.shape[4]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State of B sequences: 280 MiB each in the release, plus 40 KiB for every token of KV.

    layers: one entry per run of equal layers in the repeating unit, stacked over the R repeats of
      the unit and the P layers of the run: float32 matrices (keys by values) for lightning, a
      `KVCache` for softmax.
    length: [B] int32, tokens so far in each row.
    """

    layers: tuple[Float[Array, "R P B N H H"] | KVCache, ...]
    length: Int[Array, "B"]

    @property
    def max_length(self) -> int | None:
        """Capacity in tokens; None where no layer has a cache, which never fills up."""
        caches = [layer for layer in self.layers if isinstance(layer, KVCache)]
        return caches[0].max_length if caches else None


def init_decode_state(
    config: config_lib.ModelConfig,
    batch: int,
    max_length: int,
    dtype=jnp.bfloat16,
    layout: sharding.MeshLayout | None = None,
) -> DecodeState:
    """Return the state of `batch` empty sequences; KV in `dtype`, recurrent state in float32.

    On a mesh rows, heads, and the length of the cache are split; max_length is rounded up for that.

    Raises:
      ValueError: sizes below 1, or rows that the mesh does not split evenly.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"got batch {batch}, max_length {max_length}; wanted at least 1 of each")
    if layout is not None:
        sharding.check_batch_rows(layout, batch)
        max_length += -max_length % layout.axis_size("length")
        make = functools.partial(init_decode_state, config, batch, max_length, dtype)
        where = decode_state_specs(jax.eval_shape(make), layout)
        where = jax.tree.map(lambda spec: jax.sharding.NamedSharding(layout.mesh, spec), where)
        return jax.jit(make, out_shardings=where)()
    repeats, heads, size = config.repeats, config.num_attention_heads, config.head_dim
    layers: list[jax.Array | KVCache] = []
    for kind, number in config.layer_groups:
        if kind == config_lib.LIGHTNING:
            layers.append(jnp.zeros((repeats, number, batch, heads, size, size), jnp.float32))
        else:
            shape = (repeats, number, batch, config.num_key_value_heads, max_length, size)
            layers.append(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return DecodeState(tuple(layers), jnp.zeros((batch,), jnp.int32))


def decode_state_specs(state: DecodeState, layout: sharding.MeshLayout) -> DecodeState:
    """Return the mesh axes of every array of a state."""
    cache: Any = layout.activation_spec(None, None, "batch", "kv_heads", "length", None)
    matrix: Any = layout.activation_spec(None, None, "batch", "heads", None, None)
    length: Any = layout.activation_spec("batch")
    layers = [KVCache(cache, cache) if isinstance(x, KVCache) else matrix for x in state.layers]
    return DecodeState(tuple(layers), length)
