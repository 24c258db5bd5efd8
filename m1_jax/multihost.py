"""Plain Python values between the processes of one mesh, in collectives of bytes.

All processes call these functions at the same point of the program, since each is a collective.
Values are pickled, so all processes must run the same code.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Every broadcast begins with a block of this size, whatever the value's: one shape, so one compiled
# program, and a small value (a call of the engine) takes one collective.
_FIRST_BLOCK_BYTES = 1 << 16
_LENGTH_BYTES = 8  # of the pickle's length, at the start of the first block
# At once, after the first block. A batch with expert ids may have more bytes than an int32 counts.
_CHUNK_BYTES = 1 << 28


def broadcast_object(value: Any) -> Any:
    """Return process 0's value on every process; what the others pass is ignored."""
    if jax.process_count() == 1:
        return value
    is_source = jax.process_index() == 0
    data = pickle.dumps(value) if is_source else b""
    length = len(data).to_bytes(_LENGTH_BYTES, "little")
    start = _FIRST_BLOCK_BYTES - _LENGTH_BYTES
    block = _broadcast_bytes(length + data[:start], _FIRST_BLOCK_BYTES)
    # From here on the length is process 0's, on all processes: they agree on the number of chunks.
    num_bytes = int.from_bytes(block[:_LENGTH_BYTES], "little")
    received = [block[_LENGTH_BYTES:][:num_bytes]]
    while start < num_bytes:
        chunk_bytes = min(num_bytes - start, _CHUNK_BYTES)
        # Padded to powers of two, so that few programs are compiled.
        padded_bytes = 1 << (chunk_bytes - 1).bit_length()
        chunk = _broadcast_bytes(data[start : start + chunk_bytes], padded_bytes)
        received.append(chunk[:chunk_bytes])
        start += chunk_bytes
    # Process 0 keeps its own value: a copy would cost time and memory.
    return value if is_source else pickle.loads(b"".join(received))


def allgather_bytes(data: bytes) -> list[bytes]:
    """Return every process's bytes, in the order of processes, on every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.asarray([len(data)])).reshape(-1)
    # All processes gather arrays of one shape, that of the longest.
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    gathered = multihost_utils.process_allgather(padded)
    return [row[: int(size)].tobytes() for row, size in zip(gathered, sizes, strict=True)]


def _broadcast_bytes(data: bytes, padded_bytes: int) -> bytes:
    """Return process 0's data, padded with zeros; the others pass any data, such as none."""
    is_source = jax.process_index() == 0
    buffer = np.zeros(padded_bytes, np.uint8)
    if is_source:
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
    received = multihost_utils.broadcast_one_to_all(buffer, is_source)
    # The broadcast is a sum over processes, whose dtype may be wider.
    return np.asarray(received).astype(np.uint8).tobytes()
