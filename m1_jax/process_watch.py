"""Processes of one mesh end together: an error on one of them ends all, and so does its silence.

A collective waits for ever for a process that failed, and the process that failed waits for the
others when it shuts down. So each process has a thread that talks to the others through the
key-value store of JAX's coordination service, whatever its main thread waits in:

    with watch_processes(), contextlib.ExitStack() as stack:
        with announce_errors():
            ...                    # the work, and what `stack` closes

    what happens                            who notices             after
    an exception in `announce_errors`       every process           a contact, 1 s
    a process that is gone, or is stopped   process 0, then all     `silent_secs`
    process 0 is gone, or is stopped        every process           `silent_secs`
    no process makes progress               process 0, then all     `stalled_secs`

Each process then prints the error's one line and ends with status 1. A signal that asks one process
to stop is told to all processes in the same way (`request_stop`, `requested_stop`).

With a single process, everything here does nothing.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the public API has no key-value store

_STORE = "m1_jax/watch"  # prefix of all keys
# What a user can mend: configs, files, data, a diverged run. Other errors show their traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


class AgreedError(ValueError):
    """An error that all processes know of. Each ends by itself, so that nothing is announced."""


@dataclasses.dataclass(frozen=True)
class WatchLimits:
    """Time limits of a watch, seconds.

    Attributes:
      contact_secs: time between two contacts of a process with the others.
      silent_secs: a process that made no contact for so long counts as gone.
      stalled_secs: progress of no process for so long counts as a deadlock. The longest work of one
        call must be shorter: a compilation, or the update of a generation batch.
      closing_secs: time that a process has to close its files after an error.
    """

    contact_secs: float = 1.0
    # Others end within 30 s. Shorter limits end runs whose host is only busy.
    silent_secs: float = 22.0
    stalled_secs: float = 7200.0
    closing_secs: float = 5.0


class _Silence:
    """Measures for how long a value has not changed.

    A machine that was suspended saw nothing in that time. So a pause between two looks counts as
    two contacts at most.
    """

    def __init__(self, limits: WatchLimits):
        self._max_pause = 2 * limits.contact_secs
        self._value: Any = None
        self._last_look = time.monotonic()
        self.secs = 0.0

    def look(self, value: Any) -> float:
        """Take the present value, and return the seconds since it changed."""
        now = time.monotonic()
        self.secs += min(now - self._last_look, self._max_pause)
        self._last_look = now
        if value != self._value:
            self._value, self.secs = value, 0.0
        return self.secs


class _ProcessWatch:
    """The threads of one process, from the beginning of `watch_processes` to its end."""

    def __init__(self, session: int, limits: WatchLimits):
        self.limits = limits
        self.progress = 0  # events of this process's main thread
        self.stop_signal: int | None = None  # that came to any process
        self.stop_signals: frozenset[int] = frozenset()  # that ask for the end, see `tell_signals`
        self.error_line = ""  # of this process, once it is announced
        self._client: Any = distributed.global_state.client
        self._prefix = f"{_STORE}/{session}"
        self._process, self._num_processes = jax.process_index(), jax.process_count()
        self._contacts = 0
        self._silences: dict[int, _Silence] = {}  # by process
        self._gone: set[int] = set()  # processes that were silent for too long
        self._stall = _Silence(limits)
        self._is_closed = threading.Event()
        # A signal wakes the thread by a byte here, also while the main thread is inside of XLA.
        self.wake_reader, self.wake_writer = socket.socketpair()
        self.wake_reader.settimeout(limits.contact_secs)
        self.wake_writer.setblocking(False)
        for work in (self._keep_contact, self._watch_contact):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    # ---- for the main thread

    def announce_error(self, line: str) -> None:
        """Tell the other processes, and end this one soon, whatever its main thread does."""
        if self.error_line:
            return
        self.error_line = line
        # Told from another thread: the call could wait for a process 0 that is gone.
        self._start_thread(self._set, f"failed/{self._process}", line)
        self._start_thread(self._end_after_closing)

    def request_stop(self, signal_number: int) -> None:
        """Tell all processes that a signal asks for the end."""
        self.stop_signal = signal_number
        self._start_thread(self._set, f"stop/{self._process}", str(signal_number))

    def close(self) -> None:
        """End the watch once all processes have done their work.

        Until then an error of another one ends this process, too. The interpreter's exit would wait
        for that process without knowing of its error.
        """
        self._set(f"done/{self._process}", "")
        while len(self._read("done")) < self._num_processes:
            time.sleep(self.limits.contact_secs / 5)
        self._is_closed.set()

    # ---- threads

    def _start_thread(self, work, *arguments) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _keep_contact(self) -> None:
        while not self._is_closed.is_set():
            # Errors of a contact are judged by the time since the last one that succeeded.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._make_contact()
            self._wait_for_signal()

    def _make_contact(self) -> None:
        sign_of_life = f"{self._contacts} {self.progress}"
        # Process 0 looks at all processes, and each of them at process 0 alone. So the number of
        # values that are read grows with the processes, and not with their square.
        self._set(f"{'alive' if self._process else 'first'}/{self._process}", sign_of_life)
        for process, line in sorted(self._read("failed").items()):
            if process != self._process:
                self._end_process(f"process {process}: {line}")
        for signal_text in self._read("stop").values():
            self.stop_signal = self.stop_signal or int(signal_text)
        done = self._read("done")
        signs = self._read("first" if self._process else "alive")
        alive = {process: text for process, text in signs.items() if process not in done}
        self._check_silence(alive)
        if self._process == 0:
            self._check_progress(alive | {0: sign_of_life}, bool(done))
        self._contacts += 1

    def _check_silence(self, alive: dict[int, str]) -> None:
        """End this process if another one is silent.

        A process that never made contact is still being started.
        """
        for process, text in alive.items():
            silence = self._silences.setdefault(process, _Silence(self.limits))
            if silence.look(text) > self.limits.silent_secs:
                self._gone.add(process)
                self._fail(f"process {process} has not answered for {silence.secs:.0f} s")

    def _check_progress(self, alive: dict[int, str], some_are_done: bool) -> None:
        progress = {process: int(text.split()[1]) for process, text in alive.items()}
        stalled_secs = self._stall.look(progress)
        if stalled_secs > self.limits.stalled_secs and not some_are_done:
            last = min(progress, key=lambda process: progress[process])
            self._fail(
                f"no process has made progress for {stalled_secs:.0f} s; process {last} is behind "
                "all others. Look at its last lines and its files, then start all processes again."
            )

    def _watch_contact(self) -> None:
        """End this process if `_keep_contact` is stuck, as where process 0's host is stopped."""
        silence = _Silence(self.limits)
        while not self._is_closed.wait(self.limits.contact_secs):
            if silence.look(self._contacts) > self.limits.silent_secs:
                self._end_process(
                    f"the coordination service of process 0 has not answered for {silence.secs:.0f}"
                    " s"
                )

    def _wait_for_signal(self) -> None:
        """Wait until the next contact is due, or a signal comes."""
        with contextlib.suppress(TimeoutError):
            for signal_number in self.wake_reader.recv(64):
                if signal_number in self.stop_signals:
                    self.request_stop(signal_number)

    def _fail(self, line: str) -> None:
        """End this process and all others."""
        self._set(f"failed/{self._process}", line)
        self._end_process(line)

    def _end_after_closing(self) -> None:
        time.sleep(self.limits.closing_secs)
        self._end_process(self.error_line)

    def _end_process(self, line: str) -> NoReturn:
        """End this process at once: its main thread may wait in a collective that never ends."""
        print(f"error: {line}", file=sys.stderr, flush=True)
        self.exit_process()

    def exit_process(self) -> NoReturn:
        """End this process with status 1, without what the interpreter does at its exit.

        That would wait for processes that may be gone. Process 0 lets the others read the error
        first, as they read it from process 0.
        """
        # In a thread, as the store does not answer where process 0 is stopped.
        told = threading.Thread(target=self._wait_until_told, daemon=True)
        told.start()
        told.join(2 * self.limits.closing_secs)
        os._exit(1)

    def _wait_until_told(self) -> None:
        """Say that this process ends, and on process 0 wait until all others have said so."""
        self._set(f"ended/{self._process}", "")
        while self._process == 0:
            told = {*self._read("ended"), *self._gone}
            if len(told) == self._num_processes:
                return
            time.sleep(self.limits.contact_secs / 5)

    # ---- the store

    def _set(self, name: str, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{name}", text, allow_overwrite=True)

    def _read(self, kind: str) -> dict[int, str]:
        """Return the values of one kind by process."""
        pairs = self._client.key_value_dir_get(f"{self._prefix}/{kind}/")
        return {int(key.rpartition("/")[2]): text for key, text in pairs}


_watch: _ProcessWatch | None = None
_num_sessions = 0


@contextlib.contextmanager
def watch_processes(limits: WatchLimits | None = None) -> Iterator[None]:
    """Watch all processes within the context. All of them enter it as often.

    An exception that leaves the context ends all processes.
    """
    global _watch, _num_sessions
    if jax.process_count() == 1 or _watch is not None:
        yield
        return
    _num_sessions += 1
    watch = _watch = _ProcessWatch(_num_sessions, limits or WatchLimits())
    try:
        with announce_errors():
            yield
        watch.close()
    finally:
        # After an error the threads go on, until this process has ended.
        _watch = None if not watch.error_line else watch


@contextlib.contextmanager
def announce_errors() -> Iterator[None]:
    """Tell all processes of an exception of the context, before anything is closed."""
    try:
        yield
    except BaseException as error:
        if _watch is not None and not isinstance(error, AgreedError):
            if isinstance(error, jax.errors.JaxRuntimeError):
                # Perhaps a collective with a process that has ended. Its own error is on the way,
                # and ends this process.
                time.sleep(3 * _watch.limits.contact_secs)
            _watch.announce_error(format_error(error))
        raise


def format_error(error: BaseException) -> str:
    """Return an error as one line: its message, with its type where a user cannot mend it."""
    line = " ".join(str(error).split("\n")).strip()
    return line if isinstance(error, USER_ERRORS) and line else f"{type(error).__name__}: {line}"


def exit_with_error(error: BaseException) -> NoReturn:
    """End this process with one line on stderr and status 1.

    An error that a user cannot mend shows its traceback before.

    Raises:
      SystemExit: an error of `USER_ERRORS`, with a single process.
      BaseException: the error itself, if it is any other, with a single process.
    """
    line = f"error: {format_error(error)}"
    if _watch is None:
        if isinstance(error, USER_ERRORS):
            sys.exit(line)
        raise error
    if not isinstance(error, USER_ERRORS):
        traceback.print_exception(error)
    print(line, file=sys.stderr, flush=True)
    _watch.exit_process()


def has_failed() -> bool:
    """Return whether this process had an error, so that it does no more work with the others."""
    return _watch is not None and bool(_watch.error_line)


def is_watching() -> bool:
    """Return whether this process watches others, or did until an error."""
    return _watch is not None


def note_progress() -> None:
    """Note that this process's main thread got on."""
    if _watch is not None:
        _watch.progress += 1


def requested_stop() -> int | None:
    """Return the number of a signal that asked any process to stop, None without one."""
    return None if _watch is None else _watch.stop_signal


@contextlib.contextmanager
def tell_signals(signals: frozenset[int]) -> Iterator[None]:
    """Tell all processes of these signals to this one within the context. For the main thread.

    Python calls handlers between two instructions of the main thread, so not while it waits for a
    device. This thread is told at once.
    """
    if _watch is None:
        yield
        return
    _watch.stop_signals = signals
    earlier_fd = signal.set_wakeup_fd(_watch.wake_writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier_fd)
