"""Experts and their exchange compile for every generation of TPUs, without copies of matrices."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tpu_support
from jax.sharding import NamedSharding, PartitionSpec

from m1_jax import ModelConfig, expert_exchange, quantize, sharding
from m1_jax.plan import topology as topology_lib

LAYERS, DEVICES, EXPERTS, WIDTH, HIDDEN, TOKENS = (4, 3), 4, 8, 2048, 1024, 64
MATRIX_BYTES = EXPERTS // DEVICES * WIDTH * HIDDEN  # of a device's experts in int8
ROWS = PartitionSpec("expert")


def make_layout(chip):
    pytest.importorskip("libtpu")
    tpu_slice = topology_lib.parse_slice(tpu_support.TOPOLOGIES[chip])
    devices = topology_lib.get_slice_devices(tpu_slice)[:DEVICES]
    mesh = sharding.make_mesh({"expert": DEVICES}, devices)
    layout = sharding.make_layout(mesh, ModelConfig.tiny(), sharding.TRAIN)
    assert layout is not None
    return layout


def compile_exchange(layout, function, leading, make_matrix):
    """Compile a function of tokens, weights, expert ids, and matrices with these leading axes."""
    matrix_spec = PartitionSpec(*(None,) * len(leading), "expert")

    def array(spec, shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, spec))

    rows = functools.partial(array, ROWS)
    matrices = [
        make_matrix(functools.partial(array, matrix_spec), (*leading, EXPERTS, *shape))
        for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    inputs = (
        rows((TOKENS, WIDTH), jnp.bfloat16),
        rows((TOKENS, 2), jnp.float32),
        rows((TOKENS, 2), jnp.int32),
        *matrices,
    )
    specs = (*(ROWS,) * 3, *(matrix_spec,) * 3)
    program = jax.jit(sharding.run_sharded(layout, function, specs, ROWS))
    return program.trace(*inputs).lower(lowering_platforms=("tpu",)).compile()


def decode_layers(x, weights, ids, *matrices):
    """Run all layers of a stack, as a decode step does."""

    def run_layer(x, index):
        stack_index = jnp.divmod(index, LAYERS[1])
        y, _ = expert_exchange.run_routed_experts(
            x, weights, ids, *matrices, stack_index=stack_index
        )
        return y.astype(x.dtype), None

    return jax.lax.scan(run_layer, x, jnp.arange(LAYERS[0] * LAYERS[1], dtype=jnp.int32))[0]


@pytest.mark.parametrize("chip", tpu_support.CHIPS_IN_TURNS)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_decoding_copies_no_matrix(chip, dtype):
    def make_matrix(array, shape):
        values = array(shape, jnp.dtype(dtype))
        if dtype != "int8":
            return values
        return quantize.QuantizedMatrices(values, array((*shape[:-2], shape[-1]), jnp.float32))

    program = compile_exchange(make_layout(chip), decode_layers, LAYERS, make_matrix)
    # A slice of the stack, or a widened matrix, would be a temporary of at least this size.
    limit = MATRIX_BYTES
    # TPU7x reads bfloat16 in other tiles than arguments have. The compiler copies the three stacks
    # at the program's start, and nothing in the loop. int8 is widened layer by layer.
    if chip == "tpu7x":
        limit += {"bfloat16": 3 * 12 * 2 * MATRIX_BYTES, "int8": 3 * 3 * MATRIX_BYTES}[dtype]
    assert program.memory_analysis().temp_size_in_bytes < limit


@pytest.mark.parametrize("chip", tpu_support.CHIPS_IN_TURNS)
def test_gradients_compile(chip):
    def add_gradient(x, weights, ids, *matrices):
        def loss(x, weights, matrices):
            y, _ = expert_exchange.run_routed_experts(x, weights, ids, *matrices)
            return jnp.sum(y**2)

        d_x, d_weights, d_matrices = jax.grad(loss, (0, 1, 2))(x, weights, matrices)
        total = jnp.sum(d_weights) + sum(jnp.sum(d.astype(jnp.float32)) for d in d_matrices)
        return d_x + total.astype(d_x.dtype)

    compile_exchange(
        make_layout(chip), add_gradient, (), lambda array, shape: array(shape, jnp.bfloat16)
    )
