"""Several processes of one command: how they find each other, and how they agree on errors.

    with join_processes(is_distributed):       # first of all: it asks for the devices
        inputs = run_on_first(read_inputs)     # process 0 reads, and an error ends all
        model = run_on_all(lambda: load(...))  # each reads its part, and an error of one ends all

`run_on_first` and `run_on_all` are collectives: all processes call them at the same point of the
program. An error between them ends all processes, too (`process_watch`).
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import jax

from m1_jax import measured_choices, multihost, process_watch

Result = TypeVar("Result")

# JAX reads the first one itself. The other two are ours: JAX has arguments alone for them.
ADDRESS_VARIABLE = "JAX_COORDINATOR_ADDRESS"
COUNT_VARIABLE = "JAX_NUM_PROCESSES"
INDEX_VARIABLE = "JAX_PROCESS_ID"
DISTRIBUTED_HELP = (
    "Join the other processes of a TPU slice or cluster, which all run this command. Elsewhere set "
    f"{ADDRESS_VARIABLE}=HOST:PORT, {COUNT_VARIABLE} and {INDEX_VARIABLE}."
)


class DistributedError(ValueError):
    """Processes that cannot find each other. The message says what to set."""


@contextlib.contextmanager
def join_processes(is_distributed: bool) -> Iterator[None]:
    """Join the other processes of this run, if there are any, and watch them in the context.

    Raises:
      DistributedError: see `initialize_distributed`.
    """
    if not is_distributed:
        yield
        return
    initialize_distributed()
    with process_watch.watch_processes():
        # All processes compile the same programs, whatever lies in their own caches.
        measured_choices.share_choices()
        yield


def initialize_distributed(
    *,
    heartbeat_timeout_seconds: int = 100,
    initialization_timeout_seconds: int = 300,
    shutdown_timeout_seconds: int = 300,
) -> None:
    """Join the other processes of this run.

    On TPU slices, GKE, Slurm and Open MPI, JAX finds the processes by itself. Elsewhere three
    variables of the environment name them. What is set there goes before what JAX finds.

    Args:
      heartbeat_timeout_seconds: a process that has been silent for so long counts as dead, and the
        others end.
      initialization_timeout_seconds: how long to wait for the others at the start.
      shutdown_timeout_seconds: how long a process that has ended waits for the others.

    Raises:
      DistributedError: no processes were found, or they did not all come.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    num_processes = _read_number(COUNT_VARIABLE)
    process_index = _read_number(INDEX_VARIABLE)
    is_named = None not in (address, num_processes, process_index)
    if is_named and not (process_index or 0) < (num_processes or 0):
        raise DistributedError(
            f"distributed: got {INDEX_VARIABLE}={process_index} of {COUNT_VARIABLE}="
            f"{num_processes}; wanted 0 to {COUNT_VARIABLE} - 1"
        )
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise DistributedError(
            f"distributed: got {ADDRESS_VARIABLE}={address!r}; wanted HOST:PORT of process 0"
        )
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_index,
            # With all three known, a search could only find something else.
            cluster_detection_method="deactivate" if is_named else None,
            initialization_timeout=initialization_timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=shutdown_timeout_seconds,
        )
    # JAX raises ValueError where it finds too little, the metadata server's client OSError, and
    # the coordination service RuntimeError.
    except (ValueError, OSError, RuntimeError) as error:
        if "must be called before" in str(error) or "only be called once" in str(error):
            raise  # a fault of the program, not of the user
        names = (ADDRESS_VARIABLE, COUNT_VARIABLE, INDEX_VARIABLE)
        given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DistributedError(
            f"--distributed: got {' '.join(given) or 'no processes that JAX can find'} ({reason}); "
            "on a TPU slice, GKE or Slurm start this command on every host; elsewhere set "
            f"{ADDRESS_VARIABLE}=HOST:PORT of process 0, {COUNT_VARIABLE} and {INDEX_VARIABLE} "
            "(0, 1, ...) for each process, or leave --distributed out"
        ) from None


def _read_number(name: str) -> int | None:
    text = os.environ.get(name)
    if text is not None and not text.isdecimal():
        raise DistributedError(f"distributed: got {name}={text!r}; wanted a whole number")
    return None if text is None else int(text)


def is_first_process() -> bool:
    """Return whether this process reads and writes for all."""
    return jax.process_index() == 0


def run_on_all(function: Callable[[], Result]) -> Result:
    """Return `function()` of this process, once all processes have their results.

    Raises:
      process_watch.AgreedError: it failed on some process, so on all it has no result. The message
        is that of the first process that failed. With one process the error itself is raised.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, ""
    try:
        result = function()
    except Exception as error:  # whatever it is, the others must not wait for this process
        if not isinstance(error, ValueError | OSError):  # one line would not explain a fault
            traceback.print_exc()
        failure = str(error) or type(error).__name__
    # Process 0 hears of all, and tells all.
    for index, text in enumerate(multihost.broadcast_object(multihost.gather_objects(failure))):
        if text:
            raise process_watch.AgreedError(text if index == 0 else f"process {index}: {text}")
    return result  # pyright: ignore[reportReturnType]  # nobody failed, so it is the result


def run_on_first(function: Callable[[], Result]) -> Result | None:
    """Return `function()` of process 0, and None on the others, once it is done.

    Raises:
      process_watch.AgreedError: as `run_on_all`.
    """
    return run_on_all(lambda: function() if is_first_process() else None)


def run_to_exit(run: Callable[[], int], one_line: bool = True) -> NoReturn:
    """Run a command, and end the process with the status that `run` returns.

    What a user can mend is printed in one line after "error: ". An error that all processes agreed
    on is printed by process 0 alone.

    Args:
      run: the whole command. With several processes, all of them return the same status.
      one_line: whether an error's lines are joined.
    """
    try:
        status = run()
    except process_watch.AgreedError as error:
        text = " ".join(str(error).split("\n")) if one_line else str(error)
        sys.exit(f"error: {text}" if is_first_process() else 1)
    except (ValueError, OSError) as error:
        if one_line or process_watch.is_watching():
            process_watch.exit_with_error(error)
        sys.exit(f"error: {error}")
    except Exception as error:
        process_watch.exit_with_error(error)
    sys.exit(status)
