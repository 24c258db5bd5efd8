"""What an RL run's checkpoint has beside the model: it decides which batch comes next."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from train import checkpoints
from train.data import records
from train.rl import groups, length_schedule, rollout_setup

_REQUIRED_KEYS = ("collector", "version", "window", "fingerprints")


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
      num_skipped_in_row: number of batches up to now that changed no weight.
    """

    collector: dict[str, Any] | None = None
    weight_version: int = 0
    length_stage: dict[str, Any] | None = None
    fingerprints: dict[str, list[list]] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    num_skipped_in_row: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the state without its columns, with the keys that checkpoints on disk have."""
        return {
            "collector": self.collector,
            "version": self.weight_version,
            "window": self.length_stage,
            "fingerprints": self.fingerprints,
            "skipped_in_row": self.num_skipped_in_row,
        }

    @classmethod
    def from_parts(
        cls, value: Mapping[str, Any], columns: Mapping[str, np.ndarray]
    ) -> "RlSavedState":
        """Return the state of which `to_json` and `columns` are these.

        Raises:
          ValueError: a key is missing, or a collector's columns on process 0: an earlier version
            wrote it.
        """
        missing = [key for key in _REQUIRED_KEYS if key not in value]
        problem = f"an RL state without {', '.join(missing)}" if missing else ""
        if not missing and value["collector"] is not None and not columns:
            # The other processes need none.
            problem = "" if jax.process_index() else "a collector's state without columns"
        if problem:
            raise ValueError(
                f"checkpoint: got {problem}, which an earlier version wrote; wanted one of this "
                "version. Begin a new run with its weights in a new --workdir (--init_from)."
            )
        return cls(
            value["collector"],
            value["version"],
            value["window"],
            value["fingerprints"],
            columns,
            value.get("skipped_in_row", 0),  # earlier versions counted from each start
        )


def collect_state(
    collector: groups.GroupCollector,
    tasks: rollout_setup.TasksBySource,
    weight_version: int,
    length_stage: length_schedule.LengthStage,
    num_skipped_in_row: int,
) -> RlSavedState:
    """Return the state of a run's parts. Process 0 alone has a collector and tasks."""
    state, columns = collector.state()
    return RlSavedState(
        state,
        weight_version,
        length_stage.state(),
        {source: source_tasks.fingerprint() for source, source_tasks in tasks.items()},
        columns,
        num_skipped_in_row,
    )


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
      ValueError: an earlier version's checkpoint.
    """
    if not batch_number:
        return RlSavedState()
    # Process 0 alone has a collector, and so a use for columns.
    columns = {} if jax.process_index() else store.read_columns(batch_number)
    saved_state = RlSavedState.from_parts(store.read_info(batch_number).data, columns)
    for source, source_tasks in tasks.items():
        # A source that was added since begins at its first task.
        if source in saved_state.fingerprints:
            source_tasks.check_fingerprint(saved_state.fingerprints[source])
    if tasks and saved_state.collector is not None:
        _check_sources(saved_state.collector, tasks)
    return saved_state


def _check_sources(collector: Mapping[str, Any], tasks: rollout_setup.TasksBySource) -> None:
    """Refuse a config without a source of which groups wait in the checkpoint.

    Raises:
      DataError: there is one.
    """
    waiting = [group["source"] for kind in ("ready", "open") for group in collector[kind]["groups"]]
    for source in waiting:
        if source not in tasks:
            raise records.DataError(
                f"tasks {source}: {waiting.count(source)} groups of them wait in the checkpoint, "
                "and the config lacks the source; wanted it. Give it weight 0 in a curriculum to "
                "draw no more of it, and --allow_change=curriculum to the command."
            )
