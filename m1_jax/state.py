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


# ---- serving: `serving/ragged_batch.py`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningSlots:
    """Recurrent states of one run of lightning layers by slot, with the rings of their chunks.

    states: as of the last multiple of the chunk C, keys by values. keys, values: of the tokens
    after that. Slot 0 is padding's.
    """

    states: Float[Array, "R P slots N H H"]
    keys: Float[Array, "R P slots N C H"]
    values: Float[Array, "R P slots N C H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Rotated keys and values of one run of softmax layers, a page for C tokens; 0 is padding's."""

    keys: Float[Array, "R P pages K C H"]
    values: Float[Array, "R P pages K C H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertIdPages:
    """The experts that every layer chose for the tokens of a page; two axes as others have them."""

    expert_ids: Int[Array, "1 1 pages C L A"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingState:
    """Memory of all sequences of an engine; which of it is whose,
    `infer/scheduling/prefix_cache.py` knows.

    routes: None where they are not recorded.
    """

    layers: tuple[LightningSlots | PagedKVCache, ...]
    expert_id_pages: ExpertIdPages | None = None


def init_serving_state(
    config: config_lib.ModelConfig,
    num_slots: int,
    num_pages: int,
    chunk_tokens: int,
    dtype=jnp.bfloat16,
    layout: sharding.MeshLayout | None = None,
    record_routes: bool = False,
) -> ServingState:
    """Return memory for slots 0 to num_slots and pages 0 to num_pages; on a mesh, split by heads.

    Keys and values have `dtype`, recurrent states float32, routes int8: 2 bytes a token and layer
    in the release, kept where `record_routes` says so.
    """
    if layout is not None:
        make = functools.partial(
            init_serving_state,
            config,
            num_slots,
            num_pages,
            chunk_tokens,
            dtype,
            None,
            record_routes,
        )
        where = serving_state_specs(jax.eval_shape(make), layout)
        where = jax.tree.map(lambda spec: jax.sharding.NamedSharding(layout.mesh, spec), where)
        return jax.jit(make, out_shardings=where)()
    repeats, heads, size = config.repeats, config.num_attention_heads, config.head_dim
    layers: list[LightningSlots | PagedKVCache] = []
    for kind, number in config.layer_groups:
        if kind == config_lib.LIGHTNING:
            lead = (repeats, number, num_slots + 1, heads)
            states = jnp.zeros((*lead, size, size), jnp.float32)
            ring = (*lead, chunk_tokens, size)
            layers.append(LightningSlots(states, jnp.zeros(ring, dtype), jnp.zeros(ring, dtype)))
        else:
            lead = (repeats, number, num_pages + 1, config.num_key_value_heads)
            page = (*lead, chunk_tokens, size)
            layers.append(PagedKVCache(jnp.zeros(page, dtype), jnp.zeros(page, dtype)))
    if not record_routes:
        return ServingState(tuple(layers))
    choices = (len(config.layer_types), config.num_experts_per_tok)
    chosen = jnp.full((1, 1, num_pages + 1, chunk_tokens, *choices), -1, jnp.int8)
    return ServingState(tuple(layers), ExpertIdPages(chosen))


def serving_state_specs(state: ServingState, layout: sharding.MeshLayout) -> ServingState:
    """Return the mesh axes of every array of a serving state."""
    heads: Any = layout.activation_spec(None, None, None, "heads", None, None)
    kv_heads: Any = layout.activation_spec(None, None, None, "kv_heads", None, None)
    layers = [
        LightningSlots(heads, heads, heads)
        if isinstance(x, LightningSlots)
        else PagedKVCache(kv_heads, kv_heads)
        for x in state.layers
    ]
    everywhere: Any = layout.activation_spec()
    routes = None if state.expert_id_pages is None else ExpertIdPages(everywhere)
    return ServingState(tuple(layers), routes)


def abstract_serving_state(
    config: config_lib.ModelConfig,
    num_slots: int,
    num_pages: int,
    chunk_tokens: int,
    layout: sharding.MeshLayout,
) -> ServingState:
    """Return the bfloat16 memory of `init_serving_state` as sharded shapes."""
    state = jax.eval_shape(lambda: init_serving_state(config, num_slots, num_pages, chunk_tokens))

    def place(shape, spec):
        where = jax.sharding.NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(place, state, serving_state_specs(state, layout))
