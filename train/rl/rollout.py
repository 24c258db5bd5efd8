"""Samples drawn from the live weights by the generation engine, on the trainer's own mesh.

Process 0 runs episodes over the engine. The other processes follow it
(`infer/execution/leader_follower.py`). A sample depends on the weights, its task and its seed
alone, not on the samples beside it or on when it ran. So a run that was killed draws the same
samples again.
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
from m1_jax import process_watch
from m1_jax import tokenizer as tokenizer_lib
from train.rl import sample as sample_lib
from train.rl import tool_pool

# The engine's `finish_reason` as a sample's status. Any other reason is an error.
_STATUS_BY_FINISH_REASON: dict[str, sample_lib.SampleStatus] = {
    "stop": "stop",
    "length": "length",
    "loop": "repetition",
}


@dataclasses.dataclass(frozen=True)
class RolloutSampling:
    """How tokens are drawn.

    Attributes:
      temperature: temperature of the softmax. 0 is greedy.
      top_p: share of the probability that is kept, 1 for all.
      top_k: number of tokens that are kept, 0 for all.
      min_p: least probability, relative to the likeliest token's, that is kept, 0 for all. Any
        filter makes probabilities that the trainer does not have, which biases its ratios.
      stop_on_loop: end an answer that was sure of 3,000 tokens in a row (M1 4.3).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_on_loop: bool = True

    def __post_init__(self):
        options_lib.Options(**dataclasses.asdict(self))  # raises for values out of range


@dataclasses.dataclass(frozen=True)
class EpisodeJob:
    """One episode to run.

    Attributes:
      key: names the episode to `on_done`. The episodes that run side by side have different keys.
      episode: a fresh generator. An episode that goes on is begun anew too: its first request for
        tokens continues `partial`.
      seed: seed of the first turn.
      partial: what the episode generated before it was paused, None for a new one.
      slice_tokens: tokens that the first turn may add before the episode is paused, 0 for
        no limit. Only episodes of one turn can be paused.
    """

    key: Hashable
    episode: sample_lib.Episode
    seed: int
    partial: sample_lib.Generation | None = None
    slice_tokens: int = 0


class RolloutStopped(Exception):
    """The run is to end. Unfinished samples are lost, and the next run draws them again."""


@dataclasses.dataclass(frozen=True)
class PausedEpisode:
    """An episode that used up its slice, with all that it generated so far."""

    partial: sample_lib.Generation


@dataclasses.dataclass
class RolloutStats:
    """What one call of `RolloutSampler.run` took."""

    total_secs: float = 0.0
    waiting_secs: float = 0.0  # seconds of the total in which the device was idle, as tools ran
    num_tokens: int = 0  # tokens that were sampled; those of `EpisodeJob.partial` do not count
    num_tool_timeouts: int = 0  # tools that ran out of time

    def __add__(self, stats: "RolloutStats") -> "RolloutStats":
        return RolloutStats(
            self.total_secs + stats.total_secs,
            self.waiting_secs + stats.waiting_secs,
            self.num_tokens + stats.num_tokens,
            self.num_tool_timeouts + stats.num_tool_timeouts,
        )


@dataclasses.dataclass
class _RunningEpisode:
    """An episode that waits for the model (`request`) or for a tool (`tool_future`)."""

    job: EpisodeJob
    request: Any = None  # the engine's request, None while a tool runs
    tool_future: concurrent.futures.Future | None = None
    max_tokens: int = 0  # tokens that the turn may have in all, whatever its slice
    turn: int = 0  # turns of the model that were begun


