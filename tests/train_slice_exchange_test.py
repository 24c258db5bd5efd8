"""Arrays moved between shardings by slices: exact values, and nothing larger than it must be."""

import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.rl import slice_exchange

STACK, EXPERTS, ROWS, COLUMNS = 24, 16, 32, 48
SHAPE = (2, STACK // 2, EXPERTS, ROWS, COLUMNS)


def make_sharding(sizes, *spec, devices=None):
    devices = np.array(devices or jax.devices()[: math.prod(sizes.values())])
    mesh = Mesh(devices.reshape(tuple(sizes.values())), tuple(sizes))
    return NamedSharding(mesh, PartitionSpec(*spec))


def move(source, target, shape=SHAPE, dtype=jnp.bfloat16):
    """Return (the program, the array before, the array after)."""
    exchange = slice_exchange.plan_exchange(shape, source, target)
    assert exchange is not None
    before = np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 251
    program = jax.jit(lambda x: exchange(x, dtype), out_shardings=target)
    compiled = program.lower(jax.device_put(before, source)).compile()
    return compiled, before, compiled(jax.device_put(before, source))


def trained(experts, context):
    sizes = {"expert": experts, "context": context}
    return make_sharding(sizes, None, None, "expert", "context", None)


def served(data, experts, tensor):
    sizes = {"data": data, "expert": experts, "tensor": tensor}
    return make_sharding(sizes, None, None, "expert", None, "tensor")


# The number of expert shards stays, falls and rises. Copies are made along `data` or nowhere.
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (trained(2, 4), served(2, 2, 2)),
        (trained(4, 2), served(1, 2, 4)),
        (trained(2, 4), served(1, 4, 2)),
        (trained(1, 8), served(4, 2, 1)),
        (trained(8, 1), served(1, 1, 8)),
        (trained(8, 1), served(8, 1, 1)),
        (served(2, 2, 2), trained(2, 4)),
        (served(1, 8, 1), served(1, 8, 1)),
    ],
    ids=lambda sharding: ",".join(f"{a}={n}" for a, n in sharding.mesh.shape.items()),
)
def test_experts_move_by_slices(source, target):
    compiled, before, after = move(source, target)
    np.testing.assert_array_equal(np.asarray(after, np.float32), before)
    assert after.sharding.is_equivalent_to(target, after.ndim)
    assert after.dtype == jnp.bfloat16
    # Temporaries are those of one entry of the stack, and not of all 24. XLA by itself takes 48 to
    # 144 entries where anything moves.
    entry = max(math.prod(s.shard_shape(SHAPE)) for s in (source, target)) // STACK * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * entry


def test_what_stays_is_copied_and_not_aliased():
    sharding = served(2, 2, 2)
    exchange = slice_exchange.plan_exchange(SHAPE, sharding, sharding)
    assert exchange is not None
    before = jax.device_put(np.ones(SHAPE, np.float32), sharding)
    after = jax.jit(lambda x: exchange(x, jnp.float32), out_shardings=sharding)(before)
    before.delete()
    assert (np.asarray(after) == 1).all()


def test_swaps_replace_gathers_where_axes_suffice():
    # Rows become whole, columns are split: as many shards before as after.
    compiled, *_ = move(trained(2, 4), served(1, 2, 4))
    assert "all-to-all" in compiled.as_text()
    assert "all-gather" not in compiled.as_text()


def random_sharding(rng, devices, ndim):
    """Return a sharding of random axes of a random mesh."""
    sizes, rest = [1], len(devices)
    while rest > 1:
        sizes.append(rng.choice([n for n in range(2, rest + 1) if rest % n == 0]))
        rest //= sizes[-1]
    rng.shuffle(sizes)
    names = list("abcdefg"[: len(sizes)])
    spec = [[] for _ in range(ndim)]
    for name in rng.sample(names, len(names)):
        if rng.random() < 0.75:
            rng.choice(spec).append(name)
    entries = (tuple(axes) or None for axes in spec)
    return make_sharding(dict(zip(names, sizes, strict=True)), *entries, devices=devices)


@pytest.mark.parametrize(("num_devices", "seed"), [(8, 0), (8, 1), (6, 2), (4, 3)])
def test_random_shardings(num_devices, seed):
    rng = random.Random(seed)
    devices, shape, found = jax.devices()[:num_devices], (24, 16, 48), 0
    for _ in range(12):
        source, target = (random_sharding(rng, devices, len(shape)) for _ in range(2))
        try:
            for sharding in (source, target):
                sharding.shard_shape(shape)
        except ValueError:  # sizes that their axes do not divide
            continue
        if slice_exchange.plan_exchange(shape, source, target) is None:
            assert num_devices == 6, "powers of two have their factors in any order"
            continue
        _, before, after = move(source, target, shape, jnp.float32)
        np.testing.assert_array_equal(np.asarray(after), before)
        assert after.sharding.is_equivalent_to(target, after.ndim)
        found += 1
    assert found > 2


def test_factors_in_another_order_have_no_plan():
    source = make_sharding({"a": 2, "b": 3}, "a", "b")
    assert slice_exchange.plan_exchange((6, 6), source, make_sharding({"a": 3, "b": 2})) is None
    one_dim = make_sharding({"a": 2, "b": 3}, ("a", "b"), None)
    other = make_sharding({"a": 2, "b": 3}, ("b", "a"), None)
    assert slice_exchange.plan_exchange((6, 6), one_dim, other) is None
