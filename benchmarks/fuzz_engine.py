"""Random operations on an engine. Every request must give what it gives alone and cold.

    python benchmarks/fuzz_engine.py [--operations=10000] [--seed=0] [--dtype=float32]

A plain engine without a prefix cache first serves a pool of requests one by one. The requests have
all options, and prompts that share beginnings. Then engines of other sizes, short of pages and
slots, get the same requests over and over, between new requests that are seen once. Requests are
submitted, cancelled and preempted (to the host, and to be computed again), and weights are swapped.
Callbacks raise, and call back: they cancel any request, submit, suspend and close. A
KeyboardInterrupt comes at any line of a step. Requests are suspended to a file, and resumed.
Engines are closed under way, and others take their devices.
Tokens and log-probabilities must be bit-exact, and nothing may be compiled. Each callback must hear
of all of its output, and once of its end. A token whose embedding is NaN makes some requests end in
an error, and must affect no other request. The exit status is 1 where anything differs, or where an
operation was never tried.
"""

import argparse
import collections
import dataclasses
import functools
import linecache
import pathlib
import random
import sys
import tempfile
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import tqdm
from flax import nnx

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import request, stopping, suspend
from infer.execution import device as device_lib
from infer.execution import dispatcher
from infer.scheduling import plan as plan_lib
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib
from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib

CHUNK_TOKENS, MAX_LENGTH = 16, 256
POISON = 0  # the token whose embedding is NaN; also the padding token
SHARED_SIZES = {"max_length": MAX_LENGTH, "chunk_tokens": CHUNK_TOKENS}
REFERENCE_CONFIG = config_lib.EngineConfig(
    **SHARED_SIZES,
    max_rows=1,
    num_snapshots=0,
    prefix_cache=False,
    decode_steps=1,
    prefill_tokens=(64,),
)
BUSY_CONFIGS = (
    # 16 pages hold one sequence of max_length.
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=4,
        num_pages=24,
        num_snapshots=4,
        decode_steps=4,
        prefill_tokens=(32, 64),
        snapshot_every_tokens=64,
        swap_tokens=48,
        host_bytes=2**20,
        max_queue=12,
    ),
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=12,
        num_pages=40,
        num_snapshots=2,
        decode_steps=7,
        prefill_tokens=(16, 128),
        snapshot_every_tokens=0,
        swap_tokens=1,
        host_bytes=2**22,
        max_queue=20,
        draft_tokens=5,
        record_routes=True,
    ),
    config_lib.EngineConfig(
        **SHARED_SIZES,
        max_rows=2,
        num_snapshots=8,
        decode_steps=1,
        prefill_tokens=(24,),
        max_queue=6,
    ),
)
# What a run must have tried, by the names of its counts.
REQUIRED_COUNTS = (
    "submit",
    "stranger",
    "queue_full",
    "cancel",
    "preempt",
    "swap",
    "compared",
    "errors",
    "reasoning",
    "hits",
    "misses",
    "evicted",
    "swapped_out",
    "swapped_in",
    "restarted",
    "own_preemptions",
    "callback_raise",
    "callback_cancel",
    "callback_submit",
    "callback_suspend",
    "callback_close",
    "interrupted_plan",
    "interrupted_results",
    "suspend",
    "close",
)
_INFER = str(pathlib.Path(engine_lib.__file__).parent)


