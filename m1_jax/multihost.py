"""Values between the processes of one mesh: Python objects by the network, large arrays by devices.

Objects, such as a call of the engine, go through the key-value store of JAX's coordination service,
which process 0 hosts. They use no device, because a collective would queue behind the programs that
run, hold a copy for each process in device memory, and be compiled for each size.

A generation batch of RL has gigabytes, which all hosts need. The store would send them from one
host to each other host. The links between devices carry them instead, in blocks of one size
(`broadcast_arrays`).

Each function is a collective, so all processes call it at the same point of the program. Objects
are pickled, so all processes must run the same code. A wait has no limit of its own: where another
process fails or falls silent, `process_watch` ends this one.
"""

import functools
import itertools
import pickle
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

# The public API has no key-value store. Orbax uses this one, too.
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1_jax import process_watch

_STORE = "m1_jax/objects"  # prefix of all keys
_VALUE_BYTES = 1 << 22  # the most bytes of one value in the store
_LENGTH_BYTES = 8  # size of an object's length, with which its first value begins
# Larger objects are compressed: process 0 sends each of them to every host. The lists of pages of
# 512 rows of 86K tokens, 2.75 MB in each call of the engine, become a fifth in 36 ms.
_COMPRESSED_BYTES = 1 << 16
# Keys of so many objects are deleted together, once all processes have read them.
_OBJECTS_PER_GROUP = 64
# A wait in the store lasts so long, and is begun again. Signals are handled in between.
_POLL_MS = 1000
# Words of 32 bits in one block of arrays. Few sizes, so few programs are compiled.
_SMALL_BLOCK_WORDS, _LARGE_BLOCK_WORDS = 1 << 14, 1 << 24

_broadcast_numbers = itertools.count()
_gather_numbers = itertools.count()
# Groups of broadcast objects whose keys process 0 has yet to delete.
_kept_groups: list[int] = []


def broadcast_object(value: Any) -> Any:
    """Return process 0's value on every process. The values of the other processes are ignored."""
    if jax.process_count() == 1:
        return value
    process_watch.note_progress()
    group, index = divmod(next(_broadcast_numbers), _OBJECTS_PER_GROUP)
    name = f"{_STORE}/sent/{group}/{index}"
    is_last_of_group = index == _OBJECTS_PER_GROUP - 1
    if jax.process_index() == 0:
        _set_bytes(name, pickle.dumps(value))
        if is_last_of_group:
            _kept_groups.append(group)
            _delete_read_groups()
        return value
    received_value = pickle.loads(_get_bytes(name))
    process_watch.note_progress()
    if is_last_of_group:
        _client().key_value_increment(f"{_STORE}/readers/{group}", 1)
    return received_value


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in the order of processes, on process 0. Others get []."""
    if jax.process_count() == 1:
        return [value]
    process_watch.note_progress()
    prefix = f"{_STORE}/gathered/{next(_gather_numbers)}"
    if jax.process_index():
        _set_bytes(f"{prefix}/{jax.process_index()}", pickle.dumps(value))
        return []
    others = [
        pickle.loads(_get_bytes(f"{prefix}/{process}")) for process in range(1, jax.process_count())
    ]
    _client().key_value_delete(prefix)  # and all keys below it
    process_watch.note_progress()
    return [value, *others]


def wait_for_all() -> None:
    """Return once all processes have called this."""
    broadcast_object(gather_objects(None))


def broadcast_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return process 0's arrays on every process. The arrays of the other processes are ignored.

    The devices of a host together hold two blocks of 64 MiB, however large the arrays are.
    """
    if jax.process_count() == 1:
        return dict(arrays)
    headers = [(name, array.shape, array.dtype.str) for name, array in arrays.items()]
    headers = broadcast_object(headers)
    is_source = jax.process_index() == 0
    targets = (
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        if is_source
        else {name: np.empty(shape, dtype) for name, shape, dtype in headers}
    )
    parts = [target.reshape(-1).view(np.uint8) for target in targets.values() if target.size]
    num_bytes = sum(map(len, parts))
    is_small = num_bytes <= 4 * _SMALL_BLOCK_WORDS
    num_words = _SMALL_BLOCK_WORDS if is_small else _LARGE_BLOCK_WORDS
    # Each device of a host takes an equal part.
    block = np.zeros(num_words - num_words % jax.local_device_count(), np.uint32)
    for slices in _cut_into_blocks([len(part) for part in parts], block.nbytes):
        for part, part_slice, block_slice in slices if is_source else ():
            block.view(np.uint8)[block_slice] = parts[part][part_slice]
        received_block = _broadcast_block(block).view(np.uint8)
        process_watch.note_progress()
        for part, part_slice, block_slice in () if is_source else slices:
            parts[part][part_slice] = received_block[block_slice]
    return dict(arrays) if is_source else targets


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "several processes: jax.distributed.initialize() made the client"
    return client


