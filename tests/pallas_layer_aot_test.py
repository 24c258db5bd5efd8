"""A decoder layer of the released size, forward and backward, compiles with the kernels in it.

One lightning layer of `ModelConfig.m1()` in bfloat16 is 5.7e9 parameters: 10.6 GiB, and as much
again for their gradients. That and the activations of 4,096 tokens fit one chip of v6e (32 GB), so
nothing is sharded here and XLA need not partition the kernels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tpu_support
from flax import nnx

from m1_jax import ModelConfig, config, decoder_layer, forward_context
from pallas_kernels.lightning_attention import tiling

LENGTH = 4096
# Topology, and HBM of one chip in GiB.
CHIPS = {"v5p": ("v5p:2x2x1", 95), "v6e": ("v6e:2x2", 31)}


# Forty seconds of two cores each, so one of them in every other landing.
@pytest.mark.parametrize(
    "chip",
    [
        pytest.param("v5p", marks=pytest.mark.long(tenths=[1, 5, 9])),
        pytest.param("v6e", marks=pytest.mark.long(tenths=[3, 7])),
    ],
)
def test_full_size_layer_compiles_with_the_kernels(chip):
    topology, hbm_gib = CHIPS[chip]
    where = tpu_support.chip_sharding(topology)
    full = dataclasses.replace(ModelConfig.m1(), lightning_implementation="tpu")

    def make():
        rngs = nnx.Rngs(0)
        return decoder_layer.DecoderLayer(full, config.LIGHTNING, rngs, param_dtype=jnp.bfloat16)

    def loss(layer, x, slopes):
        positions = jnp.arange(LENGTH, dtype=jnp.int32).reshape(1, -1)
        context = forward_context.ForwardContext(positions, length_sharded=True)
        y, _, _ = layer(x, slopes, context)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    arguments = (
        nnx.eval_shape(make),
        jax.ShapeDtypeStruct((1, LENGTH, full.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((full.num_attention_heads,), jnp.float32),
    )
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments
    )
    with tiling.compile_for(chip):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*placed)
        program = traced.lower(lowering_platforms=("tpu",)).compile()
    # The executable itself: as_text cannot print this program's SparseCore calls.
    names = program.runtime_executable().serialize()
    for kernel in (b"lightning_fwd", b"lightning_bwd"):
        assert kernel in names
    assert program.memory_analysis().peak_memory_in_bytes < hbm_gib * 2**30
