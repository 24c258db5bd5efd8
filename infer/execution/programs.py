"""The programs an engine runs on the device, all compiled before the first request.

Every option of a request is an array, so nothing about requests changes a program. There is one
decode program per number of rows, one prefill program per number of tokens, and a few that move
memory (`execution/transfers.py`). What lasts between programs stays on the device: the serving
state (`m1_jax/serving/state.py`), and for each slot what choosing its next token needs
(`execution/slot_sampling.py`). A program's other arguments are fresh host arrays every time.

Slot 0 and page 0 belong to padding. Rows that do not take part are pointed at them, so that their
writes need no condition and harm nobody.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from infer import config as config_lib
from infer import options as options_lib
from infer.execution import sampling, slot_sampling
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import sharding
from m1_jax.serving import forward, ragged_batch
from m1_jax.serving import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Chunks of prompts, packed: each starts on a tile and is padded to whole tiles.

    M are the rows, I the tiles, B the sequences of the batch.

    Attributes:
      tokens: the token of each row.
      positions: its position in its sequence, -1 for padding.
      chunk_index: row in the batch of each tile's sequence, -1 for padding.
      last_rows: row of each chunk's last token where the next token is to be chosen, else -1.
      lengths: tokens in the state after this chunk, 0 if more of the prompt follows.
      known_tokens: the token after this chunk, for a sequence that is computed again and has
        chosen it before, else -1.
    """

    tokens: Int[Array, "M"]
    positions: Int[Array, "M"]
    chunk_index: Int[Array, "I"]
    last_rows: Int[Array, "B"]
    lengths: Int[Array, "B"]
    known_tokens: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineTiles:
    """Sizes that decide the last bits of all numbers: see `ragged_batch.RaggedBatch`.

    Attributes:
      attention_tile: rows of one sequence that attention computes at a time.
      matmul_tile: rows that a matrix product computes at a time, 0 for all of them.
    """

    attention_tile: int = dataclasses.field(default=8, metadata={"static": True})
    matmul_tile: int = dataclasses.field(default=8, metadata={"static": True})


