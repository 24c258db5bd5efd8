"""What every run does with its directory and its process: config, compilation cache, signals."""

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
from jax.experimental import multihost_utils

from m1_jax import configlib, durable
from train import checkpoints

CONFIG_FILE = "config.json"


def resolve_config(
    config_class: type, config: Any, workdir: pathlib.Path, changeable: re.Pattern
) -> Any:
    """Return the config to run: the given one, if `workdir` does not hold another run.

    kind: of the config. may_change: matches the paths of fields that a run may go on with others
      of; None for `config` goes on as before.

    Raises:
      ResumeError: no run to go on with, or one of another config.
    """
    file = workdir / CONFIG_FILE
    if not file.exists():
        if config is None:
            raise checkpoints.ResumeError(f"{workdir} holds no run to go on with; give --config")
        return config
    saved = configlib.from_json(config_class, json.loads(file.read_text()))
    if config is None:
        return saved
    lines = configlib.list_differences(saved, config)
    changed = [line for line in lines if not changeable.match(line)]
    if changed:
        raise checkpoints.ResumeError(
            f"{workdir} holds a run with another config: {'; '.join(changed)}. Go on with it by "
            "leaving --config out, or give a new --workdir."
        )
    return config


def save_config(config: Any, workdir: pathlib.Path) -> None:
    """Write the config into the directory, whole or not at all; process 0 does."""
    if jax.process_index():
        return
    text = json.dumps(configlib.to_json(config), indent=1)
    durable.write_text_atomically(workdir / CONFIG_FILE, text)


def open_and_run(
    open_session: Callable[[Any, pathlib.Path, contextlib.ExitStack], Any],
    config: Any,
    workdir: pathlib.Path,
) -> Any:
    """Open a session, save its config, run it, and close it; return what its `run` returns.

    Args:
      open_session: takes the config, the directory and a stack that closes what it opens.
    """
    use_compilation_cache(config.compilation_cache)
    with contextlib.ExitStack() as stack:
        session = open_session(config, workdir, stack)
        # Saved once everything could be opened, so that a run that never began leaves no config.
        save_config(config, workdir)
        return session.run()


def use_compilation_cache(directory: str) -> None:
    path = pathlib.Path(directory or "~/.cache/m1_jax/xla").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))


class StopRequest:
    """What asks a run to end early: SIGTERM or SIGINT, and the second one means it.

    signal: the number, or None. then: what the user is told that happens now.
    """

    def __init__(self, notice: str):
        self.signal_number: int | None = None
        self._notice = notice

    @contextlib.contextmanager
    def handle_signals(self):
        """Listen to signals; in other threads they stay as they are."""
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield  # several processes: the coordination service watches for SIGTERM
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        old = [signal.signal(number, lambda n, _: self._receive(n)) for number in numbers]
        try:
            yield
        finally:
            for number, before in zip(numbers, old, strict=True):
                signal.signal(number, before)

    def should_stop(self, step: int) -> bool:
        """Return whether to stop after this step; all processes agree."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _receive(self, number: int) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        logging.warning("%s: %s", signal.Signals(number).name, self._notice)
