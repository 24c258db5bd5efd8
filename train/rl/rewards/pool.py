"""Worker processes that may hang, crash and talk nonsense without harm to the caller.

Each slot is a thread with one worker process. A call that takes too long is ended by SIGKILL to
the worker's process group, and so is a worker that sent something else than a result; the next
call gets a fresh one. Time is counted from the call's start in the worker: neither waiting for a
slot nor imports count, so a result hardly depends on how busy the pool is.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any

from train.rl.rewards import worker

MAX_RESULT_BYTES = 2**20  # of a result
STARTUP_SECS = 120.0  # of an interpreter, and of a function's imports
_BOOT_CODE = (
    "import sys; sys.path[:] = {path!r}; from train.rl.rewards import worker; worker.main()"
)


class WorkerError(Exception):
    """A call that brought no result."""

    kind = "exception"


class WorkerTimeout(WorkerError):
    """It took longer than its limit."""

    kind = "timeout"


class WorkerCrash(WorkerError):
    """The worker died."""

    kind = "crash"


class WorkerGarbage(WorkerError):
    """The worker sent no JSON, or too much."""

    kind = "garbage"


class WorkerPool:
    """`workers` processes, started with the first calls."""

    def __init__(self, workers: int, limit_secs: float):
        """Start the threads. limit_secs: of each call.

        Raises:
          ValueError: fewer than one worker, or no time.
        """
        if workers < 1 or not limit_secs > 0:
            raise ValueError(
                f"pool: got {workers} workers, {limit_secs} s; wanted at least 1, more than 0"
            )
        self._limit_secs = limit_secs
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._is_closing = False
        self._slots = [_WorkerSlot() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve_slot, args=(slot,), daemon=True)
            for slot in self._slots
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, path: str, *arguments: Any) -> concurrent.futures.Future:
        """Call the function at "module:function" in a worker.

        arguments: can be pickled. The result is what JSON makes of the function's. A module's
        `prepare(*arguments)`, if it has one, is called first, outside of the time limit: it may
        import.
        The future raises a `WorkerError`.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        if self._is_closing:
            raise RuntimeError("pool: got a call after close(); wanted none")
        self._jobs.put((future, path, arguments))
        return future

    async def call(self, path: str, *arguments: Any) -> Any:
        """Do the same from a coroutine, and return the result."""
        return await asyncio.wrap_future(self.submit(path, *arguments))

    def close(self) -> None:
        """Kill all workers; calls that wait or run are cancelled or raise `WorkerCrash`."""
        self._is_closing = True
        for _ in self._threads:
            self._jobs.put(None)
        # Again and again: a slot may just be starting one.
        while any(thread.is_alive() for thread in self._threads):
            for slot in self._slots:
                slot.kill()
            for thread in self._threads:
                thread.join(0.01)
        for slot in self._slots:
            slot.kill()

    def _serve_slot(self, slot: "_WorkerSlot") -> None:
        while (job := self._jobs.get()) is not None:
            future, path, arguments = job
            if self._is_closing:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(slot.call(path, arguments, self._limit_secs))
            except Exception as error:
                future.set_exception(error)


class _WorkerSlot:
    """One worker process at a time."""

    def __init__(self):
        self._worker: tuple[subprocess.Popen, socket.socket] | None = None
        self._lock = threading.Lock()  # of starting and killing

    def call(self, path: str, arguments: tuple, limit_secs: float) -> Any:
        try:
            data = pickle.dumps((path, arguments))
        except Exception as error:  # pickling runs the arguments' own code
            raise WorkerError(f"{path}: got arguments that do not pickle: {error}") from error
        try:
            channel = self._start()
            until = time.monotonic() + STARTUP_SECS
            channel.settimeout(STARTUP_SECS)
            worker.send_message(channel, data)
            answer = _receive_message(channel, until)
            if answer.get("started"):
                answer = _receive_message(channel, time.monotonic() + limit_secs)
        except TimeoutError:
            self.kill()
            raise WorkerTimeout(f"{path}: no result in {limit_secs} s") from None
        except OSError as error:
            self.kill()
            raise WorkerCrash(f"{path}: the worker died: {error}") from None
        except ValueError as error:
            self.kill()
            raise WorkerGarbage(f"{path}: {error}") from None
        if "error" in answer:
            raise WorkerError(f"{path}: {answer['error']}")
        return answer["value"]

    def kill(self) -> None:
        """Kill the process and its group."""
        with self._lock:
            if self._worker is None:
                return
            process, channel = self._worker
            with contextlib.suppress(ProcessLookupError):  # it was not waited for: its id is ours
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            channel.close()
            self._worker = None

    def _start(self) -> socket.socket:
        with self._lock:
            if self._worker is not None:
                return self._worker[1]
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-c", _BOOT_CODE.format(path=sys.path), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # some verifiers print
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            self._worker = process, ours
            return ours


def _receive_message(channel: socket.socket, deadline: float) -> dict[str, Any]:
    """Return one message.

    Raises:
      TimeoutError, ConnectionError: it did not come.
      ValueError: it is none.
    """
    size = struct.unpack("<Q", _receive_bytes(channel, 8, deadline))[0]
    if size > MAX_RESULT_BYTES:
        raise ValueError(f"got a result of {size} bytes; wanted at most {MAX_RESULT_BYTES}")
    data = _receive_bytes(channel, size, deadline)
    try:
        answer = json.loads(data)
    except RecursionError:
        raise ValueError("got a result that nests too deep") from None
    if not isinstance(answer, dict) or not answer.keys() & {"started", "value", "error"}:
        raise ValueError(f"got {data[:80]!r}; wanted a result")
    return answer


def _receive_bytes(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        channel.settimeout(max(1e-3, deadline - time.monotonic()))
        more = channel.recv(size - len(data))
        if not more:
            raise ConnectionError("it closed its end")
        data += more
    return data
