"""What every run does with its directory and its process: locks, compilation cache and signals."""

import contextlib
import pathlib
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from m1_jax import distributed, file_lock, multihost, process_watch
from train import checkpoints, resume

LOCK_NAME = "run"  # the lock's file is run.lock


def open_and_run(
    open_session: Callable[[resume.RunStart, contextlib.ExitStack], Any],
    config_class: type,
    config: Any,
    workdir: pathlib.Path,
    changeable: re.Pattern,
    options: resume.ResumeOptions,
) -> Any:
    """Open a session, save its config, run it and close it. Return the result of its `run`.

    With several processes, an error on one of them ends all (`process_watch`). Process 0 holds the
    locks of the directories that the run writes to.

    Args:
      open_session: takes what to start and a stack, and returns the session. The stack closes what
        it opened. A session has a `position`, a `store` and a `writer`, see `resume.carry_out`.
      config_class: class of the config.
      config: the run's config. None goes on with the config in `workdir`.
      workdir: directory of the run.
      changeable: matches the paths of the fields that may differ from the run in `workdir`.
      options: what the command says of the run's beginning.

    Raises:
      LockError: another process trains in one of the directories.
      ResumeError, ConfigFileError: see `resume.begin_run`.
    """
    with (
        process_watch.watch_processes(),
        contextlib.ExitStack() as stack,
        # Within the stack: the others know of an error before this process closes anything.
        process_watch.announce_errors(),
    ):
        hold_directory(workdir, stack)
        start = resume.begin_run(config_class, config, workdir, changeable, options)
        save_directory = checkpoints.find_save_directory(workdir, start.config.save)
        is_local = "://" not in str(save_directory)  # a bucket has no locks
        if is_local and pathlib.Path(save_directory) != workdir.resolve():
            hold_directory(pathlib.Path(save_directory), stack)
        use_compilation_cache(start.config.compilation_cache)
        session = open_session(start, stack)
        # Once everything could be opened, so that a run that never began leaves no config.
        resume.carry_out(start, session.position, session.store, session.writer)
        return session.run()


def hold_directory(directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Hold a directory's lock until the stack is closed. All processes call this, process 0 holds.

    Raises:
      LockError: another process trains in it.
    """

    def hold() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # Within the directory: it may be mounted, and then its parent is another file system.
        stack.enter_context(file_lock.hold_lock(directory / LOCK_NAME, "trains in"))

    distributed.run_on_first(hold)


def use_compilation_cache(directory: str) -> None:
    """Keep compiled programs in a directory, by default in ~/.cache/m1_jax/xla."""
    # A run that goes on then compiles nothing again.
    path = pathlib.Path(directory or "~/.cache/m1_jax/xla").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))


_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A request to end a run early, by SIGTERM or SIGINT to any of its processes.

    The first signal lets the run save. The second one ends it at once, by KeyboardInterrupt.

    Attributes:
      signal_number: number of the signal for which the run stops. It is None before the run has
        decided to. All processes have the same.
    """

    def __init__(self, notice: str):
        """Begin without a request.

        Args:
          notice: what the log says after a signal.
        """
        self.signal_number: int | None = None
        self._received_signal: int | None = None  # by this process
        self._notice = notice

    @contextlib.contextmanager
    def handle_signals(self):
        """Listen to signals within the context.

        Python allows handlers in the main thread alone, so in other threads nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # `signal.signal` returns the handler that was set before, None where Python set none.
        old_handlers = [signal.signal(s, lambda n, _: self._receive(n)) for s in _STOP_SIGNALS]
        try:
            with process_watch.tell_signals(frozenset(_STOP_SIGNALS)):
                yield
        finally:
            for s, handler in zip(_STOP_SIGNALS, old_handlers, strict=True):
                signal.signal(s, signal.SIG_DFL if handler is None else handler)

    def is_requested(self) -> bool:
        """Return whether a signal came to any process. Processes learn of it at different times."""
        return self._find_signal() is not None

    def should_stop(self) -> bool:
        """Return whether to stop now. All processes call this together, and get the same answer."""
        # Process 0 decides, as a signal may reach the processes before and after this call.
        self.signal_number = multihost.broadcast_object(self._find_signal())
        return self.signal_number is not None

    def _find_signal(self) -> int | None:
        return self._received_signal or process_watch.requested_stop()

    def _receive(self, signal_number: int) -> None:
        if self._received_signal is not None:
            raise KeyboardInterrupt
        self._received_signal = signal_number
        logging.warning("%s: %s", signal.Signals(signal_number).name, self._notice)
