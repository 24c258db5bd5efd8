"""The trainer's weights in the sampler's layout and dtype."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import ModelConfig, sharding
from m1_jax import params as params_lib
from m1_jax.plan import hlo, shapes
from train import lora, optim, step
from train.rl import weight_sync

CONFIG = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    hidden_size=32,
    intermediate_size=32,
    vocab_size=64,
)
# Three repeats of the unit, with experts that are its largest parameters by far.
DEEP = dataclasses.replace(CONFIG, layer_types=("lightning", "softmax") * 3, intermediate_size=256)
KEY = jax.random.key(0)


def values(model):
    return {name: param.get_value() for name, param in params_lib.params_by_path(model).items()}


def assert_handed_over(trained, served, dtype):
    """Compare values; routers are in float32, all else in `dtype`."""
    trained, served = values(trained), values(served)
    assert trained.keys() == served.keys()
    kept = {name for name, value in served.items() if value.dtype != dtype}
    routers = {name for name in served if name.endswith("moe.router")}
    assert kept == (set() if dtype == jnp.float32 else routers)
    assert routers
    for name, value in served.items():
        wanted = np.asarray(trained[name]).astype(value.dtype)
        np.testing.assert_array_equal(np.asarray(value), wanted, err_msg=name)


ZEROS = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_samplers_copy_outlives_the_trainers_state(dtype):
    model = params_lib.random_model(CONFIG, KEY, dtype, jnp.float32)
    kept = jax.tree.map(jnp.copy, model)
    hand_over = weight_sync.WeightSync(CONFIG, dtype)
    state = step.init_state(model, optim.AdamW(1e-2))
    served = hand_over(state.model)
    after = ZEROS(state)  # as an update does, into the same memory
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(model))
    assert_handed_over(kept, served, dtype)
    assert served.dtype == dtype
    # The next weights are another copy, by the same program; the first is still the sampler's.
    again = hand_over(after.model)
    assert not any(np.asarray(x).any() for x in values(again).values())
    assert_handed_over(kept, served, dtype)
    assert hand_over.program._cache_size() == 1


def adapted(dtype, size, layout=None):
    """Return a model with adapters whose B has random entries of a size."""
    model = lora.add_adapters(
        params_lib.random_model(CONFIG, KEY, dtype, layout=layout), lora.LoraConfig(2, 4.0), KEY
    )
    for name, param in params_lib.params_by_path(model).items():
        if name.endswith("adapter.b"):
            noise = size * jax.random.normal(KEY, param.shape)
            param.set_value(jax.device_put(noise, param.get_value().sharding))
    return model


@pytest.mark.parametrize("size", [1e-6, 1e-2])
def test_what_adapters_learn_reaches_the_sampler_whole(size):
    """A step of 1e-6 is far below half a step of a bfloat16 weight."""
    model = adapted(jnp.bfloat16, size)
    sync = weight_sync.WeightSync(CONFIG, jnp.dtype(jnp.bfloat16))
    served = sync(model)
    assert sync.metrics["handover_share"] == pytest.approx(1, abs=2e-3)
    base = values(params_lib.random_model(CONFIG, KEY, jnp.bfloat16))
    for name, value in values(served).items():
        wanted = values(model)[name] if ".adapter." in name else base[name]
        np.testing.assert_array_equal(value, wanted.astype(value.dtype), err_msg=name)
    tokens = jax.random.randint(KEY, (2, 9), 0, CONFIG.vocab_size)
    np.testing.assert_array_equal(served(tokens), model(tokens))
    # The next weights go through the same program, and the trainer keeps its own.
    assert sync(adapted(jnp.bfloat16, 2 * size)).layout == served.layout
    assert sync.program._cache_size() == 1
    assert any(".adapter." in name for name in values(model))


def test_the_share_of_adapters_that_arrives():
    model = adapted(jnp.float32, 1.0)
    assert lora.measure_served_share(model, model) == pytest.approx(1, abs=1e-6)
    assert lora.measure_served_share(adapted(jnp.float32, 0.0), model) == 1  # nothing was learnt
    for factor in (0.0, 0.25, 2.0):
        other = adapted(jnp.float32, factor)
        assert lora.measure_served_share(model, other) == pytest.approx(factor, abs=1e-5)
    plain = weight_sync.WeightSync(CONFIG, jnp.dtype(jnp.float32))
    plain(params_lib.random_model(CONFIG, KEY, jnp.float32))
    assert plain.metrics == {}


def test_adapters_go_to_the_samplers_mesh():
    mesh = sharding.make_mesh({"fsdp": 4, "expert": 2})
    layout = sharding.make_layout(mesh, CONFIG, sharding.TRAIN)
    model = adapted(jnp.bfloat16, 1e-5, layout)
    serving = sharding.make_layout(
        weight_sync.make_serving_mesh(mesh, {"expert": 4, "tensor": 2}), CONFIG, sharding.DECODE
    )
    sync = weight_sync.WeightSync(CONFIG, jnp.dtype(jnp.bfloat16), serving)
    assert_handed_over(model, sync(model), jnp.bfloat16)
    assert sync.metrics["handover_share"] == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize(
    "sizes", [{"expert": 4, "tensor": 2}, {"data": 2, "expert": 2, "tensor": 2}, {}]
)
def test_from_the_trainers_mesh_to_the_samplers(sizes):
    mesh = sharding.make_mesh({"fsdp": 4, "expert": 2})
    layout = sharding.make_layout(mesh, CONFIG, sharding.TRAIN)
    model = params_lib.random_model(CONFIG, KEY, jnp.bfloat16, jnp.float32, layout)
    serving = sharding.make_layout(
        weight_sync.make_serving_mesh(mesh, sizes), CONFIG, sharding.DECODE
    )
    assert serving.mesh.devices.flat[:].tolist() == mesh.devices.flat[:].tolist()
    served = weight_sync.WeightSync(CONFIG, jnp.dtype(jnp.bfloat16), serving)(model)
    assert_handed_over(model, served, jnp.bfloat16)
    assert served.layout == serving
    wanted = values(params_lib.abstract_model(CONFIG, jnp.bfloat16, layout=serving))
    for name, value in values(served).items():
        assert value.sharding.is_equivalent_to(wanted[name].sharding, value.ndim), name
        assert (value.shape, value.dtype) == (wanted[name].shape, wanted[name].dtype)
    assert {value.sharding.mesh for value in values(model).values()} == {mesh}


# The number of expert shards falls, rises and stays.
@pytest.mark.parametrize(
    ("trained", "served"),
    [
        ({"expert": 8}, {"data": 2, "expert": 2, "tensor": 2}),
        ({"expert": 2, "context": 4}, {"expert": 8}),
        ({"expert": 2, "context": 4}, {"data": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_no_device_gathers_a_stack_of_experts(trained, served):
    mesh = sharding.make_mesh(trained)
    layout = sharding.make_layout(mesh, DEEP, sharding.TRAIN)
    model = params_lib.random_model(DEEP, KEY, jnp.bfloat16, jnp.float32, layout)
    serving = sharding.make_layout(
        weight_sync.make_serving_mesh(mesh, served), DEEP, sharding.DECODE
    )
    sync = weight_sync.WeightSync(DEEP, jnp.dtype(jnp.bfloat16), serving)
    assert_handed_over(model, sync(model), jnp.bfloat16)
    abstract = params_lib.abstract_model(DEEP, jnp.bfloat16, jnp.float32, layout)
    compiled = sync.trace(abstract).lower().compile()
    module = hlo.parse_module(compiled.as_text())
    gathered = [
        hlo.array_bytes(instruction.shape)
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("all-gather", "all-gather-start")
    ]
    # One layer's slice of the sampler is the most that a gather makes, in float32 on CPU.
    slices = []
    for param in params_lib.params_by_path(sync.abstract_model).values():
        logical_axes = param.get_metadata()["logical_axes"]
        num_layers = math.prod(param.shape[: logical_axes.count("layers")])
        slices.append(shapes.local_bytes(param.get_value()) // num_layers)
    assert 0 < max(gathered) <= 2 * max(slices)
    whole_experts = (
        DEEP.repeats * DEEP.num_local_experts * DEEP.hidden_size * DEEP.intermediate_size
    )
    assert 12 * max(slices) <= 2 * whole_experts  # so the bounds below are far from it
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * max(slices) + 16384


def test_meshes_of_the_sampler():
    mesh = sharding.make_mesh({"fsdp": 4, "expert": 2})
    plain = weight_sync.make_serving_mesh(mesh, ())
    assert dict(plain.shape) == dict.fromkeys(sharding.MESH_AXES, 1) | {"expert": 8}
    cut = weight_sync.make_serving_mesh(mesh, (("tensor", 2), ("data", 4)))
    assert dict(cut.shape) == dict.fromkeys(sharding.MESH_AXES, 1) | {"tensor": 2, "data": 4}
    assert weight_sync.make_serving_mesh(None, ()) is None
    assert weight_sync.make_serving_mesh(None, {"expert": 1}) is None


@pytest.mark.parametrize(
    "sizes", [{"expert": 4}, {"expert": 16}, {"rows": 8}, {"expert": -4, "tensor": -2}]
)
def test_meshes_that_cannot_be(sizes):
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match=r"serving mesh: got .*; wanted .* the trainer's 8 dev"):
        weight_sync.make_serving_mesh(mesh, sizes)
    with pytest.raises(ValueError, match="the trainer's 1 devices"):
        weight_sync.make_serving_mesh(None, sizes)
