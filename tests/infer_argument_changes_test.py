"""Arguments of calls, sent as what changed."""

import pickle

import numpy as np
import pytest

from infer import config as config_lib
from infer.execution import argument_changes, host_batch

CONFIG = config_lib.EngineConfig(max_rows=512, max_length=86_016, num_pages=512 * 1344)


def send(sender, receiver, program, arguments):
    """Return (bytes of the message, what the receiver makes of it)."""
    message = pickle.dumps(sender.encode(program, arguments))
    return len(message), receiver.decode(program, pickle.loads(message))


def sides():
    return argument_changes.ArgumentChanges(), argument_changes.ArgumentChanges()


def assert_equal_bits(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.tobytes() == wanted.tobytes()


def test_a_call_of_a_full_size_engine_is_small():
    """Of 512 rows of 86K tokens, 128 get a page, and one becomes the row of another request."""
    rng, (sender, receiver) = np.random.default_rng(0), sides()
    first = host_batch.make_empty_batch(512, CONFIG)
    first.pages[:] = rng.integers(1, 512 * 1344, first.pages.shape)
    size, got = send(sender, receiver, "decode", (first, np.int32(16)))
    assert size > first.pages.nbytes
    assert_equal_bits(got[0].pages, first.pages)
    second = host_batch.make_empty_batch(512, CONFIG)
    second.pages[:] = first.pages
    second.pages[::4, 700] = rng.integers(1, 512 * 1344, 128)
    second.pages[7] = rng.integers(1, 512 * 1344, first.pages.shape[1])
    size, got = send(sender, receiver, "decode", (second, np.int32(9)))
    assert size < first.pages.nbytes / 20
    assert_equal_bits(got[0].pages, second.pages)
    assert_equal_bits(got[1], np.int32(9))


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float32, np.bool_, np.int8, np.float64])
def test_any_sequence_of_calls_arrives_bit_by_bit(dtype):
    """Of several programs, with few and with many changes, NaN and zeros of both signs."""
    rng, (sender, receiver) = np.random.default_rng(1), sides()
    values = np.array([0.0, -0.0, 1.0, 3.0]).astype(dtype)
    if np.issubdtype(dtype, np.floating):
        values = np.append(values, np.array([np.nan, -np.nan, np.inf], dtype))
    arrays = {name: rng.choice(values, (40, 50)) for name in ("decode", "prefill")}
    kept = []
    for _ in range(60):
        name = ("decode", "prefill")[rng.integers(2)]
        array = arrays[name].copy()
        changed = rng.integers(0, array.size, rng.choice([0, 1, 30, array.size]))
        array.reshape(-1)[changed] = rng.choice(values, len(changed))
        arrays[name] = array
        _, got = send(sender, receiver, name, {"array": array, "step": np.int32(3)})
        kept.append((got["array"], array))
    # All, not only the last: programs under way still read the arrays of earlier calls.
    for got, wanted in kept:
        assert_equal_bits(got, wanted)


def test_arrays_of_another_shape_are_sent_whole():
    sender, receiver = sides()
    for length in (1000, 2000, 500):
        _, (got,) = send(sender, receiver, "decode", (np.arange(length, dtype=np.int32),))
        assert_equal_bits(got, np.arange(length, dtype=np.int32))
