"""Generated tasks on disk: made once, read by every later start.

A source's file is DIRECTORY/NAME-HASH.jsonl, where the hash is that of the source's recipe, so that
a changed source has another file. Its first line is the checksum of all that follows. The second
line says what was made, and with which versions. Each further line is a task, by index.

While tasks are made, they are in NAME-HASH.making, in the order in which they come. A process that
is killed leaves that journal, and the next one makes only what the journal lacks.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import pathlib
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm
from absl import logging

from m1_jax import durable, process_watch
from train.data import records
from train.rl import task_json, task_maker

_FORMAT = 1
_SUFFIX = ".jsonl"
_CHECKSUM_PREFIX = "sha256 "
_REMEDY = "Delete the file: the next start makes the tasks again."


@dataclasses.dataclass(frozen=True)
class StoredTasks:
    """The content of a source's file.

    Attributes:
      lines: a line of `task_json` for each task.
      fingerprint: hash of prompts and labels, see `tasks.GeneratedTasks.fingerprint`.
    """

    lines: list[str]
    fingerprint: list[list]


def source_path(recipe: Mapping[str, Any], directory: pathlib.Path, suffix: str) -> pathlib.Path:
    """Return the path of a source's file in the directory of tasks."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    # A name may hold a slash, or what a file system does not take.
    return directory / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', recipe['name'])}-{digest}{suffix}"


def check_stored_tasks(
    recipe: Mapping[str, Any], options: Mapping[str, Any], directory: pathlib.Path
) -> None:
    """Check that tasks exist or can be made. Arguments and errors are those of `open_stored_tasks`.

    A wrong name then stops a run before it makes the tasks of its other sources.
    """
    if not source_path(recipe, directory, _SUFFIX).exists():
        task_maker.check_recipe(recipe, options)


def open_stored_tasks(
    recipe: Mapping[str, Any], options: Mapping[str, Any], directory: pathlib.Path
) -> StoredTasks:
    """Return the tasks of a recipe, which are made now if the directory does not have them.

    Args:
      recipe: what decides the tasks, see `task_maker`.
      options: the generator's options, as the config gives them. The recipe has them as JSON.
      directory: where files of tasks are. Several runs may share one.

    Raises:
      DataError: a file that is damaged, or that is not of this recipe.
      ImportError: reasoning-gym is not installed, and the tasks are yet to be made.
      ValueError: there is no such generator, it does not take these options, or it failed.
    """
    check_stored_tasks(recipe, options, directory)
    path = source_path(recipe, directory, _SUFFIX)
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with _lock_directory(directory):
            # Another process may have made the file while this one waited.
            if not path.exists():
                _make_file(path, recipe, options)
    return _read_file(path, recipe)


