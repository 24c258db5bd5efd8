"""The programs that move memory: between slots, to and from the host, and into sampling states.

All of them index axis 2 of the state's arrays, which is that of slots or pages. The two axes before
it say which layer of a stack an array belongs to.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from infer.execution import sampling, slot_sampling
from m1_jax.serving import state as state_lib

# Sizes of one call. Programs have fixed shapes, so longer work is cut and the last call is padded.
SWAP_PAGES = 16  # pages that one call moves to or from the host
COUNT_TOKENS = 2048  # tokens that one call counts


def copy_states(
    state: state_lib.ServingState, source: Int[Array, ""], target: Int[Array, ""]
) -> state_lib.ServingState:
    """Copy a slot's recurrent states, at a multiple of the chunk.

    There the open chunk has no keys and values yet, so the matrices are all there is.
    """

    def copy_slot(group_state: state_lib.GroupState) -> state_lib.GroupState:
        if isinstance(group_state, state_lib.PagedKVCache):
            return group_state
        matrices = group_state.states
        matrices = matrices.at[:, :, target].set(matrices[:, :, source])
        return dataclasses.replace(group_state, states=matrices)

    return dataclasses.replace(state, group_states=tuple(map(copy_slot, state.group_states)))


def read_sequence(
    state: state_lib.ServingState, slot: Int[Array, ""], pages: Int[Array, "n"]
) -> Any:
    """Return everything in a slot, and in some pages: the state without its other slots and pages.

    Padding of `pages` is 0. Page 0 is padding's own, so that reading and writing it does no harm.
    """
    indices = _sequence_indices(state, slot, pages)
    return jax.tree.map(lambda array, index: array[:, :, index], state, indices)


def write_sequence(
    state: state_lib.ServingState, slot: Int[Array, ""], pages: Int[Array, "n"], part: Any
) -> state_lib.ServingState:
    """Undo `read_sequence`, perhaps with another slot and other pages."""
    indices = _sequence_indices(state, slot, pages)
    return jax.tree.map(
        lambda array, index, values: array.at[:, :, index].set(values), state, indices, part
    )


def _sequence_indices(
    state: state_lib.ServingState, slot: Int[Array, ""], pages: Int[Array, "n"]
) -> state_lib.ServingState:
    """Return a tree like the state: the pages for arrays of pages, the slot for all others."""
    group_indices = []
    for group_state in state.group_states:
        index = pages if isinstance(group_state, state_lib.PagedKVCache) else slot
        # A default, because a closure would see the last group only.
        group_indices.append(jax.tree.map(lambda _, index=index: index, group_state))
    expert_ids = jax.tree.map(lambda _: pages, state.expert_id_pages)
    return state_lib.ServingState(tuple(group_indices), expert_ids)


def read_expert_ids(state: state_lib.ServingState, pages: Int[Array, "n"]) -> Int[Array, "n C L A"]:
    """Return the experts of some pages' tokens."""
    assert state.expert_id_pages is not None  # the program exists only where they are recorded
    return state.expert_id_pages.expert_ids[0, 0, pages]


def read_sampling_state(
    sampling_state: slot_sampling.SlotSamplingState, slot: Int[Array, ""]
) -> slot_sampling.SlotSamplingState:
    """Return what one slot's sequence needs for its next token."""
    return jax.tree.map(lambda array: array[slot], sampling_state)


def write_sampling_state(
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    row: slot_sampling.SlotSamplingState,
) -> slot_sampling.SlotSamplingState:
    """Undo `read_sampling_state`, perhaps in another slot."""
    return jax.tree.map(lambda array, value: array.at[slot].set(value), sampling_state, row)


def reset_slot(
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    ids: Int[Array, "n"],
    values: Float[Array, "n"],
) -> slot_sampling.SlotSamplingState:
    """Forget what a slot's last sequence left, and set the new one's bias.

    Padding of `ids` is token 0 with value 0: values are added, so it changes nothing.
    """
    return dataclasses.replace(
        sampling_state,
        counts=sampling_state.counts.at[slot].set(0),
        bias=sampling_state.bias.at[slot].set(0.0).at[slot, ids].add(values),
        masks=sampling_state.masks.at[slot].set(jnp.uint32(0xFFFFFFFF)),
    )


def count_tokens(
    sampling_state: slot_sampling.SlotSamplingState,
    slot: Int[Array, ""],
    tokens: Int[Array, "n"],
    in_prompt: Bool[Array, ""],
) -> slot_sampling.SlotSamplingState:
    """Count tokens (-1: none) of the prompt or of the output.

    A count has two parts: `PROMPT_FLAG` if the prompt has the token, plus its number in the output.
    The repetition penalty looks at both, presence and frequency penalties at the output alone.
    """
    # Padding counts token 0 by nothing.
    ids, is_token = jnp.maximum(tokens, 0), tokens >= 0
    counts = sampling_state.counts[slot]
    # Both are computed and one is kept, so that one program serves both.
    flags = jnp.zeros_like(counts).at[ids].max(jnp.where(is_token, sampling.PROMPT_FLAG, 0))
    prompt = counts | flags
    output = counts.at[ids].add(is_token.astype(jnp.int32))
    return dataclasses.replace(
        sampling_state,
        counts=sampling_state.counts.at[slot].set(jnp.where(in_prompt, prompt, output)),
    )


def set_mask(
    sampling_state: slot_sampling.SlotSamplingState, slot: Int[Array, ""], mask: UInt[Array, "W"]
) -> slot_sampling.SlotSamplingState:
    """Set which tokens a slot's sequence may choose next: one bit a token."""
    return dataclasses.replace(sampling_state, masks=sampling_state.masks.at[slot].set(mask))
