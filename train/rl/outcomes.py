"""The outcome of a sample: the one part of its reward that says whether the answer is right.

The sum that is trained on is shaped by other parts, such as the answer's form. So two right answers
may have different sums, and a sum of 1 may be no right answer. What asks for right and wrong reads
the outcome: dynamic sampling, pass rates and the metrics of groups.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import compose

# These say how an answer is written, never whether it is right.
SHAPING_REWARDS = ("format", "repetition")
ENVIRONMENT = "environment"  # the outcome of an agent's sample: all that its environment gave
_ENVIRONMENT_PARTS = ("final", "turns")
PASS_OUTCOME = 1.0  # the least outcome of a right answer


class OutcomeReader:
    """Reads the outcomes of the samples of all sources.

    Args:
      sources: names of the sources of tasks.
      rewards: rewards of the run. None where environments give all rewards.
      has_environment: whether an agent's environment gives a reward.
      named: (source, outcome) pairs, "*" being every other source. An outcome is a reward of the
        source, a part REWARD/PART of it, or "environment", "final" or "turns" of an agent. A source
        without a name has its environment's reward, or its first reward of a weight above 0 that
        is not in `SHAPING_REWARDS`. Of a reward whose weight names parts it is the first such part.

    Raises:
      ValueError: a name that the samples of its source do not have, or no such source.
    """

    def __init__(
        self,
        sources: Iterable[str],
        rewards: compose.RewardsConfig | None,
        has_environment: bool,
        named: Iterable[tuple[str, str]] = (),
    ):
        sources, by_source = list(dict.fromkeys(sources)), dict(named)
        unknown = sorted(set(by_source) - {*sources, compose.ANY_SOURCE})
        if unknown:
            raise ValueError(f"outcomes: got the source {unknown[0]!r}; wanted some of {sources}")
        self._terms = {source: find_source_terms(rewards, source) for source in sources}
        self._names: dict[str, str] = {}
        for source, terms in self._terms.items():
            name = by_source.get(source, by_source.get(compose.ANY_SOURCE))
            if name is None:
                name = _default_outcome(terms, has_environment)
            choices = [*terms, *((ENVIRONMENT, *_ENVIRONMENT_PARTS) if has_environment else ())]
            if name.partition("/")[0] not in choices:
                raise ValueError(
                    f"outcomes: source {source!r}: got {name!r}; wanted one of "
                    f"{', '.join(choices)}, or a part of one such as REWARD/PART"
                )
            self._names[source] = name

    def name(self, source: str) -> str:
        """Return the name of a source's outcome."""
        return self._names[source]

    def read(self, sample: sample_lib.Sample, environment_reward: float | None) -> float | None:
        """Return a scored sample's outcome, None where its parts do not have it.

        Args:
          sample: has the parts of its reward.
          environment_reward: what its environment gave, None without one.
        """
        source = sample.task.source
        name, parts = self._names[source], sample.parts
        if name == ENVIRONMENT:
            return environment_reward
        if name in parts:
            return parts[name]
        # A reward of several parts: the first that its weight names, or else their sum.
        weight = self._terms[source].get(name, 1.0)
        if isinstance(weight, tuple):
            return parts.get(f"{name}/{_first_raising(dict(weight))}")
        values = [value for key, value in parts.items() if key.startswith(f"{name}/")]
        return math.fsum(values) if values else None


def find_source_terms(
    rewards: compose.RewardsConfig | None, source: str
) -> Mapping[str, compose.RewardWeight]:
    """Return the rewards of a source with their weights, in order, empty without rewards."""
    by_source: dict[str, Any] = {} if rewards is None else dict(rewards.sources)
    terms = by_source.get(source, by_source.get(compose.ANY_SOURCE, ()))
    return {name: weight for name, weight, _ in terms}


def _default_outcome(terms: Mapping[str, compose.RewardWeight], has_environment: bool) -> str:
    if has_environment:
        return ENVIRONMENT
    judging = {name: weight for name, weight in terms.items() if name not in SHAPING_REWARDS}
    return _first_raising(judging or terms) if terms else ENVIRONMENT


def _first_raising(weights: Mapping[str, compose.RewardWeight]) -> str:
    """Return the first name whose weight raises the sum, or the first of all.

    A weight of 0 is there for the log, and one below 0 is a penalty.
    """
    raising = [name for name, weight in weights.items() if isinstance(weight, tuple) or weight > 0]
    return (raising or list(weights))[0]
