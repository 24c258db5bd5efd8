"""Watches a generative judge for a taste for length, while the run goes on (M1 4.2.2).

Within each group of answers to one prompt: the correlation of reward and length, and how often
the longer of two answers with different rewards has the higher one. Means over the last groups;
above a threshold there is an alarm, and a run that asked for it stops until somebody recalibrates
the judge. Push groups in a fixed order, not as scores happen to come in.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LengthBiasConfig:
    """window: groups looked at. least: groups before there can be an alarm.

    correlation, win_rate: above either there is an alarm; 1 is never. pause: whether it stops the
    run. recalibrated: how often the judge was looked after; one more begins anew.
    """

    window: int = 512
    least: int = 64
    correlation: float = 0.4
    win_rate: float = 0.7
    pause: bool = False
    recalibrated: int = 0

    def __post_init__(self):
        if not 1 <= self.least <= self.window:
            raise ValueError(
                f"least: got {self.least}; wanted 1 to the window, which is {self.window}"
            )
        for field in ("correlation", "win_rate"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}: got {getattr(self, field)}; wanted 0 to 1")


class LengthBiasPause(ValueError):
    """The judge rewards length; somebody must look."""


class LengthBiasMonitor:
    """The monitor of one judge.

    `push` every group, log `metrics`, call `check` before training on the judge's scores. After an
    alarm with pause, `check` raises until a config says that the judge was recalibrated.
    """

    def __init__(self, config: LengthBiasConfig, state: dict[str, Any] | None = None):
        """Go on from a `state`; begin anew where the judge was recalibrated since."""
        state = state or {}
        if state.get("recalibrated", 0) != config.recalibrated:
            state = {}
        self._config = config
        # Of each group: its correlation or None, pairs won by the longer, pairs.
        self._groups: list[tuple[float | None, int, int]] = [
            (correlation, won, pairs) for correlation, won, pairs in state.get("groups", [])
        ][-config.window :]
        self.has_alarm: bool = state.get("alarm", False)
        self.is_paused: bool = state.get("paused", False)

    def push(self, lengths: Sequence[int], rewards: Sequence[float | None]) -> None:
        """Take a group: each answer's tokens and reward; answers without one do not count.

        Raises:
          ValueError: of different lengths.
        """
        if len(lengths) != len(rewards):
            raise ValueError(
                f"group: got {len(lengths)} lengths and {len(rewards)} rewards; wanted as many"
            )
        pairs = zip(lengths, rewards, strict=True)
        scored = [(length, reward) for length, reward in pairs if reward is not None]
        won = many = 0
        for (length, reward), (other_length, other) in itertools.combinations(scored, 2):
            if length != other_length and reward != other:
                many += 1
                won += (length > other_length) == (reward > other)
        if not many:
            return  # nothing to learn from
        self._groups.append((_pearson_correlation(scored), won, many))
        del self._groups[: -self._config.window]
        self._update_alarm()

    def metrics(self) -> dict[str, float]:
        """Return what to log: "reward/length/..."; NaN where there is nothing yet."""
        correlation, win_rate = self._mean_statistics()
        return {
            "reward/length/correlation": correlation,
            "reward/length/win_rate": win_rate,
            "reward/length/groups": float(len(self._groups)),
            "reward/length/alarm": float(self.has_alarm),
        }

    def check(self) -> None:
        """Do nothing while the run may go on.

        Raises:
          Paused: after an alarm, where the config asks for a pause.
        """
        if self.is_paused:
            correlation, win_rate = self._mean_statistics()
            raise LengthBiasPause(
                f"judge: got a correlation of reward and length of {correlation:.2f} and "
                f"{win_rate:.0%} wins of the longer answer; wanted at most "
                f"{self._config.correlation} and {self._config.win_rate:.0%}. Recalibrate the "
                "judge, then go on with --config=... "
                f"--set=length_bias.recalibrated={self._config.recalibrated + 1}."
            )

    def state(self) -> dict[str, Any]:
        """Return what continues this monitor, JSON-able."""
        return {
            "groups": [list(group) for group in self._groups],
            "alarm": self.has_alarm,
            "paused": self.is_paused,
            "recalibrated": self._config.recalibrated,
        }

    def _mean_statistics(self) -> tuple[float, float]:
        known = [one for one, _, _ in self._groups if one is not None]
        pairs = sum(pairs for _, _, pairs in self._groups)
        won = sum(won for _, won, _ in self._groups)
        return (
            math.fsum(known) / len(known) if known else math.nan,
            won / pairs if pairs else math.nan,
        )

    def _update_alarm(self) -> None:
        correlation, win_rate = self._mean_statistics()
        enough = len(self._groups) >= self._config.least
        above = correlation > self._config.correlation or win_rate > self._config.win_rate
        if enough and above and not self.has_alarm:
            _log.warning(
                "the judge rewards length: correlation %.3f, wins of the longer answer %.3f",
                correlation,
                win_rate,
            )
        self.has_alarm = enough and above
        self.is_paused = self.is_paused or (self.has_alarm and self._config.pause)


def _pearson_correlation(scored: list[tuple[int, float]]) -> float | None:
    """Return Pearson's correlation, or None where one side does not vary."""
    n = len(scored)
    mean_x = math.fsum(x for x, _ in scored) / n
    mean_y = math.fsum(y for _, y in scored) / n
    xx = math.fsum((x - mean_x) ** 2 for x, _ in scored)
    yy = math.fsum((y - mean_y) ** 2 for _, y in scored)
    if not xx or not yy:
        return None
    xy = math.fsum((x - mean_x) * (y - mean_y) for x, y in scored)
    return xy / math.sqrt(xx * yy)
