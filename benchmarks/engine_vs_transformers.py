"""Times the serving engine against transformers' `generate`: same weights, same CPU, one process.

    python benchmarks/engine_vs_transformers.py [--json=FILE] [--repeats=5] [--size=tiny]

Both sides decode greedily in float32 with all cores, from the same prompts, and generate the same
number of tokens. First they must generate the same tokens. The sides are called in turn, and the
fastest call of each side counts (`side_by_side.py`). For transformers that is the fastest of its
implementations of experts. "Decoding" is the part of a call after every sequence's first token.

The benchmark also measures the engine alone: how long the device waits for the host, and what
prompts with a common beginning cost. The side `all rows` is the engine with matmul_tile=0, which
multiplies all rows at once. It is faster, but a sequence's numbers then depend on the others in its
batch.

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
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to run. Empty: all.")
_PATIENCE = flags.DEFINE_float("patience_secs", 120, "Longest wait per case for a quiet machine.")
_JSON = flags.DEFINE_string("json", None, "File to write the numbers to, as JSON.")

_CHECK_TOKENS = 8
_SUFFIX_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Size:
    """What is timed."""

    prompt_tokens: int  # of a prompt, where decoding is timed
    new_tokens: int  # tokens that are generated after it
    prefill_tokens: int  # of the prompt whose prefill is timed
    prefix_tokens: int  # of the common beginning of prompts
    followers: int  # prompts with the common beginning
    targets: dict[int, float]  # ratio of speeds in decoding, by batch size
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
    """Seconds and tokens of one call. Decoding begins when every sequence has a token."""

    whole_secs: float
    decode_secs: float = 0.0
    decode_tokens: int = 0  # generated while decoding
    waiting_secs: float = 0.0  # seconds of decoding in which the device was idle

    @property
    def token_secs(self) -> float:
        return self.decode_secs / max(self.decode_tokens, 1)


class _TimedProgram:
    """A program of the engine that waits for its results and records when it ran."""

    def __init__(self, program):
        self._program, self.runs = program, []

    def __call__(self, *arguments):
        start = time.perf_counter()
        results = jax.block_until_ready(self._program(*arguments))
        self.runs.append((start, time.perf_counter()))
        return results


class OurEngine:
    """This project's engine.

    Its prefix cache keeps earlier prompts, so every timed call needs prompts of its own.
    """

    def __init__(self, model, size: Size, **changes: Any):
        with tempfile.TemporaryDirectory() as directory:
            testing.write_tiny_tokenizer(directory, model.config.vocab_size)
            tiny_tokenizer = tokenizer.Tokenizer.load(directory)
        engine_config = dataclasses.replace(size.engine, **changes)
        self._engine = engine.Engine(model, tiny_tokenizer, engine_config)
        programs = self._engine._device._programs
        self._decode = {
            key: _TimedProgram(program) for key, program in programs.items() if key[0] == "decode"
        }
        programs.update(self._decode)

    def tokens(self, prompts, new_tokens: int) -> list[list[int]]:
        """Return the tokens that follow each prompt."""
        outputs = self._engine.generate([p.tolist() for p in prompts], _greedy_options(new_tokens))
        return [[token.id for token in output.tokens] for output in outputs]

    def generate(self, prompts, new_tokens: int) -> Timing:
        """Serve prompts that are all submitted at once."""
        for timed in self._decode.values():
            timed.runs.clear()
        times, first_times = [], {}  # of all tokens; of each request's first, by its sequence id

        def on_token(request, token, text):
            times.append(time.perf_counter())
            first_times.setdefault(request.sequence_id, times[-1])

        options = _greedy_options(new_tokens)
        start = time.perf_counter()
        for prompt in prompts:
            self._engine.submit(prompt.tolist(), options, on_token)
        self._engine.run()
        end = time.perf_counter()
        decode_start = max(first_times.values())
        decode_secs = end - decode_start
        runs = [run for timed in self._decode.values() for run in timed.runs]
        # A run that began before still counts from the start of decoding on.
        busy_secs = sum(
            run_end - max(run_start, decode_start)
            for run_start, run_end in runs
            if run_end > decode_start
        )
        decode_tokens = sum(token_time > decode_start for token_time in times)
        return Timing(end - start, decode_secs, decode_tokens, decode_secs - busy_secs)


class _FirstToken(transformers.StoppingCriteria):
    """Records when the first token was there. It stops nothing."""

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
    decode_tokens = len(prompts) * (new_tokens - 1)
    return tokens[:, prompts.shape[1] :], Timing(end - start, end - first.at, decode_tokens)


def _greedy_options(new_tokens: int) -> options_lib.Options:
    return options_lib.Options(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    name: str
    sides: dict[str, Callable[[], Timing]]  # called in turn, by name
    rows: Callable[[dict[str, list[Timing]]], list[dict]]  # the table's rows from all timings


def _make_row(
    case: str, quantity: str, secs: dict[str, list[float]], tokens, target, own_side="ours"
) -> dict:
    """Return one row of the table: `own_side` against the fastest of the other sides.

    Args:
      secs: of each timed call, by side.
      tokens: of one call.
      target: of the ratio, or None.
    """
    least = {name: min(values) for name, values in secs.items()}
    other_sides = [name for name in least if name != own_side]
    fastest = min(other_sides, key=least.__getitem__)
    return {
        "case": case,
        "what": quantity,
        "ours": own_side,
        "against": fastest,
        "ours_per_sec": tokens / least[own_side],
        "against_per_sec": tokens / least[fastest],
        "ratio": least[fastest] / least[own_side],
        "target": target,
        "min_secs": least,
        "median_secs": {name: statistics.median(values) for name, values in secs.items()},
    }


def _batch_case(batch: int, size: Size, prompts, our_engines, hf_model) -> Case:
    """Time decoding of a batch: the engine, the engine with all rows at once, and transformers."""
    length, new_tokens = size.prompt_tokens, size.new_tokens
    # batched_mm copies the weights of each token's experts: right for one token.
    experts = ("eager", "grouped_mm", "batched_mm") if batch == 1 else ("eager", "grouped_mm")
    sides: dict[str, Callable[[], Timing]] = {
        name: functools.partial(
            _call_with_new_prompts, our_engine.generate, prompts, (batch, length), new_tokens
        )
        for name, our_engine in our_engines.items()
    }
    for name in experts:
        call = functools.partial(_their_generate, hf_model, name)
        sides[name] = functools.partial(_their_timing, call, prompts, (batch, length), new_tokens)
    case = f"batch-{batch}"

    def rows(timings):
        def seconds(kind, names):
            return {name: [getattr(t, kind) for t in timings[name]] for name in names}

        fair, own = ["ours", *experts], ["ours", "all rows"]
        target = size.targets[batch]
        return [
            _make_row(case, "decoding, tokens/s", seconds("token_secs", fair), 1, target),
            _make_row(
                case, "whole, tokens/s", seconds("whole_secs", fair), batch * new_tokens, None
            ),
            _make_row(case, "exactness, decoding", seconds("token_secs", own), 1, None),
        ]

    return Case(case, sides, rows)


def _call_with_new_prompts(call, prompts, shape, new_tokens) -> Timing:
    return call(prompts(*shape), new_tokens)


def _their_timing(call, prompts, shape, new_tokens) -> Timing:
    return call(prompts(*shape), new_tokens)[1]


def _prefill_case(size: Size, prompts, our_engines, hf_model) -> Case:
    """Time the prefill of one long prompt, with one generated token."""
    shape, experts = (1, size.prefill_tokens), ("eager", "grouped_mm")
    sides: dict[str, Callable[[], Timing]] = {
        name: functools.partial(_call_with_new_prompts, our_engine.generate, prompts, shape, 1)
        for name, our_engine in our_engines.items()
    }
    for name in experts:
        call = functools.partial(_their_generate, hf_model, name)
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


def _shared_case(size: Size, prompts, our_engine) -> Case:
    """Time prompts with a common beginning, submitted at once, against the beginning alone."""

    def together():
        prefix = np.repeat(prompts(1, size.prefix_tokens), size.followers, axis=0)
        suffixes = prompts(size.followers, _SUFFIX_TOKENS)
        return our_engine.generate(np.concatenate([prefix, suffixes], axis=1), 1)

    sides = {
        "ours": together,
        "one": functools.partial(
            _call_with_new_prompts, our_engine.generate, prompts, (1, size.prefix_tokens), 1
        ),
    }

    def rows(timings):
        secs = {name: [t.whole_secs for t in timings[name]] for name in sides}
        row = _make_row("shared-prefix", f"{size.followers} over one, time", secs, 1, 1.3, "one")
        return [row]

    return Case("shared-prefix", sides, rows)


def _host_case(size: Size, prompts, our_engine) -> Case:
    """Measure the share of decoding in which the device waits for the host."""
    batch = max(size.targets)
    side = functools.partial(
        _call_with_new_prompts,
        our_engine.generate,
        prompts,
        (batch, size.prompt_tokens),
        size.new_tokens,
    )

    def rows(timings):
        shares = [t.waiting_secs / t.decode_secs for t in timings["ours"]]
        quantity = f"share of decoding, batch {batch}"
        row = {"case": "host", "what": quantity, "share": min(shares), "shares": shares}
        return [row | {"target": 0.05}]

    return Case("host", {"ours": side}, rows)


def _check_same_tokens(prompts, size: Size, our_engines, hf_model) -> None:
    """Check that both sides generate the same tokens.

    Raises:
      RuntimeError: the tokens differ.
    """
    check_prompts = prompts(4, size.prompt_tokens)
    expected = _their_generate(hf_model, "eager", check_prompts, _CHECK_TOKENS)[0].tolist()
    for name, our_engine in our_engines.items():
        tokens = our_engine.tokens(check_prompts, _CHECK_TOKENS)
        if tokens != expected:
            raise RuntimeError(
                f"{name}: got tokens {tokens}, want transformers' {expected}. "
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
    model, hf_model = side_by_side.build(side_by_side.MODELS[_SIZE.value])
    our_engines = {
        "ours": OurEngine(model, size),
        "all rows": OurEngine(model, size, matmul_tile=0),
    }
    rng = np.random.default_rng(3)

    def prompts(*shape):
        return rng.integers(0, model.config.vocab_size, shape)

    machine = side_by_side.machine(hf_model)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    _check_same_tokens(prompts, size, our_engines, hf_model)
    cases = [_batch_case(batch, size, prompts, our_engines, hf_model) for batch in size.targets]
    cases.append(_prefill_case(size, prompts, our_engines, hf_model))
    cases.append(_shared_case(size, prompts, our_engines["ours"]))
    cases.append(_host_case(size, prompts, our_engines["ours"]))
    print(f"{'case':<14} {'what':<26} {'a second':>15} {'against':<10} {'a second':>9}", end="")
    print(f"{'ratio, share':>16} {'target':>7}")
    rows = []
    for case in cases:
        if not _CASES.value or case.name in _CASES.value:
            timings, calls = side_by_side.measure(case.sides, _REPEATS.value, _PATIENCE.value)
            quiet = min(calls.values()) == _REPEATS.value
            for row in case.rows(timings):
                rows.append(row | {"quiet": quiet, "quiet_calls": calls})
                _print_row(row, quiet)
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    app.run(main)
