"""Checks that tasks have what their rewards and their environment need, before anything is sampled.

A reward without a label, or code without tests, has no score for any sample. Found out during the
run, that is paid sampling which teaches nothing.
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import tqdm

from m1_jax import durable
from train.data import records
from train.rl import sample as sample_lib
from train.rl import tasks as tasks_lib
from train.rl.environments import catalog as environment_catalog
from train.rl.rewards import catalog as reward_catalog
from train.rl.rewards import compose

_VERSION = 1  # of the checks: another one has all tasks checked again
TaskCheck = Callable[[sample_lib.Task], Any]


def check_needs(
    tasks: tasks_lib.FileTasks | tasks_lib.GeneratedTasks,
    source_name: str,
    rewards: compose.RewardsConfig | None,
    environment: str | None,
    record: pathlib.Path | None = None,
) -> None:
    """Check all tasks of a source. Later starts with the same tasks and needs check none.

    Args:
      rewards: the rewards of all sources, None where the environment gives all of them.
      environment: name of the environment, None without an agent.
      record: file that remembers what was checked.

    Raises:
      DataError: tasks that lack something. The message has their number, and the first one's file
        and line.
    """
    checks = find_checks(source_name, rewards, environment)
    if not checks:
        return
    users = [user for user, _ in checks]
    checked = json.dumps({"version": _VERSION, "tasks": tasks.fingerprint(), "needed_by": users})
    if record is not None and record.exists() and record.read_text() == checked:
        return
    check_tasks(tasks, source_name, checks, tasks.location)
    if record is not None:
        durable.write_text_atomically(record, checked)


def check_tasks(
    tasks: Sequence[sample_lib.Task] | tasks_lib.FileTasks | tasks_lib.GeneratedTasks,
    source_name: str,
    checks: Sequence[tuple[str, TaskCheck]],
    find_location: Callable[[int], str],
) -> None:
    """Check tasks of a source by what `find_checks` returned.

    Args:
      find_location: returns where a task is, for messages.

    Raises:
      DataError: see `check_needs`.
    """
    first_error, num_wrong = "", 0
    # Many tasks take a while, so there is a progress bar.
    for index in tqdm.tqdm(range(len(tasks)), f"tasks of {source_name}", disable=None):
        task = tasks[index]
        try:
            for user, check in checks:
                _run_check(user, check, task)
        except ValueError as error:
            num_wrong += 1
            first_error = first_error or f"{find_location(index)}: {error}"
    if num_wrong:
        raise records.DataError(
            f"tasks {source_name}: {num_wrong} of {len(tasks)} lack what is needed to score them. "
            f"The first is {first_error}. Mend or remove these tasks, name other columns by keys=, "
            "or use another reward."
        )


def find_checks(
    source_name: str, rewards: compose.RewardsConfig | None, environment: str | None
) -> list[tuple[str, TaskCheck]]:
    """Return what needs something of a source's tasks, and how that is checked."""
    checks: list[tuple[str, TaskCheck]] = []
    if rewards is not None:
        terms_by_source = dict(rewards.sources)
        terms = terms_by_source.get(source_name, terms_by_source.get(compose.ANY_SOURCE, ()))
        checks += [
            (f"the reward {name!r}", reward_catalog.TASK_CHECKS[name])
            for name, _, _ in terms
            if name in reward_catalog.TASK_CHECKS
        ]
    if environment is not None:
        checks.append(
            (
                f"the environment {environment!r}",
                lambda task: _start_environment(environment, task),
            )
        )
    return checks


def _run_check(user: str, check: TaskCheck, task: sample_lib.Task) -> None:
    try:
        check(task)
    except ValueError as error:
        raise ValueError(f"{error} (needed by {user})") from None


def _start_environment(name: str, task: sample_lib.Task) -> None:
    environment = environment_catalog.make_environment(name)
    try:
        environment.start(task)
    finally:
        environment.close()
