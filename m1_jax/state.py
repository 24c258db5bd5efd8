"""The decode state: what earlier tokens leave for the next one, as one pytree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import config as config_lib
from m1_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of one group of softmax layers in the repeating unit.

    R repeats of the unit, J layers of the group, S the longest sequence. Entries at and past a
    row's length are undefined, and no query attends to them.
    """

    keys: Float[Array, "R J B K S H"]  # rotated by RoPE
    values: Float[Array, "R J B K S H"]

    @property
    def max_length(self) -> int:
        """Return the capacity in tokens: of the device's part, inside of `run_sharded`."""
        return self.keys.shape[4]


# The state of all layers of one group: matrices of lightning layers, or a cache of softmax layers.
GroupState = Float[Array, "R J B N H H"] | KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """State of B sequences: 280 MiB each in the release, plus 40 KiB for every token of KV.

    Attributes:
      group_states: by group of the repeating unit, the state of its layers, stacked over the R
        repeats of the unit and the J layers of the group. Lightning layers have float32 matrices
        (keys by values), softmax layers a `KVCache`.
      length: tokens so far in each row.
    """

    # A cache grows with the length of the sequence, and a matrix does not.
    group_states: tuple[GroupState, ...]
    length: Int[Array, "B"]

    @property
    def max_length(self) -> int | None:
        """Return the capacity in tokens. Without a softmax layer it is unlimited: None."""
        caches = [state for state in self.group_states if isinstance(state, KVCache)]
        return caches[0].max_length if caches else None


def init_decode_state(
    config: config_lib.ModelConfig,
    batch: int,
    max_length: int,
    dtype=jnp.bfloat16,
    layout: sharding.MeshLayout | None = None,
) -> DecodeState:
    """Return the state of `batch` empty sequences, KV in `dtype` and recurrent states in float32.

    On a mesh rows, heads and the length of the cache are split. `max_length` is rounded up to a
    multiple of the devices.

    Raises:
      ValueError: sizes below 1, or rows that the mesh does not split evenly.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"got batch {batch}, max_length {max_length}; wanted at least 1 of each")
    if layout is not None:
        sharding.check_batch_rows(layout, batch)
        # Each device of the context axis holds an equal part of the cache.
        max_length += -max_length % layout.axis_size("length")
        # A jitted program makes the arrays on the devices, so no device ever holds all of them.
        make = functools.partial(init_decode_state, config, batch, max_length, dtype)
        specs = decode_state_specs(jax.eval_shape(make), layout)
        shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(layout.mesh, spec), specs)
        return jax.jit(make, out_shardings=shardings)()
    repeats, heads, size = config.repeats, config.num_attention_heads, config.head_dim
    group_states: list[GroupState] = []
    for kind, num_layers in config.layer_groups:
        if kind == config_lib.LIGHTNING:
            shape = (repeats, num_layers, batch, heads, size, size)
            group_states.append(jnp.zeros(shape, jnp.float32))
        else:
            shape = (repeats, num_layers, batch, config.num_key_value_heads, max_length, size)
            group_states.append(KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    return DecodeState(tuple(group_states), jnp.zeros((batch,), jnp.int32))


def decode_state_specs(state: DecodeState, layout: sharding.MeshLayout) -> DecodeState:
    """Return the mesh axes of every array of a state."""
    cache = layout.field_spec(None, None, "batch", "kv_heads", "length", None)
    matrix = layout.field_spec(None, None, "batch", "heads", None, None)
    length = layout.field_spec("batch")
    group_specs = [
        KVCache(cache, cache) if isinstance(group_state, KVCache) else matrix
        for group_state in state.group_states
    ]
    return DecodeState(tuple(group_specs), length)
