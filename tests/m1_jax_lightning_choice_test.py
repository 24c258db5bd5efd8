"""Which implementation of lightning attention runs: by device, config, flag and argument."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import batch_input, generate
from m1_jax import ModelConfig, command_mesh, config, lightning, sharding, verify
from m1_jax import params as params_lib
from m1_jax.plan import topology
from pallas_kernels.lightning_attention import api, tiling

# The narrowest head that the kernels take. Two devices may share the heads.
CONFIG = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    num_attention_heads=4,
    head_dim=64,
)
TOKENS = jax.ShapeDtypeStruct((4, 128), jnp.int32)


def lower_forward(model_config, layout=None, platform="tpu"):
    """Return the text of the forward pass, lowered for a platform."""
    model = params_lib.abstract_model(model_config, jnp.bfloat16, layout=layout)
    if layout is None:  # the shapes are those of a device that the platform need not have
        model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model)
        tokens = TOKENS
    else:
        where = layout.activation_sharding("batch", "length")
        tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype, sharding=where)
    traced = jax.jit(lambda model, tokens: model(tokens)).trace(model, tokens)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def make_layout(name, sizes):
    pytest.importorskip("libtpu")
    devices = topology.get_slice_devices(topology.parse_slice(name))
    return sharding.make_layout(sharding.make_mesh(sizes, devices), CONFIG, sharding.PREFILL)


def test_the_config_knows_the_implementations():
    assert tuple(api.IMPLEMENTATIONS) == config.LIGHTNING_IMPLEMENTATIONS
    assert ModelConfig.m1().lightning_implementation is None
    with pytest.raises(config.ConfigError, match="lightning_implementation.*'fast'.*chunked"):
        dataclasses.replace(CONFIG, lightning_implementation="fast")


@pytest.mark.parametrize(
    ("choice", "platform", "has_kernel"),
    [(None, "tpu", True), (None, "cpu", False), ("chunked", "tpu", False), ("tpu", "tpu", True)],
)
def test_without_a_mesh_the_lowering_decides(choice, platform, has_kernel):
    chosen = dataclasses.replace(CONFIG, lightning_implementation=choice)
    assert ("lightning_fwd" in lower_forward(chosen, platform=platform)) == has_kernel


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_on_a_mesh_of_tpus_the_kernels_run(name):
    layout = make_layout(name, {"tensor": 2, "expert": -1})
    assert "lightning_fwd" in lower_forward(CONFIG, layout)
    chunked = dataclasses.replace(CONFIG, lightning_implementation="chunked")
    assert "lightning_fwd" not in lower_forward(chunked, layout)
    assert lightning.resolve_implementation(CONFIG, jnp.bfloat16, layout) == "tpu"
    assert lightning.resolve_implementation(chunked, jnp.bfloat16, layout) == "chunked"


def test_a_tpu_without_kernels_and_a_narrow_head_take_the_form_in_xla(monkeypatch):
    layout = make_layout("v5e:2x2", {"expert": 4})
    narrow = dataclasses.replace(CONFIG, head_dim=32)
    assert lightning.resolve_implementation(narrow, jnp.bfloat16, layout) == "chunked"
    monkeypatch.setattr(tiling, "KINDS", {})  # as libtpu's other TPUs, such as v4
    assert lightning.resolve_implementation(CONFIG, jnp.bfloat16, layout) == "chunked"
    assert "lightning_fwd" not in lower_forward(CONFIG, layout)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "expert": 2}])
def test_on_cpu_the_default_has_the_bits_of_chunked(sizes):
    layout = None
    if sizes is not None:
        mesh = sharding.make_mesh(sizes, jax.devices()[:4])
        layout = sharding.make_layout(mesh, CONFIG, sharding.TRAIN)
    tokens = jax.random.randint(jax.random.key(1), TOKENS.shape, 0, CONFIG.vocab_size)
    results = []
    for choice in (None, "chunked"):
        chosen = dataclasses.replace(CONFIG, lightning_implementation=choice)
        assert lightning.resolve_implementation(chosen, jnp.float32, layout) == "chunked"
        model = params_lib.random_model(chosen, jax.random.key(0), jnp.float32, jnp.float32, layout)
        loss, gradients = jax.jit(jax.value_and_grad(lambda m: jnp.var(m(tokens))))(model)
        results.append(jax.tree.leaves((loss, gradients)))
    for default, chunked in zip(*results, strict=True):
        np.testing.assert_array_equal(default, chunked)


def test_on_a_mesh_of_cpus_no_kernel_is_traced():
    mesh = sharding.make_mesh({"expert": 2}, jax.devices()[:2])
    layout = sharding.make_layout(mesh, CONFIG, sharding.PREFILL)
    model = params_lib.abstract_model(CONFIG, jnp.float32, layout=layout)
    assert "pallas_call" not in str(
        jax.make_jaxpr(lambda m, t: m(t))(model, jnp.zeros((2, 8), int))
    )


def test_what_runs_is_logged_once(caplog):
    api._choose_implementation.cache_clear()
    layout = make_layout("v5p:2x2x1", {"expert": 4})
    with caplog.at_level(logging.INFO, logger=api.__name__):
        for _ in range(2):
            lower_forward(CONFIG, layout)
    assert caplog.messages == ["lightning attention: Pallas kernels for tpu"]


@pytest.mark.parametrize("make", [generate.GenerateConfig, batch_input.BatchConfig])
def test_flags_of_commands(make):
    required = {"checkpoint": "DIR", "input": "a.jsonl", "output": "b.jsonl", "prompt": "Hi"}
    names = {field.name for field in dataclasses.fields(make)}
    required = {name: value for name, value in required.items() if name in names}
    assert make(**required, lightning="chunked").model_choice.lightning == "chunked"
    assert make(**required).model_choice.lightning is None
    with pytest.raises(ValueError, match="--lightning: got 'fast'; wanted one of .*chunked"):
        make(**required, lightning="fast")


def test_flag_of_verify():
    with pytest.raises(ValueError, match="--lightning: got 'fast'"):
        verify.VerifyConfig("DIR", "golden.npz", lightning="fast")
    command_mesh.check_model_flags(None, None, "tpu")
