"""Plans and requests turned into the host arrays that programs take, and their results back.

Every function returns fresh arrays. A dispatch under way may still read those of an earlier call,
so none is ever filled a second time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer import config as config_lib
from infer import options as options_lib
from infer import request as request_lib
from infer.execution import programs, sampling, slot_sampling, transfers
from infer.scheduling import plan as plan_lib

MAX_PREFILL_CHUNKS = 8  # sequences of a partition in one prefill program, its rows of the batch


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One token as the device chose it.

    Attributes:
      id: the token.
      logp: its log-probability under the distribution it was drawn from.
      logp_raw: its log-probability under the model's plain logits.
      top: the most likely tokens and their plain log-probabilities, in descending order.
    """

    id: int
    logp: float
    logp_raw: float
    top: tuple[tuple[int, float], ...]


class SampledTokens:
    """What a program chose, on the host.

    Args:
      chosen: NumPy arrays [steps, rows, ...]. None for a plan without a program.
    """

    def __init__(self, chosen: sampling.ChosenTokens | None):
        self._chosen = chosen

    def row_tokens(self, row: int) -> list[SampledToken]:
        """Return the tokens of one row, in order."""
        chosen = self._chosen
        if chosen is None:
            return []
        tokens = []
        # Token -1 marks the steps after a row had ended.
        for step in np.flatnonzero(chosen.token[:, row] >= 0):
            cell = step, row
            ids, logps = chosen.top_ids[cell], chosen.top_logp[cell]
            top = tuple((int(i), float(p)) for i, p in zip(ids, logps, strict=True) if i >= 0)
            logp, logp_raw = float(chosen.logp[cell]), float(chosen.logp_raw[cell])
            tokens.append(SampledToken(int(chosen.token[cell]), logp, logp_raw, top))
        return tokens


def make_batch(
    size: int,
    plan: plan_lib.StepPlan,
    rows: Sequence[int],
    requests: Sequence[request_lib.Request | None],
    config: config_lib.EngineConfig,
) -> slot_sampling.SequenceBatch:
    """Return the batch of a program: slots, pages and options of its sequences.

    Args:
      size: rows of the program. Those of no entry are padding.
      plan: has the entries.
      rows: the row of each entry.
      requests: the requests of the entries. None for one that is over, whose row becomes padding.
    """
    batch = make_empty_batch(size, config)
    for row, entry, request in zip(rows, plan.entries, requests, strict=True):
        if request is None:
            continue
        options, prompt_tokens = request.options, len(request.prompt)
        batch.slots[row] = entry.slot
        batch.pages[row, : len(entry.pages)] = entry.pages
        # Sampling options have the same names in a request and in the batch.
        for field in dataclasses.fields(batch.options):
            getattr(batch.options, field.name)[row] = getattr(options, field.name)
        batch.seeds[row] = options.seed
        batch.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        # With the new token counted, so that `min_tokens` others come before a stop id.
        batch.min_stop_length[row] = prompt_tokens + options.min_tokens + 1
        batch.length_limit[row] = prompt_tokens + options.max_tokens
        forced = request.progress.next_forced()
        batch.forced_tokens[row] = -1 if forced is None else forced
    return batch


