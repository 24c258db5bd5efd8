"""Decoding lightning attention in a slot pool, against a float64 recurrence and the XLA form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import lightning_support
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from lightning_support import SLOPES, worst_head, worst_state
from tpu_support import CHIPS_IN_TURNS, compile_for_chip, whole_moves

from pallas_kernels.lightning_decode import api as decode_api
from pallas_kernels.lightning_decode import ring as decode_ring
from pallas_kernels.lightning_decode import tpu_in_place, tpu_ring


def interpreted(*args):
    return tpu_in_place.lightning_decode(*args, interpret=True)


KERNELS = {"reference": decode_api.DECODE_IMPLEMENTATIONS["reference"], "tpu": interpreted}


def inputs(batch, num_slots, heads=4, size=32, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((batch, heads * 3 * size)).astype(np.float32)
    pool = rng.standard_normal((num_slots, heads, size, size)).astype(np.float32)
    return jnp.asarray(qkv, dtype), jnp.asarray(pool)


def spread(heads):
    return np.resize(SLOPES, heads)


def recurrence(qkv, slopes, pool, slots):
    """Return outputs and pool after one token of every active row, in float64."""
    pool, active = np.array(pool, np.float64), slots >= 0
    tokens = np.asarray(qkv)[active][:, None]
    named = slots[active]
    outputs, pool[named] = lightning_support.recurrence(tokens, slopes, None, pool[named])
    o = np.zeros((len(slots), outputs.shape[2]))
    o[active] = outputs[:, 0]
    return o, pool


@pytest.mark.parametrize("name", KERNELS)
class TestInPlace:
    @pytest.mark.parametrize(
        ("heads", "size", "slots"),
        [
            (4, 32, [2]),
            (4, 32, [6, -1, 0]),
            (16, 16, [5, 3, -1, 7, 9, 1, 0, -1, 12, 11, 2]),  # two tiles of rows, two blocks
            (3, 64, [-1, 1, 0, 2, 3, 4, 5, 6, 7]),  # no tile is full; heads fill no lanes
            (2, 256, [1, 0]),
        ],
    )
    def test_one_token(self, name, heads, size, slots):
        qkv, pool = inputs(len(slots), 13, heads, size)
        slopes, slots = spread(heads), np.array(slots, np.int32)
        wanted_o, wanted_pool = recurrence(qkv, slopes, pool, slots)
        o, after = KERNELS[name](qkv, jnp.asarray(slopes), pool, jnp.asarray(slots))
        active = slots >= 0
        assert worst_head(o[active], wanted_o[active], heads) < 1e-6
        assert worst_state(after, wanted_pool) < 1e-6
        np.testing.assert_array_equal(np.asarray(o)[~active], 0)
        others = np.setdiff1d(np.arange(13), slots)
        np.testing.assert_array_equal(np.asarray(after)[others], np.asarray(pool)[others])

    def test_bfloat16_rows(self, name):
        qkv, pool = inputs(3, 4, dtype=jnp.bfloat16)
        slots = np.array([3, 0, 1], np.int32)
        wanted_o, wanted_pool = recurrence(qkv, SLOPES, pool, slots)
        o, after = KERNELS[name](qkv, jnp.asarray(SLOPES), pool, jnp.asarray(slots))
        assert o.dtype == jnp.bfloat16
        assert worst_head(o, wanted_o, 4) < 3e-3  # the rounding of o alone is 1.7e-3
        assert worst_state(after, wanted_pool) < 1e-6

    def test_nothing_leaks_from_inactive_rows_or_unnamed_slots(self, name):
        qkv, pool = inputs(4, 5)
        qkv, pool = qkv.at[1].set(jnp.nan), pool.at[0].set(jnp.nan).at[3].set(jnp.inf)
        slots = jnp.array([1, -1, 2, -7], jnp.int32)
        o, after = KERNELS[name](qkv, jnp.asarray(SLOPES), pool, slots)
        assert np.isfinite(o).all()
        np.testing.assert_array_equal(np.asarray(o)[[1, 3]], 0)
        bits = [np.asarray(x)[[0, 3, 4]].view(np.uint32) for x in (after, pool)]
        np.testing.assert_array_equal(*bits)
        assert np.isfinite(np.asarray(after)[[1, 2]]).all()

    def test_no_active_row(self, name):
        qkv, pool = inputs(9, 3)
        o, after = KERNELS[name](qkv, jnp.asarray(SLOPES), pool, jnp.full((9,), -1))
        np.testing.assert_array_equal(o, 0)
        np.testing.assert_array_equal(after, pool)

    def test_chain_of_tokens_does_not_drift(self, name):
        """2,000 tokens of one state; exp(-s) in float32 would be off by 2.5e-4 of s each."""
        _, pool = inputs(1, 1, size=16)
        slots, slopes = jnp.zeros((1,), jnp.int32), jnp.asarray(SLOPES)
        rows = jnp.asarray(np.random.default_rng(1).standard_normal((2000, 1, 4 * 48)) + 0.5)
        rows = rows.astype(jnp.float32)
        step = KERNELS[name]
        last = jax.jit(
            lambda pool: jax.lax.scan(lambda p, x: step(x, slopes, p, slots)[::-1], pool, rows)[0]
        )(pool)
        x = np.asarray(rows, np.float64).reshape(2000, 4, 3, 16)
        age = np.arange(2000)[::-1, None]
        decay = np.exp(-np.float64(SLOPES) * age)
        wanted = np.einsum("tn,tnk,tnv->nkv", decay, x[:, :, 1], x[:, :, 2])
        wanted += np.exp(-2000 * np.float64(SLOPES))[:, None, None] * np.asarray(pool[0])
        assert worst_state(last, wanted[None]) < 1e-5


def test_slots_are_checked_outside_jit():
    qkv, pool = inputs(3, 4)
    slopes = jnp.asarray(SLOPES)
    with pytest.raises(ValueError, match=r"got \[2\] more than once"):
        decode_api.lightning_decode(qkv, slopes, pool, np.array([2, -1, 2]))
    with pytest.raises(ValueError, match=r"got \[4, 9\]; wanted less than 4"):
        decode_api.lightning_decode(qkv, slopes, pool, np.array([9, 4, 0]))
    o, after = decode_api.lightning_decode(qkv, slopes, pool, np.array([-1, -1, 0]))
    assert np.asarray(o)[2].any()
    # Under jit the values are unknown: what lies beyond the pool must still touch nothing.
    o, after = jax.jit(decode_api.lightning_decode)(qkv, slopes, pool, jnp.array([9, 4, 0]))
    np.testing.assert_array_equal(np.asarray(o)[:2], 0)
    np.testing.assert_array_equal(after[1:], pool[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": jnp.zeros((3, 96))}, "qkv: got shape"),
        ({"qkv": jnp.zeros((3, 384), jnp.float16)}, "float16; wanted float32 or bfloat16"),
        ({"slopes": jnp.zeros((4,), jnp.bfloat16)}, "slopes: got"),
        ({"pool": jnp.zeros((4, 4, 32, 16))}, "pool: got"),
        ({"pool": jnp.zeros((4, 4, 32, 32), jnp.bfloat16)}, "pool: got"),
        ({"slots": jnp.zeros((2,), jnp.int32)}, "slots: got"),
        ({"slots": jnp.zeros((3,))}, "slots: got"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_bad_arguments_name_what_is_wrong(change, message):
    qkv, pool = inputs(3, 4)
    slots = jnp.arange(3)
    arguments = {"qkv": qkv, "slopes": jnp.asarray(SLOPES), "pool": pool, "slots": slots} | change
    positional = [arguments.pop(key) for key in ("qkv", "slopes", "pool", "slots")]
    with pytest.raises(ValueError, match=message):
        decode_api.lightning_decode(*positional, **arguments)


def test_a_named_kernel_never_falls_back():
    qkv, pool = inputs(1, 1)
    with pytest.raises(ValueError, match="interpret mode"):
        decode_api.lightning_decode(
            qkv, jnp.asarray(SLOPES), pool, jnp.zeros((1,), jnp.int32), implementation="tpu"
        )


def test_copies_wait_for_each_other():
    """Copies that run only when waited for, in memory that starts as NaN: no step may run ahead."""
    late = pltpu.InterpretParams(dma_execution_mode="on_wait", detect_races=True)
    slopes, slots = jnp.asarray(spread(32)), jnp.array([5, 3, -1, 7, 4, 1, 0, -1, 2], jnp.int32)
    qkv, pool = inputs(9, 8, 32, 16)
    wanted = decode_api.lightning_decode(qkv, slopes, pool, slots, implementation="reference")
    got = tpu_in_place.lightning_decode(qkv, slopes, pool, slots, interpret=late)
    assert worst_head(got[0], wanted[0], 32) < 1e-6
    assert worst_state(got[1], wanted[1]) < 1e-6
    pool, positions = ring_pool(pool, np.arange(8), 4), jnp.maximum(slots, 0)
    wanted = decode_ring.lightning_decode(qkv, slopes, pool, slots, positions)
    got = tpu_ring.lightning_decode(qkv, slopes, pool, slots, positions, interpret=late)
    assert worst_head(got[0], wanted[0], 32) < 1e-5
    for field in ("hi", "lo", "ring", "base"):
        wanted_field, field = getattr(wanted[1], field), getattr(got[1], field)
        np.testing.assert_allclose(np.float32(field), np.float32(wanted_field), 1e-4, 1e-4)


RING = {
    "reference": jax.jit(decode_ring.lightning_decode),
    "tpu": jax.jit(functools.partial(tpu_ring.lightning_decode, interpret=True)),
}


def ring_pool(states, lengths, window, depth=0):
    num_slots, heads, size, _ = states.shape
    pool = decode_api.init_ring_pool(num_slots, heads, size, window=window, rollback_tokens=depth)
    return decode_ring.write_states(pool, jnp.arange(num_slots), states, jnp.asarray(lengths))


@pytest.mark.parametrize("name", RING)
class TestRing:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    @pytest.mark.parametrize(("window", "depth"), [(1, 0), (4, 0), (16, 0), (4, 3), (1, 2)])
    def test_equals_the_recurrence(self, name, window, depth, dtype):
        """40 tokens of three sequences that stand at different points of the grid."""
        heads, size, slopes = 32, 8, spread(32)
        lengths, slots = np.array([3, 0, 16, 21, 5]), np.array([2, -1, 0, 3], np.int32)
        _, states = inputs(1, 5, heads, size)
        pool, wanted = ring_pool(states, lengths, window, depth), np.asarray(states)
        for t in range(40):
            qkv, _ = inputs(4, 1, heads, size, seed=t, dtype=dtype)
            kept = qkv.astype(jnp.float32).reshape(4, heads, 3, size)  # the ring rounds k and v
            kept = kept.at[:, :, 1:].set(kept[:, :, 1:].astype(jnp.bfloat16).astype(jnp.float32))
            positions = jnp.asarray(lengths[slots] + t, jnp.int32)
            o, pool = RING[name](qkv, jnp.asarray(slopes), pool, jnp.asarray(slots), positions)
            wanted_o, wanted = recurrence(kept.reshape(4, -1), slopes, wanted, slots)
            active = slots >= 0
            # hi rounds each element to 2^-9 at worst, 1.7e-3 in the mean; o itself as much again.
            assert worst_head(o[active], wanted_o[active], heads) < 5e-3
            np.testing.assert_array_equal(np.asarray(o, np.float32)[~active], 0)
        named = np.sort(slots[active])
        ends = jnp.asarray(lengths[named] + 40, jnp.int32)
        after = decode_ring.read_states(pool, jnp.asarray(slopes), jnp.asarray(named), ends)
        # Each flush rounds to 2^-18 or so of an element; there are at most 40.
        assert worst_state(after, wanted[named]) < 3e-5
        fresh = ring_pool(states, lengths, window, depth)
        for field in ("hi", "lo", "ring", "base"):
            now, then = (np.asarray(getattr(x, field))[[1, 4]] for x in (pool, fresh))
            assert now.tobytes() == then.tobytes(), field

    def test_the_grid_is_absolute_and_flushes_are_staggered(self, name):
        heads, size, window = 64, 8, 4
        _, states = inputs(1, 1, heads, size)
        pool, slots = ring_pool(states, [2], window), jnp.zeros((1,), jnp.int32)
        shift = np.arange(4) * window // 4
        flushed = []
        for position in range(2, 18):
            qkv, _ = inputs(1, 1, heads, size, seed=position, dtype=jnp.bfloat16)
            before, where = np.asarray(pool.base[0]), jnp.array([position], jnp.int32)
            _, pool = RING[name](qkv, jnp.asarray(spread(heads)), pool, slots, where)
            base = np.asarray(pool.base[0])
            flushed.append(int(np.sum(base != before)))
            assert np.all((base + shift)[base != 2] % window == 0)
            assert np.all(position + 1 - base < window)
        assert max(flushed[4:]) == 1  # one of four blocks a step
        assert sum(flushed[4:]) == 12

    @pytest.mark.parametrize("depth", [1, 3])
    def test_rollback_is_a_cursor_move(self, name, depth):
        """Drafts of `depth` tokens, rejected after every step, leave no trace."""
        heads, size, slopes = 32, 8, jnp.asarray(spread(32))
        _, states = inputs(1, 2, heads, size)
        slots = jnp.array([1], jnp.int32)

        def decode(pool, position, seed):
            qkv, _ = inputs(1, 1, heads, size, seed=seed, dtype=jnp.bfloat16)
            return RING[name](qkv, slopes, pool, slots, jnp.array([position], jnp.int32))

        plain = drafted = ring_pool(states, [0, 6], 4, depth)
        for position in range(6, 26):
            wanted, plain = decode(plain, position, position)
            o, drafted = decode(drafted, position, position)
            # Bits may differ: a draft can have flushed a block earlier than it would have been.
            assert worst_head(o, wanted, heads) < 1e-2
            for draft in range(depth):
                _, drafted = decode(drafted, position + 1 + draft, 1000 + draft)
        ends = jnp.array([26], jnp.int32)
        got, wanted = (decode_ring.read_states(x, slopes, slots, ends) for x in (drafted, plain))
        assert worst_state(got, wanted) < 3e-5

    def test_what_an_earlier_sequence_left_in_the_ring_is_not_read(self, name):
        _, states = inputs(1, 1)
        pool = ring_pool(states, [0], 4)
        pool = dataclasses.replace(pool, ring=jnp.full_like(pool.ring, jnp.nan))
        for position in range(9):
            qkv, _ = inputs(1, 1, seed=position)
            where = jnp.array([position], jnp.int32)
            o, pool = RING[name](qkv, jnp.asarray(SLOPES), pool, jnp.array([0]), where)
            assert np.isfinite(o).all()
        assert np.isfinite(np.asarray(pool.hi, np.float32)).all()


def test_bytes_per_step():
    """What the kernel copies, a head and token: hi, the ring, a row; a third plane as often."""
    assert decode_ring.bytes_per_step(128, 16) == 32768 + 16 * 512 + 512 + 3 * 32768 / 16
    ratio = decode_ring.bytes_per_step(128, 16) / decode_ring.bytes_per_step_in_place(128)
    assert ratio < 0.364
    assert decode_ring.bytes_per_step(128, 16, rollback_tokens=16) < 0.45 * 131072


def test_ring_positions_are_checked_outside_jit():
    qkv, states = inputs(2, 3)
    pool = ring_pool(states, [4, 9, 0], 4)
    slots, slopes = np.array([1, 0]), jnp.asarray(SLOPES)
    decode_api.lightning_decode_ring(qkv, slopes, pool, slots, np.array([9, 4]))
    with pytest.raises(ValueError, match=r"got \[8\] in slots \[1\]; wanted \['9..12'\]"):
        decode_api.lightning_decode_ring(qkv, slopes, pool, slots, np.array([8, 4]))
    with pytest.raises(ValueError, match=r"got \[8\] in slots \[0\]; wanted \['4..7'\]"):
        decode_api.lightning_decode_ring(qkv, slopes, pool, slots, np.array([9, 8]))
    with pytest.raises(ValueError, match="more than once"):
        decode_api.lightning_decode_ring(qkv, slopes, pool, np.array([1, 1]), np.array([9, 9]))


def decode_shapes(batch, heads, size, dtype=jnp.bfloat16, num_slots=None):
    pool = (num_slots or batch + 1, heads, size, size)
    f32, i32 = jnp.float32, jnp.int32
    return ((batch, heads * 3 * size), dtype), ((heads,), f32), (pool, f32), ((batch,), i32)


def test_the_pool_is_updated_in_place():
    shapes = decode_shapes(12, 16, 128)
    program = compile_for_chip(decode_api.lightning_decode, shapes, "v6e", donate=2)
    pool_bytes = 4 * np.prod(shapes[2][0])
    memory = program.memory_analysis()
    assert not whole_moves(program, [shapes[2][0]])
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8
    assert "lightning_decode" in program.as_text()
    kept = compile_for_chip(decode_api.lightning_decode, shapes, "v6e", donate=())
    assert whole_moves(kept, [shapes[2][0]])  # the test sees a copy where there must be one


def ring_program(chip, batch, heads, size, dtype=jnp.bfloat16, depth=0):
    pool = jax.eval_shape(
        lambda: decode_api.init_ring_pool(batch + 1, heads, size, rollback_tokens=depth)
    )
    leaves, tree = jax.tree.flatten(pool)

    def decode(qkv, slopes, slots, positions, *leaves):
        pool = jax.tree.unflatten(tree, leaves)
        return decode_api.lightning_decode_ring(qkv, slopes, pool, slots, positions)

    row, slopes, _, slots = decode_shapes(batch, heads, size, dtype)
    shapes = [row, slopes, slots, slots, *((x.shape, x.dtype) for x in leaves)]
    program = compile_for_chip(decode, shapes, chip, donate=range(4, 4 + len(leaves)))
    for leaf in (pool.hi, pool.ring):
        assert not whole_moves(program, [leaf.shape]), leaf
    return program, sum(x.size * x.dtype.itemsize for x in leaves)


def test_the_ring_pool_is_updated_in_place():
    program, pool_bytes = ring_program("v6e", 12, 16, 128)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8
    assert "lightning_decode_ring" in program.as_text()


@pytest.mark.parametrize("chip", CHIPS_IN_TURNS)
def test_decoding_compiles_for_every_generation(chip):
    for batch, heads, size, dtype in [
        (1, 64, 128, jnp.bfloat16),
        (13, 64, 128, jnp.bfloat16),
        (256, 64, 128, jnp.bfloat16),
        (32, 64, 128, jnp.float32),
        (32, 4, 128, jnp.bfloat16),  # one shard of sixteen
        (32, 16, 64, jnp.bfloat16),
        (32, 8, 256, jnp.bfloat16),
    ]:
        shapes = decode_shapes(batch, heads, size, dtype)
        program = compile_for_chip(decode_api.lightning_decode, shapes, chip, donate=2)
        assert not whole_moves(program, [shapes[2][0]]), (batch, heads, size)
        ring_program(chip, batch, heads, size, dtype)
    ring_program(chip, 32, 64, 128, depth=16)
