"""What the collector remembers of earlier tasks: it decides which tasks are drawn next."""

from collections.abc import Mapping
from typing import Any

from train.rl import config as rl_config
from train.rl import curriculum
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
      length_bias: tells whether rewards follow length. None where the run does not ask.
      next_group_id: `SampleGroup.group_id` of the next group, from 0.
    """

    def __init__(
        self, config: rl_config.RlConfig, num_tasks: Mapping[str, int], state: Mapping[str, Any]
    ):
        self.draws = curriculum.TaskDraws(config.task_curriculum(), num_tasks, state.get("draws"))
        self.pass_rates: curriculum.PassRateTracker | None = None
        if config.pass_rates is not None:
            self.pass_rates = curriculum.PassRateTracker(config.pass_rates, state.get("pass_rates"))
        self.length_bias: length_bias.LengthBiasMonitor | None = None
        if config.length_bias is not None:
            self.length_bias = length_bias.LengthBiasMonitor(
                config.length_bias, state.get("length_bias")
            )
        self.next_group_id: int = state.get("number", 0)

    def state(self) -> dict[str, Any]:
        """Return what continues this cursor, JSON-able, with the keys that checkpoints have."""
        return {
            "draws": self.draws.state(),
            "pass_rates": self.pass_rates and self.pass_rates.state(),
            "length_bias": self.length_bias and self.length_bias.state(),
            "number": self.next_group_id,
        }

    def metrics(self) -> dict[str, float]:
        """Return the metrics of pass rates and length bias, where the run asks for them."""
        parts = (self.pass_rates, self.length_bias)
        return {
            name: value
            for part in parts
            if part is not None
            for name, value in part.metrics().items()
        }