@dataclasses.dataclass(frozen=True)
class FuzzCase:
    """A request, and its output when it is served alone."""

    prompt: tuple[int, ...]
    options: options_lib.Options
    output: request.RequestOutput


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cases", type=int, default=60, help="requests in the pool")
    parser.add_argument(
        "--engines", type=int, default=len(BUSY_CONFIGS), help="engines, one after the other"
    )
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = tokenizer_lib.Tokenizer.load(testing.write_tiny_tokenizer(directory))
    model = make_model(jnp.dtype(arguments.dtype))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _secs, **_: compiled.append(name) if "/compile/" in name else None
    )
    start = time.monotonic()
    reference = engine_lib.Engine(model, tokenizer, REFERENCE_CONFIG)
    programs = [time.monotonic() - start]
    cases = make_cases(reference, tokenizer, rng, arguments.cases)
    counts: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    secs = 0.0
    with tqdm.tqdm(total=arguments.operations, unit="operation") as bar:
        for engine_number, config in enumerate(BUSY_CONFIGS[: arguments.engines], 1):
            start = time.monotonic()
            device = device_lib.Device(model, config)
            programs.append(time.monotonic() - start)
            run = FuzzRun(
                functools.partial(make_engine, model, tokenizer, config, device),
                model,
                cases,
                rng,
                counts,
            )
            compiled.clear()  # the engine compiles when it is made, and never again
            start = time.monotonic()
            while (
                bar.n < arguments.operations * engine_number // arguments.engines and not problems
            ):
                bar.update(run.operate())
                problems += run.problems
            run.finish()
            secs += time.monotonic() - start
            problems += run.problems + [f"compiled: {name}" for name in compiled]
    problems += [f"never tried: {name}" for name in REQUIRED_COUNTS if not counts[name]]
    print(", ".join(f"{name} {counts[name]}" for name in sorted(counts)))
    print(f"{len(programs)} engines made in {sum(programs):.0f} s, busy for {secs:.0f} s")
    print(*problems[:20] or ["all outputs bit-exact, nothing compiled"], sep="\n")
    sys.exit(bool(problems))


def make_engine(model, tokenizer, config, device: device_lib.Device) -> engine_lib.Engine:
    """Return an engine on a device that another one may have used."""
    make_device, device_lib.Device = device_lib.Device, lambda *_: device
    engine = engine_lib.Engine(model, tokenizer, config)
    device_lib.Device = make_device
    engine._core._runner._dispatcher = dispatcher.Dispatcher(device, config, is_device_new=False)
    return engine


def make_model(dtype: jnp.dtype) -> model_lib.MiniMaxM1:
    """Return a tiny model with clear preferences, an irregular list of layers, and a NaN token."""
    kinds = (model_config_lib.LIGHTNING, model_config_lib.SOFTMAX)
    config = dataclasses.replace(
        model_config_lib.ModelConfig.tiny(),
        layer_types=tuple(kinds[i] for i in (0, 0, 1, 0)),
        initializer_range=0.1,
    )
    model = model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=dtype)
    model.embed.table[...] = model.embed.table[...].at[POISON].set(jnp.nan)
    return model


# ---- requests


def make_cases(reference, tokenizer, rng: random.Random, num_cases: int) -> list[FuzzCase]:
    """Serve a pool of requests one by one."""
    cases: list[FuzzCase] = []
    while len(cases) < num_cases:
        prompt = draw_prompt(rng, cases)
        options = draw_options(rng, tokenizer)
        (output,) = reference.generate([prompt], options)
        cases.append(FuzzCase(prompt, options, output))
    return cases


def draw_prompt(rng: random.Random, cases: list[FuzzCase]) -> tuple[int, ...]:
    """Return 1 to 200 tokens: new ones, alone or after another prompt's beginning or its answer."""
    tokens = tuple(rng.randrange(1, 500) for _ in range(rng.choice((1, 2, 9, 16, 33, 70, 140))))
    kind = rng.random()
    if cases and kind < 0.4:
        prefix = rng.choice(cases).prompt
        tokens = prefix[: rng.randint(1, len(prefix))] + tokens
    elif cases and kind < 0.8:
        case = rng.choice(cases)
        tokens = case.prompt + tuple(token.id for token in case.output.tokens) + tokens
    if POISON in tokens and rng.random() < 0.8:
        tokens = tuple(token or 1 for token in tokens)
    elif rng.random() < 0.03:
        tokens = (*tokens[:100], POISON, *tokens[:40])
    return tokens[:200]


