"""int8 weights: the rounding, what each recipe rounds, and that models compute what they say."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from params_support import param_values

import m1_jax
from m1_jax import convert, experts, layers, quantize, sharding, testing
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release

EXPERTS, ALL = quantize.INT8_RECIPES
EXPERT_NAMES = {"moe.gate", "moe.up", "moe.down"}
SHARED_NAMES = {f"moe.shared.{name}.kernel" for name in ("gate", "up", "down")}
LIGHTNING_NAMES = {f"attention.{name}.kernel" for name in ("qkv", "gate", "out")}
SOFTMAX_NAMES = {f"attention.{name}.kernel" for name in ("query", "key", "value", "out")}
INT8_IN_ALL = (
    {f"layers.0.{name}" for name in EXPERT_NAMES | SHARED_NAMES | LIGHTNING_NAMES}
    | {f"layers.1.{name}" for name in EXPERT_NAMES | SHARED_NAMES | SOFTMAX_NAMES}
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A float32 release of a lightning and a softmax layer with shared experts."""
    hf = testing.tiny_config(attn_type_list=[0, 1], shared_intermediate_size=96)
    tensors = testing.random_tensors(hf)
    tensors = {name: np.asarray(value, np.float32) * 1.001 for name, value in tensors.items()}
    directory = tmp_path_factory.mktemp("source") / "release"
    return testing.write_release(directory, hf, tensors)


@functools.cache
def loaded(path, weights=None):
    return m1_jax.load(path, weights=weights)


def int8_names(model):
    return {name for name, value in param_values(model).items() if value.dtype == jnp.int8}


def restored(path, weights):
    """Return the float32 model of the weights that a recipe's integers stand for."""
    model, values = m1_jax.load(path), param_values(loaded(path, weights))
    for name, param in params_lib.params_by_path(model).items():
        if values[name].dtype == jnp.int8:
            whole = values[name] * values[f"{name}_scale"][..., None, :]
            param.set_value(jnp.asarray(whole))
    return model


def tokens_of(rows, length):
    return jnp.asarray(np.random.default_rng(0).integers(0, 512, (rows, length)), jnp.int32)


# ---- rounding


def test_rounding_is_to_the_nearest_of_255_steps():
    weights = np.random.default_rng(0).standard_normal((3, 40, 7)).astype(np.float32)
    weights[1, :, 2] = 0
    weights[2, 5, 3] = -9
    values, scale = quantize.quantize_columns(weights)
    assert (values.dtype, scale.dtype) == (np.int8, np.float32)
    assert scale.shape == (3, 7)
    assert np.max(np.abs(values)) == quantize.MAX_INT8
    assert values[2, 5, 3] == -quantize.MAX_INT8
    assert np.all(values[1, :, 2] == 0)
    assert scale[1, 2] == 1
    assert np.all(np.abs(values * scale[:, None] - weights) <= scale[:, None] / 2 * 1.0001)


def test_rounding_of_columns_that_are_hardly_numbers():
    weights = np.ones((5, 3), np.float32)
    weights[2] = 190 * 2.0**-149, np.nan, np.inf  # 190 / 127 subnormal steps is 1
    values, scale = map(jnp.asarray, quantize.quantize_columns(weights[2:3]))
    assert values[0, 0] == quantize.MAX_INT8
    for column in (1, 2):
        own = slice(column, column + 1)
        product = quantize.scaled_matmul(jnp.ones((1, 1)), values[:, own], scale[own])
        assert not np.all(np.isfinite(product))


@pytest.mark.parametrize("sizes", [[5, 0, 3, 2], [0, 0, 0, 2], [300, 0, 45, 7]])
def test_backends_agree(sizes):
    rng = np.random.default_rng(0)

    def matrices(rows, columns):
        values, scale = quantize.quantize_columns(rng.standard_normal((4, rows, columns)))
        return quantize.QuantizedMatrices(jnp.asarray(values), jnp.asarray(scale))

    gate, up, down = matrices(16, 24), matrices(16, 24), matrices(24, 16)
    num = sum(sizes)
    rows = jnp.asarray(rng.standard_normal((num, 16)), jnp.float32)
    weights = jnp.asarray(rng.random(num), jnp.float32)
    # bfloat16 rounds gate, up, hidden and output by 2^-9 each; sums may do so in another order.
    for dtype, error in ((jnp.float32, 1e-5), (jnp.bfloat16, 4 * 2**-9)):
        arguments = rows.astype(dtype), gate, up, down, jnp.asarray(sizes, jnp.int32), weights
        one, two = (
            jax.jit(f)(*arguments)
            for f in (lambda *x: experts._grouped_mlp_ragged(*x)[0], experts.grouped_mlp)
        )
        one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
        assert np.max(np.abs(one - two)) <= error * np.max(np.abs(two))


