"""The names of a device's programs, and what is declared of each."""

import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any


class ProgramName(enum.StrEnum):
    """The programs of a device. `Device` declares them, and `Dispatcher` runs them by name."""

    # They run the model.
    DECODE = "decode"
    PREFILL = "prefill"
    VERIFY = "verify"  # only where the config has draft tokens
    # They move memory, or change the sampling state of one slot.
    COPY_STATE = "copy_state"
    RESET_SLOT = "reset_slot"
    COUNT_TOKENS = "count_tokens"
    SET_MASK = "set_mask"
    READ_EXPERT_IDS = "read_expert_ids"  # only where the config records routes
    # Only where preempted sequences may go to host memory.
    READ_SEQUENCE = "read_sequence"
    WRITE_SEQUENCE = "write_sequence"
    READ_SAMPLING = "read_sampling"
    WRITE_SAMPLING = "write_sampling"


@dataclasses.dataclass(frozen=True)
class ProgramSpec:
    """A program of the device.

    Attributes:
      function: takes the buffers named in `takes`, in order, then host arrays. It returns the
        buffers named in `donates`, updated, then its result if it has one.
      takes: device buffers that it reads: "weights", "state" or "sampling".
      host_arguments: examples of the host arrays, or their shapes with shardings, by the program's
        size. It is compiled once for each. The size is 0 where there is only one.
      donates: buffers whose memory it reuses for their updated versions.
      has_result: whether it returns something besides the donated buffers.
    """

    function: Callable
    takes: tuple[str, ...]
    host_arguments: Mapping[int, tuple[Any, ...]]
    donates: tuple[str, ...] = ()
    has_result: bool = False
