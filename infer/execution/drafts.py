"""The program that checks guesses at the next tokens, several of a sequence at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from infer.execution import partitions, programs, sampling, slot_sampling
from m1_jax import collectives
from m1_jax import model as model_lib
from m1_jax.serving import forward, ragged_batch
from m1_jax.serving import state as state_lib


def verify_drafts(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    drafts: Int[Array, "B t"],
    tiles: programs.EngineTiles,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Make tokens as `programs.decode_tokens` does, several at once where guesses turn out right.

    Every guess is checked by choosing from the logits before it as `decode_tokens` would: a row of
    a tile is computed as it is alone. What a wrong guess left in the open chunk and in pages is
    overwritten before anything reads it.

    Args:
      drafts: guesses at the tokens after the next one to enter the state, by row of the sequence's
        open tile, -1 for none. There is none at the last token of a chunk: the recurrent state
        would move on, for good.

    Returns:
      Both states, and what was chosen as arrays [t, B, ...], token -1 where nothing was made.
    """
    verify = functools.partial(_verify_local, tiles=tiles)
    return partitions.run_on_partitions(verify, 1, model, state, sampling_state, batch, drafts)


def _verify_local(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    drafts: Int[Array, "B t"],
    *,
    tiles: programs.EngineTiles,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Check the guesses at this partition's rows."""
    size, tile = drafts.shape
    running = sampling_state.running[batch.slots] & (batch.slots > 0)
    length = sampling_state.length[batch.slots]
    # Columns of the tile [B, t]. The token chosen last enters at `first`, its guesses after it.
    column = jnp.arange(tile, dtype=jnp.int32)[None]
    first = (length % tile)[:, None]
    is_fed = running[:, None] & ((column == first) | ((column > first) & (drafts >= 0)))
    positions = (length[:, None] - first + column).reshape(-1)
    rows = ragged_batch.RaggedBatch(
        jnp.where(is_fed.reshape(-1), positions, -1),
        jnp.where(running, batch.slots, 0),
        batch.pages,
        tiles.attention_tile,
        tiles.matmul_tile,
    )
    tokens = jnp.where(
        column == first, sampling_state.token[batch.slots][:, None], jnp.maximum(drafts, 0)
    )
    logits, state = forward.forward_ragged(model, tokens.reshape(-1), rows, state)
    logits = collectives.all_gather(logits, "vocab", 1)
    # Each column of a tile chooses like a row of its own. Pages are not needed for that.
    by_column = jax.tree.map(
        lambda a: jnp.repeat(a, tile, axis=0), dataclasses.replace(batch, pages=batch.pages[:, :0])
    )
    chosen, stopped = slot_sampling.choose_tokens(
        logits, sampling_state, by_column, is_fed.reshape(-1), positions + 1
    )
    stopped = stopped.reshape(size, tile)
    token = chosen.token.reshape(size, tile)
    is_made = _accept_columns(drafts, token, stopped, column, first) & is_fed
    sampling_state = _record_columns(
        sampling_state, batch, running, token, stopped, is_made, column, length
    )
    chosen = dataclasses.replace(chosen, token=jnp.where(is_made.reshape(-1), chosen.token, -1))
    by_step = jax.tree.map(  # [t, B, ...]: a column here is a step of `decode_tokens`
        lambda a: jnp.moveaxis(a.reshape(size, tile, *a.shape[1:]), 1, 0), chosen
    )
    return state, sampling_state, by_step


def _accept_columns(
    drafts: Int[Array, "B t"],
    token: Int[Array, "B t"],
    stopped: Bool[Array, "B t"],
    column: Int[Array, "1 t"],
    first: Int[Array, "B 1"],
) -> Bool[Array, "B t"]:
    """Return the columns whose choice counts: all before were guessed right and did not end it.

    The guess at the next column must be the token chosen here.
    """
    # Column c is right if the guess at c + 1 is the token chosen at c. The last column is compared
    # with the first guess. The next roll moves that to column 0, where `column <= first` holds.
    is_right = (column < first) | (jnp.roll(drafts, -1, axis=1) == token) & ~stopped
    # A column counts if the one before it is right, and all before that.
    is_right = jnp.roll(is_right, 1, axis=1) | (column <= first)
    return jnp.cumprod(is_right, axis=1) > 0


def _record_columns(
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    running: Bool[Array, "B"],
    token: Int[Array, "B t"],
    stopped: Bool[Array, "B t"],
    is_made: Bool[Array, "B t"],
    column: Int[Array, "1 t"],
    length: Int[Array, "B"],
) -> slot_sampling.SlotSamplingState:
    """Note the tokens made of every running row: those of the columns in `is_made`."""
    # Rows that do not run write to slot 0, so their values do not matter.
    last = jnp.max(jnp.where(is_made, column, 0), axis=1)
    last_cell = jnp.arange(len(token)), last
    slots = jnp.where(running, batch.slots, 0)
    num_made = jnp.sum(is_made, axis=1)
    return dataclasses.replace(
        sampling_state,
        token=sampling_state.token.at[slots].set(token[last_cell]),
        length=sampling_state.length.at[slots].set(length + num_made),
        running=sampling_state.running.at[slots].set(running & ~stopped[last_cell]),
        counts=sampling_state.counts.at[slots[:, None], jnp.maximum(token, 0)].add(
            is_made.astype(jnp.int32)
        ),
    )
