"""Decoding lightning attention in a slot pool, against a float64 recurrence and the XLA form."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from pallas_kernels.lightning_attention import decode_api, tpu_decode

# The release's fastest and slowest head, one between, and what a lightning last layer would have.
SLOPES = np.array([0.917, 0.0039, 4.949e-5, 3.9e-8], np.float32)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def interpreted(*args):
    return tpu_decode.lightning_decode(*args, interpret=True)


KERNELS = {"reference": decode_api.DECODE["reference"], "tpu": interpreted}


def inputs(batch, num_slots, heads=4, size=32, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((batch, heads * 3 * size)).astype(np.float32)
    pool = rng.standard_normal((num_slots, heads, size, size)).astype(np.float32)
    return jnp.asarray(qkv, dtype), jnp.asarray(pool)


def spread(heads):
    return np.resize(SLOPES, heads)


def recurrence(qkv, slopes, pool, slots):
    """One token in float64 numpy."""
    pool, num_heads = np.asarray(pool, np.float64).copy(), len(slopes)
    x = np.asarray(qkv.astype(jnp.float32), np.float64).reshape(len(slots), num_heads, 3, -1)
    o = np.zeros((len(slots), num_heads, x.shape[3]))
    for row, slot in enumerate(slots):
        for head in range(num_heads):
            if slot >= 0:
                q, k, v = x[row, head]
                state = np.exp(-np.float64(slopes[head])) * pool[slot, head] + np.outer(k, v)
                pool[slot, head], o[row, head] = state, q @ state
    return o.reshape(len(slots), -1), pool


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def worst_head(got, wanted, heads):
    """Largest relative error of any head of states [slots, N, H, H] or outputs [B, N*H]."""
    got, wanted = (
        np.asarray(x.astype(np.float32)) if x.dtype == jnp.bfloat16 else np.asarray(x)
        for x in (got, wanted)
    )
    split = [x.reshape(x.shape[0], heads, -1) for x in (got, wanted)]
    return max(relative(split[0][:, head], split[1][:, head]) for head in range(heads))


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
        assert worst_head(after, wanted_pool, heads) < 1e-6
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
        assert worst_head(after, wanted_pool, 4) < 1e-6

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
        assert worst_head(last, wanted[None], 4) < 1e-5


def test_slots_are_checked_outside_jit():
    qkv, pool = inputs(3, 4)
    slopes = jnp.asarray(SLOPES)
    with pytest.raises(ValueError, match=r"\[2\] named more than once"):
        decode_api.lightning_decode(qkv, slopes, pool, np.array([2, -1, 2]))
    with pytest.raises(ValueError, match=r"got \[4, 9\]; the pool has 4"):
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


def compiled(function, shapes, chip, donate):
    """Compile for a TPU that is not there; return the optimized HLO."""
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    traced = jax.jit(function, donate_argnums=donate).trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def decode_shapes(batch, heads, size, dtype=jnp.bfloat16, num_slots=None):
    pool = (num_slots or batch + 1, heads, size, size)
    f32, i32 = jnp.float32, jnp.int32
    return ((batch, heads * 3 * size), dtype), ((heads,), f32), (pool, f32), ((batch,), i32)


def moved_whole(program, shape):
    """Return the instructions of the optimized HLO that copy or pad an array of this shape."""
    shape = re.escape(f"[{','.join(map(str, shape))}]")
    return re.findall(rf"= \S*{shape}\S* (?:copy|pad|fusion|transpose)\S*\(.*", program.as_text())


def test_the_pool_is_updated_in_place():
    shapes = decode_shapes(12, 16, 128)
    program = compiled(decode_api.lightning_decode, shapes, "v6e", donate=2)
    pool_bytes = 4 * np.prod(shapes[2][0])
    memory = program.memory_analysis()
    assert not moved_whole(program, shapes[2][0])
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 8
    assert "lightning_decode" in program.as_text()
    kept = compiled(decode_api.lightning_decode, shapes, "v6e", donate=())
    assert moved_whole(kept, shapes[2][0])  # the test sees a copy where there must be one


@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
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
        program = compiled(decode_api.lightning_decode, shapes, chip, donate=2)
        assert not moved_whole(program, shapes[2][0]), (batch, heads, size)
