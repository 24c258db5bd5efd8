"""The programs an engine runs on the device, all compiled before the first request.

Every option of a request is an array, so nothing about requests changes a program. There is one
decode program per number of rows, one prefill program per number of tokens, and a few that move
memory (`execution/transfers.py`). What lasts between programs stays on the device: the serving
state (`m1_jax/serving/state.py`), and for each slot what choosing its next token needs
(`execution/slot_sampling.py`). A program's other arguments are fresh host arrays every time.

Slot 0 and page 0 belong to padding. Rows that do not take part are pointed at them, so that their
writes need no condition and harm nobody.

On a mesh, a program is one `shard_map` (`execution/partitions.py`). A device has the rows, slots
and pages of its own partition. It computes its rows' states, attention, projections and choices,
and sends rows to the devices that have their experts. What was chosen is gathered at the end,
because process 0 reads the rows of all partitions.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from infer import config as config_lib
from infer import options as options_lib
from infer.execution import partitions, sampling, slot_sampling
from m1_jax import collectives, sharding
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax.serving import forward, ragged_batch
from m1_jax.serving import state as state_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Chunks of prompts, packed: each starts on a tile and is padded to whole tiles.

    M are the rows, I the tiles, B the sequences of the batch. On a mesh, those of a partition lie
    one after another, and numbers of rows count from the partition's first.

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

    @classmethod
    def of_config(cls, config: config_lib.EngineConfig) -> "EngineTiles":
        """Return the tiles of a config that `EngineConfig.for_platform` returned."""
        assert config.matmul_tile is not None
        return cls(config.attention_tile, config.matmul_tile)


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
    decode = functools.partial(_decode_local, tiles=tiles, max_steps=max_steps)
    return partitions.run_on_partitions(decode, 1, model, state, sampling_state, batch, steps)


def _decode_local(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    steps: Int[Array, ""],
    *,
    tiles: EngineTiles,
    max_steps: int,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Make the tokens of this partition's rows."""

    def any_runs(sampling_state):
        # Of all partitions: devices must agree on the steps, because they meet in collectives.
        runs = jnp.any(sampling_state.running[batch.slots]).astype(jnp.int32)
        return collectives.pmax(runs, "batch") > 0

    def has_work(carry):
        step, is_running, *_ = carry
        return (step < steps) & is_running

    # The carry: step, whether any row runs, both states, and the arrays [max_steps, B, ...] of what
    # was chosen so far.
    def decode_step(carry):
        step, _, state, sampling_state, outputs = carry
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
        logits = collectives.all_gather(logits, "vocab", 1)
        sampling_state, chosen = slot_sampling.choose_and_record(
            logits, sampling_state, batch, running, length + 1
        )
        outputs = _write_step(outputs, chosen, step)
        return step + 1, any_runs(sampling_state), state, sampling_state, outputs

    # The loop's carry must have the dtypes that a step returns: they are read off one abstract
    # step, not spelled here a second time.
    carry = (jnp.int32(0), any_runs(sampling_state), state, sampling_state)
    empty = _empty_tokens(batch, max_steps)
    shapes = jax.eval_shape(lambda: decode_step((*carry, empty))[-1])
    outputs = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    # A token of -1 says that nothing was made. The zeros of the other arrays mean nothing then.
    outputs = dataclasses.replace(outputs, token=outputs.token - 1)
    # `while_loop`, not `scan`: it ends when no row runs any more, and `steps` is an array.
    _, _, state, sampling_state, outputs = jax.lax.while_loop(
        has_work, decode_step, (*carry, outputs)
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
    num_partitions = layout.axis_size("batch")
    sizes = config.split(num_partitions)
    state = state_lib.abstract_serving_state(
        model_config, sizes.total_slots, sizes.total_pages, sizes.chunk_tokens, layout
    )
    size = num_partitions * sizes.decode_batch_sizes[-1]
    sampling_state = jax.eval_shape(
        lambda: slot_sampling.init_sampling_state(
            sizes.total_slots, model_config.vocab_size, num_partitions
        )
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
    arguments = (sampling_state, batch, jax.ShapeDtypeStruct((), jnp.int32))
    return state, partitions.shard_rows(arguments, layout)


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
    prefill = functools.partial(_prefill_local, tiles=tiles)
    return partitions.run_on_partitions(prefill, 0, model, state, sampling_state, batch, prompts)


def _prefill_local(
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    prompts: PackedPrompts,
    *,
    tiles: EngineTiles,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Append the chunks of this partition's prompts."""
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
    logits = collectives.all_gather(logits, "vocab", 1)
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
