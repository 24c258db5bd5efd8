"""Plans and requests turned into the host arrays that programs take, and their results back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer import config as config_lib
from infer import options as options_lib
from infer.execution import programs, sampling, transfers
from infer.scheduling import plan as plan_lib

MAX_PREFILL_CHUNKS = 8  # sequences in one prefill program


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """One token as the device chose it; see `sampling.Chosen`."""

    id: int
    logp: float
    logp_raw: float
    top: tuple[tuple[int, float], ...]


class SampledTokens:
    """What a program chose, on the host: arrays [steps, rows, ...]."""

    def __init__(self, chosen: sampling.Chosen | None):
        self._chosen = chosen

    def row_tokens(self, row: int) -> list[SampledToken]:
        """Return the tokens of one row, in order."""
        chosen = self._chosen
        if chosen is None:
            return []
        made = []
        for step in np.flatnonzero(chosen.token[:, row] >= 0):
            at = step, row
            ids, logps = chosen.top_ids[at], chosen.top_logp[at]
            top = tuple((int(i), float(p)) for i, p in zip(ids, logps, strict=True) if i >= 0)
            logp, logp_raw = float(chosen.logp[at]), float(chosen.logp_raw[at])
            made.append(SampledToken(int(chosen.token[at]), logp, logp_raw, top))
        return made


def make_batch(size: int, items: Sequence[Any], requests: Sequence[Any], config) -> Any:
    """Return fresh host arrays: those of a dispatch under way must not change."""
    made = make_empty_batch(size, config)
    for i, (item, asked) in enumerate(zip(items, requests, strict=True)):
        if asked is None:  # cancelled since it was planned
            continue
        options, length = asked.options, len(asked.prompt)
        made.slots[i] = item.slot
        made.pages[i, : len(item.pages)] = item.pages
        for field in dataclasses.fields(made.options):
            getattr(made.options, field.name)[i] = getattr(options, field.name)
        made.seeds[i] = options.seed
        made.stop_ids[i, : len(asked.stop_ids)] = asked.stop_ids
        made.min_stop_length[i] = length + options.min_tokens + 1
        made.length_limit[i] = length + options.max_tokens
        forced = asked.progress.next_forced()
        made.forced_tokens[i] = -1 if forced is None else forced
    return made


def pack_prompts(
    parts: Sequence[plan_lib.PrefillChunk], tokens: Sequence[Any], config: config_lib.EngineConfig
) -> Any:
    """Return packed parts of prompts; tokens: of each part, and the one after it or -1."""
    tile = config.attention_tile
    padded = [-(-part.num_tokens // tile) * tile for part in parts]
    size = next(n for n in config.prefill_tokens if n >= sum(padded))
    made = make_empty_prompts(size, config)
    at = 0
    for i, (part, (ids, known), width) in enumerate(zip(parts, tokens, padded, strict=True)):
        end = part.start + part.num_tokens
        made.tokens[at : at + part.num_tokens] = ids
        made.positions[at : at + part.num_tokens] = np.arange(part.start, end)
        made.chunk_index[at // tile : (at + width) // tile] = i
        if part.is_last:
            made.lengths[i], made.known_tokens[i] = end, known
            made.last_rows[i] = at + part.num_tokens - 1 if known < 0 else -1
        at += width
    return made


def make_empty_batch(size: int, config: config_lib.EngineConfig) -> Any:
    """Return a batch of padding."""
    host_options: Any = sampling.SamplingOptions
    options = host_options(**sampling.check(size))
    make: Any = programs.SequenceBatch  # of host arrays
    return make(
        slots=np.zeros(size, np.int32),
        pages=np.zeros((size, config.pages_per_sequence), np.int32),
        options=options,
        seeds=np.zeros(size, np.uint32),
        stop_ids=np.full((size, options_lib.MAX_STOP_IDS), -1, np.int32),
        min_stop_length=np.zeros(size, np.int32),
        length_limit=np.zeros(size, np.int32),
        forced_tokens=np.full(size, -1, np.int32),
    )


def make_empty_prompts(size: int, config: config_lib.EngineConfig) -> Any:
    """Return prompts of padding."""
    tiles = size // config.attention_tile
    make: Any = programs.PackedPrompts
    return make(
        np.zeros(size, np.int32),
        np.full(size, -1, np.int32),
        np.full(tiles, -1, np.int32),
        np.full(MAX_PREFILL_CHUNKS, -1, np.int32),
        np.zeros(MAX_PREFILL_CHUNKS, np.int32),
        np.full(MAX_PREFILL_CHUNKS, -1, np.int32),
    )


def split_pages(slot: int, pages: Sequence[int]) -> list[tuple[Any, Any]]:
    """Return arguments of `moves.read` that together cover a sequence."""
    made = []
    for first in range(0, max(len(pages), 1), transfers.SWAP_PAGES):
        piece = np.zeros(transfers.SWAP_PAGES, np.int32)
        some = pages[first : first + transfers.SWAP_PAGES]
        piece[: len(some)] = some
        made.append((np.int32(slot), piece))
    return made


def make_bias(values: Mapping[int, float]) -> tuple[Any, Any]:
    """Return token ids and what is added to their logits."""
    ids, added = (
        np.zeros(options_lib.MAX_BIASES, np.int32),
        np.zeros(options_lib.MAX_BIASES, np.float32),
    )
    ids[: len(values)], added[: len(values)] = list(values), list(values.values())
    return ids, added


def pad_tokens(tokens: Sequence[int]) -> Any:
    """Return at most `moves.COUNT_TOKENS` tokens, padded."""
    made = np.full(transfers.COUNT_TOKENS, -1, np.int32)
    made[: len(tokens)] = tokens
    return made


def make_free_mask(vocab_size: int) -> Any:
    """Return the mask that allows all tokens."""
    return np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)


def fetch_tokens(chosen: Any) -> SampledTokens:
    """Wait for what a program chose."""
    if chosen is None:
        return SampledTokens(None)
    arrays = jax.tree.map(np.asarray, chosen)
    if arrays.token.ndim == 1:
        arrays = jax.tree.map(lambda a: a[None], arrays)
    return SampledTokens(arrays)
