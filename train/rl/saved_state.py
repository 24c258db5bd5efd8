"""What a checkpoint of an RL run has beside arrays: it decides which batch comes next."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RlSavedState:
    """State of a run after a batch. The default is that before the first batch.

    Attributes:
      collector: result of `GroupCollector.state`. None before the first batch.
      weight_version: number of times that the sampler got new weights.
      length_stage: result of `LengthStage.state`. None before the first batch.
      fingerprints: fingerprint of each source's tasks, by the name of the source.
    """

    collector: dict[str, Any] | None = None
    weight_version: int = 0
    length_stage: dict[str, Any] | None = None
    fingerprints: dict[str, list[list]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the state with the keys that checkpoints on disk have."""
        return {
            "collector": self.collector,
            "version": self.weight_version,
            "window": self.length_stage,
            "fingerprints": self.fingerprints,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RlSavedState":
        """Return the state that `to_json` wrote."""
        return cls(value["collector"], value["version"], value["window"], value["fingerprints"])
