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

MAX_PREFILL_CHUNKS = 8  # sequences in one prefill program, the length of its batch


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
    entries: Sequence[plan_lib.PrefillChunk] | Sequence[plan_lib.DecodeRow],
    requests: Sequence[request_lib.Request | None],
    config: config_lib.EngineConfig,
) -> slot_sampling.SequenceBatch:
    """Return the batch of a program: slots, pages and options of its sequences.

    Args:
      size: rows of the program. Those past the entries are padding.
      entries: the plan's entries, in order.
      requests: the requests of the entries. None for one that is over, whose row becomes padding.
    """
    batch = make_empty_batch(size, config)
    for row, (entry, request) in enumerate(zip(entries, requests, strict=True)):
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
    tokens: Sequence[tuple[Sequence[int], int]],
    config: config_lib.EngineConfig,
) -> programs.PackedPrompts:
    """Return chunks of prompts packed into the rows of the smallest program that holds them.

    Args:
      chunks: the plan's chunks, in order.
      tokens: the tokens of each chunk, and the token after them if that is known, else -1.
    """
    tile = config.attention_tile
    widths = [config.pad_to_tile(chunk.num_tokens) for chunk in chunks]
    size = next(rows for rows in config.prefill_tokens if rows >= sum(widths))
    prompts = make_empty_prompts(size, config)
    first = 0  # row of the chunk's first token, always on a tile
    for i, (chunk, (ids, next_id), width) in enumerate(zip(chunks, tokens, widths, strict=True)):
        end = chunk.start + chunk.num_tokens
        prompts.tokens[first : first + chunk.num_tokens] = ids
        prompts.positions[first : first + chunk.num_tokens] = np.arange(chunk.start, end)
        prompts.chunk_index[first // tile : (first + width) // tile] = i
        if chunk.is_last:
            prompts.lengths[i], prompts.known_tokens[i] = end, next_id
            # No row if the next token is known: its logits would be computed for nothing.
            prompts.last_rows[i] = first + chunk.num_tokens - 1 if next_id < 0 else -1
        first += width
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


def make_empty_prompts(size: int, config: config_lib.EngineConfig) -> programs.PackedPrompts:
    """Return prompts of padding."""
    host_prompts: Any = programs.PackedPrompts
    return host_prompts(
        tokens=np.zeros(size, np.int32),
        positions=np.full(size, -1, np.int32),
        chunk_index=np.full(size // config.attention_tile, -1, np.int32),
        last_rows=np.full(MAX_PREFILL_CHUNKS, -1, np.int32),
        lengths=np.zeros(MAX_PREFILL_CHUNKS, np.int32),
        known_tokens=np.full(MAX_PREFILL_CHUNKS, -1, np.int32),
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
