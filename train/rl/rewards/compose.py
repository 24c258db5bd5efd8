"""Scores groups of samples: runs the rewards of a sample's source, and returns the weighted sum.

A reward can fail by an exception, a time-out, a crash, NaN or a value of the wrong type. The caller
sees every failure as `RewardScore(value=None, error=...)` and in the counts. A failure is never a
score of 0: 0 would teach the model that its answer was wrong.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from m1_jax import configlib
from train.rl import sample as sample_lib
from train.rl.rewards import catalog, pool

ANY_SOURCE = "*"
RewardWeight = float | tuple[tuple[str, float], ...]
RewardOptions = tuple[tuple[str, Any], ...]
FAILURE_KINDS = ("timeout", "crash", "garbage", "exception", "none")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The rewards of each source, and how they are run.

    Attributes:
      sources: (source, ((reward, weight, options), ...)). The source "*" stands for every source
        that is not named. The three entries of a reward:
          reward: a name in `catalog.REWARD_FACTORIES`.
          weight: a factor of the reward's value, which for a mapping is the sum of its parts; or
            ((part, weight), ...). Parts that are named here must be present. Parts that are not
            named are only reported.
          options: ((name, value), ...), passed to the reward's factory.
      limit_secs: time limit of one reward of one sample, or of one group for a reward of groups.
        Some rewards have limits of their own: "code" those of its programs, judges those of their
        requests.
      retries: how often a reward is called again after a time-out or crash, so that a busy machine
        does not change scores.
      workers: number of worker processes.
      parallel: samples that one reward scores at once, where the reward has no number of its own.
    """

    sources: tuple[tuple[str, tuple[tuple[str, RewardWeight, RewardOptions], ...]], ...]
    limit_secs: float = 30.0
    retries: int = 1
    workers: int = 2
    parallel: int = 16

    def __post_init__(self):
        names = [name for name, _ in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: got {names}; wanted at least one, of different names")
        for field, minimum in (("retries", 0), ("workers", 1), ("parallel", 1)):
            value = getattr(self, field)
            configlib.check_field(value >= minimum, field, value, f"at least {minimum}")
        if not self.limit_secs > 0:
            raise ValueError(f"limit_secs: got {self.limit_secs}; wanted more than 0")
        for source, terms in self.sources:
            rewards = [name for name, _, _ in terms]
            if not rewards or len(set(rewards)) < len(rewards):
                raise ValueError(
                    f"source {source!r}: got the rewards {rewards}; wanted at least one, of "
                    "different names"
                )
            for name, weight, _ in terms:
                weights = dict(weight).values() if isinstance(weight, tuple) else (weight,)
                if not weights or not all(map(math.isfinite, weights)):
                    raise ValueError(
                        f"source {source!r}, reward {name!r}: got the weight {weight}; wanted a "
                        "finite number, or ((part, number), ...)"
                    )


@dataclasses.dataclass(frozen=True)
class _RewardTerm:
    """One reward of a source, a term of the weighted sum."""

    name: str  # in the catalogue
    reward: Any  # has `reward` or `reward_group`, see `catalog`
    weight: RewardWeight
    # Limits how many samples the reward scores at once. The time limit starts inside, so that a
    # sample does not time out while it waits for its turn.
    gate: asyncio.Semaphore
    limit_secs: float | None  # None: the reward keeps the time itself


class _RewardFailure(Exception):
    """The reason for a missing score: one of `FAILURE_KINDS`, and a sentence."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


class GroupScorer:
    """Scores submitted groups in the background, in a thread with an event loop."""

    def __init__(self, config: RewardsConfig):
        """Make the rewards and start the thread. Worker processes start with the first calls.

        Raises:
          ValueError: a reward is not in the catalogue, or does not take its options.
          ImportError: a reward's library is not installed.
        """
        self._config = config
        self._pool = pool.WorkerPool(config.workers, config.limit_secs)
        self._failure_counts: collections.Counter[tuple[str, str]] = collections.Counter()
        try:
            self._terms = {source: self._make_terms(terms) for source, terms in config.sources}
        except BaseException:
            self._pool.close()  # its threads already run
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(
        self, group: Sequence[sample_lib.Sample]
    ) -> "concurrent.futures.Future[list[sample_lib.RewardScore]]":
        """Return a future of the scores of samples of one task, in their order.

        The future raises nothing but `CancelledError`, and that only after `close`.

        Raises:
          ValueError: the samples have several sources or none, or the source has no rewards.
          RuntimeError: called after `close`.
        """
        sources = {sample.task.source for sample in group}
        if len(sources) != 1:
            raise ValueError(f"group: got the sources {sorted(sources)}; wanted one")
        source = sources.pop()
        terms = self._terms.get(source, self._terms.get(ANY_SOURCE))
        if terms is None:
            raise ValueError(
                f"source {source!r}: got no rewards; wanted them for it or for {ANY_SOURCE!r}. "
                f"There are {', '.join(self._terms)}"
            )
        if not self._thread.is_alive():
            raise RuntimeError("rewards: got a group after close(); wanted none")
        return asyncio.run_coroutine_threadsafe(self._score_group(terms, list(group)), self._loop)

    def failure_counts(self) -> dict[str, int]:
        """Return how often each reward failed so far, by "reward/error/<reward>/<kind>"."""
        names = sorted({name for _, terms in self._config.sources for name, _, _ in terms})
        return {
            f"reward/error/{name}/{kind}": self._failure_counts[name, kind]
            for name in names
            for kind in FAILURE_KINDS
        }

    def close(self) -> None:
        """Kill the workers, cancel the groups that wait for scores, and stop the thread."""
        self._pool.close()
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _make_terms(
        self, terms: tuple[tuple[str, RewardWeight, RewardOptions], ...]
    ) -> list[_RewardTerm]:
        # Fewer than the workers would leave some of them idle.
        max_parallel = max(self._config.parallel, self._config.workers)
        return [
            _RewardTerm(
                name,
                reward := catalog.make_reward(name, self._pool, dict(options)),
                weight,
                asyncio.Semaphore(getattr(reward, "parallel", max_parallel)),
                getattr(reward, "limit_secs", self._config.limit_secs),
            )
            for name, weight, options in terms
        ]

    async def _cancel_tasks(self) -> None:
        # This coroutine is a task of the loop, too, and must not cancel itself.
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _score_group(
        self, terms: list[_RewardTerm], group: list[sample_lib.Sample]
    ) -> list[sample_lib.RewardScore]:
        columns = await asyncio.gather(*(self._run_term(term, group) for term in terms))
        return [_combine_terms(terms, row) for row in zip(*columns, strict=True)]

    async def _run_term(
        self, term: _RewardTerm, group: list[sample_lib.Sample]
    ) -> list[dict[str, float] | _RewardFailure]:
        """Return each sample's parts of one reward, or why there are none."""
        if hasattr(term.reward, "reward_group"):
            results = await self._call_reward_group(term, group)
        else:
            results = await asyncio.gather(
                *(
                    # The default argument binds this sample: the call runs after the loop.
                    self._call_with_retries(term, lambda sample=sample: term.reward.reward(sample))
                    for sample in group
                )
            )
        column = [
            result if isinstance(result, _RewardFailure) else _parse_parts(result, term)
            for result in results
        ]
        for cell in column:
            if isinstance(cell, _RewardFailure):
                self._failure_counts[term.name, cell.kind] += 1
                _log.warning("reward %s failed (%s): %s", term.name, cell.kind, cell)
        return column

    async def _call_reward_group(
        self, term: _RewardTerm, group: list[sample_lib.Sample]
    ) -> list[Any]:
        """Return each sample's result of a reward of groups, which fails for all or for none."""
        results = await self._call_with_retries(term, lambda: term.reward.reward_group(group))
        if not isinstance(results, _RewardFailure) and (
            not isinstance(results, list) or len(results) != len(group)
        ):
            results = _RewardFailure(
                "garbage", f"got {results!r:.80}; wanted a list of {len(group)}"
            )
        return [results] * len(group) if isinstance(results, _RewardFailure) else results

    async def _call_with_retries(
        self, term: _RewardTerm, call: Callable[[], Awaitable[Any]]
    ) -> Any:
        """Return the call's result, or the failure of the last try."""
        failure: _RewardFailure | None = None
        for _ in range(1 + self._config.retries):
            try:
                async with term.gate:
                    return await asyncio.wait_for(call(), term.limit_secs)
            except TimeoutError as error:
                failure = _RewardFailure(
                    "timeout", str(error) or f"no score in {term.limit_secs} s"
                )
            except pool.WorkerError as error:
                failure = _RewardFailure(error.kind, str(error))
            except Exception as error:
                failure = _RewardFailure("exception", f"{type(error).__name__}: {error}")
            # Another try cannot cure a wrong value or an exception of the reward's own.
            if failure.kind not in ("timeout", "crash"):
                break
        return failure


def _parse_parts(result: Any, term: _RewardTerm) -> dict[str, float] | _RewardFailure:
    """Return the parts of a reward's result. A plain number is one part with the reward's name."""
    if result is None:
        return _RewardFailure("none", "it has no score")
    parts = dict(result) if isinstance(result, Mapping) else {term.name: result}
    # A function may say in a part "valid" that it could not judge the sample.
    if parts.pop("valid", True) is not True:
        return _RewardFailure("none", "it says that the sample is not valid")
    part_weights = dict(term.weight) if isinstance(term.weight, tuple) else {}
    if not parts or not part_weights.keys() <= parts.keys():
        return _RewardFailure(
            "garbage", f"got the parts {list(parts)}; wanted {list(part_weights)}"
        )
    for key, value in parts.items():
        if not isinstance(key, str) or isinstance(value, str) or not _is_finite(value):
            return _RewardFailure("garbage", f"got {key!r}: {value!r:.80}; wanted a finite number")
    return {key: float(value) for key, value in parts.items()}


def _is_finite(value: Any) -> bool:
    """Tell whether `value` is a finite number that fits a float."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _combine_terms(
    terms: Sequence[_RewardTerm], row: Sequence[dict[str, float] | _RewardFailure]
) -> sample_lib.RewardScore:
    """Return the weighted sum of one sample's terms, or no value if a single term failed."""
    value, parts, errors = 0.0, {}, []
    for term, cell in zip(terms, row, strict=True):
        if isinstance(cell, _RewardFailure):
            errors.append(f"{term.name}: {cell.kind}: {cell}")
            continue
        for key, part in cell.items():
            # A number has the reward's name, a part of a mapping "<reward>/<part>".
            parts[key if key == term.name else f"{term.name}/{key}"] = part
            weight = (
                dict(term.weight).get(key, 0.0) if isinstance(term.weight, tuple) else term.weight
            )
            value += weight * part
    if errors:
        return sample_lib.RewardScore(None, parts, "; ".join(errors))
    return sample_lib.RewardScore(value, parts)
