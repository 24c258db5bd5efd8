"""What an RL run's checkpoint has beside the model: it decides which batch comes next."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from train import checkpoints
from train.rl import rollout_setup


@dataclasses.dataclass(frozen=True)
class RlSavedState:
    """State of a run after a batch. The default is that before the first batch.

    Attributes:
      collector: first result of `GroupCollector.state`. None before the first batch.
      weight_version: number of times that the sampler got new weights.
      length_stage: result of `LengthStage.state`. None before the first batch.
      fingerprints: fingerprint of each source's tasks, by the name of the source.
      columns: second result of `GroupCollector.state`, arrays by name. It is stored beside the
        JSON: 13 bytes a token, which JSON would make five times as many.
    """

    collector: dict[str, Any] | None = None
    weight_version: int = 0
    length_stage: dict[str, Any] | None = None
    fingerprints: dict[str, list[list]] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the state without its columns, with the keys that checkpoints on disk have."""
        return {
            "collector": self.collector,
            "version": self.weight_version,
            "window": self.length_stage,
            "fingerprints": self.fingerprints,
        }

    @classmethod
    def from_parts(
        cls, value: Mapping[str, Any], columns: Mapping[str, np.ndarray]
    ) -> "RlSavedState":
        """Return the state of which `to_json` and `columns` are these.

        Raises:
          ValueError: a collector without columns on process 0, as an earlier version wrote it.
        """
        collector = value["collector"]
        if collector is not None and not columns and jax.process_index() == 0:
            raise ValueError(
                "checkpoint: got a collector's state without columns, which an earlier version "
                "wrote; wanted one of this version. Begin a new run with its weights in a new "
                "--workdir (--init_from)."
            )
        return cls(collector, value["version"], value["window"], value["fingerprints"], columns)


def read_saved_state(
    store: checkpoints.CheckpointStore, batch_number: int, tasks: rollout_setup.TasksBySource
) -> RlSavedState:
    """Return what the checkpoint of a batch has beside arrays. Batch 0 has no checkpoint.

    Args:
      store: the run's checkpoints.
      batch_number: number of the batch.
      tasks: tasks of each source, on process 0. None on the others.

    Raises:
      DataError: tasks that are not those of the checkpoint's run.
    """
    if not batch_number:
        return RlSavedState()
    # Process 0 alone has a collector, and so a use for columns.
    columns = {} if jax.process_index() else store.read_columns(batch_number)
    saved_state = RlSavedState.from_parts(store.read_info(batch_number).data, columns)
    for source, source_tasks in tasks.items():
        source_tasks.check_fingerprint(saved_state.fingerprints[source])
    return saved_state
