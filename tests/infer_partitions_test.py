"""Programs on a mesh: each group of devices has its share of rows, slots and pages, and no more."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from turns_support import take_turns

from infer import config as config_lib
from infer.execution import device, program_spec, programs
from m1_jax import ModelConfig, sharding
from m1_jax import params as params_lib

CONFIG = dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax"))
ROWS = 64
ENGINE = config_lib.EngineConfig(
    max_length=64,
    max_rows=ROWS,
    chunk_tokens=16,
    prefill_tokens=(64,),
    num_snapshots=0,
    matmul_tile=0,
    decode_steps=2,
)
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def make_layout(mesh):
    devices = jax.devices()[: math.prod(mesh.values())]
    layout = sharding.make_layout(sharding.make_mesh(mesh, devices), CONFIG, sharding.DECODE)
    assert layout is not None
    return layout


# ---- work


@functools.cache
def count_flops(rows=ROWS, **mesh):
    """Return the compiler's FLOPs of a step of the largest decode program, on one device."""
    layout = make_layout(mesh or {"data": 1})
    # So wide that products of rows outweigh the loop over groups of eight tiles.
    config = dataclasses.replace(CONFIG, hidden_size=4 * CONFIG.hidden_size)
    model = params_lib.abstract_model(config, jnp.float32, layout=layout)
    engine = dataclasses.replace(ENGINE, max_rows=rows)
    arguments = programs.abstract_decode_inputs(config, layout, engine)

    def decode(model, state, sampling_state, batch, steps):
        tiles = programs.EngineTiles.of_config(engine)
        return programs.decode_tokens(
            model, state, sampling_state, batch, steps, tiles, engine.decode_steps
        )

    traced = jax.jit(decode).trace(model, arguments[0], *arguments[1])
    return traced.lower().compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    "mesh",
    take_turns({"expert": 2}, {"data": 2}, {"data": 2, "expert": 2}, {"data": 4, "expert": 2}),
    ids=str,
)
def test_work_of_a_device_is_one_share_of_the_rows(mesh):
    """A device of G groups does what one device alone does for 1 / G of the rows.

    The compiler counts the bodies of loops over tiles (attention, experts, choices) once. A program
    has as many tiles as a device has rows, so these fall with the rows, too.
    """
    few, all_rows = count_flops(ROWS // 8), count_flops()
    per_row = (all_rows - few) / (ROWS - ROWS // 8)
    loop_bodies = all_rows - per_row * ROWS
    assert 0 < loop_bodies < 0.25 * all_rows
    num_groups = math.prod(mesh.values())
    shared = (count_flops(**mesh) - loop_bodies) / (all_rows - loop_bodies)
    # 5 %: the exchange of rows has arithmetic of its own.
    assert shared == pytest.approx(1 / num_groups, rel=0.05)


# ---- memory and its moves


@pytest.fixture(scope="module")
def served():
    """Return a device of 4 partitions, whose axes of slots and pages have lengths of their own."""
    layout = make_layout({"data": 2, "expert": 2, "tensor": 2})
    model = params_lib.random_model(CONFIG, jax.random.key(0), jnp.float32, layout=layout)
    config = config_lib.EngineConfig(
        max_length=64,
        max_rows=8,
        num_pages=4 * 52,
        num_snapshots=4 * 20,
        chunk_tokens=16,
        prefill_tokens=(64,),
        host_bytes=10**9,
        record_routes=True,
        draft_tokens=4,
    )
    return device.Device(model, config)


def list_collective_shapes(text):
    """Return the shapes of what a program's collectives return."""
    lines = re.findall(rf"= (.*?) (?:{COLLECTIVES})(?:-start)?\(", text)
    return [
        tuple(map(int, dims.split(","))) if dims else ()
        for line in lines
        for dims in re.findall(r"\w+\[([\d,]*)\]", line)
    ]


@pytest.mark.slow
def test_every_group_holds_its_own_partition(served):
    assert served.limits.num_partitions == 4
    assert (served.limits.num_slots, served.limits.num_pages) == (22, 52)
    lightning, pages = served._buffers["state"].group_states
    whole = lightning.states.shape
    assert whole[2] == 4 * 23
    assert lightning.states.sharding.shard_shape(whole)[2:4] == (23, whole[3] // 2)
    assert pages.keys.sharding.shard_shape(pages.keys.shape)[2:4] == (53, pages.keys.shape[3] // 2)
    expert_ids = served._buffers["state"].expert_id_pages.expert_ids
    assert expert_ids.sharding.shard_shape(expert_ids.shape)[2] == 53
    for array in jax.tree.leaves(served._buffers["sampling"]):
        assert array.sharding.shard_shape(array.shape)[0] == 23


@pytest.mark.slow
def test_no_program_moves_a_pool(served):
    pool_sizes = {23, 4 * 23, 53, 4 * 53}
    names = {name for name, _ in served._programs}
    assert names == set(program_spec.ProgramName)
    for (name, _), program in served._programs.items():
        shapes = list_collective_shapes(program._compiled.as_text())
        assert not [shape for shape in shapes if pool_sizes & set(shape)], name
        if name.startswith("read"):
            assert shapes  # what one partition has comes to all
    # Written without partitions, the same read moves one.
    states = served._buffers["state"].group_states[0].states
    naive = jax.jit(
        lambda array, slot: jnp.roll(array, slot, axis=2)[:, :, 0],
        out_shardings=jax.sharding.NamedSharding(
            states.sharding.mesh, jax.sharding.PartitionSpec()
        ),
    )
    text = naive.lower(states, 3).compile().as_text()
    assert [shape for shape in list_collective_shapes(text) if pool_sizes & set(shape)]
