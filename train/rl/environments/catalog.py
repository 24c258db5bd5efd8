"""The environments by name."""

from train.rl import sample as sample_lib
from train.rl.environments import base, files, lookup, repair

ENVIRONMENT_CLASSES = {
    "files": files.FilesEnvironment,
    "lookup": lookup.LookupEnvironment,
    "repair": repair.RepairEnvironment,
}
# A generator is deterministic in (size, seed), so tasks need no files.
_TASK_GENERATORS = {
    "files": files.make_tasks,
    "lookup": lookup.make_tasks,
    "repair": repair.make_tasks,
}


def make_environment(name: str) -> base.Environment:
    """Return a new environment, for one episode.

    Raises:
      ValueError: there is no such environment.
    """
    return ENVIRONMENT_CLASSES[_check_environment_name(name)]()


def make_tasks(name: str, size: int, seed: int) -> list[sample_lib.Task]:
    """Return `size` tasks of an environment. Equal seeds make equal tasks.

    Raises:
      ValueError: there is no such environment.
    """
    return _TASK_GENERATORS[_check_environment_name(name)](size, seed)


def _check_environment_name(name: str) -> str:
    if name not in ENVIRONMENT_CLASSES:
        raise ValueError(
            f"environment: got {name!r}; wanted one of {', '.join(ENVIRONMENT_CLASSES)}"
        )
    return name