# ---- a model


def test_recipes_round_what_they_say(source):
    small, every, whole = (
        param_values(loaded(source, weights)) for weights in (EXPERTS, ALL, None)
    )
    assert int8_names(loaded(source, ALL)) == INT8_IN_ALL
    assert int8_names(loaded(source, EXPERTS)) == {
        name for name in INT8_IN_ALL if name.split(".", 2)[2] in EXPERT_NAMES
    }
    for values in (small, every):
        for name, value in values.items():
            if value.dtype == jnp.int8:
                scale = values[f"{name}_scale"][..., None, :]
                assert np.all(np.abs(value * scale - whole[name]) <= scale / 2 * 1.0001), name
            elif not name.endswith("_scale"):
                np.testing.assert_array_equal(value, whole[name])
    for name in int8_names(loaded(source, EXPERTS)):  # one rounding for both
        np.testing.assert_array_equal(small[name], every[name])


def test_sizes(source):
    """A byte a weight and four a column, by the shapes of the whole model."""
    whole = param_values(loaded(source))
    for weights in (EXPERTS, ALL):
        model = loaded(source, weights)
        saved = sum(
            3 * whole[n].size - 4 * whole[n].size // whole[n].shape[-2] for n in int8_names(model)
        )
        got = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
        assert got == sum(value.nbytes for value in whole.values()) - saved


