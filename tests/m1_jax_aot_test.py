"""The released size compiles for a TPU pod, on a machine without one."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from m1_jax import ModelConfig, checkpoint, sharding

HBM_GIB = 95  # of one v5p chip


@pytest.mark.slow
def test_full_size_forward_and_decode_compile_for_v5p():
    pytest.importorskip("libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices
    mesh = Mesh(np.array(devices).reshape(4, 4, 4), ("fsdp", "expert", "tensor"))
    model = checkpoint.abstract_model(ModelConfig.m1())
    for param in checkpoint.parameters(model).values():
        axes = param.get_metadata()["logical_axes"]
        where = sharding.param_sharding(mesh, axes, param.shape)
        param.set_value(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=where))

    def whole(tree):
        where = NamedSharding(mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    tokens = whole(jax.ShapeDtypeStruct((1, 4096), jnp.int32))
    step = whole(jax.ShapeDtypeStruct((8, 1), jnp.int32))
    state = whole(jax.eval_shape(lambda: model.init_state(8, 8192)))
    for function, args in (
        (lambda model, tokens: model(tokens), (model, tokens)),
        (lambda model, tokens, state: model.extend(tokens, state), (model, step, state)),
    ):
        program = jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile()
        memory = program.memory_analysis()
        used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        assert 912e9 / 64 < used < HBM_GIB * 2**30
