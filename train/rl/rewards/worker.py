"""The process that `pool` starts: calls functions and sends back what they return.

It never imports jax, nor what the trainer's main module imports: it is a fresh interpreter with
the caller's search path. Calls come pickled, from us; results go back as JSON, because whatever
ran here may have gone mad.
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

_PR_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG


def send_message(channel: socket.socket, data: bytes) -> None:
    """Write one message."""
    channel.sendall(struct.pack("<Q", len(data)) + data)


def find_function(path: str) -> Callable:
    """Return the function at "module:function".

    Raises:
      ValueError: no such path, or no function there.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"got the path {path!r}; wanted 'module:function'")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"got {path!r}, which is {found!r}; wanted a function")
    return found


def _serve_calls(channel: socket.socket) -> None:
    reader = channel.makefile("rb")
    while header := reader.read(8):
        path, arguments = pickle.loads(reader.read(struct.unpack("<Q", header)[0]))
        try:
            function = find_function(path)
            # What takes long to import is not counted as the call's time.
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
    """Return what JSON takes for a scalar of numpy."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"got a {type(value).__name__}; wanted numbers, or a mapping or list of them")


def main() -> None:
    """Serve calls from the socket whose number is the first argument, until it is closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)
    _serve_calls(channel)
