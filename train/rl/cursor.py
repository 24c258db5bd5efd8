"""What the collector remembers of earlier tasks: it decides which tasks are drawn next."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from train.rl import config as rl_config
from train.rl import curriculum, outcomes, sample_groups
from train.rl.rewards import length_bias


class CollectorCursor:
    """The state of a collector but for the groups themselves.

    Args:
      config: config of the run.
      num_tasks: number of tasks of each source, by its name.
      state: the cursor that this one continues, from `state`. An empty one begins a run.

    Attributes:
      draws: draws one task after another.
      pass_rates: tells which tasks are too easy or too hard. None where the run does not ask.
      length_bias: by source, tells whether its judge's rewards follow length. It has the sources
        with a judge, and is empty where the run does not ask.
      next_group_id: `SampleGroup.group_id` of the next group, from 0.
    """

    def __init__(
        self, config: rl_config.RlConfig, num_tasks: Mapping[str, int], state: Mapping[str, Any]
    ):
        self.draws = curriculum.TaskDraws(config.task_curriculum(), num_tasks, state.get("draws"))
        self.pass_rates: curriculum.PassRateTracker | None = None
        if config.pass_rates is not None:
            self.pass_rates = curriculum.PassRateTracker(config.pass_rates, state.get("pass_rates"))
        # By source, the names of its judges.
        self._judges = _find_judges(config)
        monitor_states = state.get("length_bias") or {}
        self.length_bias: dict[str, length_bias.LengthBiasMonitor] = {}
        for source in self._judges:
            assert config.length_bias is not None, "judges are looked for where it is set"
            self.length_bias[source] = length_bias.LengthBiasMonitor(
                config.length_bias, monitor_states.get(source), source
            )
        self.next_group_id: int = state.get("number", 0)

    def state(self) -> dict[str, Any]:
        """Return what continues this cursor, JSON-able, with the keys that checkpoints have."""
        return {
            "draws": self.draws.state(),
            "pass_rates": self.pass_rates and self.pass_rates.state(),
            "length_bias": {name: bias.state() for name, bias in self.length_bias.items()},
            "number": self.next_group_id,
        }

    def push_lengths(self, group: sample_groups.SampleGroup) -> None:
        """Show a scored group to the monitor of its source's judge, if there is one."""
        if group.source not in self.length_bias:
            return
        samples = sample_groups.finished_samples(group)
        self.length_bias[group.source].push(
            [sample.num_generated for sample in samples],
            [
                _sum_parts(sample.parts, self._judges[group.source]) if sample.valid else None
                for sample in samples
            ],
        )

    def check_length_bias(self) -> None:
        """Raise where the judge of a source prefers long answers.

        Raises:
          length_bias.LengthBiasPause: see `LengthBiasMonitor.check`.
        """
        for monitor in self.length_bias.values():
            monitor.check()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of pass rates and length bias, where the run asks for them."""
        parts = [self.pass_rates] if self.pass_rates is not None else []
        return {
            name: value
            for part in (*parts, *self.length_bias.values())
            for name, value in part.metrics().items()
        }


def _find_judges(config: rl_config.RlConfig) -> dict[str, list[str]]:
    """Return the judges of each source that has some, empty without `length_bias`."""
    if config.length_bias is None:
        return {}
    judges = {
        source.name: [
            name
            for name in outcomes.find_source_terms(config.rewards, source.name)
            if name in config.length_bias.judges
        ]
        for source in config.sources
    }
    judges = {source: names for source, names in judges.items() if names}
    if not judges:
        logging.warning(
            "length_bias: watches nothing: no source has a reward of %s",
            ", ".join(config.length_bias.judges),
        )
    return judges


def _sum_parts(parts: Mapping[str, float], rewards: Sequence[str]) -> float:
    """Return the sum of all parts that rewards of these names gave."""
    return math.fsum(value for name, value in parts.items() if name.partition("/")[0] in rewards)
