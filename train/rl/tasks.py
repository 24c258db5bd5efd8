"""Tasks from files of slime, verl, SynLogic and others, or from generators.

The files have the same contents under different keys:

field     slime                      verl                        SynLogic
prompt    input, prompt              prompt (messages)           question
label     label                      reward_model.ground_truth   answer
metadata  metadata                   extra_info                  metadata
tools     tools

Columns that hold the tests of code or expected tool calls join the metadata.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging

from train.data import records
from train.rl import sample as sample_lib
from train.rl import task_columns, task_json, task_store

TASK_KEYS = task_columns.TASK_KEYS


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Where tasks come from: files, or a generator.

    Attributes:
      name: name of the source. The config lists its rewards under this name.
      path: JSON lines, Parquet or ArrayRecord files.
      keys: (field, key) pairs, for files whose keys are not in `TASK_KEYS`. An empty key leaves the
        field out. Metadata that is a list becomes {key: list}.
      make: instead of a path, an environment ("lookup", "files", "repair") that makes the tasks, or
        "logic:NAME" for a generator of reasoning-gym.
      size: number of tasks to make.
      seed: seed of the generator.
      options: (name, value) pairs for a generator of reasoning-gym.
      overlong: what happens to tasks whose prompt is longer than `rollout.max_prompt_tokens`:
        "error" stops the run before its first batch, "drop" leaves them out and logs how many.
    """

    name: str
    path: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    make: str = ""
    size: int = 0
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()
    overlong: str = "error"

    def __post_init__(self):
        if self.overlong not in ("error", "drop"):
            raise ValueError(
                f"tasks {self.name}: got overlong {self.overlong!r}; wanted 'error' or 'drop'"
            )
        if bool(self.path) == bool(self.make) or (self.make and self.size < 1):
            raise ValueError(
                f"tasks {self.name}: got path {self.path!r}, make {self.make!r}, size {self.size}; "
                "wanted either a path, or make and a size of at least 1"
            )
        if (self.keys and self.make) or (self.options and not self.make.startswith("logic:")):
            raise ValueError(
                f"tasks {self.name}: got keys {self.keys}, options {self.options}; wanted keys "
                "with a path alone, and options with make='logic:NAME' alone"
            )
        unknown = [field for field, _ in self.keys if field not in TASK_KEYS]
        if unknown:
            raise ValueError(
                f"tasks {self.name}: got the key {unknown[0]!r}; wanted some of "
                f"{', '.join(TASK_KEYS)}"
            )


def check_task_source(source: TaskSource, directory: pathlib.Path) -> None:
    """Check that the generator of tasks that are yet to be made exists and takes its options.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: no such environment or generator, or options that it does not take.
    """
    if source.make:
        task_store.check_stored_tasks(describe_source(source), dict(source.options), directory)


def open_task_source(source: TaskSource, directory: pathlib.Path) -> "FileTasks | GeneratedTasks":
    """Return a source's tasks.

    Args:
      source: the source.
      directory: where generated tasks are kept, see `GeneratedTasks`.

    Raises:
      DataError: files that cannot be read.
      ValueError: no such environment or generator.
    """
    return FileTasks(source) if source.path else GeneratedTasks(source, directory)


def describe_source(source: TaskSource) -> dict[str, Any]:
    """Return what decides a source's tasks, as JSON. It names their file, see `task_store`."""
    if source.path:
        return {
            "name": source.name,
            "path": source.path,
            "keys": [list(pair) for pair in source.keys],
        }
    # Through JSON, because a config that was saved has tuples in place of lists.
    options = json.loads(json.dumps(source.options))
    return {
        "name": source.name,
        "make": source.make,
        "size": source.size,
        "seed": source.seed,
        "options": options,
    }


class GeneratedTasks:
    """Tasks that a generator made: the same source always has the same tasks.

    They are made once, into a file, and every later start reads that file. `task_store` has its
    form, and says what happens to a making that is interrupted.

    Args:
      source: the source, with `make`.
      directory: where files of tasks are. It is made if it does not exist.

    Raises:
      DataError: a file that is damaged, or that is not of this source.
      ImportError: reasoning-gym is not installed, and the tasks are yet to be made.
      ValueError: no such environment or generator, or options that it does not take.
    """

    def __init__(self, source: TaskSource, directory: pathlib.Path):
        self._source = source
        self._stored = task_store.open_stored_tasks(
            describe_source(source), dict(source.options), directory
        )

    def __len__(self) -> int:
        return len(self._stored.lines)

    def __getitem__(self, index: int) -> sample_lib.Task:
        # Two sources may have one generator: rewards are found by the source's own name.
        return task_json.task_from_line(self._stored.lines[index], self._source.name)

    def location(self, index: int) -> str:
        """Return a task's name, for messages."""
        return f"task {self[index].id}"

    def close(self) -> None:
        """Do nothing: no file is open."""

    def fingerprint(self) -> list[list]:
        """Return a hash of the tasks, as JSON, in the form of `FileTasks.fingerprint`."""
        return self._stored.fingerprint

    def check_fingerprint(self, saved: list[list]) -> None:
        """Raise DataError if the tasks are not those of a fingerprint."""
        if saved != self.fingerprint():
            raise records.DataError(
                f"tasks {self._source.name}: got {self.fingerprint()}; wanted {saved}, as the run "
                "began with. Put the old file of tasks back into the workdir, or install the "
                "version of the generator that made them and delete the file, or begin a new run."
            )


