"""What process 0 sends to every other host for each program of the engine."""

import dataclasses
import pickle
import time

import numpy as np

from infer import config as engine_config
from infer.execution import argument_changes, host_batch


@dataclasses.dataclass(frozen=True)
class DecodeCallCost:
    """The message that calls a decode program with all rows.

    Attributes:
      first_bytes: bytes of the first message to a host.
      call_bytes: bytes of a later one, in which rows have grown by the tokens of a program.
      encode_secs: seconds of one core to make a later one.
    """

    first_bytes: int
    call_bytes: int
    encode_secs: float


def measure_decode_call(config: engine_config.EngineConfig) -> DecodeCallCost:
    """Make two messages as `leader_follower.Leader` sends them, and measure them."""
    rng, rows = np.random.default_rng(0), config.max_rows
    changes = argument_changes.ArgumentChanges()
    first = host_batch.make_empty_batch(rows, config)
    first.pages[:] = rng.integers(1, config.total_pages + 1, first.pages.shape)
    second = host_batch.make_empty_batch(rows, config)
    second.pages[:] = first.pages
    # So many rows begin a page while all make `decode_steps` tokens.
    num_grown = -(-rows * config.decode_steps // config.chunk_tokens)
    grown = rng.integers(0, first.pages.size, num_grown)
    second.pages.reshape(-1)[grown] = rng.integers(1, config.total_pages + 1, num_grown)
    steps = np.int32(config.decode_steps)
    first_bytes = len(pickle.dumps(changes.encode("decode", (first, steps))))
    started = time.process_time()
    message = pickle.dumps(changes.encode("decode", (second, steps)))
    return DecodeCallCost(first_bytes, len(message), time.process_time() - started)
