"""What every run does with its directory and its process: config, compilation cache and signals."""

import contextlib
import json
import pathlib
import re
import signal
import threading
from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from m1_jax import configlib, durable, multihost, process_watch
from train import checkpoints

CONFIG_FILE = "config.json"


def resolve_config(
    config_class: type, config: Any, workdir: pathlib.Path, changeable: re.Pattern
) -> Any:
    """Return the config to run: `config`, or that of the run in `workdir` where `config` is None.

    Args:
      config_class: class of the config.
      config: the run's config. None goes on with the config in `workdir`.
      workdir: directory of the run.
      changeable: matches the paths of the fields that may differ from the run in `workdir`.

    Raises:
      ResumeError: `config` is None and there is no run, or the run there has another config.
    """
    # Its presence is what makes a directory that of a run.
    file = workdir / CONFIG_FILE
    if not file.exists():
        if config is None:
            raise checkpoints.ResumeError(f"{workdir} holds no run to go on with; give --config")
        return config
    saved = configlib.from_json(config_class, json.loads(file.read_text()))
    if config is None:
        return saved
    # Each line begins with the path of the field.
    lines = configlib.list_differences(saved, config)
    changed = [line for line in lines if not changeable.match(line)]
    if changed:
        raise checkpoints.ResumeError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}. Go on with it by "
            "leaving --config out, or give a new --workdir."
        )
    return config


def save_config(config: Any, workdir: pathlib.Path) -> None:
    """Write the config into the directory, whole or not at all. Process 0 alone writes."""
    if jax.process_index():  # the directory may be shared by all processes
        return
    text = json.dumps(configlib.to_json(config), indent=1)
    durable.write_text_atomically(workdir / CONFIG_FILE, text)


def open_and_run(
    open_session: Callable[[Any, pathlib.Path, contextlib.ExitStack], Any],
    config: Any,
    workdir: pathlib.Path,
) -> Any:
    """Open a session, save its config, run it and close it. Return the result of its `run`.

    With several processes, an error on one of them ends all (`process_watch`).

    Args:
      open_session: takes the config, the directory and a stack, and returns the session. The stack
        closes what it opened.
      config: the run's config.
      workdir: directory of the run.
    """
    use_compilation_cache(config.compilation_cache)
    with (
        process_watch.watch_processes(),
        contextlib.ExitStack() as stack,
        # Within the stack: the others know of an error before this process closes anything.
        process_watch.announce_errors(),
    ):
        session = open_session(config, workdir, stack)
        # Saved once everything could be opened, so that a run that never began leaves no config.
        save_config(config, workdir)
        return session.run()


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
