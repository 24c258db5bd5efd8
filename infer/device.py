"""The device's side of an engine: memory, compiled programs, plans turned into arguments."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from infer import config as config_lib
from infer import plans, programs, request, sampling
from m1_jax import state as state_lib

PREFILL_PARTS = 8  # sequences in one prefill program


@dataclasses.dataclass(frozen=True)
class Made:
    """One token as the device chose it; see `sampling.Chosen`."""

    id: int
    logp: float
    logp_raw: float
    top: tuple[tuple[int, float], ...]


class Fetched:
    """What a program chose, on the host: arrays [steps, rows, ...]."""

    def __init__(self, chosen: sampling.Chosen | None):
        self._chosen = chosen

    def column(self, row: int) -> list[Made]:
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
            made.append(Made(int(chosen.token[at]), logp, logp_raw, top))
        return made


class Device:
    """Holds the state on the device and runs programs on it, in the order of the calls."""

    def __init__(self, model: Any, config: config_lib.Config):
        self._config, self._vocab_size = config, model.config.vocab_size
        self._layout = model.layout
        self.leaves, self._tree = jax.tree.flatten(model)
        self._state = state_lib.init_serving(
            model.config,
            config.slots,
            config.pages,
            config.chunk_tokens,
            model.dtype,
            model.layout,
        )
        self._rows = programs.init_rows(config.slots, self._vocab_size)
        self._swapped: dict[Any, list[Any]] = {}
        self._recipe = programs.Recipe(config.tile_rows, config.row_tile)
        self._compile(model)

    @property
    def state_bytes(self) -> int:
        """Return the bytes of one slot."""
        arrays = [x for x in self._state.layers if isinstance(x, state_lib.Slots)]
        return sum(a.nbytes // a.shape[2] for a in jax.tree.leaves(arrays)) or 1

    @property
    def page_bytes(self) -> int:
        """Return the bytes of one page."""
        arrays = [x for x in self._state.layers if isinstance(x, state_lib.Pages)]
        return sum(a.nbytes // a.shape[2] for a in jax.tree.leaves(arrays)) or 1

    def swap(self, model: Any) -> None:
        """Take other weights.

        Raises:
          ValueError: other shapes, dtypes or layout than the ones before.
        """
        leaves, tree = jax.tree.flatten(model)
        if tree != self._tree:
            raise ValueError("swap: got another model; wanted other weights of the same model")
        for old, new in zip(self.leaves, leaves, strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(
                    f"swap: got {jax.typeof(new)}; wanted {jax.typeof(old)}, as the weights before"
                )
        # An array committed elsewhere would ask for another program.
        self.leaves = [
            jax.device_put(new, old.sharding) for old, new in zip(self.leaves, leaves, strict=True)
        ]

    # ---- plans

    def decode(self, rows: Sequence[plans.Row], requests: Sequence[Any], steps: int) -> Any:
        """Run a decode plan; return what `fetch` turns into tokens."""
        size = next(n for n in self._config.decode_rows if n >= len(rows))
        batch = self._batch(size, rows, requests)
        program = self._decode[size]
        self._state, self._rows, chosen = program(
            self.leaves, self._state, self._rows, batch, np.int32(steps)
        )
        return _start_copy(chosen)

    def prefill(self, parts: Sequence[plans.Part], requests: Sequence[Any], tokens) -> Any:
        """Run a prefill plan; tokens: of each part, and the one after it if known, else -1."""
        tile = self._config.tile_rows
        padded = [-(-part.count // tile) * tile for part in parts]
        size = next(n for n in self._config.prefill_tokens if n >= sum(padded))
        prompts = _empty_prompts(size, self._config)
        at = 0
        for i, (part, (ids, known), width) in enumerate(zip(parts, tokens, padded, strict=True)):
            end = part.start + part.count
            prompts.tokens[at : at + part.count] = ids
            prompts.positions[at : at + part.count] = np.arange(part.start, end)
            prompts.part[at // tile : (at + width) // tile] = i
            if part.last:
                prompts.length[i], prompts.known[i] = end, known
                prompts.last[i] = at + part.count - 1 if known < 0 else -1
            at += width
        batch = self._batch(PREFILL_PARTS, parts, requests)
        self._state, self._rows, chosen = self._prefill[size](
            self.leaves, self._state, self._rows, batch, prompts
        )
        return _start_copy(chosen)

    def fetch(self, chosen: Any) -> Fetched:
        """Wait for what a plan chose."""
        if chosen is None:
            return Fetched(None)
        arrays = jax.tree.map(np.asarray, chosen)
        if arrays.token.ndim == 1:
            arrays = jax.tree.map(lambda a: a[None], arrays)
        return Fetched(arrays)

    def act(self, action: plans.Copy | plans.SwapOut | plans.SwapIn | plans.Drop) -> None:
        """Move memory."""
        if isinstance(action, plans.Copy):
            source, target = (np.int32(x) for x in (action.source_slot, action.target_slot))
            self._state = self._copy(self._state, source, target)
        elif isinstance(action, plans.SwapOut):
            self._swapped[action.job_id] = [
                (jax.tree.map(np.asarray, self._read(self._state, slot, pages)))
                for slot, pages in self._pieces(action)
            ]
            row = self._read_row(self._rows, np.int32(action.slot))
            self._swapped[action.job_id].append(jax.tree.map(np.asarray, row))
        elif isinstance(action, plans.SwapIn):
            *pieces, row = self._swapped.pop(action.job_id)
            for (slot, pages), held in zip(self._pieces(action), pieces, strict=True):
                self._state = self._write(self._state, slot, pages, held)
            self._rows = self._write_row(self._rows, np.int32(action.slot), row)
        else:
            self._swapped.pop(action.job_id, None)

    def _pieces(self, action):
        """Yield arguments of `read` and `write` that together cover a sequence."""
        pages = list(action.pages)
        for first in range(0, max(len(pages), 1), programs.SWAP_PAGES):
            piece = np.zeros(programs.SWAP_PAGES, np.int32)
            some = pages[first : first + programs.SWAP_PAGES]
            piece[: len(some)] = some
            yield np.int32(action.slot), piece

    # ---- what choosing needs

    def reset(self, slot: int, bias: Mapping[int, float]) -> None:
        """Give a slot to a new request."""
        ids, values = np.zeros(request.MAX_BIASES, np.int32), np.zeros(request.MAX_BIASES, "f4")
        ids[: len(bias)], values[: len(bias)] = list(bias), list(bias.values())
        self._rows = self._reset(self._rows, np.int32(slot), ids, values)

    def count(self, slot: int, tokens: Sequence[int], in_prompt: bool) -> None:
        """Count tokens for the penalties."""
        for first in range(0, len(tokens), programs.COUNT_TOKENS):
            piece = np.full(programs.COUNT_TOKENS, -1, np.int32)
            some = tokens[first : first + programs.COUNT_TOKENS]
            piece[: len(some)] = some
            self._rows = self._count(self._rows, np.int32(slot), piece, np.bool_(in_prompt))

    def set_mask(self, slot: int, mask: np.ndarray) -> None:
        """Set which tokens may come next."""
        self._rows = self._set_mask(self._rows, np.int32(slot), mask)

    def _batch(self, size: int, items: Sequence[Any], requests: Sequence[Any]) -> Any:
        """Return fresh host arrays: those of a dispatch under way must not change."""
        batch = _empty_batch(size, self._config.pages_per_sequence)
        for i, (item, asked) in enumerate(zip(items, requests, strict=True)):
            if asked is None:  # cancelled since it was planned
                continue
            options, length = asked.options, len(asked.prompt)
            batch.slots[i] = item.slot
            batch.pages[i, : len(item.pages)] = item.pages
            for field in dataclasses.fields(batch.options):
                getattr(batch.options, field.name)[i] = getattr(options, field.name)
            batch.seeds[i] = options.seed
            batch.stop_ids[i, : len(asked.stop_ids)] = asked.stop_ids
            batch.free_from[i] = length + options.min_tokens + 1
            batch.limit[i] = length + options.max_tokens
            forced = asked.progress.next_forced()
            batch.forced[i] = -1 if forced is None else forced
        return batch

    # ---- compiling

    def _compile(self, model: Any) -> None:
        """Compile all programs, several at a time, and run the decode programs on nothing."""
        config, recipe = self._config, self._recipe
        pages = config.pages_per_sequence
        tree = self._tree
        state, rows = self._state, self._rows

        def decode(leaves, state, rows, batch, steps):
            model = jax.tree.unflatten(tree, leaves)
            steps_ = config.decode_steps
            return programs.decode(model, state, rows, batch, steps, recipe, steps_)

        def prefill(leaves, state, rows, batch, prompts):
            model = jax.tree.unflatten(tree, leaves)
            return programs.prefill(model, state, rows, batch, prompts, recipe)

        one, some = np.int32(0), np.zeros(programs.SWAP_PAGES, np.int32)
        held = jax.eval_shape(programs.read, state, one, some)
        row = jax.eval_shape(programs.read_row, rows, one)
        bias = np.zeros(request.MAX_BIASES, np.int32), np.zeros(request.MAX_BIASES, "f4")
        words = np.zeros(-(-self._vocab_size // 32), np.uint32)
        tokens = np.zeros(programs.COUNT_TOKENS, np.int32)
        swapping: dict[Any, tuple] = {
            "read": (programs.read, (), state, one, some),
            "write": (programs.write, (0,), state, one, some, held),
            "read_row": (programs.read_row, (), rows, one),
            "write_row": (programs.write_row, (0,), rows, one, row),
        }
        jobs: dict[Any, tuple] = {
            **(swapping if config.host_bytes else {}),
            "copy": (programs.copy_states, (0,), state, one, one),
            "reset": (programs.reset, (0,), rows, one, *bias),
            "count": (programs.count, (0,), rows, one, tokens, np.bool_(True)),
            "set_mask": (programs.set_mask, (0,), rows, one, words),
        }
        for size in config.decode_rows:
            batch = _empty_batch(size, pages)
            jobs["decode", size] = (decode, (1, 2), self.leaves, state, rows, batch, one)
        for size in config.prefill_tokens:
            batch, prompts = _empty_batch(PREFILL_PARTS, pages), _empty_prompts(size, config)
            jobs["prefill", size] = (prefill, (1, 2), self.leaves, state, rows, batch, prompts)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            made = {
                key: pool.submit(programs.Program, *arguments) for key, arguments in jobs.items()
            }
            done = {key: future.result() for key, future in made.items()}
        self._copy, self._reset, self._count = done["copy"], done["reset"], done["count"]
        if config.host_bytes:
            self._read, self._write = done["read"], done["write"]
            self._read_row, self._write_row = done["read_row"], done["write_row"]
        self._set_mask = done["set_mask"]
        self._decode = {size: done["decode", size] for size in config.decode_rows}
        self._prefill = {size: done["prefill", size] for size in config.prefill_tokens}
        self.num_programs = len(done)


def _empty_batch(size: int, pages: int) -> Any:
    host_options: Any = sampling.SamplingOptions
    options = host_options(**sampling.check(size))
    make: Any = programs.Batch  # of host arrays
    return make(
        slots=np.zeros(size, np.int32),
        pages=np.zeros((size, pages), np.int32),
        options=options,
        seeds=np.zeros(size, np.uint32),
        stop_ids=np.full((size, request.MAX_STOP_IDS), -1, np.int32),
        free_from=np.zeros(size, np.int32),
        limit=np.zeros(size, np.int32),
        forced=np.full(size, -1, np.int32),
    )


def _empty_prompts(size: int, config: config_lib.Config) -> Any:
    tiles = size // config.tile_rows
    make: Any = programs.Prompts
    return make(
        np.zeros(size, np.int32),
        np.full(size, -1, np.int32),
        np.full(tiles, -1, np.int32),
        np.full(PREFILL_PARTS, -1, np.int32),
        np.zeros(PREFILL_PARTS, np.int32),
        np.full(PREFILL_PARTS, -1, np.int32),
    )


def _start_copy(chosen: Any) -> Any:
    """Ask for the arrays on the host as soon as they are there."""
    for array in jax.tree.leaves(chosen):
        array.copy_to_host_async()
    return chosen