def draw_options(rng: random.Random, tokenizer) -> options_lib.Options:
    """Return options of any kind. Where text matters, a bias makes letters likely."""
    values: dict = {"seed": rng.randrange(2**32), "max_tokens": rng.randint(1, 40)}

    def set_with_chance(chance, **choices):
        for name, options in choices.items():
            if rng.random() < chance:
                values[name] = rng.choice(options)

    set_with_chance(
        0.5, temperature=(0, 0.3, 1.7), top_p=(0.3, 1.0), top_k=(1, 5, 50), min_p=(0.1, 0.5)
    )
    set_with_chance(0.25, repetition_penalty=(0.8, 1.3), presence_penalty=(-1, 1.5))
    set_with_chance(0.25, frequency_penalty=(-0.5, 2), top_logprobs=(1, 5, 20))
    set_with_chance(0.2, stop_token_ids=((64, 65), (300, 301, 302)), ignore_eos=(True,))
    set_with_chance(0.2, min_tokens=(1, values["max_tokens"]), stop_on_loop=(True,))
    ids = rng.sample(range(1, 512), 8)
    bias = {token: rng.uniform(-100, 8) for token in ids} if rng.random() < 0.3 else {}
    kind = rng.randrange(9)
    if kind == 0:  # stop strings that span tokens
        bias |= dict.fromkeys(tokenizer.encode("abcdefghij"), 9.0)
        values["stop"] = rng.choice((("ab", "cde"), ("fa", "hhh", "ij"), ("d",)))
    elif kind in (
        1,
        8,
    ):  # an open thought: falling biases and penalties give `<`, `think`, `>` in turn
        bias = dict(zip(tokenizer.encode("<think>"), (100, 98.6, 97.3), strict=True))
        values |= {"temperature": 0, "presence_penalty": 2, "frequency_penalty": 2}
        values |= {"thinking_tokens": rng.randrange(20), "repetition_penalty": 1.0}
        values |= {"max_tokens": rng.randint(20, 40), "min_tokens": 0}
    elif kind in (2, 3):
        values |= {"min_tokens": 0, "ignore_eos": False, "max_tokens": rng.randint(8, 40)}
        values |= rng.choice(
            (
                {"regex": "[a-f]{2,20}[0-9]"},
                {"json_schema": {"type": "array", "items": {"enum": ["a", 1, None]}}},
                {"grammar": 'start: "(" start ")" | /[a-z]{1,3}/'},
                {"regex": "[0-9]+", "after_thinking": True, "thinking_tokens": 9},
            )
        )
    elif kind == 4 and rng.random() < 0.3:
        bias |= {POISON: 12.0}
    elif kind == 5:
        values["stop_token_ids"] = tuple(rng.sample(range(1, 500), 7))
    return options_lib.Options(logit_bias=bias, **values)


# ---- operations


class InterruptAtLine:
    """Raises KeyboardInterrupt at the `number`th line of the engine's, as a signal may."""

    def __init__(self, number: int):
        self._number = number

    def __enter__(self):
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, _):
        code = frame.f_code
        # While a program has the device's memory, the engine could but refuse.
        if not code.co_filename.startswith(_INFER) or code.co_name == "run_program":
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        # A signal does not come between a block's end and the release of its lock. A trace does.
        if event == "line" and not line.startswith("with "):
            self._number -= 1
            if not self._number:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


class FuzzCallback:
    """Hears of one request, and does something at one of its tokens.

    Attributes:
      number: tokens after which it acts.
      action: what it does. None: nothing.
      problems: what it should not have heard.
      num_ends: ends that it heard of.
    """

    def __init__(self, number: int, action):
        self.number, self.action = number, action
        self.problems: list[str] = []
        self.num_ends = 0
        self._num_tokens, self._text = 0, ""

    def __call__(self, caller: request.Request, token, text: str) -> None:
        self._num_tokens += token is not None
        self._text += text
        self.num_ends += caller.finish_reason is not None
        if self._num_tokens != len(caller.tokens) or self._text != caller.text:
            self.problems.append(f"request {caller.sequence_id}: heard {self._num_tokens} tokens")
        if self.action and self._num_tokens == self.number and caller.finish_reason is None:
            self.action(caller)