class FileTasks:
    """The tasks of one source of files, by index.

    Attributes:
      keys: key of the file for each field: the one that `TaskSource.keys` names, or else the one
        that the first record has.

    Raises:
      DataError: no such file, no records, or a record without a prompt.
    """

    def __init__(self, source: TaskSource):
        self._source = source
        # All columns: the keys of interest are not known yet.
        self._records = records.RecordFiles(source.name, source.path, columns=None)
        if not len(self._records):
            raise records.DataError(f"tasks {source.name}: {source.path} has no records")
        first, self._explicit_keys = self._records.read(0), dict(source.keys)
        # The next read opens the files again.
        self._records.close()
        self.keys = task_columns.choose_keys(source.name, first, self._explicit_keys)
        logging.info(
            "tasks %s: %d records, read from the columns %s",
            source.name,
            len(self._records),
            ", ".join(f"{key} ({field})" for field, key in self.keys.items()),
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> sample_lib.Task:
        record = self._records.read(index)
        values = {field: task_columns.get_value(record, key) for field, key in self.keys.items()}
        try:
            return sample_lib.Task(
                id=f"{self._source.name}/{index}",
                messages=task_columns.parse_prompt(values["prompt"], self.keys["prompt"]),
                source=self._source.name,
                label=values.get("label"),
                metadata=self._read_metadata(record, values.get("metadata")),
                tools=task_columns.parse_tools(values.get("tools")),
                data_source=task_columns.parse_data_source(record.get("data_source")),
            )
        except ValueError as error:
            # Finding the line is slow, and only for messages.
            raise records.DataError(f"{self.location(index)}: {error}") from None

    def location(self, index: int) -> str:
        """Return a task's file and line, for messages."""
        return self._records.location(index)

    def _read_metadata(self, record: Any, value: Any) -> dict[str, Any]:
        if self._explicit_keys.get("metadata") == "":
            return {}
        columns = {
            name: record[name]
            for name in task_columns.METADATA_COLUMNS
            if record.get(name) is not None and name not in self.keys.values()
        }
        is_explicit = "metadata" in self._explicit_keys
        key = self.keys.get("metadata", "metadata")
        return columns | task_columns.parse_metadata(value, key, is_explicit)

    def fingerprint(self) -> list[list]:
        """Return the fingerprint of the files; see `records.RecordFiles`."""
        return self._records.fingerprint()

    def check_fingerprint(self, saved: list[list]) -> None:
        """Raise DataError if the files are not those of a fingerprint."""
        self._records.check_fingerprint(saved)

    def close(self) -> None:
        """Close the files."""
        self._records.close()


class TaskSubset(Sequence[sample_lib.Task]):
    """The tasks of a source that are left when some are dropped. They keep their names.

    Args:
      tasks: all tasks of the source.
      indices: those that stay, in order.
    """

    def __init__(self, tasks: FileTasks | GeneratedTasks, indices: Sequence[int]):
        self._tasks, self._indices = tasks, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:  # a whole number, and a task
        return self._tasks[self._indices[index]]

    def location(self, index: int) -> str:
        """Return where a task is, for messages."""
        return self._tasks.location(self._indices[index])

    def fingerprint(self) -> list[list]:
        """Return the fingerprint of all tasks, and then that of the choice."""
        digest = hashlib.sha256(json.dumps(self._indices).encode()).hexdigest()
        return [*self._tasks.fingerprint(), ["kept", len(self._indices), digest]]

    def check_fingerprint(self, saved: list[list]) -> None:
        """Raise DataError if the tasks are not those of a fingerprint."""
        self._tasks.check_fingerprint(saved[:-1])
        if saved != self.fingerprint():
            raise records.DataError(
                f"tasks: got {len(self)} that are short enough; wanted the {saved[-1][1]} that the "
                "run began with. Give rollout.max_prompt_tokens and the tokenizer their old values."
            )

    def close(self) -> None:
        """Close the files."""
        self._tasks.close()
