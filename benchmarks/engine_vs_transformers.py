"""Times the serving engine against transformers' `generate`: same weights, same CPU, one run.

    python benchmarks/engine_vs_transformers.py [--json=FILE] [--repeats=5] [--size=tiny]

Both sides compute greedily in float32 with all cores, from the same prompts, and make as many
tokens whatever these say. First both must make the same tokens. Calls take turns; the fastest of
each side count (`side_by_side.py`), for transformers of whichever of its expert implementations
was fastest. "Decoding" is what is left of a call after every sequence's first token.

It also measures the engine alone: the time that the device waits for the host, and what prompts
with a common beginning cost. The side `all rows` is the engine with matmul_tile=0, which multiplies
all rows at once. It is faster, but a sequence's numbers then depend on its company.

Needs the `parity` extra (torch, transformers).
"""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import side_by_side
import torch
import transformers
from absl import app, flags

from infer import config, engine
from infer import options as options_lib
from m1_jax import testing, tokenizer

_SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "120M parameters, or a quick try.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each side per case.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to run; all if empty.")
_PATIENCE = flags.DEFINE_float("patience_secs", 120, "Longest wait per case for a quiet machine.")
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers as JSON.")

_CHECK_TOKENS = 8
_SUFFIX_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """What is timed. targets: of decoding, by batch."""

    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int
    prefix_tokens: int
    followers: int
    targets: dict[int, float]
    engine: config.EngineConfig


