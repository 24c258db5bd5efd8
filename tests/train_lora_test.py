"""LoRA on a tiny model: what is trained, what is left alone, and the merged weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import params_support
import pytest

import m1_jax
from m1_jax import convert, sharding, testing
from m1_jax import params as params_lib
from m1_jax.checkpoints import save as save_lib
from train import lora, optim, step, trainable
from train.data import batch as batch_lib

ROWS, LENGTH, VOCAB = 4, 12, 512
_HF = testing.tiny_config(attn_type_list=[0, 1], num_local_experts=4)
_LORA = lora.LoraConfig(rank=4, alpha=8.0)
_SETTINGS = step.TrainStepSettings(optim.AdamW(1e-2, weight_decay=0.1))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A release of a lightning and a softmax layer; read only."""
    directory = tmp_path_factory.mktemp("source") / "release"
    testing.write_release(directory, _HF, testing.random_tensors(_HF))
    return testing.write_tiny_tokenizer(directory)


@pytest.fixture(scope="module")
def base(source):
    return m1_jax.load(source)


def _adapted(model, settings=_LORA):
    return lora.add_adapters(model, settings, jax.random.key(1))


def _moved(model):
    """Return a copy with other adapters, B too: large changes, for a trained B is small."""
    model = jax.tree.map(jnp.copy, model)
    rng = np.random.default_rng(0)
    for name, param in _adapters(model).items():
        old, noise = param.get_value(), rng.standard_normal(param.shape, np.float32)
        scale = 0.1 if name.endswith(".b") else old.shape[-2] ** -0.5
        param.set_value(jax.device_put(scale * noise, old.sharding))
    return model


def _int8(config):
    return params_lib.abstract_model(config, weights="int8-all")


def _adapters(model):
    return {k: v for k, v in params_lib.params_by_path(model).items() if ".adapter." in k}


def _batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    ids = np.ones((ROWS, LENGTH), np.int32)
    ids[0, 9:] = 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    arrays = (tokens[:, :-1], ids, positions, tokens[:, 1:], (ids > 0).astype(np.float32))
    return batch_lib.TrainBatch(*map(jnp.asarray, arrays))


def _mesh_layout(config):
    return sharding.make_layout(sharding.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2}), config)


@functools.partial(jax.jit, static_argnames="settings")
def _gradients(model, batch, settings):
    return step.compute_gradients(model, batch, settings)


# ---- the model


def test_at_first_nothing_changes(base):
    tokens = _batch().tokens
    model = _adapted(base)
    np.testing.assert_array_equal(model(tokens), base(tokens))
    assert not _adapters(base)
    assert trainable.partition(base)[1].head.kernel.get_value() is None  # base itself is not frozen


def test_adapters_are_where_they_are_asked_for(base):
    def where(modules):
        names = _adapters(_adapted(base, lora.LoraConfig(modules=modules)))
        return sorted(name.removesuffix(".adapter.a") for name in names if name.endswith(".a"))

    lightning = [f"layers.0.attention.{name}" for name in ("gate", "out", "qkv")]
    softmax = [f"layers.1.attention.{name}" for name in ("key", "out", "query", "value")]
    assert where(_LORA.modules) == lightning + softmax
    assert where("qkv|query$") == ["layers.0.attention.qkv", "layers.1.attention.query"]


def test_a_shared_expert_may_have_adapters():
    hf = testing.tiny_config(attn_type_list=[0], shared_intermediate_size=8)
    config = m1_jax.ModelConfig.from_hf(hf)
    model = params_lib.random_model(config, jax.random.key(0), jnp.float32)
    model = _adapted(model, lora.LoraConfig(modules=r"shared\."))
    assert {name.rsplit(".", 2)[0] for name in _adapters(model)} == {
        f"layers.0.moe.shared.{name}" for name in ("gate", "up", "down")
    }


def test_prefill_and_decoding_use_the_adapters(base):
    model, tokens = _moved(_adapted(base)), _batch().tokens
    wanted = model(tokens)
    assert np.max(np.abs(wanted - base(tokens))) > 0.1
    logits, state = model.extend(tokens[:, :-1], model.init_state(ROWS, LENGTH))
    last, _ = model.extend(tokens[:, -1:], state)
    got = jnp.concatenate([logits, last], axis=1)
    np.testing.assert_allclose(got, wanted, atol=testing.TOLERANCES["logits"])


# ---- training


def test_only_adapters_change_and_the_loss_falls(source):
    """Over a frozen bfloat16 model, computing in bfloat16."""
    settings = dataclasses.replace(_SETTINGS, accumulate=2)
    model = _adapted(m1_jax.load(source, jnp.bfloat16))
    before = params_support.param_values(model)
    state = step.init_state(model, settings.optimizer)
    sizes = sum(p.get_value().size for p in _adapters(model).values())
    assert sum(x.size for x in jax.tree.leaves(state.moments[0].mu)) == sizes
    losses = []
    for _ in range(15):
        state, metrics = step.train_step(state, _batch(), settings=settings)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    for name, value in params_support.param_values(state.model).items():
        assert value.dtype == before[name].dtype
        assert np.array_equal(value, before[name]) == (".adapter." not in name), name