def decode_tokens(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    steps: Int[Array, ""],
    tiles: EngineTiles,
    max_steps: int,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Make up to `steps` tokens for every running row.

    Several steps in one program save the host's round trip between them.

    Returns:
      Both states, and what was chosen as arrays [max_steps, B, ...]. Tokens are -1 where a row had
      ended.
    """

    def has_work(carry):
        step, _, sampling_state, _ = carry
        return (step < steps) & jnp.any(sampling_state.running[batch.slots])

    # The carry: step, both states, and the arrays [max_steps, B, ...] of what was chosen so far.
    def decode_step(carry):
        step, state, sampling_state, outputs = carry
        # Slot 0 is padding's, and padding never runs.
        running = sampling_state.running[batch.slots] & (batch.slots > 0)
        length = sampling_state.length[batch.slots]
        # The token chosen last enters at position `length`. Rows at -1 are left out.
        rows = ragged_batch.RaggedBatch(
            jnp.where(running, length, -1),
            jnp.where(running, batch.slots, 0),
            batch.pages,
            tiles.attention_tile,
            tiles.matmul_tile,
        )
        tokens = sampling_state.token[batch.slots]
        logits, state = forward.forward_ragged(model, tokens, rows, state)
        # Every device chooses for all rows: the sampling state is replicated.
        logits = sharding.replicate_array(logits, model.layout)
        sampling_state, chosen = slot_sampling.choose_and_record(
            logits, sampling_state, batch, running, length + 1
        )
        outputs = _write_step(outputs, chosen, step)
        return step + 1, state, sampling_state, outputs

    # The loop's carry must have the dtypes that a step returns: they are read off one abstract
    # step, not spelled here a second time.
    empty = _empty_tokens(batch, max_steps)
    shapes = jax.eval_shape(lambda: decode_step((jnp.int32(0), state, sampling_state, empty))[3])
    outputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    # A token of -1 says that nothing was made. The zeros of the other arrays mean nothing then.
    outputs = dataclasses.replace(outputs, token=outputs.token - 1)
    # `while_loop`, not `scan`: it ends when no row runs any more, and `steps` is an array.
    _, state, sampling_state, outputs = jax.lax.while_loop(
        has_work, decode_step, (jnp.int32(0), state, sampling_state, outputs)
    )
    return state, sampling_state, outputs


def abstract_decode_inputs(
    model_config: model_config_lib.ModelConfig,
    layout: sharding.MeshLayout,
    config: config_lib.EngineConfig,
) -> tuple[state_lib.ServingState, tuple[Any, ...]]:
    """Return the state that `decode_tokens` takes, and what it takes after it, as sharded shapes.

    For `m1_jax.plan`, which compiles the decode program at full size without the hardware.
    """
    state = state_lib.abstract_serving_state(
        model_config, config.total_slots, config.total_pages, config.chunk_tokens, layout
    )
    size = config.decode_batch_sizes[-1]
    sampling_state = jax.eval_shape(
        lambda: slot_sampling.init_sampling_state(config.total_slots, model_config.vocab_size)
    )
    # The fields are annotated as arrays. `Any` lets shapes through the type checker.
    ints: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    abstract_batch: Any = slot_sampling.SequenceBatch
    batch = abstract_batch(
        slots=ints,
        pages=jax.ShapeDtypeStruct((size, config.pages_per_sequence), jnp.int32),
        options=jax.eval_shape(lambda: sampling.make_options(size)),
        seeds=jax.ShapeDtypeStruct((size,), jnp.uint32),
        stop_ids=jax.ShapeDtypeStruct((size, options_lib.MAX_STOP_IDS), jnp.int32),
        min_stop_length=ints,
        length_limit=ints,
        forced_tokens=ints,
    )
    replicated = NamedSharding(layout.mesh, PartitionSpec())
    return state, jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=replicated),
        (sampling_state, batch, jax.ShapeDtypeStruct((), jnp.int32)),
    )


def verify_drafts(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    drafts: Int[Array, "B t"],
    tiles: EngineTiles,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Make tokens as `decode_tokens` does, several at once where guesses at them turn out right.

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
    logits = sharding.replicate_array(logits, model.layout)
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


def _write_step(
    outputs: sampling.ChosenTokens, chosen: sampling.ChosenTokens, step: Int[Array, ""]
) -> sampling.ChosenTokens:
    """Put what one step chose [B, ...] into the arrays of all steps [max_steps, B, ...]."""
    return jax.tree.map(
        lambda all_steps, row: jax.lax.dynamic_update_index_in_dim(all_steps, row, step, 0),
        outputs,
        chosen,
    )


def _empty_tokens(batch: slot_sampling.SequenceBatch, steps: int) -> sampling.ChosenTokens:
    """Return arrays [steps, B, ...] without a token."""
    shape = (steps, batch.slots.shape[0])
    top = (*shape, options_lib.MAX_TOP_LOGPROBS)
    return sampling.ChosenTokens(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(shape),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top),
    )


def prefill_prompts(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    prompts: PackedPrompts,
    tiles: EngineTiles,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Append chunks of prompts.

    Returns:
      Both states, and what was chosen as arrays [B, ...]: a token after every chunk that ends its
      prompt, -1 after the others.
    """
    # One index a tile. The index -1 of padding would take the last sequence.
    index = jnp.maximum(prompts.chunk_index, 0)
    rows = ragged_batch.RaggedBatch(
        prompts.positions,
        jnp.where(prompts.chunk_index >= 0, batch.slots[index], 0),
        batch.pages[index],
        tiles.attention_tile,
        tiles.matmul_tile,
    )
    # Logits of the last rows alone: those of all rows would be the largest array of the program.
    logits, state = forward.forward_ragged(model, prompts.tokens, rows, state, prompts.last_rows)
    logits = sharding.replicate_array(logits, model.layout)
    sampling_state, chosen = slot_sampling.choose_and_record(
        logits, sampling_state, batch, prompts.last_rows >= 0, prompts.lengths
    )
    # Sequences that are computed again: nothing is chosen, decoding goes on from the known token.
    is_known = prompts.known_tokens >= 0
    slots = jnp.where(is_known, batch.slots, 0)
    sampling_state = dataclasses.replace(
        sampling_state,
        token=sampling_state.token.at[slots].set(prompts.known_tokens),
        length=sampling_state.length.at[slots].set(prompts.lengths),
        running=sampling_state.running.at[slots].set(is_known),
    )
    return state, sampling_state, chosen
