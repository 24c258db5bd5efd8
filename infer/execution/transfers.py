"""The programs that move memory: between slots, to and from the host, and into sampling states.

Those of the serving state index axis 2 of its arrays, which is that of slots or pages. The two axes
before it say which layer of a stack an array belongs to.

On a mesh, each device looks for the ids in its own partition. Ids of another one become those of
padding, whose memory nobody reads. So a write needs no condition, and a read adds up what the
partitions have, which is nothing but in one. No device ever has more than its part of a pool.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from infer.execution import sampling, slot_sampling
from m1_jax import collectives, sharding
from m1_jax.serving import state as state_lib

# Sizes of one call. Programs have fixed shapes, so longer work is cut and the last call is padded.
SWAP_PAGES = 16  # pages that one call moves to or from the host
COUNT_TOKENS = 2048  # tokens that one call counts


def copy_states(
    layout: sharding.MeshLayout | None,
    state: state_lib.ServingState,
    source: Int[Array, ""],
    target: Int[Array, ""],
) -> state_lib.ServingState:
    """Copy a slot's recurrent states to another of its partition, at a multiple of the chunk.

    There the open chunk has no keys and values yet, so the matrices are all there is.
    """

    def copy_slot(group_state, source, target):
        if isinstance(group_state, state_lib.PagedKVCache):
            return group_state
        matrices = group_state.states
        (source, _), (target, _) = (
            state_lib.localize_ids(slot, matrices.shape[2]) for slot in (source, target)
        )
        matrices = matrices.at[:, :, target].set(matrices[:, :, source])
        return dataclasses.replace(group_state, states=matrices)

    def copy(state, source, target):
        copied = tuple(copy_slot(group_state, source, target) for group_state in state.group_states)
        return dataclasses.replace(state, group_states=copied)

    if layout is None:
        return copy(state, source, target)
    specs = state_lib.serving_state_specs(state, layout)
    return _run_on_mesh(layout, copy, specs, specs)(state, source, target)


def read_sequence(
    layout: sharding.MeshLayout | None,
    state: state_lib.ServingState,
    slot: Int[Array, ""],
    pages: Int[Array, "n"],
) -> Any:
    """Return everything in a slot, and in some pages: the state without its other slots and pages.

    Every partition gets it, so that the sequence may come back in any of them. Padding of `pages`
    is 0. Page 0 is padding's own, so that reading and writing it does no harm.
    """

    def read_ids(array, ids):
        ids, is_local = state_lib.localize_ids(ids, array.shape[2])
        return _take_from_owner(array[:, :, ids], is_local, 2)

    def read(state, slot, pages):
        return jax.tree.map(read_ids, state, _sequence_ids(state, slot, pages))

    if layout is None:
        return read(state, slot, pages)
    specs = state_lib.serving_state_specs(state, layout)
    part_specs = state_lib.serving_state_specs(state, layout, partition_axis=None)
    return _run_on_mesh(layout, read, specs, part_specs)(state, slot, pages)


def write_sequence(
    layout: sharding.MeshLayout | None,
    state: state_lib.ServingState,
    slot: Int[Array, ""],
    pages: Int[Array, "n"],
    part: Any,
) -> state_lib.ServingState:
    """Undo `read_sequence`, perhaps with a slot and pages of another partition."""

    def write_ids(array, ids, values):
        ids, _ = state_lib.localize_ids(ids, array.shape[2])
        return array.at[:, :, ids].set(values)

    def write(state, slot, pages, part):
        return jax.tree.map(write_ids, state, _sequence_ids(state, slot, pages), part)

    if layout is None:
        return write(state, slot, pages, part)
    specs = state_lib.serving_state_specs(state, layout)
    part_specs = state_lib.serving_state_specs(state, layout, partition_axis=None)
    program = sharding.run_sharded(
        layout, write, (specs, PartitionSpec(), PartitionSpec(), part_specs), specs
    )
    return program(state, slot, pages, part)


def _sequence_ids(
    state: state_lib.ServingState, slot: Int[Array, ""], pages: Int[Array, "n"]
) -> state_lib.ServingState:
    """Return a tree like the state: the pages for arrays of pages, the slot for all others."""
    group_ids = []
    for group_state in state.group_states:
        ids = pages if isinstance(group_state, state_lib.PagedKVCache) else slot[None]
        # A default, because a closure would see the last group only.
        group_ids.append(jax.tree.map(lambda _, ids=ids: ids, group_state))
    expert_ids = jax.tree.map(lambda _: pages, state.expert_id_pages)
    return state_lib.ServingState(tuple(group_ids), expert_ids)


def read_expert_ids(
    layout: sharding.MeshLayout | None, state: state_lib.ServingState, pages: Int[Array, "n"]
) -> Int[Array, "n C L A"]:
    """Return the experts of some pages' tokens, on every device."""
    assert state.expert_id_pages is not None  # the program exists only where they are recorded

    def read(expert_ids, pages):
        pages, is_local = state_lib.localize_ids(pages, expert_ids.shape[2])
        return _take_from_owner(expert_ids[0, 0, pages], is_local, 0)

    expert_ids = state.expert_id_pages.expert_ids
    if layout is None:
        return read(expert_ids, pages)
    specs = state_lib.serving_state_specs(state, layout).expert_id_pages
    assert specs is not None
    return _run_on_mesh(layout, read, specs.expert_ids, PartitionSpec())(expert_ids, pages)