def pack_prompts(
    chunks: Sequence[plan_lib.PrefillChunk],
    rows: Sequence[int],
    tokens: Sequence[tuple[Sequence[int], int]],
    config: config_lib.EngineConfig,
    num_partitions: int = 1,
) -> programs.PackedPrompts:
    """Return chunks of prompts packed into the rows of the smallest program that holds them.

    Args:
      chunks: the plan's chunks, in order.
      rows: the row of each chunk's sequence in the batch.
      tokens: the tokens of each chunk, and the token after them if that is known, else -1.
    """
    tile = config.attention_tile
    widths = [config.pad_to_tile(chunk.num_tokens) for chunk in chunks]
    used = [0] * num_partitions  # rows of each partition that chunks have taken
    first_rows = []  # of each chunk's first token in its partition, always on a tile
    for chunk, width in zip(chunks, widths, strict=True):
        first_rows.append(used[chunk.partition])
        used[chunk.partition] += width
    size = next(tokens for tokens in config.prefill_tokens if tokens >= max(used))
    prompts = make_empty_prompts(size, config, num_partitions)
    for chunk, row, (ids, next_id), width, first in zip(
        chunks, rows, tokens, widths, first_rows, strict=True
    ):
        end = chunk.start + chunk.num_tokens
        place = chunk.partition * size + first
        prompts.tokens[place : place + chunk.num_tokens] = ids
        prompts.positions[place : place + chunk.num_tokens] = np.arange(chunk.start, end)
        # Rows of the partition's part of the batch, and of its tokens below.
        prompts.chunk_index[place // tile : (place + width) // tile] = row % MAX_PREFILL_CHUNKS
        if chunk.is_last:
            prompts.lengths[row], prompts.known_tokens[row] = end, next_id
            # No row if the next token is known: its logits would be computed for nothing.
            prompts.last_rows[row] = first + chunk.num_tokens - 1 if next_id < 0 else -1
    return prompts


def make_empty_batch(size: int, config: config_lib.EngineConfig) -> slot_sampling.SequenceBatch:
    """Return a batch of padding."""
    # The fields are annotated as jax arrays. `Any` lets host arrays through the type checker.
    host_options: Any = sampling.SamplingOptions
    host_batch: Any = slot_sampling.SequenceBatch
    return host_batch(
        slots=np.zeros(size, np.int32),
        pages=np.zeros((size, config.pages_per_sequence), np.int32),
        options=host_options(**sampling.make_option_arrays(size)),
        seeds=np.zeros(size, np.uint32),
        stop_ids=np.full((size, options_lib.MAX_STOP_IDS), -1, np.int32),
        min_stop_length=np.zeros(size, np.int32),
        length_limit=np.zeros(size, np.int32),
        forced_tokens=np.full(size, -1, np.int32),
    )


def make_empty_prompts(
    size: int, config: config_lib.EngineConfig, num_partitions: int = 1
) -> programs.PackedPrompts:
    """Return prompts of padding, with `size` rows of tokens in each partition."""
    num_tokens, num_chunks = num_partitions * size, num_partitions * MAX_PREFILL_CHUNKS
    host_prompts: Any = programs.PackedPrompts
    return host_prompts(
        tokens=np.zeros(num_tokens, np.int32),
        positions=np.full(num_tokens, -1, np.int32),
        chunk_index=np.full(num_tokens // config.attention_tile, -1, np.int32),
        last_rows=np.full(num_chunks, -1, np.int32),
        lengths=np.zeros(num_chunks, np.int32),
        known_tokens=np.full(num_chunks, -1, np.int32),
    )


def split_pages(slot: int, pages: Sequence[int]) -> list[tuple[np.int32, np.ndarray]]:
    """Return arguments of `transfers.read_sequence` that together cover a sequence.

    Every slice names the slot, because the program reads slot and pages in one call.
    """
    slices = []
    # At least one slice: a sequence without pages still has a slot to read.
    for first in range(0, max(len(pages), 1), transfers.SWAP_PAGES):
        page_ids = np.zeros(transfers.SWAP_PAGES, np.int32)
        block = pages[first : first + transfers.SWAP_PAGES]
        page_ids[: len(block)] = block
        slices.append((np.int32(slot), page_ids))
    return slices


def make_bias(values: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and what is added to their logits, padded with token 0 and 0."""
    # One size for all requests, because the program has fixed shapes.
    ids = np.zeros(options_lib.MAX_BIASES, np.int32)
    added = np.zeros(options_lib.MAX_BIASES, np.float32)
    ids[: len(values)], added[: len(values)] = list(values), list(values.values())
    return ids, added


def pad_tokens(tokens: Sequence[int]) -> np.ndarray:
    """Return at most `transfers.COUNT_TOKENS` tokens, padded with -1."""
    padded = np.full(transfers.COUNT_TOKENS, -1, np.int32)
    padded[: len(tokens)] = tokens
    return padded


def make_free_mask(vocab_size: int) -> np.ndarray:
    """Return the mask that allows all tokens: one bit a token."""
    return np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)


def fetch_tokens(chosen: sampling.ChosenTokens | None) -> SampledTokens:
    """Wait for what a program chose."""
    if chosen is None:
        return SampledTokens(None)
    arrays = jax.tree.map(np.asarray, chosen)
    if arrays.token.ndim == 1:
        # A prefill makes one token a row, and its arrays have no axis of steps.
        arrays = jax.tree.map(lambda a: a[None], arrays)
    return SampledTokens(arrays)
