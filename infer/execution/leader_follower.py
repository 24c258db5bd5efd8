"""Several processes of one mesh: the first decides, all of them compute.

Process 0 has the engine. Whatever it asks of the device it tells the others first, and they ask the
same of theirs: the programs meet in their collectives. Nobody else schedules, so nothing has to be
agreed on.

    if jax.process_index() == 0:
        engine.Engine(model, tokenizer, config)   # as on one process; close() ends all
    else:
        controller.follow(model, config)          # returns when process 0 closes

Where the processes do something else together in between, such as training, process 0 calls
`dismiss` and the others, with a `Follower`, come back to `follow_engine`.
"""

import pickle
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from infer import config as config_lib
from infer.execution import device

_BLOCK_BYTES = 1 << 16  # one shape, so that telling compiles once
_HEADER_BYTES = 8
_DEVICE_CALLS = (
    "run_program",
    "swap_out",
    "swap_in",
    "drop_host_copy",
    "swap_weights",
    "keep_alive",
    "dismiss_followers",
    "close",
)


class Leader:
    """Process 0's device: the same calls as `device.Device`, told to all processes."""

    def __init__(self, own: device.Device):
        self._device = own
        self.state_bytes, self.page_bytes = own.state_bytes, own.page_bytes
        self.num_programs = own.num_programs
        self.keep_alive()  # compiles what telling needs

    @property
    def weights(self) -> list[Any]:
        return self._device.weights

    def run_program(self, name: str, size: int, *host: Any) -> Any:
        _broadcast_call(("run_program", (name, size, *host)))
        return self._device.run_program(name, size, *host)

    def swap_out(self, name, pieces) -> None:
        _broadcast_call(("swap_out", (name, pieces)))
        self._device.swap_out(name, pieces)

    def swap_in(self, name, pieces) -> None:
        _broadcast_call(("swap_in", (name, pieces)))
        self._device.swap_in(name, pieces)

    def drop_host_copy(self, name) -> None:
        _broadcast_call(("drop_host_copy", (name,)))
        self._device.drop_host_copy(name)

    def swap_weights(self, model: Any) -> None:
        """Take other weights; the followers ask their `next_model` for their parts of them."""
        self._device.check_weights(model)
        _broadcast_call(("swap_weights", ()))
        self._device.swap_weights(model)

    def keep_alive(self) -> None:
        """Keep the others waiting: collectives have time limits."""
        _broadcast_call(("keep_alive", ()))

    def dismiss_followers(self) -> None:
        """Let the others go for now."""
        _broadcast_call(("dismiss_followers", ()))

    def close(self) -> None:
        """Let the others go."""
        _broadcast_call(("close", ()))


class Follower:
    """The device of a process that is not the first."""

    def __init__(self, model: Any, config: config_lib.EngineConfig):
        self._device = device.Device(model, config)

    def follow(self, next_model: Callable[[], Any] | None = None) -> None:
        """Do what process 0 does, until it closes its engine or dismisses the others.

        next_model: returns the next weights, where process 0 swaps them.

        Raises:
          ValueError: weights are swapped and there is no `next_model`.
        """
        while True:
            call, arguments = _receive_call()
            if call in ("close", "dismiss_followers"):
                return
            if call == "swap_weights":
                if next_model is None:
                    raise ValueError(
                        "swap_weights: process 0 swaps weights; wanted follow(next_model=...)"
                    )
                self._device.swap_weights(next_model())
            elif call != "keep_alive":
                getattr(self._device, call)(*arguments)


def follow_engine(
    model: Any, config: config_lib.EngineConfig, next_model: Callable[[], Any] | None = None
) -> None:
    """Follow process 0 from the making of its engine on; see `Follower`."""
    Follower(model, config).follow(next_model)


def _broadcast_call(message: tuple[str, tuple]) -> None:
    data = pickle.dumps(message)
    data = len(data).to_bytes(_HEADER_BYTES, "little") + data
    for first in range(0, len(data), _BLOCK_BYTES):
        _broadcast_block(data[first : first + _BLOCK_BYTES])


def _receive_call() -> tuple[str, tuple]:
    data = _broadcast_block(b"")
    size = int.from_bytes(data[:_HEADER_BYTES], "little") + _HEADER_BYTES
    while len(data) < size:
        data += _broadcast_block(b"")
    call, arguments = pickle.loads(data[_HEADER_BYTES:size])
    assert call in _DEVICE_CALLS, call
    return call, arguments


def _broadcast_block(data: bytes) -> bytes:
    """Send a piece from process 0 to all; return what process 0 sent."""
    buffer = np.zeros(_BLOCK_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    sent = multihost_utils.broadcast_one_to_all(buffer, is_source=jax.process_index() == 0)
    return np.asarray(sent).astype(np.uint8).tobytes()
