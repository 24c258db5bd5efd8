"""Worker processes that may hang, crash or send garbage without harm to the caller.

Each slot is a thread with one worker process. The slot kills the worker's process group by SIGKILL
when a call takes too long, and when the worker sends anything but a result. The next call gets a
fresh worker. Time is counted from the start of the call in the worker. Waiting for a slot and
imports do not count, so a result hardly depends on how busy the pool is.

`multiprocessing` and `concurrent.futures` do not serve here: they unpickle the results of a worker,
and a process that ran a model's text can send anything. Results come back as JSON.
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

MAX_RESULT_BYTES = 2**20
STARTUP_SECS = 120.0  # for the start of the interpreter and a function's imports together
# A fresh interpreter with the caller's search path. It does not import the trainer's main module,
# as multiprocessing's spawn would, and does not fork a process that has threads and a device.
_BOOT_CODE = (
    "import sys; sys.path[:] = {path!r}; from train.rl.rewards import worker; worker.main()"
)


class WorkerError(Exception):
    """A call without a result. The kind is one of `compose.FAILURE_KINDS`."""

    kind = "exception"


class WorkerTimeout(WorkerError):
    """The call took longer than its limit."""

    kind = "timeout"
    is_startup = False  # the time went by before the call itself began


class WorkerCrash(WorkerError):
    """The worker died."""

    kind = "crash"


class WorkerGarbage(WorkerError):
    """The worker sent something else than JSON, or too much."""

    kind = "garbage"


class WorkerPool:
    """Worker processes, started with the first calls."""

    def __init__(self, workers: int, limit_secs: float):
        """Start the slots' threads.

        Args:
          workers: number of slots, at least 1.
          limit_secs: time limit of each call, above 0.

        Raises:
          ValueError: an argument is out of range.
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

    def submit(
        self, path: str, *arguments: Any, limit_secs: float | None = None
    ) -> concurrent.futures.Future:
        """Return a future of the result of a function that is called in a worker.

        The result has passed through JSON, so tuples have become lists. If the function's module
        has a function `prepare_worker(*arguments)`, it is called first, outside of the time limit,
        to import what takes long. The future raises a `WorkerError`.

        Args:
          path: "module:function".
          arguments: passed to the function, pickled.
          limit_secs: a time limit for this call, where it is below that of the pool.

        Raises:
          RuntimeError: called after `close`.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        if self._is_closing:
            raise RuntimeError("pool: got a call after close(); wanted none")
        secs = min(self._limit_secs, limit_secs or self._limit_secs)
        self._jobs.put((future, path, arguments, secs))
        return future

    async def call(self, path: str, *arguments: Any, limit_secs: float | None = None) -> Any:
        """Return the result of `submit`, from a coroutine."""
        return await asyncio.wrap_future(self.submit(path, *arguments, limit_secs=limit_secs))

    def close(self) -> None:
        """Kill all workers. Calls under way are cancelled or raise `WorkerCrash`."""
        self._is_closing = True
        for _ in self._threads:
            self._jobs.put(None)  # ends one thread
        # Repeat until the threads ended: a slot may start a worker just after it was killed.
        while any(thread.is_alive() for thread in self._threads):
            for slot in self._slots:
                slot.kill()
            for thread in self._threads:
                thread.join(0.01)
        for slot in self._slots:
            slot.kill()

    def _serve_slot(self, slot: "_WorkerSlot") -> None:
        while (job := self._jobs.get()) is not None:
            future, path, arguments, limit_secs = job
            if self._is_closing:
                future.cancel()
            # False where the future was cancelled, here or by its owner.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(slot.call(path, arguments, limit_secs))
            except Exception as error:
                future.set_exception(error)


class _WorkerSlot:
    """A slot of the pool: one worker process at a time, started when a call needs it."""

    def __init__(self):
        self._worker: tuple[subprocess.Popen, socket.socket] | None = None
        self._lock = threading.Lock()  # `close` kills from another thread than the slot's

    def call(self, path: str, arguments: tuple, limit_secs: float) -> Any:
        """Return the function's result, or raise a `WorkerError`."""
        try:
            data = pickle.dumps((path, arguments))
        except Exception as error:  # pickling runs the arguments' own code
            raise WorkerError(f"{path}: got arguments that do not pickle: {error}") from error
        has_started = False
        try:
            channel = self._start()
            deadline = time.monotonic() + STARTUP_SECS
            channel.settimeout(STARTUP_SECS)
            worker.send_message(channel, data)
            answer = _receive_message(channel, deadline)
            # The worker reports the start after its imports, unless these already failed.
            if has_started := bool(answer.get("started")):
                answer = _receive_message(channel, time.monotonic() + limit_secs)
        except TimeoutError:
            self.kill()
            secs = limit_secs if has_started else STARTUP_SECS
            timeout = WorkerTimeout(f"{path}: no result in {secs} s")
            timeout.is_startup = not has_started
            raise timeout from None
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
            # The worker leads its process group. Its id cannot have passed to another process,
            # because nobody has waited for it yet.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            channel.close()
            self._worker = None

    def _start(self) -> socket.socket:
        with self._lock:
            if self._worker is not None:
                return self._worker[1]
            own_end, worker_end = socket.socketpair()
            with worker_end:
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _BOOT_CODE.format(path=sys.path),
                        str(worker_end.fileno()),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # some verifiers print to it
                    pass_fds=(worker_end.fileno(),),
                    start_new_session=True,
                )
            self._worker = process, own_end
            return own_end


def _receive_message(channel: socket.socket, deadline: float) -> dict[str, Any]:
    """Return one message: 8 bytes of length, then JSON.

    Raises:
      TimeoutError: the message was not complete in time.
      ConnectionError: the worker closed its end.
      ValueError: the message has another form, or is too long.
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
        # 0 would make the socket non-blocking.
        channel.settimeout(max(1e-3, deadline - time.monotonic()))
        chunk = channel.recv(size - len(data))
        if not chunk:
            raise ConnectionError("it closed its end of the connection")
        data += chunk
    return data
