"""The environments by name."""

from train.rl import sample as sample_lib
from train.rl.environments import base, files, lookup, repair

ENVIRONMENT_CLASSES = {
    "files": files.FilesEnvironment,
    "lookup": lookup.LookupEnvironment,
    "repair": repair.RepairEnvironment,
}
# A task is a function of its seed and index alone, so any process may make any part of a source.
_TASK_MAKERS = {
    "files": files.make_task,
    "lookup": lookup.make_task,
    "repair": repair.make_task,
}


def make_environment(name: str) -> base.Environment:
    """Return a new environment, for one episode.

    Raises:
      ValueError: there is no such environment.
    """
    return ENVIRONMENT_CLASSES[check_environment_name(name)]()


def make_task(name: str, seed: int, index: int) -> sample_lib.Task:
    """Return a task of an environment. Equal seeds and indices make equal tasks.

    Raises:
      ValueError: there is no such environment.
    """
    return _TASK_MAKERS[check_environment_name(name)](seed, index)


def check_environment_name(name: str) -> str:
    """Return the name.

    Raises:
      ValueError: there is no such environment.
    """
    if name not in ENVIRONMENT_CLASSES:
        raise ValueError(
            f"environment: got {name!r}; wanted one of {', '.join(ENVIRONMENT_CLASSES)}"
        )
    return name