_SIZES = {
    "full": Size(
        128, 64, 2048, 2000, 16, {1: 2.0, 8: 3.0, 32: 4.0},
        config.EngineConfig(max_length=2304, max_rows=32, prefill_tokens=(128, 512)),
    ),
    "tiny": Size(
        16, 8, 32, 48, 4, {1: 2.0, 8: 3.0},
        config.EngineConfig(
            max_length=128, max_rows=8, chunk_tokens=16, prefill_tokens=(32,), decode_steps=4,
        ),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call. decode: seconds after every sequence had a token, and tokens made in them.

    waiting_secs: of the decoding, those in which the device had nothing to do.
    """

    whole_secs: float
    decode_secs: float = 0.0
    decode_tokens: int = 0
    waiting_secs: float = 0.0

    @property
    def token_secs(self) -> float:
        return self.decode_secs / max(self.decode_tokens, 1)


class _TimedProgram:
    """A program of the engine that waits for its results and notes when it ran."""

    def __init__(self, program):
        self._program, self.runs = program, []

    def __call__(self, *arguments):
        start = time.perf_counter()
        results = jax.block_until_ready(self._program(*arguments))
        self.runs.append((start, time.perf_counter()))
        return results


class OurEngine:
    """An engine whose prompts are all its own: it remembers those of earlier calls."""

    def __init__(self, model, size: Size, **changes: Any):
        with tempfile.TemporaryDirectory() as directory:
            testing.write_tiny_tokenizer(directory, model.config.vocab_size)
            words = tokenizer.Tokenizer.load(directory)
        self._engine = engine.Engine(model, words, dataclasses.replace(size.engine, **changes))
        programs = self._engine._device._programs
        self._decode = {
            key: _TimedProgram(program) for key, program in programs.items() if key[0] == "decode"
        }
        programs.update(self._decode)

    def tokens(self, prompts, new_tokens: int) -> list[list[int]]:
        """Return what follows each prompt."""
        outputs = self._engine.generate([p.tolist() for p in prompts], _greedy_options(new_tokens))
        return [[token.id for token in output.tokens] for output in outputs]

    def generate(self, prompts, new_tokens: int) -> Timing:
        """Serve prompts that are all submitted at once."""
        for timed in self._decode.values():
            timed.runs.clear()
        times, first = [], {}

        def note(asked, token, text):
            times.append(time.perf_counter())
            first.setdefault(asked.number, times[-1])

        options = _greedy_options(new_tokens)
        start = time.perf_counter()
        for prompt in prompts:
            self._engine.submit(prompt.tolist(), options, note)
        self._engine.run()
        end = time.perf_counter()
        begun = max(first.values())
        decode_secs = end - begun
        runs = [run for timed in self._decode.values() for run in timed.runs]
        busy_secs = sum(stop - max(at, begun) for at, stop in runs if stop > begun)
        made = sum(at > begun for at in times)
        return Timing(end - start, decode_secs, made, decode_secs - busy_secs)


class _FirstToken(transformers.StoppingCriteria):
    """Notes when the first token was there; stops nothing."""

    def __init__(self):
        self.at = 0.0

    def __call__(self, input_ids, scores, **kwargs):
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _their_generate(model, experts: str, prompts, new_tokens: int) -> tuple[Any, Timing]:
    """Return tokens [B, new_tokens] and times."""
    model.set_experts_implementation(experts)
    first = _FirstToken()
    start = time.perf_counter()
    tokens = model.generate(
        torch.from_numpy(prompts),
        attention_mask=torch.ones(prompts.shape, dtype=torch.long),
        do_sample=False,
        use_cache=True,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        stopping_criteria=transformers.StoppingCriteriaList([first]),
    )
    end = time.perf_counter()
    made = len(prompts) * (new_tokens - 1)
    return tokens[:, prompts.shape[1] :], Timing(end - start, end - first.at, made)


def _greedy_options(new_tokens: int) -> options_lib.Options:
    return options_lib.Options(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: sides to call in turn; rows makes table rows of their timings."""

    name: str
    sides: dict[str, Callable[[], Timing]]
    rows: Callable[[dict[str, list[Timing]]], list[dict]]


def _make_row(
    case: str, what: str, secs: dict[str, list[float]], tokens, target, ours="ours"
) -> dict:
    """Return one line: the side `ours` against the fastest of the others."""
    least = {name: min(values) for name, values in secs.items()}
    others = [name for name in least if name != ours]
    best = min(others, key=least.__getitem__)
    return {
        "case": case,
        "what": what,
        "ours": ours,
        "against": best,
        "ours_per_sec": tokens / least[ours],
        "against_per_sec": tokens / least[best],
        "ratio": least[best] / least[ours],
        "target": target,
        "min_secs": least,
        "median_secs": {name: statistics.median(values) for name, values in secs.items()},
    }


def _batch_case(batch: int, size: Size, prompts, ours, theirs) -> Case:
    """Decode a batch: exact, all rows at once, and transformers."""
    length, new = size.prompt_tokens, size.new_tokens
    # batched_mm copies the weights of each token's experts: right for one token.
    experts = ("eager", "grouped_mm", "batched_mm") if batch == 1 else ("eager", "grouped_mm")
    sides: dict[str, Callable[[], Timing]] = {
        name: functools.partial(
            _call_with_new_prompts, made.generate, prompts, (batch, length), new
        )
        for name, made in ours.items()
    }
    for name in experts:
        call = functools.partial(_their_generate, theirs, name)
        sides[name] = functools.partial(_their_timing, call, prompts, (batch, length), new)
    case = f"batch-{batch}"

    def rows(timings):
        def seconds(kind, names):
            return {name: [getattr(t, kind) for t in timings[name]] for name in names}

        fair, own = ["ours", *experts], ["ours", "all rows"]
        target = size.targets[batch]
        return [
            _make_row(case, "decoding, tokens/s", seconds("token_secs", fair), 1, target),
            _make_row(case, "whole, tokens/s", seconds("whole_secs", fair), batch * new, None),
            _make_row(case, "exactness, decoding", seconds("token_secs", own), 1, None),
        ]

    return Case(case, sides, rows)


def _call_with_new_prompts(call, prompts, shape, new_tokens) -> Timing:
    return call(prompts(*shape), new_tokens)


def _their_timing(call, prompts, shape, new_tokens) -> Timing:
    return call(prompts(*shape), new_tokens)[1]


def _prefill_case(size: Size, prompts, ours, theirs) -> Case:
    """Read one long prompt and make a token."""
    shape, experts = (1, size.prefill_tokens), ("eager", "grouped_mm")
    sides: dict[str, Callable[[], Timing]] = {
        name: functools.partial(_call_with_new_prompts, made.generate, prompts, shape, 1)
        for name, made in ours.items()
    }
    for name in experts:
        call = functools.partial(_their_generate, theirs, name)
        sides[name] = functools.partial(_their_timing, call, prompts, shape, 1)

    def rows(timings):
        secs = {name: [t.whole_secs for t in timings[name]] for name in sides}
        exact = {name: secs[name] for name in ("ours", "all rows")}
        fair = {name: secs[name] for name in ("ours", *experts)}
        return [
            _make_row("prefill", "prompt tokens/s", fair, shape[1], None),
            _make_row("prefill", "exactness, prefill", exact, shape[1], None),
        ]

    return Case("prefill", sides, rows)


def _shared_case(size: Size, prompts, ours) -> Case:
    """Time prompts with a common beginning, submitted at once, against the beginning alone."""

    def together():
        prefix = np.repeat(prompts(1, size.prefix_tokens), size.followers, axis=0)
        suffixes = prompts(size.followers, _SUFFIX_TOKENS)
        return ours.generate(np.concatenate([prefix, suffixes], axis=1), 1)

    sides = {
        "ours": together,
        "one": functools.partial(
            _call_with_new_prompts, ours.generate, prompts, (1, size.prefix_tokens), 1
        ),
    }

    def rows(timings):
        secs = {name: [t.whole_secs for t in timings[name]] for name in sides}
        row = _make_row("shared-prefix", f"{size.followers} over one, time", secs, 1, 1.3, "one")
        return [row]

    return Case("shared-prefix", sides, rows)


def _host_case(size: Size, prompts, ours) -> Case:
    """Say which part of decoding the device spends waiting for the host."""
    batch = max(size.targets)
    side = functools.partial(
        _call_with_new_prompts, ours.generate, prompts, (batch, size.prompt_tokens), size.new_tokens
    )

    def rows(timings):
        shares = [t.waiting_secs / t.decode_secs for t in timings["ours"]]
        what = f"share of decoding, batch {batch}"
        row = {"case": "host", "what": what, "share": min(shares), "shares": shares}
        return [row | {"target": 0.05}]

    return Case("host", {"ours": side}, rows)


def _check_same_tokens(prompts, size: Size, ours, theirs) -> None:
    """Demand the same greedy tokens of both sides.

    Raises:
      RuntimeError: they differ.
    """
    asked = prompts(4, size.prompt_tokens)
    wanted = _their_generate(theirs, "eager", asked, _CHECK_TOKENS)[0].tolist()
    for name, made in ours.items():
        got = made.tokens(asked, _CHECK_TOKENS)
        if got != wanted:
            raise RuntimeError(
                f"{name}: got tokens {got}, want transformers' {wanted}. "
                "The sides compute different models, so their times cannot be compared."
            )


def _print_row(row: dict, quiet: bool) -> None:
    cells = [f"{row['case']:<14} {row['what']:<26}"]
    if "share" in row:
        cells.append(f"{row['share']:52.1%} {row['target']:7.1%}")
    else:
        cells.append(f"{row['ours']:<5} {row['ours_per_sec']:9,.1f} {row['against']:<10}")
        cells.append(
            f"{row['against_per_sec']:9,.1f} {row['ratio']:15.2f} {row['target'] or '':>7}"
        )
    print(*cells, "" if quiet else "BUSY MACHINE: do not quote", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"got arguments {argv[1:]}, want flags only")
    side_by_side.start()
    size = _SIZES[_SIZE.value]
    names = [f"batch-{batch}" for batch in size.targets] + ["prefill", "shared-prefix", "host"]
    if unknown := sorted(set(_CASES.value) - set(names)):
        raise app.UsageError(f"got cases {unknown}, want some of {names}")
    model, theirs = side_by_side.build(side_by_side.MODELS[_SIZE.value])
    ours = {"ours": OurEngine(model, size), "all rows": OurEngine(model, size, matmul_tile=0)}
    rng = np.random.default_rng(3)

    def prompts(*shape):
        return rng.integers(0, model.config.vocab_size, shape)

    machine = side_by_side.machine(theirs)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    _check_same_tokens(prompts, size, ours, theirs)
    cases = [_batch_case(batch, size, prompts, ours, theirs) for batch in size.targets]
    cases.append(_prefill_case(size, prompts, ours, theirs))
    cases.append(_shared_case(size, prompts, ours["ours"]))
    cases.append(_host_case(size, prompts, ours["ours"]))
    print(f"{'case':<14} {'what':<26} {'a second':>15} {'against':<10} {'a second':>9}", end="")
    print(f"{'ratio, share':>16} {'target':>7}")
    made = []
    for case in cases:
        if not _CASES.value or case.name in _CASES.value:
            timings, calls = side_by_side.measure(case.sides, _REPEATS.value, _PATIENCE.value)
            quiet = min(calls.values()) == _REPEATS.value
            for row in case.rows(timings):
                made.append(row | {"quiet": quiet, "quiet_calls": calls})
                _print_row(row, quiet)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump({"machine": machine, "rows": made}, file, indent=2)


if __name__ == "__main__":
    app.run(main)
