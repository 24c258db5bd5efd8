"""The environments by name."""

from train.rl import sample as sample_lib
from train.rl.environments import base, files, lookup, repair

ENVIRONMENTS = {"files": files.Files, "lookup": lookup.Lookup, "repair": repair.Repair}
_TASKS = {"files": files.tasks, "lookup": lookup.tasks, "repair": repair.tasks}


def make(name: str) -> base.Environment:
    """Return a fresh environment.

    Raises:
      ValueError: no such environment.
    """
    return ENVIRONMENTS[_known(name)]()


def tasks(name: str, size: int, seed: int) -> list[sample_lib.Task]:
    """Return `size` tasks of an environment; the same seed makes the same.

    Raises:
      ValueError: no such environment.
    """
    return _TASKS[_known(name)](size, seed)


def _known(name: str) -> str:
    if name not in ENVIRONMENTS:
        raise ValueError(f"environment: got {name!r}; wanted one of {', '.join(ENVIRONMENTS)}")
    return name
