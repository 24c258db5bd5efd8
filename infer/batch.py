"""Text for a list of prompts, in batches of one shape: the loop on the device.

Prompts of a batch differ in length: they are prefilled side by side, padded on the right, in
chunks of at most 2,048 tokens whose widths are powers of two, so that few programs are compiled.
Decoding runs many steps per dispatch on the device, and the host prints the tokens of one dispatch
while the next one runs.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from infer import sampling

_CHUNK_TOKENS = 2048
_MIN_WIDTH_TOKENS = 64
_MAX_STEPS = 64  # of one dispatch
_DISPATCH_SECS = 0.1  # text comes at least about this often; shorter costs throughput


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


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 8,
    on_token: Callable[[int, int, bool], None] | None = None,
    **options: float,
) -> tuple[list[list[int]], Stats]:
    """Continue token ids; what a prompt becomes depends on its number and the seed alone.

    Args:
      model: as `m1_jax.load` returns it.
      prompts: token ids, at least one each.
      max_tokens: longest output. stop_ids: tokens that end one; they are its last token.
      seed: 0 to 2^32 - 1. batch_size: most prompts side by side.
      on_token: called with a prompt's number, each of its tokens, and whether it is the last.
      **options: as in `sampling.options`.

    Returns:
      The new tokens of each prompt.

    Raises:
      ValueError: what `check` and `sampling.options` refuse.
    """
    check(prompts, max_tokens, model.config)
    batch = min(batch_size, len(prompts))
    made = sampling.options(batch, **options)
    stop_array = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
    outputs: list[list[int]] = [[] for _ in prompts]

    def choice(numbers):
        return _Choice(made, sampling.row_keys(seed, numbers), stop_array)

    def collect(first: int, tokens: np.ndarray) -> bool:
        for column in tokens.T:  # in the order in which they were made
            for row in np.flatnonzero(column >= 0):
                number, token = first + int(row), int(column[row])
                outputs[number].append(token)
                if on_token is not None:
                    last = token in stop_ids or len(outputs[number]) == max_tokens
                    on_token(number, token, last)
        rows = outputs[first : first + len(tokens)]
        return any(ids[-1] not in stop_ids and len(ids) < max_tokens for ids in rows)

    batches = _Batches(model, choice, batch, max_tokens, max(map(len, prompts)))
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        batches.run(group, first, functools.partial(collect, first))
    return outputs, batches.stats


def check(prompts, max_tokens: int, model_config: Any, max_length: int = 0) -> None:
    """Raise ValueError for prompts that are empty, too long or outside of the vocabulary.

    max_length: limit of prompt and output together, beside the model's own; 0 is none.
    """
    if not prompts or max_tokens < 1:
        raise ValueError(f"got {len(prompts)} prompts, max_tokens {max_tokens}; wanted 1 of each")
    own = model_config.max_position_embeddings
    limit, remedy = own, "lower --max_tokens (the model allows no more)"
    if 0 < max_length < own:
        limit, remedy = max_length, "raise --max_length"
    for i, ids in enumerate(prompts):
        if not ids:
            raise ValueError(f"prompt {i}: got no tokens; wanted at least one")
        if len(ids) + max_tokens > limit:
            raise ValueError(
                f"prompt {i}: got {len(ids)} tokens + max_tokens {max_tokens} = "
                f"{len(ids) + max_tokens}; wanted at most {limit}. Shorten the prompt or {remedy}."
            )
        bad = [token for token in ids if not 0 <= token < model_config.vocab_size]
        if bad:
            raise ValueError(
                f"prompt {i}: got token id {bad[0]}; wanted 0 to {model_config.vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """A batch between two dispatches; `token` is chosen but not yet in `state`."""

    state: Any
    token: Int[Array, "B"]
    active: Bool[Array, "B"]
    counts: Int[Array, "B V"]  # as in `sampling.choose`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What choosing tokens needs; constant over a batch."""

    options: sampling.SamplingOptions
    keys: Array
    stop_ids: Int[Array, "S"]


def _prefill(model, tokens, counts, state, last):
    """Append a chunk; `last` [B, V] keeps the logits of the last real token of every row."""
    logits, state = model.extend(tokens, state, num_tokens=counts, last_only=True)
    return state, jnp.where((counts > 0)[:, None], logits[:, 0], last)