def read_sampling_state(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
) -> slot_sampling.SlotSamplingState:
    """Return what one slot's sequence needs for its next token, on every device."""

    def read(sampling_state, slot):
        slots, is_local = state_lib.localize_ids(slot[None], len(sampling_state.token))
        return jax.tree.map(
            lambda array: _take_from_owner(array[slots], is_local, 0)[0], sampling_state
        )

    if layout is None:
        return read(sampling_state, slot)
    specs = slot_sampling.sampling_state_specs(sampling_state, layout)
    return _run_on_mesh(layout, read, specs, PartitionSpec())(sampling_state, slot)


def write_sampling_state(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    row: slot_sampling.SlotSamplingState,
) -> slot_sampling.SlotSamplingState:
    """Undo `read_sampling_state`, perhaps in another slot."""
    return _change_slot(layout, sampling_state, slot, lambda _, row: row, row)


def reset_slot(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    ids: Int[Array, "n"],
    values: Float[Array, "n"],
) -> slot_sampling.SlotSamplingState:
    """Forget what a slot's last sequence left, and set the new one's bias.

    Padding of `ids` is token 0 with value 0: values are added, so it changes nothing.
    """

    def reset(row, ids, values):
        return dataclasses.replace(
            row,
            counts=jnp.zeros_like(row.counts),
            bias=jnp.zeros_like(row.bias).at[ids].add(values),
            masks=jnp.full_like(row.masks, 0xFFFFFFFF),
        )

    return _change_slot(layout, sampling_state, slot, reset, ids, values)


def count_tokens(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    tokens: Int[Array, "n"],
    in_prompt: Bool[Array, ""],
) -> slot_sampling.SlotSamplingState:
    """Count tokens (-1: none) of the prompt or of the output.

    A count has two parts: `PROMPT_FLAG` if the prompt has the token, plus its number in the output.
    The repetition penalty looks at both, presence and frequency penalties at the output alone.
    """

    def count(row, tokens, in_prompt):
        # Padding counts token 0 by nothing.
        ids, is_token = jnp.maximum(tokens, 0), tokens >= 0
        counts = row.counts
        # Both are computed and one is kept, so that one program serves both.
        flags = jnp.zeros_like(counts).at[ids].max(jnp.where(is_token, sampling.PROMPT_FLAG, 0))
        prompt = counts | flags
        output = counts.at[ids].add(is_token.astype(jnp.int32))
        return dataclasses.replace(row, counts=jnp.where(in_prompt, prompt, output))

    return _change_slot(layout, sampling_state, slot, count, tokens, in_prompt)


def set_mask(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    mask: UInt[Array, "W"],
) -> slot_sampling.SlotSamplingState:
    """Set which tokens a slot's sequence may choose next: one bit a token."""
    return _change_slot(
        layout, sampling_state, slot, lambda row, mask: dataclasses.replace(row, masks=mask), mask
    )


def _change_slot(
    layout: sharding.MeshLayout | None,
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    change: Callable,
    *arguments: Any,
) -> slot_sampling.SlotSamplingState:
    """Return the state with one slot's row replaced by change(row, *arguments)."""

    def run(sampling_state, slot, *arguments):
        slot, is_local = state_lib.localize_ids(slot, len(sampling_state.token))
        row = jax.tree.map(lambda array: array[slot], sampling_state)

        def write(array, old, new):
            if new is old:  # a field that the change leaves alone needs no write
                return array
            # Padding of the other partitions keeps what it has: a row of it must never run.
            return array.at[slot].set(jnp.where(is_local, new, old))

        return jax.tree.map(write, sampling_state, row, change(row, *arguments))

    if layout is None:
        return run(sampling_state, slot, *arguments)
    specs = slot_sampling.sampling_state_specs(sampling_state, layout)
    return _run_on_mesh(layout, run, specs, specs)(sampling_state, slot, *arguments)


def _take_from_owner(
    values: Shaped[Array, "..."], is_local: Bool[Array, "n"], dim: int
) -> Shaped[Array, "..."]:
    """Return, on every device, the values of the devices that have them.

    Args:
      values: those of a dimension `dim` of n.
      is_local: whether this device has them.
    """
    if collectives.axis_size("batch") == 1:
        return values
    is_local = is_local.reshape((-1, *(1,) * (values.ndim - dim - 1)))
    is_integer = not jnp.issubdtype(values.dtype, jnp.floating)
    # Small integers and booleans are added up as int32.
    wide = values.astype(jnp.int32) if is_integer and values.dtype != jnp.uint32 else values
    # Adding -0.0 leaves every float as it is. 0.0 would make 0.0 of -0.0.
    nothing = jnp.asarray(0 if is_integer else -0.0, wide.dtype)
    return collectives.psum(jnp.where(is_local, wide, nothing), "batch").astype(values.dtype)


def _run_on_mesh(
    layout: sharding.MeshLayout, function: Callable, buffer_specs: Any, output_specs: Any
) -> Callable:
    """Return `function` of a buffer and of host arrays that every device has."""

    def run(buffer, *arguments):
        replicated = jax.tree.map(lambda _: PartitionSpec(), arguments)
        program = sharding.run_sharded(layout, function, (buffer_specs, *replicated), output_specs)
        return program(buffer, *arguments)

    return run
