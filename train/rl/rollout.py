"""Samples drawn from the live weights by the generation engine, on the trainer's own mesh.

Process 0 runs episodes over the engine; the others follow it
(`infer/execution/leader_follower.py`). A sample depends on the weights, its task and its seed
alone: not on its company, nor on when it ran, so a run that was killed draws the same samples
again.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax

from infer import config as engine_config
from infer import engine, request
from infer import options as options_lib
from infer.execution import leader_follower
from m1_jax import tokenizer as tokenizer_lib
from train.rl import sample as sample_lib

_STATUS_BY_FINISH_REASON = {"stop": "stop", "length": "length", "loop": "repetition"}


@dataclasses.dataclass(frozen=True)
class RolloutSampling:
    """How tokens are drawn.

    top_p, top_k, min_p: anything but "off" makes probabilities that the trainer does not have,
    and biases its ratios.
    stop_on_loop: an answer ends that was sure of 3,000 tokens in a row (M1 4.3).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_on_loop: bool = True

    def __post_init__(self):
        options_lib.Options(**dataclasses.asdict(self))  # which checks them


@dataclasses.dataclass(frozen=True)
class EpisodeJob:
    """One episode to run.

    seed: of its first turn. made: what it said before, if it goes on. slice_tokens: what it may add
    to its one turn before it is paused; 0: all.
    """

    key: Hashable
    episode: sample_lib.Episode
    seed: int
    partial: sample_lib.Generation | None = None
    slice_tokens: int = 0


class RolloutStopped(Exception):
    """The run is to end; what was under way is sampled again by the next one."""


@dataclasses.dataclass(frozen=True)
class PausedEpisode:
    """An episode that used up its slice: everything that it said so far."""

    partial: sample_lib.Generation


@dataclasses.dataclass
class RolloutStats:
    """Seconds: of all, and of those in which the device had nothing to do but wait for tools."""

    total_secs: float = 0.0
    waiting_secs: float = 0.0
    num_tokens: int = 0

    def plus(self, other: "RolloutStats") -> "RolloutStats":
        return RolloutStats(
            self.total_secs + other.total_secs,
            self.waiting_secs + other.waiting_secs,
            self.num_tokens + other.num_tokens,
        )


@dataclasses.dataclass
class _RunningEpisode:
    job: EpisodeJob
    request: Any = None  # the engine's request, if it is the model's turn
    tool_future: concurrent.futures.Future | None = None
    max_tokens: int = 0  # tokens that the turn may have in all
    turn: int = 0


