"""int8 experts: the rounding, and that they compute what their weights say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m1_jax
from m1_jax import checkpoint, convert, experts, quantize, sharding

NAMES = ("gate", "up", "down")


@functools.cache
def loaded(path, expert_dtype=None):
    return m1_jax.load(path, expert_dtype=expert_dtype)


def tokens_of(rows, length):
    return jnp.asarray(np.random.default_rng(0).integers(0, 512, (rows, length)), jnp.int32)


def test_rounding_is_to_the_nearest_of_255_steps():
    weights = np.random.default_rng(0).standard_normal((3, 40, 7)).astype(np.float32)
    weights[1, :, 2] = 0
    weights[2, 5, 3] = -9
    values, scale = quantize.quantize(weights)
    assert values.dtype == jnp.int8
    assert scale.shape == (3, 7)
    assert np.max(np.abs(values)) == quantize.LARGEST
    assert values[2, 5, 3] == -quantize.LARGEST
    assert np.all(np.asarray(values[1, :, 2]) == 0)
    error = np.abs(np.asarray(values) * np.asarray(scale)[:, None] - weights)
    assert np.all(error <= np.asarray(scale)[:, None] / 2 * 1.0001)


@pytest.mark.parametrize("sizes", [[5, 0, 3, 2], [0, 0, 0, 2], [300, 0, 45, 7]])
def test_backends_agree(sizes):
    rng = np.random.default_rng(0)

    def matrices(rows, columns):
        return quantize.Quantized(*quantize.quantize(rng.standard_normal((4, rows, columns))))

    gate, up, down = matrices(16, 24), matrices(16, 24), matrices(24, 16)
    num = sum(sizes)
    rows = jnp.asarray(rng.standard_normal((num, 16)), jnp.float32)
    weights = jnp.asarray(rng.random(num), jnp.float32)
    arguments = rows, gate, up, down, jnp.asarray(sizes, jnp.int32), weights
    one, two = jax.jit(experts._ragged)(*arguments), jax.jit(experts._tiled)(*arguments)
    assert np.max(np.abs(one - two)) <= 1e-5 * np.max(np.abs(two))


def test_logits_are_those_of_the_rounded_weights(golden_dir):
    small, whole = loaded(golden_dir, jnp.int8), m1_jax.load(golden_dir)
    assert small.layers[0].moe.gate.dtype == jnp.int8
    for run, same in zip(whole.layers, small.layers, strict=True):
        for name in NAMES:
            values, scale = (getattr(same.moe, n)[...] for n in (name, f"{name}_scale"))
            getattr(run.moe, name).set_value(values * scale[..., None, :])
    tokens = tokens_of(2, 30)
    np.testing.assert_allclose(small(tokens), whole(tokens), rtol=0, atol=1e-4)


def test_rounding_moves_log_probabilities_little(golden_dir):
    tokens = tokens_of(4, 60)
    one, two = (jax.nn.log_softmax(m(tokens)) for m in (loaded(golden_dir), int8(golden_dir)))
    moved = float(jnp.mean(jnp.sum(jnp.exp(one) * jnp.abs(two - one), axis=-1)))
    # 0.031 in the mean: steps are 0.6 % of a weight's spread, in 8 layers of random weights.
    assert 1e-3 < moved < 0.04


def int8(path):
    return loaded(path, jnp.int8)


def test_a_converted_directory_gives_the_same_integers(golden_dir, tmp_path):
    dst = convert.run(convert.Config(src=str(golden_dir), dst=str(tmp_path / "orbax"), to="orbax"))
    one, two = (checkpoint.parameters(int8(path)) for path in (golden_dir, dst))
    assert one.keys() == two.keys()
    for name, param in one.items():
        assert param.dtype == two[name].dtype
        np.testing.assert_array_equal(param[...], two[name][...])


def test_decoding_on_a_mesh(golden_dir):
    one = int8(golden_dir)
    mesh = sharding.make_mesh({"expert": 2, "tensor": 2}, jax.devices()[:4])
    many = m1_jax.load(golden_dir, mesh=mesh, mode="decode", expert_dtype=jnp.int8)
    gate = many.layers[0].moe.gate[...]
    assert gate.addressable_shards[0].data.size * 4 == gate.size
    tokens = tokens_of(4, 12)
    wanted, state = one.extend(tokens[:, :11], one.init_state(4, 16))
    got, other = many.extend(tokens[:, :11], many.init_state(4, 16))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    wanted, _ = one.extend(tokens[:, 11:], state)
    got, _ = many.extend(tokens[:, 11:], other)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_other_dtypes_are_refused(golden_dir):
    with pytest.raises(ValueError, match="wanted None or int8"):
        m1_jax.load(golden_dir, expert_dtype=jnp.float16)
