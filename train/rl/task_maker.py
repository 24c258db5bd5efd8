"""Processes that make the tasks of a generator, the same ones on every machine.

Some generators of reasoning-gym read more than their seed: the order of a set of text, which
follows PYTHONHASHSEED, and Python's global `random`. Tasks are therefore made in fresh interpreters
whose hash seed is fixed, and `logic.generate_tasks` seeds the global `random` for each task. So a
task depends on its recipe and its index alone, and indices may be shared out in any way.

A recipe is the part of a `tasks.TaskSource` that decides its tasks, as JSON: name, make, size, seed
and options.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from train.rl import task_json
from train.rl.environments import catalog
from train.rl.rewards import logic

_HASH_SEED = "0"  # for PYTHONHASHSEED
# Each process imports reasoning-gym, which takes a second and 150 MB.
_MAX_PROCESSES = 32
_MIN_TASKS_PER_PROCESS = 16
# A fresh interpreter with the caller's search path. It imports neither jax nor the caller's main
# module, and does not fork a process that has threads and a device.
_BOOT_CODE = (
    "import sys; sys.path[:] = {path!r}; from train.rl import task_maker; task_maker.main()"
)
_ERROR_PREFIX = "error "
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def check_recipe(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Check that there is such a generator, and that it takes these options.

    Args:
      recipe: what to make.
      options: the generator's options, as the config gives them.

    Raises:
      ImportError: reasoning-gym is not installed.
      ValueError: no such environment or generator, or options that it does not take.
    """
    kind, name = _split_make(recipe)
    if kind == "logic":
        logic.check_generator(name, options)
        task_json.encode_value(dict(options))
    else:
        catalog.check_environment_name(name)


def generator_versions(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions of the software whose change may change the tasks, by name."""
    versions = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    if _split_make(recipe)[0] == "logic":
        versions["reasoning-gym"] = installed_version("reasoning-gym")
    return versions


def installed_version(package: str) -> str:
    """Return a package's version, or "none" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def make_task_lines(
    recipe: Mapping[str, Any],
    options: Mapping[str, Any],
    indices: Sequence[int],
    num_processes: int | None = None,
) -> Generator[tuple[int, str], None, None]:
    """Yield (index, line of `task_json`) of the tasks of these indices, in any order.

    Args:
      recipe: what to make.
      options: the generator's options, as the config gives them.
      indices: indices of the tasks.
      num_processes: processes that work at the same time. None takes the machine's cores.

    Raises:
      ValueError: the generator failed.
      RuntimeError: a process died.
    """
    if num_processes is None:
        num_useful = -(-len(indices) // _MIN_TASKS_PER_PROCESS)
        num_processes = max(1, min(num_useful, _MAX_PROCESSES, len(os.sched_getaffinity(0))))
    orders = [
        {
            "recipe": recipe,
            "options": task_json.encode_value(dict(options)),
            # Every process gets indices of all parts, since tasks may get harder on the way.
            "indices": list(indices[n::num_processes]),
        }
        for n in range(num_processes)
    ]
    lines: queue.SimpleQueue = queue.SimpleQueue()
    processes = [_start_process() for _ in orders]
    threads = [
        threading.Thread(target=_forward_lines, args=(process, order, lines), daemon=True)
        for process, order in zip(processes, orders, strict=True)
    ]
    try:
        for thread in threads:
            thread.start()
        for _ in indices:
            line = lines.get()
            if isinstance(line, Exception):
                raise line
            index, _, task_line = line.partition(" ")
            yield int(index), task_line
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for thread in threads:
            thread.join()


def _split_make(recipe: Mapping[str, Any]) -> tuple[str, str]:
    """Return ("logic", its generator), or ("environment", its name)."""
    kind, _, name = recipe["make"].partition(":")
    return (kind, name) if kind == "logic" else ("environment", recipe["make"])


def _start_process() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", _BOOT_CODE.format(path=sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONHASHSEED": _HASH_SEED},
        text=True,
        # Ctrl-C reaches the run alone, which then ends the process.
        start_new_session=True,
    )


def _forward_lines(
    process: subprocess.Popen, order: Mapping[str, Any], lines: queue.SimpleQueue
) -> None:
    """Give a process its order, and put each line of its answer, or an exception, into `lines`."""
    assert process.stdin is not None
    assert process.stdout is not None
    # A process that died takes no order. What it did not answer tells so below.
    with contextlib.suppress(BrokenPipeError), process.stdin:
        json.dump(order, process.stdin)
    num_missing = len(order["indices"])
    with process.stdout:
        for line in process.stdout:
            if line.startswith(_ERROR_PREFIX):
                message = json.loads(line.removeprefix(_ERROR_PREFIX))
                lines.put(ValueError(f"tasks {order['recipe']['name']}: {message}"))
                return
            # A process that is killed may leave a part of a line.
            if line.endswith("\n"):
                num_missing -= 1
                lines.put(line[:-1])
    if num_missing:
        lines.put(
            RuntimeError(
                f"tasks {order['recipe']['name']}: a process that makes tasks died with status "
                f"{process.wait()}, {num_missing} tasks before its end. Was there too little "
                "memory? Start again: tasks that are made already are kept."
            )
        )


def main() -> None:
    """Make the tasks that the standard input orders, and write their lines to the output."""
    # Die with the run, even if that is killed and cannot clean up.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Some generators print. What they print must not get between the lines.
    with open(os.dup(1), "w") as output, open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 1)
        order = json.load(sys.stdin)
        try:
            for index, line in _make_lines(order):
                output.write(f"{index} {line}\n")
                output.flush()
        except Exception as error:
            output.write(f"{_ERROR_PREFIX}{json.dumps(f'{type(error).__name__}: {error}')}\n")


def _make_lines(order: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    recipe, indices = order["recipe"], order["indices"]
    kind, name = _split_make(recipe)
    seed = recipe["seed"]
    if kind == "logic":
        options = task_json.decode_value(order["options"])
        tasks = logic.generate_tasks(name, recipe["size"], seed, indices, **options)
    else:
        tasks = (catalog.make_task(name, seed, index) for index in indices)
    for index, task in zip(indices, tasks, strict=True):
        yield index, task_json.task_to_line(task)
