"""The programs an engine runs on the device; all are compiled before the first request.

Every option of a request is an array, so nothing about requests changes a program: there is one
decode program per number of rows, one prefill program per number of tokens, and a few that move
memory. What lasts between them stays on the device: the serving state (`m1_jax/state.py`), and for
each slot what choosing its next token needs (`SlotSamplingState`). A program's own arguments (`SequenceBatch`) are fresh
host arrays every time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from infer import config as config_lib
from infer import options as options_lib
from infer.execution import sampling
from m1_jax import sharding
from m1_jax import state as state_lib
from m1_jax.serving import ragged_batch

SAMPLE_ROWS = (
    8  # rows that choosing takes at a time, for the reason given in `serving/ragged_batch.py`
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSamplingState:
    """By slot, what its sequence needs for its next token; slot 0 is padding's.

    token: chosen, and not yet in the state. length: tokens in the state. running: until a stop
    token or the limit. counts, bias, masks: as `sampling.choose` takes them.
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
    """Sequences of one program; rows of slot 0 are padding.

    seeds: of the requests. stop_ids: -1 where there are fewer. free_from: length of prompt and
    output from which on stop ids may be chosen. limit: length at which the sequence ends. forced:
    token to choose, whatever the model says; -1 for none.
    """

    slots: Int[Array, "B"]
    pages: Int[Array, "B P"]
    options: sampling.SamplingOptions
    seeds: UInt[Array, "B"]
    stop_ids: Int[Array, "B S"]
    min_stop_length: Int[Array, "B"]
    length_limit: Int[Array, "B"]
    forced_tokens: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Parts of prompts, packed: each starts on a tile and is padded to whole tiles.

    tokens, positions: of M rows; position -1 is padding. part: of each tile, -1 for padding.
    last: row of each part's last token where the next token is to be chosen, else -1.
    length: tokens in the state after this part, 0 if more of the prompt follows. known: the token
    chosen already, for a sequence that is computed again; else -1.
    """

    tokens: Int[Array, "M"]
    positions: Int[Array, "M"]
    chunk_index: Int[Array, "I"]
    last_rows: Int[Array, "B"]
    lengths: Int[Array, "B"]
    known_tokens: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes that decide the numbers: see `serving.RaggedBatch`."""

    attention_tile: int = dataclasses.field(default=8, metadata={"static": True})
    matmul_tile: int = dataclasses.field(default=8, metadata={"static": True})


def init_sampling_state(num_slots: int, vocab_size: int) -> SlotSamplingState:
    """Return the rows of slots 0 to num_slots, none of them running."""
    number = num_slots + 1
    return SlotSamplingState(
        jnp.zeros(number, jnp.int32),
        jnp.zeros(number, jnp.int32),
        jnp.zeros(number, bool),
        jnp.zeros((number, vocab_size), jnp.int32),
        jnp.zeros((number, vocab_size), jnp.float32),
        jnp.full((number, -(-vocab_size // 32)), 0xFFFFFFFF, jnp.uint32),
    )


def decode_tokens(
    model: Any,
    state: state_lib.ServingState,
    rows: SlotSamplingState,
    batch: SequenceBatch,
    steps: Int[Array, ""],
    recipe: Tiling,
    most_steps: int,
) -> tuple[state_lib.ServingState, SlotSamplingState, sampling.Chosen]:
    """Make up to `steps` tokens for every running row; what was chosen has a leading step axis.

    Tokens are -1 where a row had ended.
    """

    def going(carry):
        step, _, rows, _ = carry
        return (step < steps) & jnp.any(rows.running[batch.slots])

    def body(carry):
        step, state, rows, made = carry
        running = rows.running[batch.slots] & (batch.slots > 0)
        length = rows.length[batch.slots]
        work = ragged_batch.RaggedBatch(
            jnp.where(running, length, -1),
            jnp.where(running, batch.slots, 0),
            batch.pages,
            recipe.attention_tile,
            recipe.matmul_tile,
        )
        logits, state = ragged_batch.forward_ragged(model, rows.token[batch.slots], work, state)
        logits = sharding.replicate_array(logits, model.layout)
        rows, chosen = _choose_and_record(logits, rows, batch, running, length + 1)
        made = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, step, 0), made, chosen
        )
        return step + 1, state, rows, made

    one = jax.eval_shape(
        lambda: body((jnp.int32(0), state, rows, _empty_tokens(batch, most_steps)))[3]
    )
    made = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)
    made = dataclasses.replace(made, token=made.token - 1)
    _, state, rows, made = jax.lax.while_loop(going, body, (jnp.int32(0), state, rows, made))
    return state, rows, made