@pytest.mark.parametrize("weights", [EXPERTS, ALL])
def test_logits_are_those_of_the_rounded_weights(source, weights):
    small, same = loaded(source, weights), restored(source, weights)
    tokens = tokens_of(2, 30)
    wanted = same(tokens)
    assert np.max(np.abs(wanted - loaded(source)(tokens))) > 0.01
    np.testing.assert_allclose(small(tokens), wanted, rtol=0, atol=1e-4)
    logits, state = small.extend(tokens[:, :29], small.init_state(2, 30))
    last, _ = small.extend(tokens[:, 29:], state)
    np.testing.assert_allclose(jnp.concatenate([logits, last], 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_projection_is_summed_in_float32_and_scaled_once(dtype):
    """Also below an adapter, whose product is added to it."""
    rng = np.random.default_rng(0)
    values, scale = quantize.quantize_columns(rng.standard_normal((512, 6)))
    x = jnp.asarray(rng.standard_normal((2, 3, 512)), dtype)
    linear = layers.Linear(
        nnx.Rngs(0), 512, 6, ("embed", "heads"), std=0.1, param_dtype=jnp.float32
    )
    linear.kernel.set_value(jnp.asarray(values))
    linear.kernel_scale = nnx.Param(jnp.asarray(scale))
    exact = np.asarray(x, np.float64) @ (values * scale.astype(np.float64))
    half_step = float(jnp.finfo(dtype).eps) / 2
    error = 1e-5 * np.max(np.abs(exact)) + half_step * np.abs(exact)
    assert np.all(np.abs(np.asarray(linear(x), np.float64) - exact) <= error)
    a, b = (nnx.Param(jnp.asarray(rng.standard_normal(s), dtype)) for s in ((512, 2), (2, 6)))
    before = linear(x)
    linear.adapter = layers.LoraAdapter(a, b, 0.5)
    np.testing.assert_array_equal(linear(x), before + linear.adapter(x))


def noisy(path, weights, seed):
    """Return the float32 model with random errors: each uniform in half a step either way."""
    model, values = m1_jax.load(path), param_values(loaded(path, weights))
    rng = np.random.default_rng(seed)
    for name, param in params_lib.params_by_path(model).items():
        if values[name].dtype == jnp.int8:
            half = values[f"{name}_scale"][..., None, :] / 2
            noise = rng.uniform(-1, 1, param.shape).astype(np.float32) * half
            param.set_value(param[...] + noise)
    return model


@pytest.mark.parametrize("weights", [EXPERTS, ALL])
def test_the_golden_log_probabilities_move_as_by_random_halves_of_a_step(golden_dir, weights):
    """Nothing but rounding may move them, and rounding is noise, uniform in half a step.

    Of three draws of such noise the means of |error| lie within 20 % of each other; a wrong scale
    or axis is tenfold.
    """
    with np.load(golden_dir / "golden.npz") as file:
        tokens, wanted = file["input_ids"][:, :300], file["next_token_logprobs"][:, :299]
    tokens = jnp.asarray(tokens)

    def error(model):
        got = jax.nn.log_softmax(model(tokens)[:, :-1])
        got = jnp.take_along_axis(got, tokens[:, 1:, None], axis=-1)[..., 0]
        return float(jnp.mean(jnp.abs(got - wanted)))

    assert error(loaded(golden_dir)) < 1e-4
    by_noise = [error(noisy(golden_dir, weights, seed)) for seed in range(3)]
    got = error(loaded(golden_dir, weights))
    assert 0.8 * min(by_noise) < got < 1.25 * max(by_noise)


# ---- loading


def test_one_matrix_at_a_time(source, monkeypatch):
    seen, whole = [], quantize.quantize_columns
    monkeypatch.setattr(quantize, "quantize_columns", lambda x: (seen.append(x.shape), whole(x))[1])
    m1_jax.load(source, weights=ALL)
    assert len(seen) == 2 * (3 * loaded(source).config.num_local_experts + 3) + 3 + 4
    assert {len(shape) for shape in seen} == {2}


def test_integers_are_those_of_the_stored_weights(source, tmp_path):
    """Whatever the directory's form and the dtype of the computation."""
    dst = convert.run(
        convert.ConvertConfig(src=str(source), dst=str(tmp_path / "orbax"), to="orbax")
    )
    wanted = param_values(loaded(source, ALL))
    for path, dtype in ((dst, jnp.float32), (source, jnp.bfloat16), (dst, jnp.bfloat16)):
        got = param_values(m1_jax.load(path, dtype, weights=ALL))
        assert got.keys() == wanted.keys()
        for name in INT8_IN_ALL | {f"{name}_scale" for name in INT8_IN_ALL}:
            assert got[name].dtype == wanted[name].dtype
            np.testing.assert_array_equal(got[name], wanted[name])


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("decode", {"expert": 2, "tensor": 2}),
        ("decode", {"data": 2, "context": 2, "tensor": 2}),
        ("prefill", {"context": 2, "expert": 2}),
        ("train", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_a_mesh_has_the_same_numbers_and_computes_with_them(source, mode, sizes):
    one = loaded(source, ALL)
    mesh = sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    many = m1_jax.load(source, mesh=mesh, mode=mode, weights=ALL)
    for name, param in params_lib.params_by_path(many).items():
        np.testing.assert_array_equal(param[...], params_lib.params_by_path(one)[name][...])
        axes = param.get_metadata()["logical_axes"]
        assert param.get_value().sharding.is_equivalent_to(
            sharding.make_param_sharding(many.layout, axes, param.shape), param.ndim
        )
    params = params_lib.params_by_path(many)
    for name in INT8_IN_ALL:
        *rest, _, columns = params[name].get_value().sharding.shard_shape(params[name].shape)
        scale = params[f"{name}_scale"].get_value()
        assert scale.sharding.shard_shape(scale.shape) == (*rest, columns)
    tokens = tokens_of(4, 12)
    wanted, state = one.extend(tokens[:, :11], one.init_state(4, 16))
    if mode == "train":
        np.testing.assert_allclose(many(tokens)[:, :11], wanted, rtol=0, atol=1e-4)
        return
    got, other = many.extend(tokens[:, :11], many.init_state(4, 16))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
    wanted, _ = one.extend(tokens[:, 11:], state)
    got, _ = many.extend(tokens[:, 11:], other)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("int8-expert", "got 'int8-expert'; wanted None, int8-experts or int8-all; did you mean "
         "int8-experts?"),
        ("int8_all", "did you mean int8-all?"),
        ("fp4", "None leaves weights as they are"),
        ("", "got ''"),
        (jnp.int8, "int8-experts or int8-all"),
    ],
)  # fmt: skip
def test_other_recipes_are_refused_before_anything_is_read(name, words, tmp_path):
    with pytest.raises(ValueError, match="weights: ") as error:
        m1_jax.load(tmp_path / "nowhere", weights=name)
    assert words in str(error.value)


def test_a_damaged_matrix_is_named(source, tmp_path):
    dst = convert.run(
        convert.ConvertConfig(src=str(source), dst=str(tmp_path / "orbax"), to="orbax")
    )
    chunks = dst / format_lib.PARAMS_DIR / "layers.0.moe.up" / "c"
    file = sorted(path for path in chunks.rglob("*") if path.is_file())[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(release.CheckpointError, match=r"layers\.0\.moe\.up"):
        m1_jax.load(dst, weights=EXPERTS)
