"""Plain Python values between the processes of one mesh, in collectives of bytes.

Each function is a collective, so all processes call it at the same point of the program. Values are
pickled, so all processes must run the same code.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Every broadcast begins with a block of this size, whatever the size of the value. One shape is one
# compiled program, and a small value (such as a call of the engine) takes one collective.
_FIRST_BLOCK_BYTES = 1 << 16
_LENGTH_BYTES = 8  # size of the pickle's length, which is the start of the first block
# The most bytes of one collective after the first block. A batch with expert ids may have more
# bytes than an int32 counts.
_CHUNK_BYTES = 1 << 28


def broadcast_object(value: Any) -> Any:
    """Return process 0's value on every process. The values of the other processes are ignored."""
    if jax.process_count() == 1:
        return value
    is_source = jax.process_index() == 0
    data = pickle.dumps(value) if is_source else b""
    length = len(data).to_bytes(_LENGTH_BYTES, "little")
    start = _FIRST_BLOCK_BYTES - _LENGTH_BYTES
    block = _broadcast_bytes(length + data[:start], _FIRST_BLOCK_BYTES)
    # Read from the block, which is process 0's everywhere: all agree on the number of chunks.
    num_bytes = int.from_bytes(block[:_LENGTH_BYTES], "little")
    received_parts = [block[_LENGTH_BYTES:][:num_bytes]]
    while start < num_bytes:
        chunk_bytes = min(num_bytes - start, _CHUNK_BYTES)
        # The next power of two: few shapes, so few programs are compiled.
        padded_bytes = 1 << (chunk_bytes - 1).bit_length()
        chunk = _broadcast_bytes(data[start : start + chunk_bytes], padded_bytes)
        received_parts.append(chunk[:chunk_bytes])
        start += chunk_bytes
    # Process 0 returns its own object, since a copy would cost time and memory.
    return value if is_source else pickle.loads(b"".join(received_parts))


def allgather_bytes(data: bytes) -> list[bytes]:
    """Return every process's bytes, in the order of processes, on every process."""
    if jax.process_count() == 1:
        return [data]
    sizes = multihost_utils.process_allgather(np.asarray([len(data)])).reshape(-1)
    # A gather needs one shape on all processes, so data is padded to the longest.
    padded_data = np.zeros(int(sizes.max()), np.uint8)
    padded_data[: len(data)] = np.frombuffer(data, np.uint8)
    gathered_data = multihost_utils.process_allgather(padded_data)
    return [row[: int(size)].tobytes() for row, size in zip(gathered_data, sizes, strict=True)]


def _broadcast_bytes(data: bytes, padded_bytes: int) -> bytes:
    """Return process 0's data, padded with zeros. The data of other processes is ignored."""
    is_source = jax.process_index() == 0
    buffer = np.zeros(padded_bytes, np.uint8)
    if is_source:
        buffer[: len(data)] = np.frombuffer(data, np.uint8)
    received_data = multihost_utils.broadcast_one_to_all(buffer, is_source)
    # The broadcast is a sum over processes, whose dtype may be wider.
    return np.asarray(received_data).astype(np.uint8).tobytes()
