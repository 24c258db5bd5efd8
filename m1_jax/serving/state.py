"""Memory of the serving engine: slots, pages, and the experts chosen for the tokens of pages.

The engine's sequences share a few large arrays. A sequence owns one slot, for what does not grow
with its length, and a page for every C of its tokens. `infer/scheduling` decides which slots and
pages a sequence owns.

Every array has its layer's two stack axes first (R repeats of the unit, J layers of the group),
then the axis of slots or pages, so that one index function serves them all. Slot 0 and page 0
belong to padding. They are written, and never read for a real token.

On a mesh, the devices of one place on the batch axes are a group, and each group has a partition of
the slots and of the pages, with a slot 0 and a page 0 of its own. The axis of slots or pages is all
partitions, one after another. Outside of `sharding.run_sharded`, ids count through all of them.
Inside, a device sees its own partition, and `localize_ids` turns ids into those of the partition.

K is the kv heads, N the heads, H the size of a head, L the layers, and A the experts of a token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m1_jax import collectives, sharding
from m1_jax import config as config_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LightningSlots:
    """Recurrent states of one group of lightning layers, by slot, with the open chunk's tokens.

    Attributes:
      states: float32 matrices, keys by values, as of the sequence's last multiple of C tokens.
      keys: keys of the tokens after that, at most C.
      values: values of the same tokens.
    """

    states: Float[Array, "R J slots N H H"]
    keys: Float[Array, "R J slots N C H"]
    values: Float[Array, "R J slots N C H"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys (rotated by RoPE) and values of one group of softmax layers, C tokens to a page."""

    keys: Float[Array, "R J pages K C H"]
    values: Float[Array, "R J pages K C H"]


# The memory of all layers of one group.
GroupState = LightningSlots | PagedKVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertIdPages:
    """The experts that every layer chose for the tokens of a page, -1 where there is no token.

    The two leading axes of size 1 stand where other arrays have their stack axes.
    """

    expert_ids: Int[Array, "1 1 pages C L A"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServingState:
    """Memory of all sequences of an engine.

    Attributes:
      group_states: by group of the repeating unit, the memory of its layers.
      expert_id_pages: None where experts are not recorded.
    """

    group_states: tuple[GroupState, ...]
    expert_id_pages: ExpertIdPages | None = None

    @property
    def page_axis_size(self) -> int | None:
        """Return the length of the axis of pages. None for a model without pages."""
        pools = [pool for pool in self.group_states if isinstance(pool, PagedKVCache)]
        arrays = jax.tree.leaves((pools, self.expert_id_pages))
        return arrays[0].shape[2] if arrays else None


def localize_ids(
    ids: Int[Array, "*ids"], axis_size: int
) -> tuple[Int[Array, "*ids"], Bool[Array, "*ids"]]:
    """Return ids of slots or pages as a device numbers them, and whether it has them.

    Those of other partitions become 0, which is padding's.

    Args:
      axis_size: length of the device's own axis of slots or pages.
    """
    local_ids = ids - collectives.axis_index("batch") * axis_size
    is_local = (local_ids >= 0) & (local_ids < axis_size)
    return jnp.where(is_local, local_ids, 0), is_local


def init_serving_state(
    config: config_lib.ModelConfig,
    num_slots: int,
    num_pages: int,
    chunk_tokens: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    layout: sharding.MeshLayout | None = None,
    record_routes: bool = False,
) -> ServingState:
    """Return zeroed memory for slots 0 to num_slots and pages 0 to num_pages of each partition.

    Keys and values have `dtype`, recurrent states float32. On a mesh, heads are split over `tensor`
    and partitions over the batch axes. Without one there is one partition.

    Args:
      num_slots: a partition's slots of sequences and snapshots, without slot 0.
      num_pages: a partition's pages of all sequences together, without page 0.
      chunk_tokens: C, tokens of a page and of lightning attention's open chunk.
      record_routes: keep the chosen experts as int8: 2 bytes a token and layer in the release.
    """
    num_partitions = 1 if layout is None else layout.axis_size("batch")
    make = functools.partial(
        _make_zeros,
        config,
        num_partitions * (num_slots + 1),
        num_partitions * (num_pages + 1),
        chunk_tokens,
        dtype,
        record_routes,
    )
    if layout is None:
        return make()
    # A jitted program makes the arrays on the devices, so no device ever holds all of them.
    specs = serving_state_specs(jax.eval_shape(make), layout)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(layout.mesh, spec), specs)
    return jax.jit(make, out_shardings=shardings)()


