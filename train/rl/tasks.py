"""Tasks from files: whatever the keys are that slime, verl, SynLogic and others give them.

ours      slime                      verl                        SynLogic
prompt    input, prompt              prompt (messages)           question
label     label                      reward_model.ground_truth   answer
metadata  metadata                   extra_info                  metadata
tools     tools
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from train.data import records
from train.rl import sample as sample_lib
from train.rl.environments import catalog
from train.rl.rewards import logic

# Ours -> the keys that are tried, in this order; a dot goes into an object.
TASK_KEYS = {
    "prompt": ("prompt", "messages", "input", "question", "problem"),
    "label": ("label", "reward_model.ground_truth", "answer", "ground_truth", "solution"),
    "metadata": ("metadata", "extra_info"),
    "tools": ("tools",),
}


@dataclasses.dataclass(frozen=True)
class TaskSource:
    """Where tasks come from.

    name: names its rewards in the config. path: JSON lines, Parquet or ArrayRecord files. keys:
    (ours, theirs) pairs in place of `TASK_KEYS`. metadata that is a list becomes {its key: the
    list}.
    make: instead of a path, an environment ("lookup", "files", "repair"), or "logic:NAME" for a
    generator of reasoning-gym, that makes `size` tasks from `seed`; options: that generator's.
    """

    name: str
    path: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    make: str = ""
    size: int = 0
    seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
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
        unknown = [ours for ours, _ in self.keys if ours not in TASK_KEYS]
        if unknown:
            raise ValueError(
                f"tasks {self.name}: got the key {unknown[0]!r}; wanted some of "
                f"{', '.join(TASK_KEYS)}"
            )


def open_tasks(source: TaskSource) -> "FileTasks | GeneratedTasks":
    """Return a source's tasks.

    Raises:
      DataError: files that cannot be read. ValueError: no such environment or generator.
    """
    return FileTasks(source) if source.path else GeneratedTasks(source)


class GeneratedTasks:
    """Tasks that are made on the spot: the same for the same source."""

    def __init__(self, source: TaskSource):
        kind, _, name = source.make.partition(":")
        if kind == "logic":
            made = logic.generate_tasks(name, source.size, source.seed, **dict(source.options))
        else:
            made = catalog.make_tasks(source.make, source.size, source.seed)
        self._tasks = [dataclasses.replace(task, source=source.name) for task in made]

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> sample_lib.Task:
        return self._tasks[index]

    def close(self) -> None:
        """Do nothing: nothing is open."""

    def fingerprint(self) -> list[list]:
        """Return what tells the tasks from others."""
        text = "\n".join(f"{task.messages!r} {task.label!r}" for task in self._tasks)
        return [["made", len(self), hashlib.sha256(text.encode()).hexdigest()]]

    def check_fingerprint(self, saved: list[list]) -> None:
        """Raise DataError where the tasks are not those of a fingerprint."""
        if saved != self.fingerprint():
            raise records.DataError(
                f"tasks: got {self.fingerprint()}; wanted {saved}, as the run began with. Install "
                "the version of the generator that made them, or begin a new run."
            )


class FileTasks:
    """The tasks of one source, by number.

    Attributes:
      keys: ours -> theirs, as found in the first record and asked for.

    Raises:
      DataError: no such file, no records, or a record without a prompt.
    """

    def __init__(self, source: TaskSource):
        self._source = source
        self._records = records.RecordFiles(source.name, source.path, columns=None)
        if not len(self._records):
            raise records.DataError(f"tasks {source.name}: {source.path} has no records")
        first, asked = self._records.read(0), dict(source.keys)
        self._records.close()
        self.keys = {ours: theirs for ours, theirs in asked.items() if theirs}
        for ours, theirs in self.keys.items():
            if not _has_key(first, theirs):
                raise records.DataError(
                    f"tasks {source.name}: got the keys {sorted(first)}; wanted {theirs}, as keys= "
                    f"says of the {ours}"
                )
        for ours, tried in TASK_KEYS.items():
            # A key with nothing in it may have something in other records.
            there = [key for key in tried if _has_key(first, key)]
            there.sort(key=lambda key: _get_value(first, key) is None)
            if ours not in asked and there:
                self.keys[ours] = there[0]
        if "prompt" not in self.keys:
            raise records.DataError(
                f"tasks {source.name}: got the keys {sorted(first)}; wanted a prompt in one of "
                f"{', '.join(TASK_KEYS['prompt'])}, or keys=(('prompt', KEY),)"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> sample_lib.Task:
        record, where = self._records.read(index), self._records.location(index)
        found = {ours: _get_value(record, theirs) for ours, theirs in self.keys.items()}
        metadata = found.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            metadata = {self.keys["metadata"].rpartition(".")[2]: metadata}
        return sample_lib.Task(
            id=f"{self._source.name}/{index}",
            messages=_parse_messages(found.get("prompt"), where),
            source=self._source.name,
            label=found.get("label"),
            metadata=dict(metadata),
            tools=_parse_tools(found.get("tools"), where),
        )

    def fingerprint(self) -> list[list]:
        """Return what tells the files from others; see `sources.RecordFiles`."""
        return self._records.fingerprint()

    def check_fingerprint(self, saved: list[list]) -> None:
        """Raise DataError where the files are not those of a fingerprint."""
        self._records.check_fingerprint(saved)

    def close(self) -> None:
        self._records.close()


def _parse_messages(prompt: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, str) and prompt:
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) for m in prompt):
        return tuple(prompt)
    raise records.DataError(
        f"{where}: got the prompt {prompt!r:.80}; wanted a string or a list of messages"
    )


def _parse_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    tools = json.loads(value) if isinstance(value, str) and value.startswith("[") else value or []
    if isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools):
        return tuple(tools)
    raise records.DataError(
        f"{where}: got the tools {value!r:.80}; wanted a list of function schemas, or its JSON"
    )


def _has_key(record: Any, key: str) -> bool:
    above, _, name = key.rpartition(".")
    record = _get_value(record, above) if above else record
    return isinstance(record, Mapping) and name in record


def _get_value(record: Any, key: str) -> Any:
    for part in key.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record
