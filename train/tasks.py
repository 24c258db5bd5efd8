"""Tasks from files: whatever the keys are that slime, verl, SynLogic and others give them.

ours      slime                      verl                        SynLogic
prompt    input, prompt              prompt (messages)           question
label     label                      reward_model.ground_truth   answer
metadata  metadata                   extra_info                  metadata
tools     tools
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from train import sample as sample_lib
from train import sources
from train.environments import catalog as environments
from train.rewards import logic

# Ours -> the keys that are tried, in this order; a dot goes into an object.
KEYS = {
    "prompt": ("prompt", "messages", "input", "question", "problem"),
    "label": ("label", "reward_model.ground_truth", "answer", "ground_truth", "solution"),
    "metadata": ("metadata", "extra_info"),
    "tools": ("tools",),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Where tasks come from.

    name: names its rewards in the config. path: JSON lines, Parquet or ArrayRecord files. keys:
    (ours, theirs) pairs in place of `KEYS`. metadata that is a list becomes {its key: the list}.
    make: instead of a path, an environment ("lookup", "files", "repair"), or "logic:NAME" for a
    generator of reasoning-gym, that makes `size` tasks from `seed`; options: the generator's.
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
        unknown = [ours for ours, _ in self.keys if ours not in KEYS]
        if unknown:
            raise ValueError(
                f"tasks {self.name}: got the key {unknown[0]!r}; wanted some of {', '.join(KEYS)}"
            )


def open_source(source: Source) -> "Tasks | Made":
    """Return a source's tasks.

    Raises:
      DataError: files that cannot be read. ValueError: no such environment or generator.
    """
    return Tasks(source) if source.path else Made(source)


class Made:
    """Tasks that are made on the spot: the same for the same source."""

    def __init__(self, source: Source):
        kind, _, name = source.make.partition(":")
        if kind == "logic":
            made = logic.tasks(name, source.size, source.seed, **dict(source.options))
        else:
            made = environments.tasks(source.make, source.size, source.seed)
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

    def check(self, saved: list[list]) -> None:
        """Raise DataError where the tasks are not those of a fingerprint."""
        if saved != self.fingerprint():
            raise sources.DataError(
                f"tasks: got {self.fingerprint()}; wanted {saved}, as the run began with. Install "
                "the version of the generator that made them, or begin a new run."
            )


class Tasks:
    """The tasks of one source, by number.

    Attributes:
      keys: ours -> theirs, as found in the first record and asked for.

    Raises:
      DataError: no such file, no records, or a record without a prompt.
    """

    def __init__(self, source: Source):
        self._source, self._records = source, sources.Records(source.name, source.path)
        if not len(self._records):
            raise sources.DataError(f"tasks {source.name}: {source.path} has no records")
        first, asked = self._records.read(0), dict(source.keys)
        self.keys = {ours: theirs for ours, theirs in asked.items() if theirs}
        for ours, tried in KEYS.items():
            found = next((key for key in tried if _get(first, key) is not None), None)
            if ours not in asked and found is not None:
                self.keys[ours] = found
        if "prompt" not in self.keys:
            raise sources.DataError(
                f"tasks {source.name}: got the keys {sorted(first)}; wanted a prompt in one of "
                f"{', '.join(KEYS['prompt'])}, or keys=(('prompt', KEY),)"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> sample_lib.Task:
        record, where = self._records.read(index), self._records.where(index)
        found = {ours: _get(record, theirs) for ours, theirs in self.keys.items()}
        metadata = found.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            metadata = {self.keys["metadata"].rpartition(".")[2]: metadata}
        return sample_lib.Task(
            id=f"{self._source.name}/{index}",
            messages=_messages(found.get("prompt"), where),
            source=self._source.name,
            label=found.get("label"),
            metadata=dict(metadata),
            tools=tuple(found.get("tools") or ()),
        )

    def fingerprint(self) -> list[list]:
        """Return what tells the files from others; see `sources.Records`."""
        return self._records.fingerprint()

    def check(self, saved: list[list]) -> None:
        """Raise DataError where the files are not those of a fingerprint."""
        self._records.check(saved)

    def close(self) -> None:
        self._records.close()


def _messages(prompt: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if isinstance(prompt, str) and prompt:
        return ({"role": "user", "content": prompt},)
    if isinstance(prompt, list) and prompt and all(isinstance(m, Mapping) for m in prompt):
        return tuple(prompt)
    raise sources.DataError(
        f"{where}: got the prompt {prompt!r:.80}; wanted a string or a list of messages"
    )


def _get(record: Any, key: str) -> Any:
    for part in key.split("."):
        record = record.get(part) if isinstance(record, Mapping) else None
    return record
