"""Command: write text with a checkpoint.

    python -m infer.generate --checkpoint=DIR --prompt="Why is the sky blue?"
    python -m infer.generate --checkpoint=DIR --prompts_file=FILE --max_tokens=64 --temperature=0

DIR is a release directory or one made by `m1_jax.convert`, with its tokenizer. FILE has a prompt
per line, or, named .jsonl, an object per line: {"prompt": ..., "system": ...} or
{"messages": [...], "tools": [...]}. Text goes to stdout as it comes, speed to stderr at the end.

Prompts of a batch differ in length: they are prefilled side by side, padded on the right, in
chunks of at most 2,048 tokens whose widths are powers of two, so that few programs are compiled.
Decoding runs many steps per dispatch on the device, and the host prints the tokens of one dispatch
while the next one runs.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import m1_jax
from infer import prompt as prompt_lib
from infer import sampling
from m1_jax import tokenizer as tokenizer_lib

_CHUNK_TOKENS = 2048
_MIN_WIDTH_TOKENS = 64
_MAX_STEPS = 64  # of one dispatch
_DISPATCH_SECS = 0.1  # text comes at least about this often; shorter costs throughput
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def _flag(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """What to generate; each field is a flag of the command."""

    checkpoint: str = _flag("", "Release directory, or one made by m1_jax.convert.")
    prompt: str | None = _flag(None, "What the user says.")
    system: str | None = _flag(None, "System message, for prompts that do not bring their own.")
    prompts_file: str | None = _flag(None, "File with a prompt per line, or .jsonl objects.")
    max_tokens: int = _flag(512, "Longest output, in tokens.")
    temperature: float = _flag(1.0, "0 always takes the most likely token.")
    top_p: float = _flag(0.95, "Keep the likeliest tokens with this probability; 1 is off.")
    top_k: int = _flag(0, "Keep this many likeliest tokens; 0 is off.")
    min_p: float = _flag(0.0, "Keep tokens this likely, relative to the likeliest; 0 is off.")
    repetition_penalty: float = _flag(1.0, "Over prompt and output; 1 is off.")
    seed: int = _flag(0, "The same seed and prompt number draw the same text.")
    dtype: str = _flag("float32", "Of the computation: float32 or bfloat16.")
    max_length: int = _flag(0, "Most tokens of prompt and output; 0: what the model allows.")
    batch_size: int = _flag(8, "Most prompts side by side.")
    raw: bool = _flag(False, "Read prompts as they are, control tokens included: no template.")
    stream: bool = _flag(True, "Print text as it comes.")
    ignore_eos: bool = _flag(False, "Always write max_tokens tokens.")
    profile: str = _flag("release", "Chat template: release or vllm.")

    def __post_init__(self):
        wanted = {
            "checkpoint": (bool(self.checkpoint), "a directory"),
            "max_tokens": (self.max_tokens >= 1, "1 or more"),
            "max_length": (self.max_length >= 0, "0 (the model's own) or more"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "dtype": (self.dtype in _DTYPES, " or ".join(_DTYPES)),
            "seed": (0 <= self.seed < 2**32, f"0 to {2**32 - 1}"),
            "profile": (self.profile in prompt_lib.PROFILES, " or ".join(prompt_lib.PROFILES)),
        }
        for name, (valid, text) in wanted.items():
            if not valid:
                raise ValueError(f"--{name}: got {getattr(self, name)!r}; wanted {text}")
        sampling.options(1, **self.sampling)
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError("--prompt, --prompts_file: got both or neither; wanted one of them")
        if self.raw and self.system is not None:
            raise ValueError("--system: got one with --raw, which has no place for it; leave it out")

    @property
    def sampling(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in _SAMPLING}


@dataclasses.dataclass
class Stats:
    """How many tokens in how many seconds; compiling is on its own."""

    prefill_tokens: int = 0
    prefill_secs: float = 0.0
    decode_tokens: int = 0
    decode_secs: float = 0.0
    compile_secs: float = 0.0

    def __str__(self):
        def rate(tokens, secs):
            return f"{tokens} tokens in {secs:.2f} s ({tokens / max(secs, 1e-9):.1f} tokens/s)"

        return (
            f"prefill: {rate(self.prefill_tokens, self.prefill_secs)}; "
            f"decode: {rate(self.decode_tokens, self.decode_secs)}; "
            f"compile: {self.compile_secs:.1f} s"
        )


@dataclasses.dataclass(frozen=True)
class Output:
    """tokens: as generated, a stop token included. finish: "stop" or "length"."""

    tokens: list[int]
    text: str
    finish: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """A batch between two dispatches; `token` is chosen but not yet in `state`."""

    state: Any
    token: Int[Array, "B"]
    active: Bool[Array, "B"]
    seen: Bool[Array, "B V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What choosing tokens needs; constant over a batch."""

    options: sampling.SamplingOptions
    keys: Array
    stop_ids: Int[Array, "S"]


