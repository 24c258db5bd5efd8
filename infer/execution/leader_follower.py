"""Several processes of one mesh: the first decides, all of them compute.

Process 0 has the engine. Whatever it asks of the device it tells the others first, and they ask the
same of theirs: the programs meet in their collectives. Nobody else schedules, so nothing has to be
agreed on.

    if jax.process_index() == 0:
        engine.Engine(model, tokenizer, config)   # as on one process; close() ends all
    else:
        controller.follow(model, config)          # returns when process 0 closes

Where the processes do something else together in between, such as training, process 0 calls
`dismiss` and the others, with a `Follower`, come back to `follow`.
"""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from infer import config as config_lib
from infer.execution import device

_PIECE_BYTES = 1 << 16  # one shape, so that telling compiles once
_HEAD_BYTES = 8
_CALLS = ("run", "swap_out", "swap_in", "drop", "swap", "rest", "dismiss", "close")


class Leader:
    """Process 0's device: the same calls as `device.Device`, told to all processes."""

    def __init__(self, own: device.Device):
        self._own = own
        self.state_bytes, self.page_bytes = own.state_bytes, own.page_bytes
        self.num_programs = own.num_programs
        self.rest()  # compiles what telling needs

    @property
    def leaves(self) -> list[Any]:
        return self._own.leaves

    def run(self, name: str, size: int, *host: Any) -> Any:
        _tell(("run", (name, size, *host)))
        return self._own.run(name, size, *host)

    def swap_out(self, name, pieces) -> None:
        _tell(("swap_out", (name, pieces)))
        self._own.swap_out(name, pieces)

    def swap_in(self, name, pieces) -> None:
        _tell(("swap_in", (name, pieces)))
        self._own.swap_in(name, pieces)

    def drop(self, name) -> None:
        _tell(("drop", (name,)))
        self._own.drop(name)

    def swap(self, model: Any) -> None:
        """Take other weights; the followers ask their `next_model` for their parts of them."""
        self._own.check(model)
        _tell(("swap", ()))
        self._own.swap(model)

    def rest(self) -> None:
        """Keep the others waiting: collectives have time limits."""
        _tell(("rest", ()))

    def dismiss(self) -> None:
        """Let the others go for now."""
        _tell(("dismiss", ()))

    def close(self) -> None:
        """Let the others go."""
        _tell(("close", ()))


class Follower:
    """The device of a process that is not the first."""

    def __init__(self, model: Any, config: config_lib.Config):
        self._own = device.Device(model, config)

    def follow(self, next_model: Callable[[], Any] | None = None) -> None:
        """Do what process 0 does, until it closes its engine or dismisses the others.

        next_model: returns the next weights, where process 0 swaps them.

        Raises:
          ValueError: weights are swapped and there is no `next_model`.
        """
        while True:
            call, arguments = _hear()
            if call in ("close", "dismiss"):
                return
            if call == "swap":
                if next_model is None:
                    raise ValueError("swap: process 0 swaps weights; wanted follow(next_model=...)")
                self._own.swap(next_model())
            elif call != "rest":
                getattr(self._own, call)(*arguments)


def follow(
    model: Any, config: config_lib.Config, next_model: Callable[[], Any] | None = None
) -> None:
    """Follow process 0 from the making of its engine on; see `Follower`."""
    Follower(model, config).follow(next_model)


def _tell(message: tuple[str, tuple]) -> None:
    data = pickle.dumps(message)
    data = len(data).to_bytes(_HEAD_BYTES, "little") + data
    for first in range(0, len(data), _PIECE_BYTES):
        _piece(data[first : first + _PIECE_BYTES])


def _hear() -> tuple[str, tuple]:
    data = _piece(b"")
    size = int.from_bytes(data[:_HEAD_BYTES], "little") + _HEAD_BYTES
    while len(data) < size:
        data += _piece(b"")
    call, arguments = pickle.loads(data[_HEAD_BYTES:size])
    assert call in _CALLS, call
    return call, arguments


def _piece(data: bytes) -> bytes:
    """Send a piece from process 0 to all; return what process 0 sent."""
    buffer = np.zeros(_PIECE_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    sent = multihost_utils.broadcast_one_to_all(buffer, is_source=jax.process_index() == 0)
    return np.asarray(sent).astype(np.uint8).tobytes()
