"""What is read off a run's rewards, as fixed before the first run; plain numpy.

A curve is the mean reward of each generation batch. Batches are counted as those trained on
before a window of three whose mean reward is at least the bar.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

WINDOW = 3
LAST = 8  # batches that end a run
SUSTAINED, HALF = 0.9, 0.5


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """What became of one run.

    sustained: batches to .9 that is never left again; half: to .5 for the first time; None where
    that was not reached in `batches`. tokens: sampled before `sustained`. mean: of all rewards.
    last, lowest: mean and minimum of the last eight. collapsed: see `collapsed`. fork_clipped: of
    the fork tokens with A > 0 in the first six batches, the share that was dropped, or whose
    weight was capped; None without such tokens.
    """

    batches: int
    sustained: int | None
    half: int | None
    tokens: int | None
    mean: float
    last: float
    lowest: float
    collapsed: bool
    fork_clipped: float | None


def measure_outcome(
    rewards: Sequence[float],
    tokens: Sequence[float],
    fork: Sequence[tuple[int, int]],
    failed: bool = False,
) -> RunOutcome:
    """Return what became of a run.

    Args:
      tokens: sampled for each batch. fork: (clipped, there) of each batch's fork tokens. failed:
        the run ended early, without a finite gradient.

    Raises:
      ValueError: columns of different lengths, or none at all.
    """
    if not rewards or not len(rewards) == len(tokens) == len(fork):
        raise ValueError(
            f"got {len(rewards)} rewards, {len(tokens)} tokens, {len(fork)} fork counts; wanted "
            "one of each for every batch, and at least one batch"
        )
    reached = None if failed else sustained_crossing(rewards, SUSTAINED)
    clipped, there = np.sum(np.asarray(fork[:6]), axis=0)
    return RunOutcome(
        batches=len(rewards),
        sustained=reached,
        half=first_crossing(rewards, HALF),
        tokens=None if reached is None else int(sum(tokens[:reached])),
        mean=float(np.mean(rewards)),
        last=float(np.mean(rewards[-LAST:])),
        lowest=float(np.min(rewards[-LAST:])),
        collapsed=failed or has_collapsed(rewards),
        fork_clipped=float(clipped / there) if there else None,
    )


def window_means(rewards: Sequence[float]) -> np.ndarray:
    """Return the means of all windows of three batches; none of a shorter run."""
    if len(rewards) < WINDOW:
        return np.zeros(0)
    return np.convolve(rewards, np.full(WINDOW, 1 / WINDOW), "valid")


def first_crossing(rewards: Sequence[float], bar: float) -> int | None:
    """Return how many batches came before the first window at the bar, or None."""
    above = window_means(rewards) >= bar - 1e-9
    return int(above.argmax()) if above.any() else None


def sustained_crossing(rewards: Sequence[float], bar: float) -> int | None:
    """Return how many batches came before the first of the windows that stay at the bar."""
    below = np.flatnonzero(window_means(rewards) < bar - 1e-9)
    start = int(below[-1]) + 1 if below.size else 0
    return start if start < len(window_means(rewards)) else None


def has_collapsed(rewards: Sequence[float]) -> bool:
    """Return whether the last eight batches have less than half of the best window's reward."""
    seen = window_means(rewards)
    return bool(seen.size) and float(np.mean(rewards[-LAST:])) < 0.5 * float(seen.max())


def batch_ratio(ours: int | None, theirs: int | None) -> float | None:
    """Return ours / theirs of a pair: infinite where only theirs arrived, 0 where only ours did.

    Such values stand for an unknown number on their side of every known one, which is all that a
    median needs. None where neither arrived: nothing is known of that pair.
    """
    if ours is None and theirs is None:
        return None
    if ours is None or theirs is None:
        return math.inf if ours is None else 0.0
    if theirs == 0:
        return 1.0 if ours == 0 else math.inf
    return ours / theirs


@dataclasses.dataclass(frozen=True)
class PairedRatio:
    """The median ratio of pairs, its 95% bootstrap interval, and of how many pairs it is."""

    median: float
    low: float
    high: float
    pairs: int
    unknown: int


def paired_ratio(
    ours: Sequence[int | None], theirs: Sequence[int | None], draws: int = 10_000, seed: int = 0
) -> PairedRatio | None:
    """Return the paired ratio of equal seeds, or None where no pair has one.

    Medians and percentiles are elements of the sample, so infinite ratios stay what they are.
    """
    found = [batch_ratio(a, b) for a, b in zip(ours, theirs, strict=True)]
    known = np.array([x for x in found if x is not None])
    if not known.size:
        return None
    picked = np.random.default_rng(seed).integers(known.size, size=(draws, known.size))
    medians = _median(known[picked])
    low, high = np.quantile(medians, (0.025, 0.975), method="inverted_cdf")
    return PairedRatio(
        float(_median(known[None])[0]), float(low), float(high), known.size, len(found) - known.size
    )


def _median(rows: np.ndarray) -> np.ndarray:
    """Return each row's median; of an even number the geometric mean of the middle two."""
    ordered = np.sort(rows, axis=1)
    size = rows.shape[1]
    one, other = ordered[:, (size - 1) // 2], ordered[:, size // 2]
    with np.errstate(invalid="ignore"):
        mean = np.sqrt(one * other)
    return np.where(np.isnan(mean), other, mean)  # between 0 and infinity: the worse


def best_rate(found: dict[float, Sequence[RunOutcome]]) -> float:
    """Return the learning rate whose runs reach sustained .9 first, of these tuning runs.

    More runs that arrive count first, then the mean of their batches, then the mean reward; the
    lower rate breaks a tie.
    """

    def order(rate: float):
        some = found[rate]
        arrived = [one.sustained for one in some if one.sustained is not None]
        batches = float(np.mean(arrived)) if arrived else math.inf
        return -len(arrived), batches, -float(np.mean([one.mean for one in some])), rate

    return min(found, key=order)
