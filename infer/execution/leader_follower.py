"""Several processes of one mesh: the first decides, all of them compute.

Process 0 has the engine. Before each call of its device it broadcasts the call. The other processes
make the same call of theirs, so that the programs meet in their collectives. Only process 0
schedules, so nothing has to be agreed on.

    if jax.process_index() == 0:
        engine.Engine(model, tokenizer, config)           # as on one process
    else:
        leader_follower.follow_engine(model, config)      # returns when process 0 closes

Where the processes do something else together in between, such as training, process 0 calls
`dismiss_followers`, and the others, with a `Follower`, come back to `follow`.
"""

import enum
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from infer import config as config_lib
from infer.execution import argument_changes, device, program_spec
from m1_jax import model as model_lib
from m1_jax import multihost


class DeviceCall(enum.StrEnum):
    """What the leader broadcasts: methods of `device.Device`, and nothing else, by their names."""

    RUN_PROGRAM = "run_program"
    SWAP_OUT = "swap_out"
    SWAP_IN = "swap_in"
    DROP_HOST_COPY = "drop_host_copy"
    SWAP_WEIGHTS = "swap_weights"
    KEEP_ALIVE = "keep_alive"
    DISMISS_FOLLOWERS = "dismiss_followers"
    CLOSE = "close"


class Leader:
    """Process 0's device: the calls of `device.Device`, each broadcast before it is made."""

    def __init__(self, own_device: device.Device):
        self._device = own_device
        self.limits = own_device.limits
        self.num_programs = own_device.num_programs
        self._changes = argument_changes.ArgumentChanges()
        # All have compiled: the first collective of XLA waits for half a minute at most on CPU.
        multihost.wait_for_all()

    @property
    def weights(self) -> list[jax.Array]:
        return self._device.weights

    def run_program(self, name: program_spec.ProgramName, size: int, *host_arguments: Any) -> Any:
        sent_arguments = self._changes.encode((name, size), host_arguments)
        _broadcast_call(DeviceCall.RUN_PROGRAM, name, size, sent_arguments)
        return self._device.run_program(name, size, *host_arguments)

    def swap_out(
        self, sequence_id: Hashable, slices: Sequence[tuple[np.int32, np.ndarray]]
    ) -> None:
        _broadcast_call(DeviceCall.SWAP_OUT, sequence_id, slices)
        self._device.swap_out(sequence_id, slices)

    def swap_in(self, sequence_id: Hashable, slices: Sequence[tuple[np.int32, np.ndarray]]) -> None:
        _broadcast_call(DeviceCall.SWAP_IN, sequence_id, slices)
        self._device.swap_in(sequence_id, slices)

    def drop_host_copy(self, sequence_id: Hashable) -> None:
        _broadcast_call(DeviceCall.DROP_HOST_COPY, sequence_id)
        self._device.drop_host_copy(sequence_id)

    def swap_weights(self, model: model_lib.MiniMaxM1) -> None:
        """Take other weights. The followers ask their `next_model` for their parts of them."""
        # Checked before the broadcast: a follower that swapped alone could not go back.
        self._device.check_weights(model)
        _broadcast_call(DeviceCall.SWAP_WEIGHTS)
        self._device.swap_weights(model)

    def keep_alive(self) -> None:
        """Show that the engine is idle. `process_watch` takes long silence for a deadlock."""
        _broadcast_call(DeviceCall.KEEP_ALIVE)

    def dismiss_followers(self) -> None:
        """Let the followers return from `follow` for now."""
        _broadcast_call(DeviceCall.DISMISS_FOLLOWERS)

    def close(self) -> None:
        """Let the followers return from `follow` for good."""
        _broadcast_call(DeviceCall.CLOSE)


class Follower:
    """The device of a process that is not the first."""

    def __init__(self, model: model_lib.MiniMaxM1, config: config_lib.EngineConfig):
        self._device = device.Device(model, config)
        self._changes = argument_changes.ArgumentChanges()
        multihost.wait_for_all()  # as the leader

    def follow(self, next_model: Callable[[], model_lib.MiniMaxM1] | None = None) -> None:
        """Do what process 0 does, until it closes its engine or dismisses the followers.

        Args:
          next_model: returns the next weights, where process 0 swaps them.

        Raises:
          ValueError: weights are swapped and there is no `next_model`.
        """
        while True:
            call, arguments = _receive_call()
            if call in (DeviceCall.CLOSE, DeviceCall.DISMISS_FOLLOWERS):
                return
            if call is DeviceCall.SWAP_WEIGHTS:
                if next_model is None:
                    raise ValueError(
                        "swap_weights: process 0 swaps weights; wanted "
                        "follow_engine(model, config, next_model)"
                    )
                self._device.swap_weights(next_model())
            elif call is DeviceCall.RUN_PROGRAM:
                name, size, sent_arguments = arguments
                host_arguments = self._changes.decode((name, size), sent_arguments)
                self._device.run_program(name, size, *host_arguments)
            elif call is not DeviceCall.KEEP_ALIVE:
                getattr(self._device, call)(*arguments)


def follow_engine(
    model: model_lib.MiniMaxM1,
    config: config_lib.EngineConfig,
    next_model: Callable[[], model_lib.MiniMaxM1] | None = None,
) -> None:
    """Follow process 0 from the making of its engine on. Arguments and errors as in `Follower`."""
    Follower(model, config).follow(next_model)


def _broadcast_call(call: DeviceCall, *arguments: Any) -> None:
    """Tell the followers of a call, from process 0."""
    multihost.broadcast_object((call, arguments))


def _receive_call() -> tuple[DeviceCall, tuple[Any, ...]]:
    """Wait for the next call of process 0."""
    # None: only process 0's value counts.
    call, arguments = multihost.broadcast_object(None)
    # The call comes from process 0 of the same run, and is still checked before it is made.
    return DeviceCall(call), arguments