def _make_zeros(
    config: config_lib.ModelConfig,
    slot_axis_size: int,
    page_axis_size: int,
    chunk_tokens: int,
    dtype: jax.typing.DTypeLike,
    record_routes: bool,
) -> ServingState:
    """Return zeroed memory with axes of slots and pages of these lengths."""
    repeats, heads, size = config.repeats, config.num_attention_heads, config.head_dim
    group_states: list[GroupState] = []
    for kind, num_layers in config.layer_groups:
        if kind == config_lib.LIGHTNING:
            lead = (repeats, num_layers, slot_axis_size, heads)
            states = jnp.zeros((*lead, size, size), jnp.float32)
            chunk = (*lead, chunk_tokens, size)
            keys, values = jnp.zeros(chunk, dtype), jnp.zeros(chunk, dtype)
            group_states.append(LightningSlots(states, keys, values))
        else:
            lead = (repeats, num_layers, page_axis_size, config.num_key_value_heads)
            page = (*lead, chunk_tokens, size)
            group_states.append(PagedKVCache(jnp.zeros(page, dtype), jnp.zeros(page, dtype)))
    if not record_routes:
        return ServingState(tuple(group_states))
    # int8 holds ids up to 127, and -1.
    choices = (len(config.layer_types), config.num_experts_per_tok)
    expert_ids = jnp.full((1, 1, page_axis_size, chunk_tokens, *choices), -1, jnp.int8)
    return ServingState(tuple(group_states), ExpertIdPages(expert_ids))


def serving_state_specs(
    state: ServingState, layout: sharding.MeshLayout, partition_axis: str | None = "batch"
) -> ServingState:
    """Return the mesh axes of every array of a serving state.

    Args:
      partition_axis: logical axis of slots and pages. None for a few of them that every group has.
    """
    heads = layout.field_spec(None, None, partition_axis, "heads", None, None)
    kv_heads = layout.field_spec(None, None, partition_axis, "kv_heads", None, None)
    # States and chunks of keys and values have the heads on one axis, so they share a spec.
    group_specs = [
        LightningSlots(heads, heads, heads)
        if isinstance(group_state, LightningSlots)
        else PagedKVCache(kv_heads, kv_heads)
        for group_state in state.group_states
    ]
    # The devices of a group route the same rows, so all of them know the experts.
    routes = layout.field_spec(None, None, partition_axis, None, None, None)
    expert_ids = None if state.expert_id_pages is None else ExpertIdPages(routes)
    return ServingState(tuple(group_specs), expert_ids)


def abstract_serving_state(
    config: config_lib.ModelConfig,
    num_slots: int,
    num_pages: int,
    chunk_tokens: int,
    layout: sharding.MeshLayout,
) -> ServingState:
    """Return the bfloat16 memory of `init_serving_state` as sharded shapes, without the memory."""
    num_partitions = layout.axis_size("batch")
    state = jax.eval_shape(
        lambda: _make_zeros(
            config,
            num_partitions * (num_slots + 1),
            num_partitions * (num_pages + 1),
            chunk_tokens,
            jnp.bfloat16,
            record_routes=False,
        )
    )

    def add_sharding(shape, spec):
        named = jax.sharding.NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=named)

    return jax.tree.map(add_sharding, state, serving_state_specs(state, layout))
