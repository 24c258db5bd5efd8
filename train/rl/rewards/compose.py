"""Scores groups of samples: runs the rewards of each source, weighs and adds them up.

Nothing that a reward does reaches the caller but as `RewardScore(value=None, error=...)` and as a
count: not an exception, a time-out, a crash, NaN, or a value of the wrong type. A failure is never
a score of 0.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import catalog, pool

ANY_SOURCE = "*"
RewardWeight = float | tuple[tuple[str, float], ...]
RewardOptions = tuple[tuple[str, Any], ...]
FAILURE_KINDS = ("timeout", "crash", "garbage", "exception", "none")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """Which rewards a sample gets.

    sources: (source, ((reward, weight, options), ...)); the source "*" is any that is not named.
      reward: a name in `catalog.REWARD_FACTORIES`. weight: of its value, a mapping's being the sum of its
      parts; or ((part, weight), ...), of parts that must be there; parts without a weight are only
      reported. options: ((name, value), ...).
    limit_secs: of one reward of one sample, of the whole group for a reward of groups; some have
      a limit of their own: "code" has those of its programs, judges that of their requests.
    retries: of time-outs and crashes, so that a busy machine does not change scores.
    workers: processes.
    parallel: samples at once of a reward that waits for others, unless it has its own number.
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
        for field, least in (("retries", 0), ("workers", 1), ("parallel", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field}: got {getattr(self, field)}; wanted at least {least}")
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
                if not weights or not all(math.isfinite(one) for one in weights):
                    raise ValueError(
                        f"source {source!r}, reward {name!r}: got the weight {weight}; wanted a "
                        "finite number, or ((part, number), ...)"
                    )


@dataclasses.dataclass(frozen=True)
class _RewardTerm:
    """A reward of a source. gate: lets so many samples in at once; only then time is counted."""

    name: str
    reward: Any
    weight: RewardWeight
    gate: asyncio.Semaphore
    limit_secs: float | None


class _RewardFailure(Exception):
    """Why there is no score: one of `FAILURE_KINDS`, and a sentence."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind = kind


class GroupScorer:
    """Scores what is submitted, in the background."""

    def __init__(self, config: RewardsConfig):
        """Make the rewards and start a thread; workers start with the first call.

        Raises:
          ValueError: a reward that is not in the catalogue, or options it does not take.
          ImportError: a library is missing.
        """
        self._config = config
        self._pool = pool.WorkerPool(config.workers, config.limit_secs)
        self._failure_counts: collections.Counter[tuple[str, str]] = collections.Counter()
        try:
            self._terms = {source: self._make_terms(terms) for source, terms in config.sources}
        except BaseException:
            self._pool.close()
            raise
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def submit(
        self, group: Sequence[sample_lib.Sample]
    ) -> "concurrent.futures.Future[list[sample_lib.RewardScore]]":
        """Score samples of one task; the scores come in their order.

        The future raises nothing but, after `close`, `CancelledError`.

        Raises:
          ValueError: samples of several sources or none, or of one without rewards.
          RuntimeError: after `close`.
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
        """Return how often each reward failed so far, "reward/error/<reward>/<kind>"."""
        names = sorted({name for _, terms in self._config.sources for name, _, _ in terms})
        return {
            f"reward/error/{name}/{kind}": self._failure_counts[name, kind]
            for name in names
            for kind in FAILURE_KINDS
        }

    def close(self) -> None:
        """Kill the workers, cancel what is not scored, and stop the thread."""
        self._pool.close()
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _make_terms(
        self, terms: tuple[tuple[str, RewardWeight, RewardOptions], ...]
    ) -> list[_RewardTerm]:
        most = max(self._config.parallel, self._config.workers)
        return [
            _RewardTerm(
                name,
                reward := catalog.make_reward(name, self._pool, dict(options)),
                weight,
                asyncio.Semaphore(getattr(reward, "parallel", most)),
                getattr(reward, "limit_secs", self._config.limit_secs),
            )
            for name, weight, options in terms
        ]

    async def _cancel_tasks(self) -> None:
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
        """Return what one reward says of each sample: its parts, or why there are none."""
        if hasattr(term.reward, "reward_group"):
            said = await self._call_with_retries(term, lambda: term.reward.reward_group(group))
            if not isinstance(said, _RewardFailure) and (
                not isinstance(said, list) or len(said) != len(group)
            ):
                said = _RewardFailure("garbage", f"got {said!r:.80}; wanted a list of {len(group)}")
            column = [said] * len(group) if isinstance(said, _RewardFailure) else said
        else:
            column = await asyncio.gather(
                *(
                    self._call_with_retries(term, lambda one=one: term.reward.reward(one))
                    for one in group
                )
            )
        checked = [
            one if isinstance(one, _RewardFailure) else _parse_parts(one, term) for one in column
        ]
        for one in checked:
            if isinstance(one, _RewardFailure):
                self._failure_counts[term.name, one.kind] += 1
                _log.warning("reward %s failed (%s): %s", term.name, one.kind, one)
        return checked

    async def _call_with_retries(self, term: _RewardTerm, call: Any) -> Any:
        """Return what the call does, or the failure of the last try."""
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
            if failure.kind not in ("timeout", "crash"):
                break
        return failure


def _parse_parts(result: Any, term: _RewardTerm) -> dict[str, float] | _RewardFailure:
    """Return the parts of what a reward said; its value alone is named after the reward."""
    if result is None:
        return _RewardFailure("none", "it has no score")
    parts = dict(result) if isinstance(result, Mapping) else {term.name: result}
    if parts.pop("valid", True) is not True:
        return _RewardFailure("none", "it says that the sample is not valid")
    wanted = dict(term.weight) if isinstance(term.weight, tuple) else {}
    if not parts or not wanted.keys() <= parts.keys():
        return _RewardFailure("garbage", f"got the parts {list(parts)}; wanted {list(wanted)}")
    for key, value in parts.items():
        if not isinstance(key, str) or isinstance(value, str) or not _is_finite(value):
            return _RewardFailure("garbage", f"got {key!r}: {value!r:.80}; wanted a finite number")
    return {key: float(value) for key, value in parts.items()}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _combine_terms(
    terms: Sequence[_RewardTerm], row: Sequence[dict[str, float] | _RewardFailure]
) -> sample_lib.RewardScore:
    """Return the weighted sum; one failure is enough for there to be none."""
    value, parts, errors = 0.0, {}, []
    for term, said in zip(terms, row, strict=True):
        if isinstance(said, _RewardFailure):
            errors.append(f"{term.name}: {said.kind}: {said}")
            continue
        for key, part in said.items():
            parts[key if key == term.name else f"{term.name}/{key}"] = part
            weight = (
                dict(term.weight).get(key, 0.0) if isinstance(term.weight, tuple) else term.weight
            )
            value += weight * part
    if errors:
        return sample_lib.RewardScore(None, parts, "; ".join(errors))
    return sample_lib.RewardScore(value, parts)