def test_gradients_are_those_of_the_product_and_no_others(base):
    """dA = scale dW B^T and dB = scale A^T dW, with dW from the merged model."""
    model = _moved(_adapted(base))
    program, all_of_it = (
        _gradients.lower(net, _batch(), _SETTINGS).compile()
        for net in (model, lora.merge_adapters(model))
    )
    got, whole = program(model, _batch())[0], all_of_it(lora.merge_adapters(model), _batch())[0]
    whole, params = params_support.param_values(whole), params_support.param_values(model)
    for name, grad in _adapters(got).items():
        path, which = name.rsplit(".adapter.", 1)
        d_kernel = whole[f"{path}.kernel"]
        other = params[f"{path}.adapter.{'b' if which == 'a' else 'a'}"].swapaxes(-1, -2)
        wanted = 2.0 * (d_kernel @ other if which == "a" else other @ d_kernel)
        error = np.linalg.norm(grad.get_value() - wanted) / np.linalg.norm(wanted)
        assert error < testing.TOLERANCES["gradients"], name
    # The compiler's count: the products for gradients of frozen weights are not there.
    flops = [compiled.cost_analysis()["flops"] for compiled in (program, all_of_it)]
    assert flops[0] < 0.8 * flops[1]


# ---- merging


def test_merged_weights_give_the_same_logits(base):
    model, tokens = _moved(_adapted(base)), _batch().tokens
    merged = lora.merge_adapters(model)
    np.testing.assert_allclose(merged(tokens), model(tokens), atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert _adapters(model)


def test_merging_into_float32_keeps_what_bfloat16_rounds_off(base):
    def to_dtype(dtype):
        return jax.tree.map(lambda x: x.astype(dtype), base)

    coarse = jax.tree.map(lambda x: x, _moved(_adapted(to_dtype(jnp.bfloat16))))
    for linear in lora._find_linears(coarse).values():
        if linear.adapter is not None:
            linear.adapter.b.set_value(linear.adapter.b.get_value() * 1e-4)
    path, linear = next(
        (path, linear) for path, linear in lora._find_linears(coarse).items() if linear.adapter
    )
    kernel = np.asarray(linear.kernel.get_value(), np.float32)
    for dtype, is_kept in ((None, False), (jnp.float32, True)):
        merged = lora._find_linears(lora.merge_adapters(coarse, dtype))[path].kernel.get_value()
        assert merged.dtype == (dtype or jnp.bfloat16)
        changed = np.mean(np.asarray(merged, np.float32) != kernel)
        assert changed > 0.9 if is_kept else changed < 0.1


def test_the_merged_model_is_saved_and_exported(source, base, tmp_path):
    model, tokens = _moved(_adapted(base)), _batch().tokens
    with pytest.raises(ValueError, match="adapter"):
        save_lib.save(model, tmp_path / "saved", source)
    merged = lora.merge_adapters(model)
    saved = save_lib.save(merged, tmp_path / "saved", source)
    back = convert.run(
        convert.ConvertConfig("hf", str(saved), str(tmp_path / "back"), progress=False)
    )
    for path in (saved, back):
        np.testing.assert_array_equal(m1_jax.load(path)(tokens), merged(tokens))


# ---- on a mesh


def test_a_mesh_computes_what_one_device_does(source, base):
    batch, layout = _batch(), _mesh_layout(base.config)
    one = _moved(_adapted(base))
    many = _adapted(m1_jax.load(source, mesh=layout.mesh))
    for name, param in _adapters(many).items():
        shape = param.get_value().sharding.shard_shape(param.shape)
        # A lies with W's rows, B with its columns.
        assert np.prod(shape) * (1 if name.endswith("out.adapter.b") else 2) <= param.size
    many = _moved(many)
    logits = one(batch.tokens)
    np.testing.assert_allclose(many(batch.tokens), logits, atol=1e-5)
    np.testing.assert_allclose(lora.merge_adapters(many)(batch.tokens), logits, atol=1e-5)

    where = [leaf.sharding for leaf in jax.tree.leaves(many)]
    planned = jax.tree.leaves(step.abstract_state(many, _SETTINGS.optimizer).moments)
    spread = jax.device_put(batch, layout.activation_sharding("batch", "length"))
    (first, numbers), (state, metrics) = (
        step.train_step(
            jax.jit(step.init_state, static_argnums=1)(net, _SETTINGS.optimizer), part, _SETTINGS
        )
        for net, part in ((jax.tree.map(jnp.copy, one), batch), (many, spread))
    )
    for name in numbers:
        np.testing.assert_allclose(metrics[name], numbers[name], rtol=1e-5)
    # A first moment is a tenth of the gradient.
    for a, b in zip(*(jax.tree.leaves(x.moments[0].mu) for x in (first, state)), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    for leaf, place in zip(jax.tree.leaves(state.model), where, strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    for leaf, plan in zip(jax.tree.leaves(state.moments), planned, strict=True):
        assert leaf.shape == plan.shape
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: lora.LoraConfig(rank=0), "got rank 0"),
        (lambda _: lora.LoraConfig(alpha=0.0), "alpha 0.0"),
        (lambda _: lora.LoraConfig(modules="("), "no regular expression"),
        (
            lambda base: _adapted(base, lora.LoraConfig(modules="router")),
            "'router' is found in none of",
        ),
        (lambda base: _adapted(_adapted(base)), "has adapters already"),
        (lambda base: _adapted(_int8(base.config)), "int8 weights, which are for inference"),
        (
            lambda base: lora.merge_adapters(_int8(base.config)),
            "int8 weights, which are for inference",
        ),
    ],
)
def test_wrong_values_are_refused_in_words(base, make, words):
    with pytest.raises(ValueError, match=words):
        make(base)
