"""What each slot needs to choose its next token, and the choice itself.

`SlotSamplingState` lasts between programs and stays on the device. `SequenceBatch` is new in every
program: it says which slots take part, and what their requests ask for.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from infer.execution import sampling
from m1_jax import sharding
from m1_jax.serving import ragged_batch
from m1_jax.serving import state as state_lib

# Rows that choosing takes at a time, whatever the batch: a row's numbers must not depend on the
# batch (`serving/ragged_batch.py`).
SAMPLE_ROWS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSamplingState:
    """By slot, what its sequence needs for its next token.

    On a mesh, slots are split over partitions as those of `serving/state.py` are.

    Attributes:
      token: the token chosen last, which is not in the state yet.
      length: tokens in the state.
      running: whether the sequence goes on: false after a stop token and at the limit.
      counts: how often each token occurs in the output, plus `sampling.PROMPT_FLAG` for the prompt.
      bias: added to the logits.
      masks: one bit a token: whether a grammar allows it.
    """

    token: Int[Array, "slots"]
    length: Int[Array, "slots"]
    running: Bool[Array, "slots"]
    counts: Int[Array, "slots V"]
    bias: Float[Array, "slots V"]
    masks: UInt[Array, "slots W"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequenceBatch:
    """The sequences of one program.

    On a mesh, the rows of a partition lie one after another. A device gets those of its own.

    Attributes:
      slots: state slot of each row. Rows of slot 0 are padding.
      pages: the sequence's pages, in order, at least up to the last one that is written.
      options: sampling options of the requests.
      seeds: seeds of the requests.
      stop_ids: tokens that end the sequence. -1 where there are fewer.
      min_stop_length: length of prompt and output from which on a stop id may be chosen.
      length_limit: length of prompt and output at which the sequence ends.
      forced_tokens: the token to choose, whatever the model says. -1 for none.
    """

    slots: Int[Array, "B"]
    pages: Int[Array, "B P"]
    options: sampling.SamplingOptions
    seeds: UInt[Array, "B"]
    stop_ids: Int[Array, "B S"]
    min_stop_length: Int[Array, "B"]
    length_limit: Int[Array, "B"]
    forced_tokens: Int[Array, "B"]


def init_sampling_state(
    num_slots: int, vocab_size: int, num_partitions: int = 1
) -> SlotSamplingState:
    """Return the sampling state of slots 0 to num_slots of each partition, none of them running."""
    total_slots = num_partitions * (num_slots + 1)  # slot 0, which is padding's, included
    return SlotSamplingState(
        jnp.zeros(total_slots, jnp.int32),
        jnp.zeros(total_slots, jnp.int32),
        jnp.zeros(total_slots, bool),
        jnp.zeros((total_slots, vocab_size), jnp.int32),
        jnp.zeros((total_slots, vocab_size), jnp.float32),
        # All bits are set: without a grammar every token is allowed.
        jnp.full((total_slots, -(-vocab_size // 32)), 0xFFFFFFFF, jnp.uint32),
    )


def sampling_state_specs(
    sampling_state: SlotSamplingState, layout: sharding.MeshLayout
) -> SlotSamplingState:
    """Return the mesh axes of every array."""
    return jax.tree.map(lambda _: layout.activation_spec("batch"), sampling_state)


def localize_batch(
    batch: SequenceBatch, state: state_lib.ServingState, sampling_state: SlotSamplingState
) -> SequenceBatch:
    """Return the batch with slots and pages as this device numbers them."""
    slots, _ = state_lib.localize_ids(batch.slots, len(sampling_state.token))
    pages, page_axis_size = batch.pages, state.page_axis_size
    if page_axis_size is not None:
        pages, _ = state_lib.localize_ids(pages, page_axis_size)
    return dataclasses.replace(batch, slots=slots, pages=pages)


def choose_and_record(
    logits: Float[Array, "B V"],
    sampling_state: SlotSamplingState,
    batch: SequenceBatch,
    row_mask: Bool[Array, "B"],
    length: Int[Array, "B"],
) -> tuple[SlotSamplingState, sampling.ChosenTokens]:
    """Choose a token for the rows of the mask, whose state holds `length` tokens, and record it."""
    chosen, stopped = choose_tokens(logits, sampling_state, batch, row_mask, length)
    # Slot 0 takes the writes of all other rows. Several rows may write there, in any order.
    slots = jnp.where(row_mask, batch.slots, 0)
    sampling_state = dataclasses.replace(
        sampling_state,
        token=sampling_state.token.at[slots].set(chosen.token),
        length=sampling_state.length.at[slots].set(length),
        running=sampling_state.running.at[slots].set(row_mask & ~stopped),
        counts=sampling_state.counts.at[slots, chosen.token].add(row_mask.astype(jnp.int32)),
    )
    return sampling_state, dataclasses.replace(chosen, token=jnp.where(row_mask, chosen.token, -1))


def choose_tokens(
    logits: Float[Array, "B V"],
    sampling_state: SlotSamplingState,
    batch: SequenceBatch,
    row_mask: Bool[Array, "B"],
    length: Int[Array, "B"],
) -> tuple[sampling.ChosenTokens, Bool[Array, "B"]]:
    """Return the tokens chosen, and whether each ends its sequence."""

    def choose_tile(logits, slots, options, seeds, stop_ids, is_early, forced, length):
        slot_state = (
            sampling_state.counts[slots],
            sampling_state.bias[slots],
            sampling_state.masks[slots],
        )
        # Stop ids are forbidden until the request's min_tokens are made.
        banned = jnp.where(is_early[:, None], stop_ids, -1)
        # The key is made of the request's seed and the position: the same in any batch and run.
        keys = sampling.sampling_keys(seeds, length)
        return sampling.sample_tokens(logits, options, keys, *slot_state, banned, forced)

    total = length + 1  # the new token included
    can_stop = total >= batch.min_stop_length
    # Tiles have a fixed number of rows, so that sums over the vocabulary do not depend on B.
    chosen = ragged_batch.map_row_tiles(
        choose_tile,
        SAMPLE_ROWS,
        row_mask,
        logits,
        batch.slots,
        batch.options,
        batch.seeds,
        batch.stop_ids,
        ~can_stop,
        batch.forced_tokens,
        length,
    )
    stopped = jnp.any(chosen.token[:, None] == batch.stop_ids, axis=1) & can_stop
    return chosen, stopped | (total >= batch.length_limit)
