"""Random operations on an engine. Every request must give what it gives alone and cold.

Requests are submitted, cancelled and preempted (to the host, and to be computed again), and weights
are swapped. Callbacks raise, and call back: they cancel any request, submit, suspend and close. A
KeyboardInterrupt comes at any line of a step. Requests are suspended to a file, and resumed.
Engines are closed under way, and others take their devices.
"""

import collections
import dataclasses
import functools
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.monitoring

from infer import config as config_lib
from infer import engine as engine_lib
from infer import request, stopping, suspend
from infer.execution import device as device_lib
from infer.execution import dispatcher
from infer.scheduling import plan as plan_lib
from infer.selfcheck import fuzz_disturbances, fuzz_requests
from m1_jax import model as model_lib
from m1_jax import tokenizer as tokenizer_lib

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


@dataclasses.dataclass(frozen=True)
class FuzzOutcome:
    """What random operations came to.

    Attributes:
      counts: what was tried, and how often.
      problems: what differed from a request served alone, and what was compiled under way.
      num_operations: operations done, all engines together.
      setup_secs: time to make each engine, the one that serves alone first.
      busy_secs: time of the operations.
    """

    counts: collections.Counter[str]
    problems: Sequence[str]
    num_operations: int
    setup_secs: Sequence[float]
    busy_secs: float

    def list_untried(self) -> list[str]:
        """Return what a run must have tried, and this one has not."""
        return [name for name in REQUIRED_COUNTS if not self.counts[name]]


def run_fuzz(
    model: model_lib.MiniMaxM1,
    tokenizer: tokenizer_lib.Tokenizer,
    rng: random.Random,
    num_cases: int,
    configs: Sequence[config_lib.EngineConfig],
    num_operations: int,
    on_operation: Callable[[int], None] = lambda _: None,
    deadline: float = float("inf"),
) -> FuzzOutcome:
    """Serve requests alone, then the same ones by busy engines under random operations.

    Args:
      num_cases: requests that are served alone first.
      configs: sizes of the busy engines, one after the other.
      num_operations: of all of them together.
      on_operation: called with the operations just done.
      deadline: `time.monotonic()` after which no operation begins, and no case is added.
    """
    compiled: list[str] = []

    def note_compilation(event: str, duration_secs: float, **metadata: str | int) -> None:
        del duration_secs, metadata
        if "/compile/" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    try:
        start = time.monotonic()
        reference = engine_lib.Engine(model, tokenizer, fuzz_requests.REFERENCE_CONFIG)
        setup_secs, busy_secs = [time.monotonic() - start], 0.0
        cases = fuzz_requests.make_cases(reference, tokenizer, rng, num_cases, deadline)
        reference.close()
        counts: collections.Counter[str] = collections.Counter()
        problems: list[str] = []
        done = 0
        for engine_number, config in enumerate(configs, 1):
            start = time.monotonic()
            device = device_lib.Device(model, config)
            make_successor = functools.partial(make_engine, model, tokenizer, config, device)
            run = FuzzRun(make_successor, model, cases, rng, counts)
            setup_secs.append(time.monotonic() - start)
            compiled.clear()  # the engine compiles when it is made, and never again
            start, limit = time.monotonic(), num_operations * engine_number // len(configs)
            while done < limit and not problems and time.monotonic() < deadline:
                num_new = run.operate()
                done += num_new
                on_operation(num_new)
                problems += run.problems
            run.finish()
            busy_secs += time.monotonic() - start
            problems += run.problems + [f"compiled: {name}" for name in compiled]
    finally:
        jax.monitoring.unregister_event_duration_listener(note_compilation)
    return FuzzOutcome(counts, problems, done, setup_secs, busy_secs)


def make_engine(model, tokenizer, config, device: device_lib.Device) -> engine_lib.Engine:
    """Return an engine on a device that another one may have used."""
    make_device, device_lib.Device = device_lib.Device, lambda *_: device
    engine = engine_lib.Engine(model, tokenizer, config)
    device_lib.Device = make_device
    engine._core._runner._dispatcher = dispatcher.Dispatcher(device, config, is_device_new=False)
    return engine


# The case of a request, if it has one, and its callback.
_OpenRequest = tuple[fuzz_requests.FuzzCase | None, fuzz_disturbances.FuzzCallback | None]


class FuzzRun:
    """Random operations on an engine and its successors, and the problems that they uncover."""

    def __init__(
        self,
        make_successor,
        model: model_lib.MiniMaxM1,
        cases: list[fuzz_requests.FuzzCase],
        rng: random.Random,
        counts: collections.Counter[str],
    ):
        self._make_successor, self._engine = make_successor, make_successor()
        self._model, self._cases = model, cases
        self._rng, self._counts = rng, counts
        self._open: dict[request.Request, _OpenRequest] = {}
        # Cases of the requests in the file.
        self._suspended: list[fuzz_requests.FuzzCase | None] = []
        self._folder = tempfile.TemporaryDirectory()
        self._file = pathlib.Path(self._folder.name) / "requests.json"
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
            with fuzz_disturbances.InterruptAtLine(self._rng.randrange(1, 2500)):
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

    def _draw_callback(self) -> fuzz_disturbances.FuzzCallback | None:
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
            return fuzz_disturbances.FuzzCallback(0, None)
        name = f"callback_{action.__name__.strip('_').partition('_')[0]}"

        def act(caller):
            self._count(name)
            action(caller)

        return fuzz_disturbances.FuzzCallback(rng.randint(1, 12), act)

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
        self._folder.cleanup()

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
            prompt = fuzz_requests.draw_prompt(self._rng, self._cases)
            options = fuzz_requests.draw_options(self._rng, self._engine.tokenizer)
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
            actual, expected = (
                fuzz_requests.comparable_output(output),
                fuzz_requests.comparable_output(case.output),
            )
            if was_interrupted or output.finish_reason in ("cancelled", "suspended"):
                num_tokens = len(output.tokens)
                expected = fuzz_requests.comparable_output(
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
