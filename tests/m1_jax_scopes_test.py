"""Compiled programs name the parts of the model, as a profile of them shows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import config as config_lib
from infer.execution import host_batch, programs
from m1_jax import ModelConfig, sharding
from m1_jax import params as params_lib
from train import optim, step
from train.data import batch as batch_lib

LAYER_SCOPES = {"lightning", "softmax", "router", "exchange", "experts"}
FORWARD_SCOPES = {"embedding", "head"} | LAYER_SCOPES
TRAIN_SCOPES = FORWARD_SCOPES | {"loss", "optimizer"}
CONFIG = dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax"))
ENGINE = config_lib.EngineConfig(
    max_length=64, max_rows=2, chunk_tokens=16, prefill_tokens=(64,), num_snapshots=0
)
TILES = programs.EngineTiles.of_config(ENGINE.for_platform("cpu"))
ROWS, LENGTH = 2, 16


def make_layout(mode: str) -> sharding.MeshLayout:
    """Return a mesh of two devices that share the experts: rows must be exchanged."""
    layout = sharding.make_layout(
        sharding.make_mesh({"expert": 2}, jax.devices()[:2]), CONFIG, mode
    )
    assert layout is not None
    return layout


def trace_train():
    layout = make_layout(sharding.TRAIN)
    model = params_lib.abstract_model(CONFIG, jnp.float32, layout=layout)
    # Two microbatches, since a loop over them must keep the names.
    settings = step.TrainStepSettings(optim.AdamW(1e-3), accumulate=2, z_coefficient=1e-4)
    rows = layout.activation_sharding("batch", "length")

    def array(dtype):
        return jax.ShapeDtypeStruct((2 * ROWS, LENGTH), dtype, sharding=rows)

    ints = array(jnp.int32)
    batch = batch_lib.TrainBatch(ints, ints, ints, ints, array(jnp.float32))
    return step.train_step.trace(
        step.abstract_state(model, settings.optimizer), batch, settings=settings
    )


def trace_serving(function, host_arguments):
    """Trace a program of the engine with the arguments that follow its two states."""
    layout = make_layout(sharding.DECODE)
    model = params_lib.abstract_model(CONFIG, jnp.float32, layout=layout)
    state, (sampling_state, *_) = programs.abstract_decode_inputs(CONFIG, layout, ENGINE)
    return jax.jit(function).trace(model, state, sampling_state, *host_arguments)


def trace_prefill():
    return trace_serving(
        lambda *arguments: programs.prefill_prompts(*arguments, TILES),
        (
            host_batch.make_empty_batch(host_batch.MAX_PREFILL_CHUNKS, ENGINE),
            host_batch.make_empty_prompts(64, ENGINE),
        ),
    )


def trace_decode():
    return trace_serving(
        lambda *arguments: programs.decode_tokens(*arguments, TILES, ENGINE.decode_steps),
        (host_batch.make_empty_batch(2, ENGINE), np.int32(0)),
    )


def list_scopes(op_name: str) -> set[str]:
    """Return the scopes in the name of an operation.

    A name is a path, in which a transformation wraps a scope: `jit(f)/transpose(jvp(loss))/mul`.
    The name of a jitted function is no scope: `jax.nn.softmax` writes `jit(softmax)`.
    """
    return set(re.findall(r"\w+", re.sub(r"jit\(\w+\)", "", op_name)))


@pytest.fixture(
    scope="module",
    params=[
        (trace_train, TRAIN_SCOPES),
        (trace_prefill, FORWARD_SCOPES),
        (trace_decode, FORWARD_SCOPES),
    ],
    ids=["train", "prefill", "decode"],
)
def program(request):
    """Return the HLO text of a compiled program, and the scopes that it must have."""
    trace, scopes = request.param
    return trace().lower().compile().as_text(), scopes


def test_a_compiled_program_has_every_scope(program):
    text, scopes = program
    found = set().union(*map(list_scopes, re.findall(r'op_name="([^"]*)"', text)))
    assert scopes <= found


def test_every_matrix_product_lies_in_a_scope(program):
    text, scopes = program
    products = re.findall(r' dot\(.*op_name="([^"]*)"', text)
    assert products
    assert not [name for name in products if not list_scopes(name) & scopes]