def _choose(logits: Float[Array, "B V"], rows: _Rows, choice: _Choice) -> _Rows:
    keys = sampling.step_keys(choice.keys, rows.state.length)
    token = sampling.choose(logits, choice.options, keys, rows.counts).token
    counts = rows.counts.at[jnp.arange(token.shape[0]), token].add(1)
    stopped = jnp.any(token[:, None] == choice.stop_ids[None, :], axis=1)
    return _Rows(rows.state, token, rows.active & ~stopped, counts)


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

    def __init__(self, model, choice: Callable, batch: int, max_tokens: int, longest: int):
        self._model, self._choice, self._batch = model, choice, batch
        self._max_tokens = max_tokens
        # Padding may reach past the last token, and the cache must hold it too.
        self._max_length = max(longest + max_tokens, sum(_widths(longest)))
        self._programs: dict[Any, Callable] = {}
        self.stats = Stats()

    def run(self, prompts: Sequence[Sequence[int]], first: int, on_tokens: Callable) -> None:
        """Generate for prompts number `first` and following.

        on_tokens: called with tokens [b, at most 64], -1 where a prompt's output has ended;
          returns whether some prompt goes on.
        """
        fill = self._batch - len(prompts)  # rows of no interest, to keep the shape
        numbers = jnp.asarray([*range(first, first + len(prompts)), *[0] * fill])
        choice = self._choice(numbers)
        rows = self._start([*prompts, *[[0]] * fill], len(prompts), choice)
        self.stats.prefill_tokens += sum(map(len, prompts))
        self._compile("decode", _decode, (1,), self._model, rows, choice, jnp.int32(1))
        left, steps, done, secs = self._max_tokens - 1, 1, 0, 0.0
        # Copied, because the rows' own memory is given to the next dispatch.
        pending, pending_steps = np.array(rows.token)[:, None], 0
        before = time.perf_counter()
        while pending is not None:
            following, following_steps = None, min(steps, left)
            if following_steps:  # runs while the host is busy with the tokens before
                args = (self._model, rows, choice, jnp.int32(following_steps))
                rows, following = self._programs["decode"](*args)
                left -= following_steps
            tokens = np.asarray(pending)[: len(prompts)]
            now = time.perf_counter()
            secs += now - before
            before = now
            if pending_steps:
                self.stats.decode_tokens += int((tokens >= 0).sum())
                done += pending_steps
                wanted = round(done * _DISPATCH_SECS / max(secs, 1e-9))
                steps = min(max(wanted, 1), 2 * steps, _MAX_STEPS)
            pending = following if on_tokens(tokens) else None
            pending_steps = following_steps
        self.stats.decode_secs += secs

    def _start(self, prompts, real: int, choice: _Choice) -> _Rows:
        """Prefill; return the rows with their first token chosen."""
        vocab_size = self._model.config.vocab_size
        lengths = np.asarray([len(prompt) for prompt in prompts])
        seen = np.zeros((self._batch, vocab_size), np.int32)
        state = self._model.init_state(batch=self._batch, max_length=self._max_length)
        last = jnp.zeros((self._batch, vocab_size), jnp.float32)
        active = jax.block_until_ready(jnp.arange(self._batch) < real)
        zeros = jnp.zeros(self._batch, jnp.int32)
        began, compiled = time.perf_counter(), self.stats.compile_secs
        start = 0
        for width in _widths(int(lengths.max())):
            counts = np.clip(lengths - start, 0, width).astype(np.int32)
            tokens = np.zeros((self._batch, width), np.int32)
            for row, prompt in enumerate(prompts):
                part = np.asarray(prompt[start : start + width], np.int32)
                tokens[row, : len(part)] = part
                seen[row, part] = sampling.PROMPT_FLAG
            args = (self._model, tokens, counts, state, last)
            state, last = self._compile(width, _prefill, (3, 4), *args)(*args)
            start += width
        rows = _Rows(state, zeros, active, jnp.asarray(seen))
        rows = self._compile("first", _choose, (1,), last, rows, choice)(last, rows, choice)
        jax.block_until_ready(rows)
        compiled = self.stats.compile_secs - compiled
        self.stats.prefill_secs += time.perf_counter() - began - compiled
        return rows

    def _compile(self, key, function: Callable, donated: Sequence[int], *args) -> Callable:
        """Return `function` compiled for arguments like `args`, making it the first time.

        Compiled ahead, because then its time is known and speed is told without it.
        """
        if key not in self._programs:
            began = time.perf_counter()
            # Leaves go in one by one: lowering puts descriptions of arrays into the classes of
            # its arguments, and shape checks of those classes, on in tests, refuse them.
            ends = np.cumsum([0, *(len(jax.tree.leaves(arg)) for arg in args)])
            leaves, tree = jax.tree.flatten(args)
            given = [leaf for arg in donated for leaf in range(ends[arg], ends[arg + 1])]
            flat = jax.jit(lambda *x: function(*jax.tree.unflatten(tree, x)), donate_argnums=given)
            program = flat.lower(*leaves).compile()
            self._programs[key] = lambda *args: program(*jax.tree.leaves(args))
            self.stats.compile_secs += time.perf_counter() - began
        return self._programs[key]


def _widths(length_tokens: int) -> list[int]:
    """Cut a prompt into full chunks and a last one of a power of two."""
    full, rest = divmod(length_tokens, _CHUNK_TOKENS)
    last = max(_MIN_WIDTH_TOKENS, 1 << (rest - 1).bit_length()) if rest else 0
    return [_CHUNK_TOKENS] * full + ([last] if rest else [])
