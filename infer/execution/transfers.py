"""The programs that move memory: between slots, to and from the host, and into `programs.SlotSamplingState`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from infer.execution import programs, sampling
from m1_jax import state as state_lib

SWAP_PAGES = 16  # pages moved to or from the host by one call
COUNT_TOKENS = 2048  # tokens counted by one call


def copy_states(state, source: Int[Array, ""], target: Int[Array, ""]):
    """Copy a slot's recurrent states, at a multiple of the chunk, where its ring is empty."""

    def one(layer):
        if isinstance(layer, state_lib.PagedKVCache):
            return layer
        new = layer.states.at[:, :, target].set(layer.states[:, :, source])
        return dataclasses.replace(layer, states=new)

    return dataclasses.replace(state, layers=tuple(map(one, state.layers)))


def read_sequence(state, slot: Int[Array, ""], pages: Int[Array, "n"]):
    """Return everything in a slot, and in some pages."""
    return jax.tree.map(lambda a, at: a[:, :, at], state, _sequence_indices(state, slot, pages))


def write_sequence(state, slot: Int[Array, ""], pages: Int[Array, "n"], held):
    """Undo `read_sequence`, perhaps elsewhere."""
    places = _sequence_indices(state, slot, pages)
    return jax.tree.map(lambda a, at, new: a.at[:, :, at].set(new), state, places, held)


def _sequence_indices(state, slot, pages):
    layers = [
        jax.tree.map(lambda _, x=x: pages if isinstance(x, state_lib.PagedKVCache) else slot, x)
        for x in state.layers
    ]
    routes = jax.tree.map(lambda _: pages, state.expert_id_pages)
    return state_lib.ServingState(tuple(layers), routes)


def read_expert_ids(state, pages: Int[Array, "n"]) -> Int[Array, "n C L A"]:
    """Return the experts of some pages' tokens."""
    return state.expert_id_pages.expert_ids[0, 0, pages]


def read_sampling_state(
    rows: programs.SlotSamplingState, slot: Int[Array, ""]
) -> programs.SlotSamplingState:
    """Return what one slot's sequence needs for its next token."""
    return jax.tree.map(lambda a: a[slot], rows)


def write_sampling_state(
    rows: programs.SlotSamplingState, slot: Int[Array, ""], row: programs.SlotSamplingState
) -> programs.SlotSamplingState:
    """Undo `read_sampling_state`, perhaps elsewhere."""
    return jax.tree.map(lambda a, new: a.at[slot].set(new), rows, row)


def reset_slot(
    rows: programs.SlotSamplingState, slot, ids: Int[Array, "n"], values: Float[Array, "n"]
) -> programs.SlotSamplingState:
    """Forget what a slot's last sequence left, and set the new one's bias (value 0: none)."""
    return dataclasses.replace(
        rows,
        counts=rows.counts.at[slot].set(0),
        bias=rows.bias.at[slot].set(0.0).at[slot, ids].add(values),
        masks=rows.masks.at[slot].set(jnp.uint32(0xFFFFFFFF)),
    )


def count_tokens(
    rows: programs.SlotSamplingState, slot, tokens: Int[Array, "n"], in_prompt: Bool[Array, ""]
) -> programs.SlotSamplingState:
    """Count tokens (-1: none) of the prompt or of the output."""
    ids, real = jnp.maximum(tokens, 0), tokens >= 0
    seen = rows.counts[slot]
    prompt = seen | jnp.zeros_like(seen).at[ids].max(jnp.where(real, sampling.PROMPT_FLAG, 0))
    output = seen.at[ids].add(real.astype(jnp.int32))
    return dataclasses.replace(
        rows, counts=rows.counts.at[slot].set(jnp.where(in_prompt, prompt, output))
    )


def set_mask(
    rows: programs.SlotSamplingState, slot, mask: UInt[Array, "W"]
) -> programs.SlotSamplingState:
    """Set which tokens a slot's sequence may have next."""
    return dataclasses.replace(rows, masks=rows.masks.at[slot].set(mask))
