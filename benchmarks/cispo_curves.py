"""The measures of a run's rewards, as they were fixed before the first run. Plain numpy.

A curve is the mean reward of each generation batch. A result in batches is the number of batches
trained on before a window of three batches whose mean reward is at least the bar.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

WINDOW = 3  # batches
LAST = 8  # the batches at the end of a run that `last` and `lowest` describe
SUSTAINED, HALF = 0.9, 0.5


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """The measures of one run."""

    batches: int
    sustained: int | None  # batches to .9 that is never left again; None: not reached
    half: int | None  # batches to .5 for the first time; None: not reached
    tokens: int | None  # sampled before `sustained`
    mean: float  # of all rewards
    last: float  # mean of the last eight batches
    lowest: float  # minimum of the last eight batches
    collapsed: bool  # see `has_collapsed`
    # Among fork tokens with A > 0 in the first six batches: the share that was dropped, or whose
    # weight was capped. None without such tokens.
    fork_clipped: float | None


def measure_outcome(
    rewards: Sequence[float],
    tokens: Sequence[float],
    fork: Sequence[tuple[int, int]],
    failed: bool = False,
) -> RunOutcome:
    """Return the measures of a run.

    Args:
      rewards: mean reward of each batch.
      tokens: tokens sampled for each batch.
      fork: (clipped, all) fork tokens of each batch.
      failed: the run ended early, without a finite gradient.

    Raises:
      ValueError: the columns have different lengths, or are empty.
    """
    if not rewards or not len(rewards) == len(tokens) == len(fork):
        raise ValueError(
            f"got {len(rewards)} rewards, {len(tokens)} tokens, {len(fork)} fork counts; wanted "
            "one of each for every batch, and at least one batch"
        )
    reached = None if failed else sustained_crossing(rewards, SUSTAINED)
    num_clipped, num_fork = np.sum(np.asarray(fork[:6]), axis=0)
    return RunOutcome(
        batches=len(rewards),
        sustained=reached,
        half=first_crossing(rewards, HALF),
        tokens=None if reached is None else int(sum(tokens[:reached])),
        mean=float(np.mean(rewards)),
        last=float(np.mean(rewards[-LAST:])),
        lowest=float(np.min(rewards[-LAST:])),
        collapsed=failed or has_collapsed(rewards),
        fork_clipped=float(num_clipped / num_fork) if num_fork else None,
    )


def window_means(rewards: Sequence[float]) -> np.ndarray:
    """Return the means of all windows of three batches. A shorter run has none."""
    if len(rewards) < WINDOW:
        return np.zeros(0)
    return np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), "valid")


def first_crossing(rewards: Sequence[float], bar: float) -> int | None:
    """Return how many batches came before the first window at the bar, or None."""
    above = window_means(rewards) >= bar - 1e-9  # a mean of three may round down
    return int(above.argmax()) if above.any() else None


def sustained_crossing(rewards: Sequence[float], bar: float) -> int | None:
    """Return how many batches came before the first window from which on all are at the bar."""
    below = np.flatnonzero(window_means(rewards) < bar - 1e-9)
    start = int(below[-1]) + 1 if below.size else 0
    return start if start < len(window_means(rewards)) else None


def has_collapsed(rewards: Sequence[float]) -> bool:
    """Return whether the last eight batches have less than half of the best window's reward."""
    means = window_means(rewards)
    return bool(means.size) and float(np.mean(rewards[-LAST:])) < 0.5 * float(means.max())


def batch_ratio(numerator: int | None, denominator: int | None) -> float | None:
    """Return numerator / denominator of a pair of runs, where None is a run that never arrived.

    The ratio is infinite where only the denominator's run arrived, and 0 where only the
    numerator's did. These values stand for an unknown number that lies beyond every known one,
    which is all that a median needs. The ratio is None where neither run arrived.
    """
    if numerator is None and denominator is None:
        return None
    if numerator is None or denominator is None:
        return math.inf if numerator is None else 0.0
    if denominator == 0:
        return 1.0 if numerator == 0 else math.inf
    return numerator / denominator


@dataclasses.dataclass(frozen=True)
class PairedRatio:
    """The median ratio of pairs, with its 95% bootstrap interval."""

    median: float
    low: float  # lower end of the interval
    high: float  # upper end
    pairs: int  # pairs with a ratio
    unknown: int  # pairs of which neither run arrived


def paired_ratio(
    numerators: Sequence[int | None],
    denominators: Sequence[int | None],
    draws: int = 10_000,
    seed: int = 0,
) -> PairedRatio | None:
    """Return the ratio of runs paired by seed, or None where no pair has a ratio.

    Percentiles are elements of the sample rather than interpolated, so that infinite ratios stay
    infinite.
    """
    ratios = [batch_ratio(a, b) for a, b in zip(numerators, denominators, strict=True)]
    known = np.array([ratio for ratio in ratios if ratio is not None])
    if not known.size:
        return None
    picked = np.random.default_rng(seed).integers(known.size, size=(draws, known.size))
    medians = _median(known[picked])
    low, high = np.quantile(medians, (0.025, 0.975), method="inverted_cdf")
    return PairedRatio(
        float(_median(known[None])[0]),
        float(low),
        float(high),
        known.size,
        len(ratios) - known.size,
    )


def _median(rows: np.ndarray) -> np.ndarray:
    """Return each row's median; of an even number the geometric mean of the middle two."""
    ordered = np.sort(rows, axis=1)
    size = rows.shape[1]
    lower, upper = ordered[:, (size - 1) // 2], ordered[:, size // 2]
    with np.errstate(invalid="ignore"):
        mean = np.sqrt(lower * upper)
    return np.where(np.isnan(mean), upper, mean)  # 0 * infinity: the worse one


def best_rate(outcomes_by_rate: dict[float, Sequence[RunOutcome]]) -> float:
    """Return the learning rate whose tuning runs reach sustained .9 first.

    The rate with more runs that arrive is better, then the one with fewer batches on average, then
    the one with the higher mean reward. The lower rate breaks a tie.
    """

    def order(rate: float) -> tuple[int, float, float, float]:
        outcomes = outcomes_by_rate[rate]
        arrived = [outcome.sustained for outcome in outcomes if outcome.sustained is not None]
        batches = float(np.mean(arrived)) if arrived else math.inf
        mean_reward = float(np.mean([outcome.mean for outcome in outcomes]))
        return -len(arrived), batches, -mean_reward, rate

    return min(outcomes_by_rate, key=order)