class RolloutSampler:
    """The sampler of one run.

    model: with the first weights, as `WeightSync` gives them. config: sizes of the engine.
    workers: tools at work side by side.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: tokenizer_lib.Tokenizer,
        config: engine_config.EngineConfig,
        sampling: RolloutSampling,
        num_tool_workers: int = 8,
    ):
        self._sampling = sampling
        self._next = model
        self._engine: engine.Engine | None = None
        self._follower: leader_follower.Follower | None = None
        if jax.process_index() == 0:
            self._engine = engine.Engine(model, tokenizer, config)
        else:
            self._follower = leader_follower.Follower(model, config)
        self._stale, self._version = False, 0
        self._pool = concurrent.futures.ThreadPoolExecutor(num_tool_workers, "tool")

    def update_weights(self, model: Any, version: int) -> None:
        """Take new weights; they are used from the next `run` on. Every process calls this."""
        self._next, self._stale = model, True
        self._version = version

    def run(
        self,
        make_jobs: Callable[[], Iterable[EpisodeJob]],
        on_done: Callable[[Hashable, sample_lib.Sample | PausedEpisode], Iterable[EpisodeJob]],
        sampling: RolloutSampling | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutStats:
        """Run episodes to their ends, on process 0; the others `follow` meanwhile.

        make: returns the first episodes. on_done: takes each that ends, in no order, and returns
        more. sampling: in place of the run's. stopping: whether to give up.

        Raises:
          Stopped: `stopping` said so; what was under way is given up.
        """
        assert self._engine is not None, "process 0 runs, the others follow"
        if self._stale:
            self._engine.swap_weights(self._next, keep_running=False)
            self._engine.continue_from_version(self._version)
            self._stale = False
        began = time.perf_counter()
        drive = _EpisodeLoop(
            self._engine, self._pool, sampling or self._sampling, on_done, should_stop
        )
        times = drive.run(list(make_jobs()))
        times.total_secs = time.perf_counter() - began
        return times

    def follow(self) -> None:
        """Do process 0's work on this process's devices, until it dismisses the others."""
        assert self._follower is not None
        self._follower.follow(lambda: self._next)

    def dismiss(self) -> None:
        """Let the others go on to training."""
        assert self._engine is not None
        self._engine.dismiss_followers()

    @property
    def version(self) -> int:
        """Return the version of the weights that the next `run` samples from."""
        assert self._engine is not None
        return self._version if self._stale else self._engine.version

    def continue_from(self, version: int) -> None:
        """Count versions of the weights from here on, as the run before this one did."""
        if self._engine is not None:
            self._engine.continue_from_version(version)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._engine is not None:
            self._engine.close()
        elif self._follower is not None:
            self._follower.follow()


class _EpisodeLoop:
    """One call of `Rollout.run`."""

    def __init__(
        self, served: engine.Engine, pool, sampling: RolloutSampling, on_done, should_stop
    ):
        self._engine, self._pool, self._sampling = served, pool, sampling
        self._on_done, self._should_stop = on_done, should_stop
        self._running: dict[Hashable, _RunningEpisode] = {}
        self._stats = RolloutStats()

    def run(self, jobs: list[EpisodeJob]) -> RolloutStats:
        for job in jobs:
            self._start(job)
        while self._running:
            if self._should_stop():
                for one in self._running.values():
                    if one.request is not None:
                        self._engine.cancel(one.request)
                self._drain()
                raise RolloutStopped
            if not self._engine.step():
                self._wait_for_tools()
            for one in list(self._running.values()):
                if one.request is not None and one.request.finish_reason is not None:
                    self._on_generated(one)
                elif one.tool_future is not None and one.tool_future.done():
                    self._on_tool_done(one)
        self._drain()
        return self._stats

    def _drain(self) -> None:
        """Finish what ended by the host's word alone, which is still under way."""
        while self._engine.step():
            pass

    def _start(self, job: EpisodeJob) -> None:
        if job.key in self._running:
            raise ValueError(f"episode {job.key!r}: got it twice; wanted keys that differ")
        one = self._running[job.key] = _RunningEpisode(job)
        self._advance(one, None)

    def _advance(
        self, one: _RunningEpisode, answer: Any, throw: BaseException | None = None
    ) -> None:
        """Send an answer to the episode, and begin what it wants next."""
        one.request = one.tool_future = None
        try:
            wanted = one.job.episode.throw(throw) if throw else one.job.episode.send(answer)
        except StopIteration as stop:
            self._finish(one, stop.value)
            return
        if isinstance(wanted, sample_lib.RunTool):
            one.tool_future = self._pool.submit(wanted.function)
            return
        made, one.max_tokens = one.job.partial if one.turn == 0 else None, wanted.max_tokens
        number = len(made.tokens) if made else 0
        cut = one.job.slice_tokens
        limit = min(wanted.max_tokens, number + cut) if cut else wanted.max_tokens
        options = options_lib.Options(
            **dataclasses.asdict(self._sampling),
            seed=(one.job.seed + one.turn * 0x85EBCA6B) % 2**32,
            max_tokens=limit,
        )
        one.turn += 1
        one.request = self._engine.submit(
            wanted.tokens, options, prior_tokens=_resumed_tokens(made) or None
        )

    def _on_generated(self, one: _RunningEpisode) -> None:
        asked = one.request
        first = len(one.job.partial.tokens) if one.turn == 1 and one.job.partial else 0
        self._stats.num_tokens += len(asked.tokens) - first
        made = sample_lib.Generation(
            tuple(token.id for token in asked.tokens),
            tuple(token.logp for token in asked.tokens),
            tuple(token.version for token in asked.tokens),
            _STATUS_BY_FINISH_REASON.get(asked.finish_reason, "error"),
            asked.routes,
            tuple(token.logp_raw for token in asked.tokens),
        )
        if made.status == "length" and len(made.tokens) < one.max_tokens:
            one.job.episode.close()
            self._finish(one, PausedEpisode(made))
            return
        self._advance(one, made)

    def _on_tool_done(self, one: _RunningEpisode) -> None:
        assert one.tool_future is not None
        error = one.tool_future.exception()
        if error is None:
            self._advance(one, one.tool_future.result())
        else:
            self._advance(one, None, throw=error)

    def _finish(self, one: _RunningEpisode, result: sample_lib.Sample | PausedEpisode) -> None:
        del self._running[one.job.key]
        for job in self._on_done(one.job.key, result):
            self._start(job)

    def _wait_for_tools(self) -> None:
        """Wait for a tool, where nothing else can go on."""
        acting = [one.tool_future for one in self._running.values() if one.tool_future is not None]
        over = [one for one in self._running.values() if one.request and one.request.finish_reason]
        if over or not acting:
            return
        began = time.perf_counter()
        concurrent.futures.wait(acting, return_when=concurrent.futures.FIRST_COMPLETED)
        self._stats.waiting_secs += time.perf_counter() - began


def _resumed_tokens(partial: sample_lib.Generation | None) -> list[Any]:
    if partial is None:
        return []
    make: Any = request.OutputToken
    return [
        make(*one)
        for one in zip(partial.tokens, partial.logprobs, partial.raw, partial.versions, strict=True)
    ]


def make_engine_config(
    sizes: Mapping[str, Any], max_length: int, max_queue: int
) -> engine_config.EngineConfig:
    """Return an engine's config for sequences of at most `max_length` tokens.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown one.
    """
    known = {field.name for field in dataclasses.fields(engine_config.EngineConfig)}
    for name in sizes:
        if name not in known or name in ("max_length", "max_queue"):
            raise ValueError(
                f"rollout.engine: got {name!r}; wanted some of "
                f"{', '.join(sorted(known - {'max_length', 'max_queue'}))}"
            )
    return engine_config.EngineConfig(max_length=max_length, max_queue=max_queue, **sizes)
