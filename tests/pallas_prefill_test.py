"""Serving prefill: many sequences in one call, against a float64 recurrence."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import lightning_support
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from lightning_support import SLOPES, worst_state
from tpu_support import CHIPS_IN_TURNS, compile_for_chip, whole_moves

from pallas_kernels.lightning_decode import api as decode_api
from pallas_kernels.lightning_decode import reference as decode_reference
from pallas_kernels.lightning_decode import tpu_in_place, tpu_prefill

HEADS, SIZE, SLOTS = 4, 16, 7

worst_head = functools.partial(lightning_support.worst_head, heads=HEADS)

interpreted = jax.jit(lambda *args: tpu_prefill.lightning_prefill(*args, interpret=True))
KERNELS = {"reference": jax.jit(decode_reference.lightning_prefill), "tpu": interpreted}


def inputs(num_tokens, heads=HEADS, size=SIZE, seed=0):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((num_tokens, heads * 3 * size)).astype(np.float32)
    pool = rng.standard_normal((SLOTS, heads, size, size)).astype(np.float32)
    return qkv, pool


def recurrence(qkv, slopes, pool, sequences):
    """Return outputs and pool in float64; sequences are (slot, start, length, fresh)."""
    qkv, pool = np.asarray(qkv), np.array(pool, np.float64)
    o = np.zeros((len(qkv), qkv.shape[1] // 3))
    for slot, start, length, fresh in sequences:
        if slot < 0 or length == 0:
            continue
        state = np.zeros_like(pool[slot]) if fresh else pool[slot]
        rows = slice(start, start + length)
        (o[rows],), (pool[slot],) = lightning_support.recurrence(
            qkv[None, rows], slopes, None, state[None]
        )
    return o, pool


def run(name, qkv, pool, sequences, slopes=SLOPES):
    slots, starts, lengths, fresh = (np.array(column) for column in zip(*sequences, strict=True))
    numbers = [jnp.asarray(x, jnp.int32) for x in (slots, starts, lengths)]
    arrays = [jnp.asarray(x) for x in (qkv, slopes, pool)]
    return KERNELS[name](*arrays, *numbers, jnp.asarray(fresh, bool))


def rows_of(sequences, num_tokens):
    inside = np.zeros(num_tokens, bool)
    for slot, start, length, _ in sequences:
        inside[start : start + length] |= slot >= 0
    return inside


MIXES = {
    "one token": (1, [(2, 0, 1, False)]),
    "less than a tile": (5, [(0, 1, 3, False)]),
    "one long": (300, [(3, 0, 300, True)]),
    "tiles end on the grid": (384, [(3, 0, 128, False), (1, 128, 256, True)]),
    "odd starts, gaps, any order": (
        413,
        [(6, 270, 131, False), (2, 3, 1, False), (0, 4, 255, True), (5, 260, 9, False)],
    ),
    "empty and ignored": (200, [(1, 0, 0, True), (-1, 5, 60, False), (4, 65, 130, False)]),
    "many in one block": (128, [(i, 17 * i + 2, 17 - i, i % 2 == 0) for i in range(7)]),
    "nothing": (140, [(-1, 0, 140, False), (2, 0, 0, False)]),
}


@pytest.mark.parametrize("name", KERNELS)
class TestPrefill:
    @pytest.mark.parametrize("mix", MIXES)
    def test_mixes(self, name, mix):
        num_tokens, sequences = MIXES[mix]
        qkv, pool = inputs(num_tokens)
        inside = rows_of(sequences, num_tokens)
        wanted_o, wanted_pool = recurrence(qkv, SLOPES, pool, sequences)
        named = {slot for slot, _, length, _ in sequences if slot >= 0 and length}
        others = np.setdiff1d(np.arange(SLOTS), list(named))
        fresh = [slot for slot, _, length, new in sequences if slot in named and length and new]
        pool[fresh] = np.nan  # a fresh sequence never reads its slot
        pool[others, 0, 0, 0] = np.nan
        poisoned = np.where(inside[:, None], qkv, np.nan)
        o, after = run(name, poisoned, pool, sequences)
        o, after = np.asarray(o), np.asarray(after)
        np.testing.assert_array_equal(o[~inside], 0)
        np.testing.assert_array_equal(after[others].view(np.uint32), pool[others].view(np.uint32))
        if named:
            assert worst_head(o, wanted_o) < 1e-5
            assert worst_state(after[list(named)], wanted_pool[list(named)]) < 1e-5
        for _, start, length, _ in sequences:  # a missing +1 in the query decay shows here
            first = slice(start, start + min(4, length))
            if inside[first].any():
                assert worst_head(o[first], wanted_o[first]) < 1e-5

    def test_bfloat16(self, name):
        num_tokens, sequences = MIXES["odd starts, gaps, any order"]
        qkv, pool = inputs(num_tokens)
        rounded = jnp.asarray(qkv, jnp.bfloat16)
        wanted_o, wanted_pool = recurrence(rounded.astype(jnp.float32), SLOPES, pool, sequences)
        o, after = run(name, rounded, pool, sequences)
        assert o.dtype == jnp.bfloat16
        # o is rounded (1.7e-3), and the kernel rounds scores and decayed keys alike.
        assert worst_head(o.astype(jnp.float32), wanted_o) < 4e-3
        assert worst_state(after, wanted_pool) < 3e-3

    def test_extreme_slopes_and_several_head_blocks(self, name):
        slopes = np.resize(np.array([0.0, 8.0, 0.5, 3.9e-8, 1.9e-3, 0.1], np.float32), 32)
        qkv, pool = inputs(150, heads=32, size=8)
        sequences = [(4, 1, 140, False)]
        wanted_o, wanted_pool = recurrence(qkv, slopes, pool, sequences)
        o, after = run(name, qkv, pool, sequences, slopes)
        assert worst_head(o, wanted_o, heads=32) < 1e-5
        assert worst_state(after, wanted_pool) < 1e-5

    def test_bits_do_not_depend_on_company(self, name):
        """A sequence that starts on the grid gets the same bits alone and among others."""
        qkv, pool = inputs(512, seed=3)
        alone = run(name, qkv[128:330], pool, [(2, 0, 202, False)])
        among = run(name, qkv, pool, [(0, 340, 90, True), (2, 128, 202, False), (1, 5, 100, False)])
        np.testing.assert_array_equal(alone[0], among[0][128:330])
        np.testing.assert_array_equal(alone[1][2], among[1][2])

    def test_prefill_decode_prefill(self, name):
        decode = {
            "reference": decode_reference.lightning_decode,
            "tpu": lambda *args: tpu_in_place.lightning_decode(*args, interpret=True),
        }[name]
        qkv, pool = inputs(200)
        wanted_o, wanted_pool = recurrence(qkv, SLOPES, pool, [(5, 0, 200, True)])
        first, pool = run(name, qkv[:133], pool, [(5, 0, 133, True)])
        outputs, slots = [first], jnp.array([5, -1], jnp.int32)
        step = jax.jit(decode)
        for t in range(133, 140):
            rows = jnp.stack([qkv[t], qkv[t]])
            o, pool = step(rows, jnp.asarray(SLOPES), pool, slots)
            outputs.append(o[:1])
        last, pool = run(name, qkv[137:], pool, [(5, 3, 60, False)])
        o = np.concatenate([*outputs, last[3:]])
        assert worst_head(o, wanted_o) < 1e-5
        assert worst_state(pool[5:6], wanted_pool[5:6]) < 1e-5


def test_copies_wait_for_each_other():
    """Copies that run only when waited for, in memory that starts as NaN: no tile may run ahead."""
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    num_tokens, sequences = MIXES["many in one block"]
    qkv, pool = inputs(num_tokens, heads=32)
    slopes = np.resize(SLOPES, 32)
    wanted = run("reference", qkv, pool, sequences, slopes)
    columns = [jnp.array(column) for column in zip(*sequences, strict=True)]
    arrays = [jnp.asarray(x) for x in (qkv, slopes, pool)]
    got = tpu_prefill.lightning_prefill(*arrays, *columns, interpret=late)
    assert worst_head(got[0], wanted[0], heads=32) < 1e-5
    assert worst_state(got[1], wanted[1]) < 1e-5


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=8)
def test_tiles_cover_every_token_once(data):
    num_tokens = data.draw(st.integers(1, 60))
    chunk = data.draw(st.sampled_from([4, 7, 16]))
    cuts = data.draw(st.lists(st.integers(0, num_tokens), min_size=2, max_size=8).map(sorted))
    pieces = list(zip(cuts[:-1], cuts[1:], strict=True))[::2]
    slots = np.array(data.draw(st.permutations(range(-1, len(pieces) - 1))), np.int32)
    starts = np.array([a for a, _ in pieces], np.int32)
    lengths = np.array([b - a for a, b in pieces], np.int32)
    tiles, order = decode_reference.cut_prefill_tiles(
        jnp.asarray(slots), jnp.asarray(starts), jnp.asarray(lengths), num_tokens, chunk
    )
    wanted, got = np.full(num_tokens, -1), np.full(num_tokens, -1)
    for index, (slot, start, length) in enumerate(zip(slots, starts, lengths, strict=True)):
        wanted[start : start + length] = index if slot >= 0 else -1
    firsts, lasts, opened = [], [], []
    for block, low, high, sequence, flags in np.asarray(tiles).T:
        rows = slice(block * chunk + low, block * chunk + high)
        assert np.all(got[rows] == -1)
        assert high <= chunk
        if high > low:
            got[rows] = order[sequence]
        firsts += [int(order[sequence])] * bool(flags & decode_reference.FIRST_TILE)
        lasts += [int(order[sequence])] * bool(flags & decode_reference.LAST_TILE)
        opened += [int(block)] * bool(flags & decode_reference.OPENS_BLOCK)
    np.testing.assert_array_equal(got, wanted)
    assert firsts == lasts
    assert sorted(firsts) == sorted(set(wanted) - {-1})
    assert opened == list(range(-(-num_tokens // chunk)))


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([(1, 0, 5, False), (1, 5, 5, False)], r"slots: got \[1\] more than once"),
        ([(7, 0, 5, False)], r"slots: got \[7\]; wanted less than 7"),
        ([(0, 0, 5, False), (1, 4, 2, False)], r"sequences: rows \[4\] have two"),
        ([(0, 5, 16, False)], "wanted them in 20 rows"),
        ([(0, -1, 3, False)], "wanted them in 20 rows"),
        ([(0, 3, -1, False)], "wanted them in 20 rows"),
    ],
)
def test_sequences_are_checked_outside_jit(sequences, message):
    qkv, pool = inputs(20)
    columns = [np.array(column) for column in zip(*sequences, strict=True)]
    with pytest.raises(ValueError, match=message):
        decode_api.lightning_prefill(qkv, jnp.asarray(SLOPES), jnp.asarray(pool), *columns)


def test_public_entry_under_jit():
    qkv, pool = inputs(20)
    sequences = [(3, 2, 15, False), (9, 17, 3, False)]  # the second slot is beyond the pool
    columns = [jnp.array(column) for column in zip(*sequences, strict=True)]
    o, after = jax.jit(decode_api.lightning_prefill)(qkv, jnp.asarray(SLOPES), pool, *columns)
    wanted_o, wanted_pool = recurrence(qkv, SLOPES, pool, sequences[:1])
    assert worst_head(o, wanted_o) < 1e-5
    assert worst_state(after, wanted_pool) < 1e-5


def compiled(chip, num_tokens, count, heads, size, dtype=jnp.bfloat16):
    """Compile for a TPU that is not there, the pool donated; neither rows nor pool may move."""
    shapes = [
        ((num_tokens, heads * 3 * size), dtype),
        ((heads,), jnp.float32),
        ((count + 1, heads, size, size), jnp.float32),
        *[((count,), jnp.int32)] * 3,
        ((count,), jnp.bool_),
    ]
    program = compile_for_chip(decode_api.lightning_prefill, shapes, chip, donate=2)
    (rows, _), _, (pool, _), *_ = shapes
    operations = ("copy", "pad", "fusion", "transpose", "gather")
    assert not whole_moves(program, [rows, pool], operations)
    return program


def test_rows_and_pool_are_not_copied():
    program = compiled("v6e", 1000, 16, 16, 128)
    pool_bytes = 4 * 17 * 16 * 128 * 128
    assert program.memory_analysis().alias_size_in_bytes >= pool_bytes
    assert program.memory_analysis().temp_size_in_bytes < pool_bytes / 8
    assert "lightning_prefill" in program.as_text()


@pytest.mark.parametrize("chip", CHIPS_IN_TURNS)
def test_prefill_compiles_for_every_generation(chip):
    compiled(chip, 4096, 256, 64, 128)
    compiled(chip, 77, 1, 64, 128)
    compiled(chip, 2048, 32, 64, 128, jnp.float32)
    compiled(chip, 2048, 32, 4, 128)
    compiled(chip, 2048, 32, 16, 64)
    compiled(chip, 2048, 32, 8, 256)
