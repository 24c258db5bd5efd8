"""The process that `pool` starts: calls functions, and sends their results back.

The process is a fresh interpreter with the caller's search path. It imports neither jax nor the
trainer's main module. Calls arrive pickled, from the trainer. Results go back as JSON, because code
that ran here may have changed the process in any way, and the trainer must not unpickle its bytes.
"""

import asyncio
import ctypes
import importlib
import inspect
import json
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def send_message(channel: socket.socket, data: bytes) -> None:
    """Write one message: 8 bytes of length, then the data."""
    channel.sendall(struct.pack("<Q", len(data)) + data)


def find_function(path: str) -> Callable:
    """Return the function at "module:function".

    Raises:
      ValueError: the path has another form, or names no function.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"got the path {path!r}; wanted 'module:function'")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"got {path!r}, which is {function!r}; wanted a function")
    return function


def _serve_calls(channel: socket.socket) -> None:
    reader = channel.makefile("rb")
    while header := reader.read(8):
        path, arguments = pickle.loads(reader.read(struct.unpack("<Q", header)[0]))
        try:
            function = find_function(path)
            # Imports must not count as the call's time: the pool starts its clock at "started".
            getattr(sys.modules[function.__module__], "prepare_worker", _skip_preparation)(
                *arguments
            )
            send_message(channel, b'{"started": true}')
            answer = json.dumps(
                {"value": _call_function(function, arguments)}, default=_to_json_scalar
            )
        except Exception as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]})
        send_message(channel, answer.encode())


def _call_function(function: Callable, arguments: tuple) -> Any:
    value = function(*arguments)
    if inspect.iscoroutine(value):
        value = asyncio.run(value)
    return value


def _skip_preparation(*_: Any) -> None:
    pass


def _to_json_scalar(value: Any) -> Any:
    """Return a numpy scalar as a Python number."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"got a {type(value).__name__}; wanted numbers, or a mapping or list of them")


def main() -> None:
    """Serve calls until the socket closes whose descriptor is the first argument."""
    # Die with the trainer, even if that is killed and cannot clean up.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)  # a reward's own children must not hold it open
    _serve_calls(channel)