@functools.partial(jax.jit, donate_argnames=("state", "last"))
def _prefill(model, tokens, counts, state, last):
    """Append a chunk; `last` [B, V] keeps the logits of the last real token of every row."""
    logits, state = model.extend(tokens, state, num_tokens=counts, last_only=True)
    return state, jnp.where((counts > 0)[:, None], logits[:, 0], last)


@functools.partial(jax.jit, donate_argnames=("rows",))
def _choose(logits: Float[Array, "B V"], rows: _Rows, choice: _Choice) -> _Rows:
    keys = sampling.step_keys(choice.keys, rows.state.length)
    token, _, _ = sampling.sample(logits, choice.options, keys, rows.seen)
    seen = rows.seen.at[jnp.arange(token.shape[0]), token].set(True)
    stopped = jnp.any(token[:, None] == choice.stop_ids[None, :], axis=1)
    return _Rows(rows.state, token, rows.active & ~stopped, seen)


@functools.partial(jax.jit, donate_argnames=("rows",))
def _decode(model, rows: _Rows, choice: _Choice, steps: Int[Array, ""]):
    """Run up to `steps` steps; return the rows and tokens [B, 64], -1 where a row has ended."""

    def running(carry):
        step, rows, _ = carry
        return (step < steps) & jnp.any(rows.active)

    def body(carry):
        step, rows, tokens = carry
        # Rows that have ended go on as well: cheaper than taking them out, and seen by nobody.
        logits, state = model.extend(rows.token[:, None], rows.state)
        after = _choose(logits[:, 0], dataclasses.replace(rows, state=state), choice)
        new = jnp.where(rows.active, after.token, -1)
        return step + 1, after, lax.dynamic_update_index_in_dim(tokens, new, step, axis=1)

    tokens = jnp.full((rows.token.shape[0], _MAX_STEPS), -1, jnp.int32)
    _, rows, tokens = lax.while_loop(running, body, (jnp.int32(0), rows, tokens))
    return rows, tokens


class _Batches:
    """Generates for one batch after another of the same shape, with the same programs."""

    def __init__(self, model, options: dict, stop_ids: Sequence[int], batch: int, longest: int):
        self._model, self._batch = model, batch
        self._options = sampling.options(batch, **options)
        self._stop_ids = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
        self._max_length = longest
        self._programs: dict[Any, Callable] = {}
        self.stats = Stats()

    def run(self, prompts, first: int, seed: int, max_tokens: int, on_token) -> None:
        """Generate for prompts number `first` and following; fill up with rows of no interest."""
        real = len(prompts)
        numbers = jnp.asarray([first + i if i < real else 0 for i in range(self._batch)])
        choice = _Choice(self._options, sampling.row_keys(seed, numbers), self._stop_ids)
        rows = self._start([*prompts, *[[0]] * (self._batch - real)], real, choice)
        self.stats.prefill_tokens += sum(map(len, prompts))
        left, steps = max_tokens - 1, 1
        decode = self._compiled("decode", _decode, self._model, rows, choice, jnp.int32(1))
        pending = rows.token[:, None] + 0  # a copy: the rows themselves are given away
        began = before = time.perf_counter()
        while pending is not None:
            following = None
            steps = min(steps, left, _MAX_STEPS)
            if steps > 0:
                rows, following = decode(self._model, rows, choice, jnp.int32(steps))
                left -= steps
            tokens = np.asarray(pending)[:real]
            alive = tokens[:, 0] >= 0
            self._report(tokens, first, on_token)
            pending = following if alive.any() else None
            now = time.perf_counter()
            steps = max(1, round(steps * _DISPATCH_SECS / max(now - before, 1e-9)))
            before = now
        self.stats.decode_secs += time.perf_counter() - began
        self.stats.decode_tokens -= real  # the first token of each row is the prefill's