def abstract_decode_inputs(
    model_config: Any, layout: sharding.MeshLayout, config: config_lib.EngineConfig
) -> tuple[state_lib.ServingState, tuple[Any, ...]]:
    """Return the state that `decode_tokens` takes, and what it takes after it, as sharded shapes."""
    state = state_lib.abstract_serving_state(
        model_config, config.total_slots, config.total_pages, config.chunk_tokens, layout
    )
    size = config.decode_batch_sizes[-1]
    rows = jax.eval_shape(lambda: init_sampling_state(config.total_slots, model_config.vocab_size))
    ints: Any = jax.ShapeDtypeStruct((size,), jnp.int32)
    make: Any = SequenceBatch
    batch = make(
        slots=ints,
        pages=jax.ShapeDtypeStruct((size, config.pages_per_sequence), jnp.int32),
        options=jax.eval_shape(lambda: sampling.options(size)),
        seeds=jax.ShapeDtypeStruct((size,), jnp.uint32),
        stop_ids=jax.ShapeDtypeStruct((size, options_lib.MAX_STOP_IDS), jnp.int32),
        min_stop_length=ints,
        length_limit=ints,
        forced_tokens=ints,
    )
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return state, jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere),
        (rows, batch, jax.ShapeDtypeStruct((), jnp.int32)),
    )


def verify_drafts(
    model: Any,
    state: state_lib.ServingState,
    rows: SlotSamplingState,
    batch: SequenceBatch,
    drafts: Int[Array, "B t"],
    recipe: Tiling,
) -> tuple[state_lib.ServingState, SlotSamplingState, sampling.Chosen]:
    """Make tokens as `decode_tokens` does, several at once where guesses at them turn out right.

    drafts: by place in the sequence's open tile, guesses at the tokens after the next one to enter
      the state; -1 is none. None at the last place of a chunk: the state would move on, for good.

    Every guess is checked by choosing from the logits before it as `decode_tokens` would: a row of a tile
    is computed as it is alone. What a wrong guess left in ring and pages is overwritten before
    anything reads it.
    """
    size, tile = drafts.shape
    running = rows.running[batch.slots] & (batch.slots > 0)
    length = rows.length[batch.slots]
    place = jnp.arange(tile, dtype=jnp.int32)[None]
    first = (length % tile)[:, None]
    real = running[:, None] & ((place == first) | ((place > first) & (drafts >= 0)))
    positions = (length[:, None] - first + place).reshape(-1)
    work = ragged_batch.RaggedBatch(
        jnp.where(real.reshape(-1), positions, -1),
        jnp.where(running, batch.slots, 0),
        batch.pages,
        recipe.attention_tile,
        recipe.matmul_tile,
    )
    tokens = jnp.where(place == first, rows.token[batch.slots][:, None], jnp.maximum(drafts, 0))
    logits, state = ragged_batch.forward_ragged(model, tokens.reshape(-1), work, state)
    logits = sharding.replicate_array(logits, model.layout)
    each = jax.tree.map(
        lambda a: jnp.repeat(a, tile, axis=0), dataclasses.replace(batch, pages=batch.pages[:, :0])
    )
    chosen, stopped = _choose_tokens(logits, rows, each, real.reshape(-1), positions + 1)
    stopped = stopped.reshape(size, tile)
    token = chosen.token.reshape(size, tile)
    # A row counts if all before it were guessed right and did not end the sequence.
    right = (place < first) | (jnp.roll(drafts, -1, axis=1) == token) & ~stopped
    right = jnp.roll(right, 1, axis=1) | (place <= first)
    made = (jnp.cumprod(right, axis=1) > 0) & real
    last = jnp.max(jnp.where(made, place, 0), axis=1)
    at = jnp.arange(size), last
    slots = jnp.where(running, batch.slots, 0)
    number = jnp.sum(made, axis=1)
    rows = dataclasses.replace(
        rows,
        token=rows.token.at[slots].set(token[at]),
        length=rows.length.at[slots].set(length + number),
        running=rows.running.at[slots].set(running & ~stopped[at]),
        counts=rows.counts.at[slots[:, None], jnp.maximum(token, 0)].add(made.astype(jnp.int32)),
    )
    chosen = dataclasses.replace(chosen, token=jnp.where(made.reshape(-1), chosen.token, -1))
    by_step = jax.tree.map(
        lambda a: jnp.moveaxis(a.reshape(size, tile, *a.shape[1:]), 1, 0), chosen
    )
    return state, rows, by_step