def _set_bytes(name: str, data: bytes) -> None:
    """Store bytes in values of at most `_VALUE_BYTES`, the first one with the length before it.

    The byte after the length is 1 where the rest is compressed.
    """
    is_compressed = len(data) > _COMPRESSED_BYTES
    data = bytes([is_compressed]) + (zlib.compress(data, level=1) if is_compressed else data)
    data = len(data).to_bytes(_LENGTH_BYTES, "little") + data
    # The first value last: a reader that has it finds all others.
    for start in reversed(range(0, len(data), _VALUE_BYTES)):
        value = data[start : start + _VALUE_BYTES]
        _client().key_value_set_bytes(f"{name}/{start // _VALUE_BYTES}", value)


def _get_bytes(name: str) -> bytes:
    """Wait for what `_set_bytes` stores."""
    first = _wait_for_value(f"{name}/0")
    total = _LENGTH_BYTES + int.from_bytes(first[:_LENGTH_BYTES], "little")
    rest = [_wait_for_value(f"{name}/{i}") for i in range(1, -(-total // _VALUE_BYTES))]
    data = b"".join((first[_LENGTH_BYTES:], *rest))
    return zlib.decompress(data[1:]) if data[0] else data[1:]


def _wait_for_value(key: str) -> bytes:
    while True:
        try:
            return _client().blocking_key_value_get_bytes(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            # Begun again: the watch knows whether there is still somebody to wait for.
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _delete_read_groups() -> None:
    """Delete the objects that all other processes have read."""
    for group in list(_kept_groups):
        readers = f"{_STORE}/readers/{group}"
        if _client().key_value_increment(readers, 0) == jax.process_count() - 1:
            _client().key_value_delete(f"{_STORE}/sent/{group}")
            _client().key_value_delete(readers)
            _kept_groups.remove(group)


def _cut_into_blocks(
    lengths: list[int], block_bytes: int
) -> Iterator[list[tuple[int, slice, slice]]]:
    """Yield for each block its (part, slice of the part, slice of the block), in bytes."""
    slices, filled = [], 0
    for part, length in enumerate(lengths):
        start = 0
        while start < length:
            size = min(length - start, block_bytes - filled)
            slices.append((part, slice(start, start + size), slice(filled, filled + size)))
            start, filled = start + size, filled + size
            if filled == block_bytes:
                yield slices
                slices, filled = [], 0
    if slices:
        yield slices


def _broadcast_block(block: np.ndarray) -> np.ndarray:
    """Return process 0's block of uint32 words, of one length on all processes."""
    mesh, add_up = _block_program()
    shape = (mesh.shape["process"], len(block))

    # JAX asks for this process's row alone. Each of its devices takes a part.
    def read_part(index: Any) -> np.ndarray:
        return block[None, index[1]]

    block_sharding = NamedSharding(mesh, PartitionSpec("process", "device"))
    global_block = jax.make_array_from_callback(shape, block_sharding, read_part)
    received_block = np.empty_like(block)
    for shard in add_up(global_block).addressable_shards:
        received_block[shard.index] = shard.data
    return received_block


@functools.cache
def _block_program() -> tuple[Mesh, Any]:
    """Return the mesh [process, device of a process], and the program that adds up its blocks."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.reshape(np.array(devices), (jax.process_count(), -1)), ("process", "device"))

    # The blocks of all processes but 0 are zeros. Integers add up exactly.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("process", "device"),
        out_specs=PartitionSpec("device"),
    )
    def add_up(block):
        return jax.lax.psum(block[0], "process")

    return mesh, jax.jit(add_up)
