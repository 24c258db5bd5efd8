"""Runs tools in daemon threads, some at a time, each within a limit of time.

An executor does not serve here. Its number of threads is fixed, so calls that hang would block all
later calls, and the interpreter waits for its threads at exit.
"""

import collections
import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

_WAIT_SECS = 1.0  # between two looks at what else may end a wait


class ToolTimeoutError(TimeoutError):
    """A tool ran for longer than its limit. Its thread is left behind."""


@dataclasses.dataclass(eq=False)
class _ToolCall:
    """One call. `deadline_secs` is a time of `time.monotonic`, infinite before the call begins."""

    function: Callable[[], Any]
    future: concurrent.futures.Future
    deadline_secs: float = math.inf


class ToolPool:
    """Runs calls in the order in which they were submitted.

    Args:
      num_workers: calls that may run at the same time, at least 1. One that ran out of time no
        longer counts, as nobody can stop a thread.
      limit_secs: how long a call may run, above 0. Waiting for its turn does not count.

    Raises:
      ValueError: a number out of range.
    """

    def __init__(self, num_workers: int = 8, limit_secs: float = 600.0):
        if num_workers < 1 or not limit_secs > 0:
            raise ValueError(
                f"tools: got {num_workers} workers and a limit of {limit_secs} s; wanted at least "
                "1 worker, and more than 0 s"
            )
        self._num_workers, self._limit_secs = num_workers, limit_secs
        self._lock = threading.Lock()
        self._waiting: collections.deque[_ToolCall] = collections.deque()
        self._running: list[_ToolCall] = []

    def submit(self, function: Callable[[], Any]) -> concurrent.futures.Future:
        """Return a future of what `function` returns or raises.

        It raises `ToolTimeoutError` where the call ran out of time, and RuntimeError for what is no
        `Exception`, such as SystemExit: a tool must not end the run.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            self._waiting.append(_ToolCall(function, future))
            self._start_calls()
        return future

    def wait(self, futures: Sequence[concurrent.futures.Future]) -> None:
        """Wait until one of the futures is done, but for at most a second."""
        self.expire_calls()
        concurrent.futures.wait(
            futures,
            timeout=min(_WAIT_SECS, self._limit_secs),
            return_when=concurrent.futures.FIRST_COMPLETED,
        )
        self.expire_calls()

    def expire_calls(self) -> None:
        """End the futures of all calls that ran out of time. The next calls take their turns."""
        with self._lock:
            now_secs = time.monotonic()
            for call in [c for c in self._running if c.deadline_secs <= now_secs]:
                self._running.remove(call)
                call.future.set_exception(
                    ToolTimeoutError(f"the tool ran for more than {self._limit_secs:g} s")
                )
            self._start_calls()

    def drop_waiting_calls(self) -> None:
        """Cancel the calls that did not begin yet. Those under way go on, and nobody waits."""
        with self._lock:
            for call in self._waiting:
                call.future.cancel()
            self._waiting.clear()

    def _start_calls(self) -> None:
        """Begin calls that wait, as far as there is room. The lock is held."""
        while self._waiting and len(self._running) < self._num_workers:
            call = self._waiting.popleft()
            call.deadline_secs = time.monotonic() + self._limit_secs
            self._running.append(call)
            threading.Thread(target=self._run_call, args=(call,), name="tool", daemon=True).start()

    def _run_call(self, call: _ToolCall) -> None:
        result: Any = None
        failure: Exception | None = None
        try:
            result = call.function()
        except Exception as error:
            failure = error
        except BaseException as error:
            failure = RuntimeError(f"the tool raised {type(error).__name__}: {error}")
        with self._lock:
            if call in self._running:  # else it ran out of time, and has its error
                self._running.remove(call)
                if failure is None:
                    call.future.set_result(result)
                else:
                    call.future.set_exception(failure)
            self._start_calls()