class RolloutSampler:
    """The sampler of one run. Every process has one."""

    def __init__(
        self,
        model: Any,
        tokenizer: tokenizer_lib.Tokenizer,
        config: engine_config.EngineConfig,
        sampling: RolloutSampling,
        tools: tool_pool.ToolPool | None = None,
    ):
        """Start the engine on process 0, a follower of it elsewhere.

        Args:
          model: the model with its first weights, as `WeightSync` gives them.
          tokenizer: its stop tokens end an answer.
          config: sizes of the engine.
          sampling: used by each `run` that has none of its own.
          tools: runs the tools of episodes. None makes one with the defaults of its class.
        """
        self._sampling = sampling
        self._next_model = model  # with the weights of the next `run`
        self._engine: engine.Engine | None = None
        self._follower: leader_follower.Follower | None = None
        if jax.process_index() == 0:
            self._engine = engine.Engine(model, tokenizer, config)
        else:
            self._follower = leader_follower.Follower(model, config)
        # Whether the engine has yet to take `_next_model`, and the version of its weights.
        self._stale, self._version = False, 0
        self._pool = tool_pool.ToolPool() if tools is None else tools

    def update_weights(self, model: Any, version: int) -> None:
        """Use new weights from the next `run` on. Every process calls this."""
        self._next_model, self._stale = model, True
        self._version = version

    def run(
        self,
        make_jobs: Callable[[], Iterable[EpisodeJob]],
        on_done: Callable[[Hashable, sample_lib.Sample | PausedEpisode], Iterable[EpisodeJob]],
        sampling: RolloutSampling | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> RolloutStats:
        """Run episodes to their ends, on process 0. The other processes `follow` meanwhile.

        Args:
          make_jobs: returns the first episodes. It is called when the engine has the new weights.
          on_done: takes the key and the result of each episode that ends, in no certain order, and
            returns episodes to run next.
          sampling: how tokens are drawn, in place of the sampler's own options.
          should_stop: whether to give up. It is called before each step of the engine, and each
            second while all episodes wait for tools.

        Raises:
          RolloutStopped: `should_stop` returned True. Unfinished episodes are lost.
        """
        assert self._engine is not None, "process 0 runs, the others follow"
        if self._stale:
            # Nothing is under way here, so no request has to keep its state of the old weights.
            self._engine.swap_weights(self._next_model, keep_running=False)
            self._engine.continue_from_version(self._version)
            self._stale = False
        began = time.perf_counter()
        loop = _EpisodeLoop(
            self._engine, self._pool, sampling or self._sampling, on_done, should_stop
        )
        stats = loop.run(list(make_jobs()))
        stats.total_secs = time.perf_counter() - began
        return stats

    def follow(self) -> None:
        """Do process 0's work on this process's devices, until process 0 calls `dismiss`."""
        assert self._follower is not None
        self._follower.follow(lambda: self._next_model)

    def dismiss(self) -> None:
        """Let the other processes return from `follow` and go on to training."""
        assert self._engine is not None
        self._engine.dismiss_followers()

    @property
    def version(self) -> int:
        """Return the version of the weights that the next `run` samples from."""
        assert self._engine is not None
        return self._version if self._stale else self._engine.version

    def continue_from(self, version: int) -> None:
        """Count versions of the weights on from `version`, where the last run ended."""
        if self._engine is not None:
            self._engine.continue_from_version(version)

    def close(self) -> None:
        """End the engine. Every process calls this."""
        self._pool.drop_waiting_calls()
        if self._engine is not None:
            self._engine.close()
        # After an error this process is behind the others. The next call of process 0 would meet
        # another collective there, and neither would end.
        elif self._follower is not None and not process_watch.has_failed():
            self._follower.follow()  # until process 0's engine closes


class _EpisodeLoop:
    """The work of one call of `RolloutSampler.run`."""

    def __init__(
        self,
        running_engine: engine.Engine,
        pool: tool_pool.ToolPool,
        sampling: RolloutSampling,
        on_done: Callable[[Hashable, sample_lib.Sample | PausedEpisode], Iterable[EpisodeJob]],
        should_stop: Callable[[], bool],
    ):
        self._engine, self._pool, self._sampling = running_engine, pool, sampling
        self._on_done, self._should_stop = on_done, should_stop
        self._running: dict[Hashable, _RunningEpisode] = {}
        self._stats = RolloutStats()

    def run(self, jobs: list[EpisodeJob]) -> RolloutStats:
        for job in jobs:
            self._start(job)
        while self._running:
            if self._should_stop():
                for episode in self._running.values():
                    if episode.request is not None:
                        self._engine.cancel(episode.request)
                self._pool.drop_waiting_calls()
                self._drain()
                raise RolloutStopped
            self._pool.expire_calls()
            if not self._engine.step():
                self._wait_for_tools()
            # A copy: an episode that ends leaves the dict, and others enter it.
            for episode in list(self._running.values()):
                if episode.request is not None and episode.request.finish_reason is not None:
                    self._on_generated(episode)
                elif episode.tool_future is not None and episode.tool_future.done():
                    self._on_tool_done(episode)
        self._drain()
        return self._stats

    def _drain(self) -> None:
        """Take the results of dispatched steps, whose requests the host has ended already."""
        while self._engine.step():
            pass

    def _start(self, job: EpisodeJob) -> None:
        if job.key in self._running:
            raise ValueError(f"episode {job.key!r}: got it twice; wanted keys that differ")
        episode = self._running[job.key] = _RunningEpisode(job)
        self._advance(episode, None)  # None starts a generator

    def _advance(
        self, episode: _RunningEpisode, answer: Any, error: BaseException | None = None
    ) -> None:
        """Send an answer, or an error, to the episode, and begin the action it asks for next."""
        episode.request = episode.tool_future = None
        generator, job = episode.job.episode, episode.job
        try:
            action = generator.throw(error) if error else generator.send(answer)
        except StopIteration as stop:
            self._finish(episode, stop.value)
            return
        if isinstance(action, sample_lib.RunTool):
            episode.tool_future = self._pool.submit(action.function)
            return
        # Only the first turn continues what the episode generated before it was paused.
        partial, episode.max_tokens = job.partial if episode.turn == 0 else None, action.max_tokens
        num_prior = len(partial.tokens) if partial else 0
        slice_tokens = job.slice_tokens
        # The engine's limit counts prior tokens too.
        max_tokens = (
            min(action.max_tokens, num_prior + slice_tokens) if slice_tokens else action.max_tokens
        )
        options = options_lib.Options(
            **dataclasses.asdict(self._sampling),
            # A large odd constant: the turns' seeds are far apart.
            seed=(job.seed + episode.turn * 0x85EBCA6B) % 2**32,
            max_tokens=max_tokens,
        )
        episode.turn += 1
        episode.request = self._engine.submit(
            action.tokens, options, prior_tokens=_resumed_tokens(partial)
        )

    def _on_generated(self, episode: _RunningEpisode) -> None:
        request_done, partial = episode.request, episode.job.partial
        num_prior = len(partial.tokens) if episode.turn == 1 and partial else 0
        self._stats.num_tokens += len(request_done.tokens) - num_prior
        tokens = request_done.tokens
        status = _STATUS_BY_FINISH_REASON.get(request_done.finish_reason, "error")
        routes = sample_lib.keep_first_routes(
            partial.routes if num_prior and partial else None, request_done.routes
        )
        # Cut off by its slice, not by the turn's own limit.
        if status == "length" and len(tokens) < episode.max_tokens:
            episode.job.episode.close()
            # Copies, as the columns of a request have room for more.
            partial = sample_lib.Generation(
                tokens.ids.copy(),
                tokens.logps.copy(),
                tokens.versions.copy(),
                status,
                routes,
                raw=tokens.raw_logps.copy(),
            )
            self._finish(episode, PausedEpisode(partial))
            return
        generation = sample_lib.Generation(
            tokens.ids.copy(),
            tokens.logps.copy(),
            tokens.versions.copy(),
            status,
            routes,
            text=request_done.text,
        )
        self._advance(episode, generation)

    def _on_tool_done(self, episode: _RunningEpisode) -> None:
        assert episode.tool_future is not None
        error = episode.tool_future.exception()
        self._stats.num_tool_timeouts += isinstance(error, tool_pool.ToolTimeoutError)
        if error is None:
            self._advance(episode, episode.tool_future.result())
        else:
            self._advance(episode, None, error=error)

    def _finish(self, episode: _RunningEpisode, result: sample_lib.Sample | PausedEpisode) -> None:
        del self._running[episode.job.key]
        for job in self._on_done(episode.job.key, result):
            self._start(job)

    def _wait_for_tools(self) -> None:
        """Wait until a tool is done, if no episode can go on before that. A second at most."""
        episodes = self._running.values()
        futures = [episode.tool_future for episode in episodes if episode.tool_future is not None]
        # Requests that ended, but whose episodes have not been told yet.
        finished = [
            episode for episode in episodes if episode.request and episode.request.finish_reason
        ]
        if finished or not futures:
            return
        began = time.perf_counter()
        self._pool.wait(futures)
        self._stats.waiting_secs += time.perf_counter() - began


def _resumed_tokens(
    partial: sample_lib.Generation | None,
) -> request.OutputTokens | None:
    """Return a paused episode's tokens as the engine's, None without any."""
    if partial is None or not len(partial.tokens):
        return None
    return request.OutputTokens.from_columns(
        partial.tokens, partial.logprobs, partial.raw, partial.versions
    )


def make_engine_config(
    sizes: Mapping[str, Any], max_length: int, max_queue: int
) -> engine_config.EngineConfig:
    """Return an engine's config for sequences of at most `max_length` tokens.

    Args:
      sizes: fields of `EngineConfig` by name, but for `max_length` and `max_queue`.
      max_length: tokens of prompt and answer together.
      max_queue: requests that may wait at the same time.

    Raises:
      ValueError: sizes that do not fit each other, or an unknown one.
    """
    field_names = {field.name for field in dataclasses.fields(engine_config.EngineConfig)}
    for name in sizes:
        if name not in field_names or name in ("max_length", "max_queue"):
            raise ValueError(
                f"rollout.engine: got {name!r}; wanted some of "
                f"{', '.join(sorted(field_names - {'max_length', 'max_queue'}))}"
            )
    return engine_config.EngineConfig(max_length=max_length, max_queue=max_queue, **sizes)
