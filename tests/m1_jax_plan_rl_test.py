"""The planner's jobs of reinforcement learning: what they trace is what runs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from m1_jax import ModelConfig, sharding
from m1_jax import params as params_lib
from m1_jax.plan import command as plan_command
from m1_jax.plan import config as plan_config
from m1_jax.plan import estimate, meshes, report, shapes
from m1_jax.plan import jobs as plan_jobs
from train.rl import batch as rl_batch
from train.rl import row_packing
from train.rl import sample as sample_lib

SMALL = dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax"), remat="layer")
MESH, SERVING = {"expert": 2, "context": 4}, {"data": 2, "expert": 2, "tensor": 2}


def make_setting(kind):
    job = estimate.PlanJob(kind, 64, 2)
    layout = meshes.make_job_layout(SMALL, MESH, jax.devices(), job)
    model = shapes.abstract_job_model(SMALL, job, layout)
    serving = plan_jobs.make_serving_layout(SMALL, layout, SERVING)
    return plan_jobs.JobSetting(SMALL, job, layout, model, serving)


def held(part):
    return {name: shapes.local_bytes(tree) for name, tree in part.items()}


@pytest.fixture(scope="module")
def programs():
    setting = make_setting("rl_update")
    return setting, {
        program.name: program for program in plan_jobs.JOB_TRACERS["rl_update"](setting)
    }


def test_every_program_of_an_update_counts_state_sums_and_sampler(programs):
    setting, found = programs
    assert list(found) == ["score", "add", "update"]
    weights = shapes.local_bytes(setting.model)
    routers = sum(
        shapes.local_bytes(p.get_value())
        for n, p in params_lib.params_by_path(plan_jobs.abstract_sampler_model(setting)).items()
        if p.dtype == "float32"
    )
    sampler = shapes.local_bytes(plan_jobs.abstract_sampler_model(setting))
    assert routers > 0
    # bfloat16 but for the routers, and split 4 ways where the trainer's are split 8 ways.
    assert sampler > (weights - routers) / 2
    for program in found.values():
        parts = held(program.arguments) | held(program.co_resident)
        assert parts["parameters"] == weights
        assert parts["sampler"] == sampler
        assert abs(parts["optimizer"] - 2 * weights) < 64  # two counters
        assert ("sums" in parts) == (program.name != "score")
        if program.name == "add":  # gradients, and the metrics' few numbers
            drops = 4 * 4 * SMALL.vocab_size  # how often a word was dropped, clipped, and there
            assert weights + drops < parts["sums"] < weights + drops + 4096
        if program.name == "update":
            assert parts["sums"] == weights
        # What the compiler is not told of is what the program does not take.
        assert not program.arguments.keys() & program.co_resident.keys()
    assert found["update"].co_resident.keys() == {"sampler"}


def test_hand_count_of_an_update_has_the_same_parts(programs):
    _, found = programs
    for program in found.values():
        parts = held(program.arguments)
        for name in parts.keys() - {"batch", "sums", "optimizer"}:
            assert program.resource_estimate.hbm_bytes[name] == parts[name]
        assert (program.resource_estimate.hbm_bytes.get("gradients", 0) > 0) == (
            program.name == "add"
        )


def test_traced_rows_are_those_of_a_batch(programs):
    setting, found = programs
    task = sample_lib.Task("t", ({"role": "user", "content": "x"},), "s")
    samples = [
        sample_lib.Sample(
            task, *(np.array(column) for column in ((1, 2), (3, 4), (1, 1), (0.0, 0.0), (0, 0)))
        )
    ] * 2
    packed = rl_batch.pack_samples(samples, row_packing.RowShapes((2,), (64,)), (2, 2))
    placed = rl_batch.device_put_microbatch(packed, 0, setting.layout)
    traced = found["add"].arguments["batch"]

    def shape(x):
        return x.shape, x.dtype, x.sharding

    got, wanted = (jax.tree.map(shape, rows) for rows in (traced, placed))
    assert got == wanted


def test_reshard_is_the_handover_on_the_same_devices():
    setting = make_setting("reshard")
    (program,) = plan_jobs.JOB_TRACERS["reshard"](setting)
    assert setting.serving_layout is not None
    assert setting.serving_layout.mode == sharding.DECODE
    assert list(setting.serving_layout.mesh.devices.flat) == list(setting.layout.mesh.devices.flat)
    made = jax.tree.leaves(program.results["new sampler"])
    assert {leaf.dtype.name for leaf in made} == {"bfloat16", "float32"}
    # The old weights lie beside the new ones until these are there, and the moments all the time.
    assert held(program.co_resident)["sampler"] == held(program.results)["new sampler"]
    assert (
        abs(held(program.co_resident)["optimizer"] - 2 * held(program.arguments)["parameters"]) < 64
    )


def test_serving_mesh_of_other_sizes_is_refused():
    setting = make_setting("reshard")
    with pytest.raises(ValueError, match="product is the trainer's 8 devices"):
        plan_jobs.make_serving_layout(SMALL, setting.layout, {"expert": 2})
    with pytest.raises(ValueError, match="fsdp=8 cannot be used to decode"):
        plan_jobs.make_serving_layout(SMALL, setting.layout, {"fsdp": 8})


def read(file, record):
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(record))
    assert written["fits"]
    return report.format_report(record)


def test_reshard_through_the_command(tmp_path):
    pytest.importorskip("libtpu")
    file, model = tmp_path / "plan.json", tmp_path / "config.json"
    model.write_text(json.dumps(SMALL.to_hf()))
    record = plan_command.run(
        plan_config.PlanConfig(
            "v5p:2x2x1",
            "reshard",
            config=str(model),
            mesh="expert=2,context=2",
            serving_mesh="expert=2,tensor=2",
            json=str(file),
        )
    )
    text = read(file, record)
    assert "serving mesh expert=2,tensor=2" in text
    assert "by hand       GiB" not in text  # its collectives are not counted by hand
    inside = sum(record["hbm_parts"].values())
    assert record["hbm_bytes_per_chip"] == inside + sum(record["hbm_beside"].values())
    assert sum(traffic["bytes"] for traffic in record["collectives"].values()) > 0
    assert record["capacity"] == {}


@pytest.mark.long
def test_an_update_through_the_command(tmp_path):
    pytest.importorskip("libtpu")
    file, model = tmp_path / "plan.json", tmp_path / "config.json"
    model.write_text(json.dumps(SMALL.to_hf()))
    record = plan_command.run(
        plan_config.PlanConfig(
            "v5p:2x2x1",
            "rl_update",
            config=str(model),
            serving_mesh="expert=2,tensor=2",
            seq=64,
            batch=4,
            json=str(file),
        )
    )
    text = read(file, record)
    for program in record["programs"]:
        assert f"program {program['program']}" in text
        # What the compiler holds is our sum, up to the padding of tiles and small arrays.
        parts = {n: size for n, size in program["hbm_parts"].items() if n != "activations"}
        assert sum(parts.values()) <= program["argument_bytes"] < 4 * sum(parts.values())
        beside = sum(program["hbm_beside"].values())
        assert program["hbm_bytes_per_chip"] == sum(program["hbm_parts"].values()) + beside
        assert program["hbm_bytes_per_chip"] <= record["hbm_bytes_per_chip"]
    assert record["capacity"][64] > 0
    assert "the sampler's requests beside it" in text