def _empty_tokens(batch: SequenceBatch, steps: int) -> sampling.Chosen:
    shape = (steps, batch.slots.shape[0])
    top = (*shape, options_lib.MAX_TOP_LOGPROBS)
    return sampling.Chosen(
        jnp.full(shape, -1, jnp.int32),
        jnp.zeros(shape),
        jnp.zeros(shape),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top),
    )


def prefill_prompts(
    model: Any,
    state: state_lib.ServingState,
    rows: SlotSamplingState,
    batch: SequenceBatch,
    prompts: PackedPrompts,
    recipe: Tiling,
) -> tuple[state_lib.ServingState, SlotSamplingState, sampling.Chosen]:
    """Append parts of prompts; return what was chosen after those that are the last of theirs."""
    part = jnp.maximum(prompts.chunk_index, 0)
    work = ragged_batch.RaggedBatch(
        prompts.positions,
        jnp.where(prompts.chunk_index >= 0, batch.slots[part], 0),
        batch.pages[part],
        recipe.attention_tile,
        recipe.matmul_tile,
    )
    logits, state = ragged_batch.forward_ragged(
        model, prompts.tokens, work, state, prompts.last_rows
    )
    logits = sharding.replicate_array(logits, model.layout)
    rows, chosen = _choose_and_record(logits, rows, batch, prompts.last_rows >= 0, prompts.lengths)
    again = prompts.known_tokens >= 0
    slots = jnp.where(again, batch.slots, 0)
    rows = dataclasses.replace(
        rows,
        token=rows.token.at[slots].set(prompts.known_tokens),
        length=rows.length.at[slots].set(prompts.lengths),
        running=rows.running.at[slots].set(again),
    )
    return state, rows, chosen


def _choose_and_record(
    logits: Float[Array, "B V"],
    rows: SlotSamplingState,
    batch: SequenceBatch,
    wanted: Bool[Array, "B"],
    length: Int[Array, "B"],
) -> tuple[SlotSamplingState, sampling.Chosen]:
    """Choose a token for the wanted rows, whose state holds `length` tokens, and note it."""
    chosen, stopped = _choose_tokens(logits, rows, batch, wanted, length)
    slots = jnp.where(wanted, batch.slots, 0)
    rows = dataclasses.replace(
        rows,
        token=rows.token.at[slots].set(chosen.token),
        length=rows.length.at[slots].set(length),
        running=rows.running.at[slots].set(wanted & ~stopped),
        counts=rows.counts.at[slots, chosen.token].add(wanted.astype(jnp.int32)),
    )
    return rows, dataclasses.replace(chosen, token=jnp.where(wanted, chosen.token, -1))


def _choose_tokens(logits, rows: SlotSamplingState, batch: SequenceBatch, wanted, length):
    """Return what is chosen, and whether it ends the sequence."""

    def tile(logits, slots, options, seeds, stop_ids, banned, forced, length):
        held = (rows.counts[slots], rows.bias[slots], rows.masks[slots])
        banned = jnp.where(banned[:, None], stop_ids, -1)
        keys = sampling.keys(seeds, length)
        return sampling.choose(logits, options, keys, *held, banned, forced)

    total = length + 1  # with the new token
    free = total >= batch.min_stop_length
    chosen = ragged_batch.map_row_tiles(
        tile,
        SAMPLE_ROWS,
        wanted,
        logits,
        batch.slots,
        batch.options,
        batch.seeds,
        batch.stop_ids,
        ~free,
        batch.forced_tokens,
        length,
    )
    stopped = jnp.any(chosen.token[:, None] == batch.stop_ids, axis=1) & free
    return chosen, stopped | (total >= batch.length_limit)