class FuzzRun:
    """Random operations on an engine and its successors, and the problems that they uncover."""

    def __init__(
        self,
        make_successor,
        model: model_lib.MiniMaxM1,
        cases: list[FuzzCase],
        rng: random.Random,
        counts: collections.Counter[str],
    ):
        self._make_successor, self._engine = make_successor, make_successor()
        self._model, self._cases = model, cases
        self._rng, self._counts = rng, counts
        # The case of each request, and its callback.
        self._open: dict[request.Request, tuple[FuzzCase | None, FuzzCallback | None]] = {}
        self._suspended: list[FuzzCase | None] = []  # cases of the requests in the file
        self._file = pathlib.Path(tempfile.mkdtemp()) / "requests.json"
        self._preempted = 0
        self.problems: list[str] = []
        # Suspending compiles a program of its own: now for weights as they are swapped in.
        self._engine.swap_weights(model)
        suspend.digest_arrays(self._engine.weights)

    def operate(self) -> int:
        """Do something; return its number of operations. A step of the engine is none."""
        rng, chance = self._rng, self._rng.random()
        config, preemptions_before = self._engine.config, self._preemptions()
        if chance < 0.25 and len(self._open) < config.max_queue // 2 + config.max_rows:
            self._submit()
        elif 0.25 < chance < 0.26 and self._open:
            self._engine.cancel(rng.choice(list(self._open)))
            self._count("cancel")
        elif 0.26 < chance < 0.29 and self._open:
            self._engine.preempt(rng.choice(list(self._open)))
            self._count("preempt")
        elif 0.29 < chance < 0.292:
            self._engine.swap_weights(self._model, keep_running=rng.random() < 0.5)
            self._count("swap")
        elif 0.292 < chance < 0.305:
            self._interrupt()
        elif 0.305 < chance < 0.308:
            self._suspend()
            self._count("suspend")
        elif 0.308 < chance < 0.311:
            self._close()
            self._count("close")
        elif chance > 0.997:
            while self._engine.stats().num_waiting < config.max_queue:
                self._submit()
            self._submit()
        else:
            self._engine.step()
            self._settle()
            return 0
        self._settle()
        self._preempted += self._preemptions() - preemptions_before
        return 1

    def _settle(self) -> None:
        """Check what ended, and go on where the engine was closed or its requests suspended."""
        self._check_ended()
        if self._engine._closed:
            self._engine.close()
            self._check_ended()
            self._add_statistics()
            self._engine, self._preempted = self._make_successor(), 0
        if self._suspended:
            resumed = suspend.resume_requests(self._engine, self._file)
            self._open.update(zip(resumed, [(c, None) for c in self._suspended], strict=True))
            self._suspended = []

    def _interrupt(self) -> None:
        """Interrupt one of the next steps somewhere."""
        try:
            with InterruptAtLine(self._rng.randrange(1, 2500)):
                for _ in range(6):
                    self._engine.step()
        except KeyboardInterrupt:
            unfinished = self._engine._core._section.unfinished
            self._count("interrupted_" + (unfinished or "nothing").split()[-1])
            # A new beginning counts anew.
            self._preempted = 0
            self._engine.step()

    def _suspend(self, *_) -> None:
        alive = [
            self._open[live][0] if live in self._open else None
            for live in self._engine._core.requests.values()
            if live.finish_reason is None
        ]
        # A callback may be within another one's suspension.
        if alive and not self._suspended:
            suspend.save_requests(self._engine, self._file)
            self._suspended = alive

    def _close(self, *_) -> None:
        self._engine.close()

    def _draw_callback(self) -> FuzzCallback | None:
        rng = self._rng
        if rng.random() < 0.4:
            return None

        def raise_error(_):
            raise rng.choice((BrokenPipeError("gone"), ValueError("a bug"), LookupError("a bug")))

        def cancel(_):
            self._engine.cancel(rng.choice(list(self._open)))

        def submit(_):
            if not self._engine._closed:
                self._submit()

        # Weighted: a suspension or a closing disturbs all others.
        actions = {None: 35, raise_error: 5, cancel: 5, submit: 5, self._suspend: 1, self._close: 2}
        (action,) = rng.choices(list(actions), list(actions.values()))
        if action is None:
            return FuzzCallback(0, None)
        name = f"callback_{action.__name__.strip('_').partition('_')[0]}"

        def act(caller):
            self._count(name)
            action(caller)

        return FuzzCallback(rng.randint(1, 12), act)

    def finish(self) -> None:
        """Serve the open requests, and add the engine's own statistics to the counts."""
        self._engine.run()
        self._check_ended()
        while self._suspended or self._engine._closed:
            self._settle()
            self._engine.run()
        self._check_ended()
        if self._open:
            self.problems.append(f"{len(self._open)} requests never ended")
        self._add_statistics()

    def _add_statistics(self) -> None:
        stats = self._engine.stats()
        for name in ("hits", "misses", "hit_tokens", "evicted"):
            self._counts[name] += getattr(stats.cache, name)
        for name in ("swapped_out", "swapped_in", "restarted", "slots_taken_over"):
            self._counts[name] += getattr(stats.memory, name)
        self._counts["own_preemptions"] += self._preemptions() - self._preempted
        self._counts["held_back"] += stats.num_held_back
        self._counts["steps"] += stats.num_plans

    def _submit(self) -> None:
        case = self._rng.choice(self._cases) if self._rng.random() < 0.6 else None
        if case is not None:
            prompt, options = case.prompt, case.options
        else:
            prompt = draw_prompt(self._rng, self._cases)
            options = draw_options(self._rng, self._engine.tokenizer)
        self._count("submit" if case else "stranger")
        callback = self._draw_callback()
        try:
            handle = self._engine.submit(prompt, options, callback)
            self._open[handle] = case, callback
        except plan_lib.QueueFull:
            self._count("queue_full")

    def _check_ended(self) -> None:
        """Compare the requests that ended with what they gave alone."""
        for ended in [handle for handle in self._open if handle.done.is_set()]:
            (case, callback), output = self._open.pop(ended), ended.output()
            self._counts[f"ended_{output.finish_reason}"] += 1
            was_interrupted = output.error is not None and not isinstance(
                output.error, FloatingPointError
            )
            if callback is not None:
                self.problems += callback.problems
                # One that raised knows of the end, and is not called again.
                if callback.num_ends != 1 and not was_interrupted:
                    self.problems.append(f"{callback.num_ends} ends of {output.finish_reason}")
            if case is None:
                continue
            actual, expected = comparable_output(output), comparable_output(case.output)
            if was_interrupted or output.finish_reason in ("cancelled", "suspended"):
                num_tokens = len(output.tokens)
                expected = comparable_output(
                    dataclasses.replace(case.output, tokens=case.output.tokens[:num_tokens])
                )
                same = actual[:num_tokens] == expected[:num_tokens]
                # With the text that was held back: a stop string might have taken it.
                progress = stopping.OutputProgress(case.options, self._engine.tokenizer)
                texts = [progress.push(token.id, token.logp_raw).text for token in output.tokens]
                same = same and output.text == "".join(texts) + progress.flush()
            else:
                same = actual == expected
                self._count("compared")
                self._counts["errors"] += output.finish_reason == "error"
                self._counts["reasoning"] += output.reasoning_tokens > 0
            if not same:
                pairs = [(a, b) for a, b in zip(actual, expected, strict=False) if a != b]
                self.problems.append(
                    f"{case}: of {len(actual)} and {len(expected)}, first {pairs[:1]}"
                )

    def _preemptions(self) -> int:
        stats = self._engine.stats().memory
        return stats.swapped_out + stats.restarted

    def _count(self, name: str) -> None:
        self._counts[name] += 1


def comparable_output(output: request.RequestOutput) -> list:
    """Return what must be equal: the tokens, then text, reason and number of thought tokens."""
    # Weights are put in place anew, which raises the version and changes no number.
    tokens = [dataclasses.replace(token, version=0) for token in output.tokens]
    return [*tokens, output.text, output.finish_reason, output.reasoning_tokens]


if __name__ == "__main__":
    main()
