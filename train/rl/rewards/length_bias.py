"""Watches a generative judge for a preference of long answers, during the run (M1 4.2.2).

Two statistics are taken within each group of answers to one prompt: the correlation of reward and
length, and how often the longer of two answers has the higher reward. An alarm is raised while the
mean of either over the last groups is above its threshold. A run can be configured to stop then,
until somebody recalibrates the judge.

A monitor reads what one source's judge gave. Rewards by rules have no such preference: right
answers may well be longer than wrong ones.

Push groups in a fixed order, not in the order in which scores arrive: the order decides which
groups the statistics cover.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

# Rewards of `catalog` that ask a model. The others follow rules, and prefer no length.
JUDGE_REWARDS = ("graded", "pairwise")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LengthBiasConfig:
    """When the judge's preference of long answers is an alarm, and what an alarm does."""

    window: int = 512  # the last groups that the statistics are means of
    least: int = 64  # groups before there can be an alarm, 1 to window
    correlation: float = 0.4  # alarm above this mean correlation, 0 to 1; 1 is never
    win_rate: float = 0.7  # alarm above this share of wins of the longer answer, 0 to 1; 1 is never
    pause: bool = False  # whether an alarm stops the run
    recalibrated: int = 0  # times the judge was recalibrated; an increase resets the monitor
    judges: tuple[str, ...] = JUDGE_REWARDS  # names of the rewards that are watched

    def __post_init__(self):
        if not 1 <= self.least <= self.window:
            raise ValueError(
                f"least: got {self.least}; wanted 1 to the window, which is {self.window}"
            )
        for field in ("correlation", "win_rate"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}: got {getattr(self, field)}; wanted 0 to 1")


class LengthBiasPause(ValueError):
    """The judge rewards length, and the run must wait for a recalibration."""


class LengthBiasMonitor:
    """The monitor of one judge.

    Push every group, log `metrics`, and call `check` before training on the judge's scores. After
    an alarm with `pause`, `check` raises until the config counts one more recalibration.
    """

    def __init__(
        self, config: LengthBiasConfig, state: dict[str, Any] | None = None, source: str = ""
    ):
        """Continue from a `state`, or start empty where the judge was recalibrated since.

        Args:
          config: when there is an alarm, and what follows.
          state: state of an earlier monitor, from `LengthBiasMonitor.state`.
          source: name of the source whose judge is watched, for metrics and messages.
        """
        state = state or {}
        self._source = source
        if state.get("recalibrated", 0) != config.recalibrated:
            state = {}
        self._config = config
        # A group's correlation (None where it is not defined), pairs won by the longer answer, and
        # pairs in all.
        self._groups: list[tuple[float | None, int, int]] = [
            (correlation, won, pairs) for correlation, won, pairs in state.get("groups", [])
        ][-config.window :]
        self.has_alarm: bool = state.get("alarm", False)
        self.is_paused: bool = state.get("paused", False)

    def push(self, lengths: Sequence[int], rewards: Sequence[float | None]) -> None:
        """Add a group.

        Args:
          lengths: each answer's number of tokens.
          rewards: each answer's reward. Answers without a reward do not count.

        Raises:
          ValueError: there are more of one than of the other.
        """
        if len(lengths) != len(rewards):
            raise ValueError(
                f"group: got {len(lengths)} lengths and {len(rewards)} rewards; wanted as many"
            )
        pairs = zip(lengths, rewards, strict=True)
        scored = [(length, reward) for length, reward in pairs if reward is not None]
        num_won = num_pairs = 0
        for (length, reward), (other_length, other_reward) in itertools.combinations(scored, 2):
            if length != other_length and reward != other_reward:
                num_pairs += 1
                num_won += (length > other_length) == (reward > other_reward)
        if not num_pairs:
            return  # equal rewards or equal lengths say nothing about a preference
        self._groups.append((_pearson_correlation(scored), num_won, num_pairs))
        del self._groups[: -self._config.window]
        self._update_alarm()

    def metrics(self) -> dict[str, float]:
        """Return the metrics "reward/length/SOURCE/...". They are NaN before the first group."""
        correlation, win_rate = self._mean_statistics()
        prefix = f"reward/length/{self._source}/" if self._source else "reward/length/"
        return {
            f"{prefix}correlation": correlation,
            f"{prefix}win_rate": win_rate,
            f"{prefix}groups": float(len(self._groups)),
            f"{prefix}alarm": float(self.has_alarm),
        }

    def check(self) -> None:
        """Raise where the run must not go on.

        Raises:
          LengthBiasPause: there was an alarm, and the config asks for a pause.
        """
        if self.is_paused:
            correlation, win_rate = self._mean_statistics()
            raise LengthBiasPause(
                f"judge{self._of_source()}: got a correlation of reward and length of "
                f"{correlation:.2f} and {win_rate:.0%} wins of the longer answer; wanted at most "
                f"{self._config.correlation} and {self._config.win_rate:.0%}. Recalibrate the "
                "judge, then go on with --config=... "
                f"--set=length_bias.recalibrated={self._config.recalibrated + 1}."
            )

    def state(self) -> dict[str, Any]:
        """Return the state that continues this monitor, as JSON values."""
        return {
            "groups": [list(group) for group in self._groups],
            "alarm": self.has_alarm,
            "paused": self.is_paused,
            "recalibrated": self._config.recalibrated,
        }

    def _of_source(self) -> str:
        return f" of {self._source}" if self._source else ""

    def _mean_statistics(self) -> tuple[float, float]:
        """Return the mean correlation of the groups, and the share of pairs won by the longer."""
        correlations = [
            correlation for correlation, _, _ in self._groups if correlation is not None
        ]
        num_pairs = sum(pairs for _, _, pairs in self._groups)
        num_won = sum(won for _, won, _ in self._groups)
        return (
            math.fsum(correlations) / len(correlations) if correlations else math.nan,
            num_won / num_pairs if num_pairs else math.nan,
        )

    def _update_alarm(self) -> None:
        correlation, win_rate = self._mean_statistics()
        has_enough = len(self._groups) >= self._config.least
        # Comparisons with NaN are false: no statistic, no alarm.
        is_above = correlation > self._config.correlation or win_rate > self._config.win_rate
        if has_enough and is_above and not self.has_alarm:
            _log.warning(
                "the judge%s rewards length: correlation %.3f, wins of the longer answer %.3f",
                self._of_source(),
                correlation,
                win_rate,
            )
        self.has_alarm = has_enough and is_above
        # An alarm ends when the statistics fall again, a pause only with a recalibration.
        self.is_paused = self.is_paused or (self.has_alarm and self._config.pause)


def _pearson_correlation(scored: list[tuple[int, float]]) -> float | None:
    """Return Pearson's correlation, or None where lengths or rewards do not vary."""
    n = len(scored)
    mean_x = math.fsum(x for x, _ in scored) / n
    mean_y = math.fsum(y for _, y in scored) / n
    xx = math.fsum((x - mean_x) ** 2 for x, _ in scored)
    yy = math.fsum((y - mean_y) ** 2 for _, y in scored)
    if not xx or not yy:
        return None
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in scored)
    return xy / math.sqrt(xx * yy)