@contextlib.contextmanager
def _lock_directory(directory: pathlib.Path) -> Iterator[None]:
    """Keep other processes from making tasks in the same directory at the same time."""
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("%s: waiting for another process that makes tasks there", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The system takes the lock back from a process that dies.
        yield


def _make_file(path: pathlib.Path, recipe: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Make all tasks of a recipe that its journal lacks, and write its file."""
    began, size = time.monotonic(), recipe["size"]
    versions = task_maker.generator_versions(recipe)
    identity = {"format": _FORMAT, "recipe": recipe, "versions": versions}
    journal_path = path.with_suffix(".making")
    lines = _read_journal(journal_path, identity)
    missing = [index for index in range(size) if index not in lines]
    logging.info("%s: making %d of %d tasks", path, len(missing), size)
    with (
        journal_path.open("a", encoding="ascii") as journal,
        # A terminal shows a bar. A file of logs gets the two lines around this.
        tqdm.tqdm(
            desc=f"tasks of {recipe['name']}", total=size, initial=len(lines), disable=None
        ) as bar,
        contextlib.closing(task_maker.make_task_lines(recipe, options, missing)) as made_lines,
    ):
        for index, line in made_lines:
            lines[index] = line
            journal.write(_with_checksum(f"{index} {line}"))
            journal.flush()
            bar.update()
            # Other processes wait meanwhile, perhaps for hours.
            process_watch.note_progress()
    ordered_lines = [lines[index] for index in range(size)]
    header = identity | {"fingerprint": _fingerprint_lines(ordered_lines)}
    text = "".join(f"{line}\n" for line in (json.dumps(header), *ordered_lines))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    durable.write_text_atomically(path, f"{_CHECKSUM_PREFIX}{checksum}\n{text}")
    journal_path.unlink()
    logging.info("%s: made in %.0f s", path, time.monotonic() - began)


def _fingerprint_lines(lines: list[str]) -> list[list]:
    """Return a hash of prompts and labels. Runs of earlier versions have saved this form."""
    tasks = [task_json.task_from_line(line, "") for line in lines]
    text = "\n".join(f"{task.messages!r} {task.label!r}" for task in tasks)
    return [["made", len(tasks), hashlib.sha256(text.encode()).hexdigest()]]


def _with_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _read_journal(path: pathlib.Path, identity: Mapping[str, Any]) -> dict[int, str]:
    """Return the lines of tasks in a journal, by index, and leave a journal of these alone.

    Lines that a crash left incomplete are dropped. So is a journal of another recipe or of other
    versions, since tasks of two versions must not be mixed.
    """
    first_line = _with_checksum(json.dumps(identity))
    lines: dict[int, str] = {}
    if path.exists():
        # What a crash leaves of a file need not be text.
        journal_lines = path.read_text(encoding="ascii", errors="replace").splitlines(keepends=True)
        if journal_lines[:1] == [first_line]:
            for journal_line in journal_lines[1:]:
                _, _, text = journal_line.rstrip("\n").partition(" ")
                if journal_line == _with_checksum(text):
                    index, _, line = text.partition(" ")
                    lines[int(index)] = line
        else:
            logging.warning(
                "%s: got a journal of other versions or a damaged one; making all tasks", path
            )
    # Written anew: the next line must not be appended to a part of one.
    journal_text = [_with_checksum(f"{index} {line}") for index, line in lines.items()]
    durable.write_text_atomically(path, "".join([first_line, *journal_text]))
    return lines


def _read_file(path: pathlib.Path, recipe: Mapping[str, Any]) -> StoredTasks:
    """Return the content of a source's file, checked."""
    checksum_line, _, text = path.read_text(encoding="ascii", errors="replace").partition("\n")
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if checksum_line != f"{_CHECKSUM_PREFIX}{checksum}":
        raise records.DataError(
            f"{path}: got tasks whose checksum is {checksum}; wanted that of the first line, "
            f"{checksum_line!r:.80}. The file is damaged. {_REMEDY}"
        )
    header_line, *lines = text.removesuffix("\n").split("\n")
    header = json.loads(header_line)
    got, wanted = (header["format"], header["recipe"]), (_FORMAT, recipe)
    if got != wanted or len(lines) != recipe["size"]:
        raise records.DataError(
            f"{path}: got {len(lines)} tasks of format {got[0]} and source {got[1]}; wanted those "
            f"of format {wanted[0]} and source {wanted[1]}. Was the file renamed? {_REMEDY}"
        )
    _warn_of_other_version(path, header["versions"].get("reasoning-gym"))
    return StoredTasks(lines, header["fingerprint"])


def _warn_of_other_version(path: pathlib.Path, made_with: str | None) -> None:
    """Log if the verifiers of reasoning-gym are not of the version that made the tasks."""
    installed = task_maker.installed_version("reasoning-gym")
    if made_with is not None and installed != made_with:
        logging.warning(
            "%s: got reasoning-gym %s to verify answers; its tasks were made with %s. They stay as "
            "they are. Install that version if rewards look wrong.",
            path,
            installed,
            made_with,
        )
