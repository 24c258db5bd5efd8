"""The planner: its arguments, its arithmetic, and one program compiled through the command."""

import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from turns_support import take_turns

from m1_jax import ModelConfig, config, sharding
from m1_jax.plan import aot, collectives, estimate, meshes, report, shapes, topology
from m1_jax.plan import command as plan_command
from m1_jax.plan import config as plan_config
from m1_jax.plan import jobs as plan_jobs

GIB = 2**30
M1 = dataclasses.replace(ModelConfig.m1(), remat="layer")


# ---- slices


@pytest.mark.parametrize(
    ("name", "slices", "num_chips", "num_devices"),
    [
        ("v5p:8x8x8", 1, 512, 512),
        ("v5e:16x16", 1, 256, 256),
        ("v6e:2x2", 2, 8, 8),
        ("tpu7x:4x4x8", 1, 128, 256),
    ],
)
def test_slices(name, slices, num_chips, num_devices):
    found = topology.parse_slice(name, slices)
    assert (found.name, found.num_chips, found.num_devices) == (name, num_chips, num_devices)


@pytest.mark.parametrize(
    "name", ["", "v5p", "v5p:", "v5p:8x8", "v5e:4x4x4", "v4:2x2x1", "v6e:32x32", "v5p:0x2x2", "x"]
)
def test_wrong_topology_is_refused_with_an_example(name):
    with pytest.raises(topology.TopologyError, match=r"wanted .*v\d\w:\d+x\d+"):
        topology.parse_slice(name)


def test_missing_compiler_says_what_to_install(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(topology.TopologyError, match="pip install libtpu"):
        topology.get_slice_devices(topology.parse_slice("v5p:2x2x1"))


def test_slice_that_the_compiler_refuses():
    pytest.importorskip("libtpu")
    with pytest.raises(topology.TopologyError, match="refuses 'v5p:3x2x2'.*Others: v5e"):
        topology.get_slice_devices(topology.parse_slice("v5p:3x2x2"))


@pytest.mark.parametrize(
    ("name", "slices", "gib"),
    [
        ("v5e:2x2", 1, 15.75),
        ("v5p:2x2x1", 2, 95.73),
        ("v6e:2x2", 1, 31.24),
        ("tpu7x:2x2x1", 1, 94.7),
    ],
)
def test_devices_and_the_memory_that_the_compiler_grants(name, slices, gib):
    pytest.importorskip("libtpu")
    where = topology.parse_slice(name, slices)
    devices = topology.get_slice_devices(where)
    assert len(devices) == where.num_devices
    assert aot.probe_hbm_limit_bytes(devices[0]) / GIB == pytest.approx(gib, abs=0.1)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (557.45G) exceeds available HBM (95.73G).",
            (557.45 * GIB, 95.73 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.20T of 15.75G hbm.",
            (1.2 * 1024 * GIB, 15.75 * GIB),
        ),
        ("RESOURCE_EXHAUSTED: quota", None),
        ("INTERNAL: (3G) exceeds available HBM (2G)", None),
    ],
)
def test_out_of_memory_messages(message, expected):
    assert aot.parse_out_of_memory(message) == expected


# ---- arguments


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job": "sing"}, "wanted one of train, prefill, decode, serve, rl_update, reshard"),
        ({"job": "rl_update"}, "got '' for the job rl_update; wanted axis=size"),
        ({"serving_mesh": "expert=4"}, "got 'expert=4' for the job train; .* for no other"),
        ({"job": "reshard", "serving_mesh": "expert=4"}, "mesh: got none.* of the trainer"),
        ({"job": "rl_update", "serving_mesh": "expert=4", "accumulate": 2}, "wanted 1 for rl"),
        (
            {"job": "rl_update", "serving_mesh": "expert=4", "weights": "int8-all"},
            "int8-all cannot be trained",
        ),
        ({"seq": 0}, "at least 1"),
        ({"lightning": "gpu"}, "chunked or tpu"),
        ({"weights": "int8-all"}, "int8-all cannot be trained"),
    ],
)
def test_wrong_config_is_refused(changes, words):
    with pytest.raises(plan_config.PlanError, match=words):
        plan_config.PlanConfig(**{"topology": "v5p:2x2x1", "job": "train"} | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": "model=4"}, "one of data, fsdp, expert, tensor, context"),
        ({"mesh": "fsdp=2,fsdp=2"}, "the axis once"),
        ({"mesh": "fsdp=x"}, "axis=size"),
        ({"mesh": "fsdp=8"}, "makes 8 devices; wanted 4"),
        ({"config": "nowhere"}, "wanted m1 or tiny"),
        ({"batch": 3, "accumulate": 2}, "got 3 rows; wanted a multiple of the 2"),
        (
            {"batch": 1, "seq": 37, "config": "tiny"},
            "no mesh of 4 devices divides 1 rows of 37 tokens",
        ),
    ],
)
def test_plan_that_cannot_be_made(changes, words):
    pytest.importorskip("libtpu")
    with pytest.raises(plan_config.PlanError, match=words):
        plan_command.run(plan_config.PlanConfig("v5p:2x2x1", "train", **changes))


def test_config_is_read_from_a_file_or_its_directory(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ModelConfig.tiny().to_hf()))
    for path in (file, tmp_path):
        read = plan_config.read_model_config(
            plan_config.PlanConfig("v5p:2x2x1", "decode", config=str(path))
        )
        assert read == ModelConfig.tiny()
    file.write_text("{}")
    with pytest.raises(config.ConfigError, match="model_type"):
        plan_config.read_model_config(
            plan_config.PlanConfig("v5p:2x2x1", "decode", config=str(tmp_path))
        )


# ---- arithmetic


@pytest.fixture(scope="module")
def params():
    """The release's parameters on a mesh of CPU devices: fsdp 2, expert 2, tensor 2."""
    job = estimate.PlanJob("train", 4096, 8)
    layout = meshes.make_job_layout(M1, {"fsdp": 2, "expert": 2, "tensor": 2}, jax.devices(), job)
    model = shapes.abstract_job_model(M1, job, layout)
    return model, plan_jobs.estimate_job(M1, job, layout, model)


def test_state_of_training_is_twelve_bytes_a_parameter(params):
    model, guess = params
    total = sum(leaf.size for leaf in jax.tree.leaves(model))
    held = guess.hbm_bytes["parameters"] + guess.hbm_bytes["optimizer"]
    assert held == shapes.local_bytes(model) * 3
    # All but a few vectors is split 8 ways.
    assert 12 * total / 8 < held < 12 * total / 7.99


def test_traffic_of_training_by_hand(params):
    _, guess = params
    experts = 80 * 32 * 3 * 6144 * 9216
    gather, scatter = guess.collectives["all-gather"], guess.collectives["reduce-scatter"]
    # A chip computes with a quarter of the experts, has half of that, and gathers it twice.
    assert gather.bytes > 2 * 2 * experts / 4 / 2
    # Twice bfloat16, once float32; and of the routing weights two gathers and one scatter.
    assert gather.bytes - scatter.bytes == 80 * 4 * 2 * 4096 * 2
    exchange = guess.collectives["ragged-all-to-all"]
    # Two rows a chip; half leave it; out and back, and in the backward pass rows and gradients out
    # and gradients back, in 80 layers.
    assert exchange.bytes == 2 * 4096 * 2 * 6144 * 2 / 2 * 5 * 80
    assert exchange.count == 5 * 80
    assert "collective-permute" not in guess.collectives


def test_bytes_of_int8_weights():
    """Of the release on 8 devices: a byte a weight, but for what no recipe rounds."""
    job = estimate.PlanJob("decode", 8192, 8)
    layout = meshes.make_job_layout(M1, {"expert": 4, "tensor": 2}, jax.devices(), job)

    def held(weights):
        model = shapes.abstract_job_model(M1, job, layout, weights)
        return plan_jobs.estimate_job(M1, job, layout, model).hbm_bytes["parameters"]

    whole, experts, every = map(held, (None, "int8-experts", "int8-all"))
    matrices, width = 80 * 32 / 4 * 3 * 6144 * 9216 / 2, 64 * 128
    scales = 80 * 32 / 4 * 4 * (2 * 9216 / 2 + 6144)
    assert whole - experts == matrices - scales
    # qkv, gate and out of 70 lightning layers; query, key, value and out of 10 softmax ones.
    columns = 70 * 4 * width + 10 * (width + 2 * 8 * 128)
    scales = 4 * (columns / 2 + 80 * 6144)
    assert experts - every == 6144 * (columns + 80 * width) / 2 - scales


def test_meshes_divide_what_they_split():
    job = estimate.PlanJob("train", 4096, 512)
    devices = [jax.devices()[0]] * 512
    found = list(meshes.iterate_meshes(M1, job, devices))
    assert {"fsdp": 16, "expert": 32} in found
    assert len({tuple(mesh.items()) for mesh in found}) == len(found)
    for mesh in found:
        assert math.prod(mesh.values()) == 512
        assert mesh.get("expert", 1) <= 32
    # One row of a million tokens can only be split by heads and context.
    for mesh in meshes.iterate_meshes(M1, estimate.PlanJob("train", 2**20, 1), devices[:64]):
        assert mesh.keys() <= {"tensor", "context"}
    assert not list(
        meshes.iterate_meshes(M1, estimate.PlanJob("decode", 2**20 + 1, 3), devices[:256])
    )
    slices = list(meshes.iterate_meshes(M1, job, devices, num_slices=2))
    assert {"data": 2, "fsdp": 8, "expert": 32} in slices
    assert {"fsdp": 16, "expert": 32} in slices
    for mesh in slices:
        assert mesh.get("data", 1) * mesh.get("fsdp", 1) % 2 == 0


def test_serving_prefers_meshes_that_hold_less():
    job = estimate.PlanJob("decode", 8192, 64)
    small = estimate.ResourceEstimate(
        {"parameters": 10e9}, {"all-reduce": collectives.CollectiveTraffic(10, 1e6)}
    )
    large = estimate.ResourceEstimate({"parameters": 90e9}, {})
    assert small.cost(job) < large.cost(job)
    training = dataclasses.replace(job, kind="train")
    assert small.cost(training) > large.cost(training)


# ---- the command


def test_int8_weights_through_the_command():
    pytest.importorskip("libtpu")
    settings = {"config": "tiny", "seq": 64, "batch": 4, "mesh": "expert=2,tensor=2"}
    record = plan_command.run(
        plan_config.PlanConfig("v5p:2x2x1", "decode", weights="int8-all", **settings)
    )
    # What the compiler holds is our sum, up to the padding of tiles.
    parts = sum(record["hbm_parts"][name] for name in ("parameters", "state", "kv", "batch"))
    assert parts <= record["argument_bytes"] < 3 * parts
    assert "weights int8-all" in report.format_report(record)


def test_a_small_program_through_the_command(tmp_path):
    pytest.importorskip("libtpu")
    file = tmp_path / "plan.json"
    record = plan_command.run(
        plan_config.PlanConfig(
            "v5p:2x2x1", "decode", config="tiny", seq=64, batch=8, json=str(file)
        )
    )
    check_record(record, file)
    assert record["hbm_parts"]["kv"] == 2 * 2 * 8 * 2 * 64 * 32 * 2 / _split(record)
    assert record["tried"][0]["mesh"] == record["mesh"]


@pytest.mark.long
def test_a_training_step_through_the_command(tmp_path):
    pytest.importorskip("libtpu")
    file = tmp_path / "plan.json"
    settings = {"config": "tiny", "seq": 128, "batch": 8, "accumulate": 2, "json": str(file)}
    record = plan_command.run(
        plan_config.PlanConfig("v5p:2x2x1", "train", mesh="fsdp=2,expert=2", **settings)
    )
    check_record(record, file)
    assert record["mesh"] == {"fsdp": 2, "expert": 2}
    # What the compiler holds is our sum, up to the padding of tiles.
    parts = sum(record["hbm_parts"][name] for name in ("parameters", "optimizer", "batch"))
    assert parts <= record["argument_bytes"] < 3 * parts
    assert record["collectives"]["all-gather"]["bytes"] > 0


def _split(record):
    return math.prod(size for axis, size in record["mesh"].items() if axis != "context")


def check_record(record, file):
    written = json.loads(file.read_text())
    assert written == json.loads(json.dumps(record))
    wanted = {
        "job", "topology", "mesh", "fits", "hbm_bytes_per_chip", "hbm_limit_bytes",
        "argument_bytes", "temp_bytes", "flops_per_chip", "collectives", "compile_secs",
        "host_peak_bytes",
    }  # fmt: skip
    assert wanted <= written.keys()
    assert written["fits"]
    for key in ("argument_bytes", "temp_bytes", "flops_per_chip", "compile_secs"):
        assert written[key] > 0
    assert all({"count", "bytes"} == set(t) for t in written["collectives"].values())
    text = report.format_report(record)
    assert text.splitlines()[-1].startswith("fits: ")
    misfit = record | {"fits": False, "hbm_bytes_per_chip": 100 * GIB, "hbm_limit_bytes": 95 * GIB}
    assert "5.00 GiB too much" in report.format_report(misfit).splitlines()[-1]


def test_program_that_does_not_fit_is_reported():
    """At 16 TB an argument is too large anywhere; the refusal still has sizes."""
    pytest.importorskip("libtpu")
    device = topology.get_slice_devices(topology.parse_slice("v5e:2x2"))[0]
    where = jax.sharding.SingleDeviceSharding(device)
    large = jax.ShapeDtypeStruct((2**40,), np.float32, sharding=where)
    compiled = aot.compile_program(jax.jit(lambda x: x * 2).trace(large), 1.0)
    assert not compiled.fits
    assert compiled.needed_bytes == pytest.approx(2**43)
    assert compiled.limit_bytes < 16 * GIB
    assert "ENTRY" in compiled.hlo_text


@pytest.mark.parametrize(
    "job",
    [
        pytest.param("train", marks=pytest.mark.long),
        pytest.param("decode", marks=pytest.mark.slow),
    ],
)
def test_chips_without_a_ragged_exchange(job):
    pytest.importorskip("libtpu")
    record = plan_command.run(
        plan_config.PlanConfig(
            "v5e:4x4", job, config="tiny", mesh="data=4,expert=4", seq=64, batch=16
        )
    )
    assert record["fits"]
    assert "ragged-all-to-all" not in record["collectives"]


# ---- columns that do not fill tiles


def padded_columns(model_config, kind, sizes):
    job = estimate.PlanJob(kind, 64, 8)
    mesh = sharding.make_mesh(sizes, jax.devices())
    layout = sharding.make_layout(mesh, model_config, job.mode)
    model = shapes.abstract_job_model(model_config, job)
    return (
        meshes.describe_padded_columns(model_config, job, layout, model),
        meshes.padded_copy_bytes(model_config, job, layout, model),
    )


@pytest.mark.parametrize(
    ("field", "size", "tensor", "words"),
    [
        ("intermediate_size", 1536, 8, "leaves 192 columns.*GiB a chip here.*1, 2, 3, 4, 6, 12$"),
        ("intermediate_size", 640, 2, "leaves 320 columns.*tensor one of 1, 5$"),
        ("intermediate_size", 1000, 2, "leaves 500 columns.*No tensor axis makes one$"),
        ("shared_intermediate_size", 1536, 8, "shared_intermediate_size 1536 over tensor=8"),
    ],
)
def test_columns_that_are_padded_are_named_with_good_axes(field, size, tensor, words):
    model_config = dataclasses.replace(M1, layer_types=("softmax",) * 2, **{field: size})
    sizes = {"tensor": tensor, "data": 8 // tensor}
    (warning,), copied = padded_columns(model_config, "serve", sizes)
    assert re.search(words, warning)
    if field == "intermediate_size":  # gate and up of 32 experts in 2 layers, in bfloat16
        padded = -(-size // tensor // 128) * 128
        assert copied == pytest.approx(2 * 2 * 32 * 6144 * padded * 2)
        assert padded_columns(model_config, "decode", sizes)[1] == 0


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"tensor": 4, "data": 2}])
def test_columns_that_fill_tiles_have_no_warning(sizes):
    assert padded_columns(M1, "serve", sizes) == ([], 0.0)
    assert padded_columns(ModelConfig.tiny(), "serve", {"data": 8}) == ([], 0.0)  # below a tile


# ---- memory that programs must not take


def compile_small(job, model_config, tmp_path, **fields):
    pytest.importorskip("libtpu")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(model_config.to_hf()))
    return plan_command.run(plan_config.PlanConfig("v5p:2x2x1", job, config=str(file), **fields))


@pytest.mark.parametrize(
    ("job", "mesh", "batch"),
    take_turns(
        ("decode", "expert=4", 256),
        ("decode", "expert=2,tensor=2", 256),
        ("prefill", "expert=4", 4),
    ),
)
def test_states_are_updated_in_place(tmp_path, job, mesh, batch):
    # Several key heads on a device, and so many layers that states outweigh activations.
    model_config = dataclasses.replace(
        ModelConfig.tiny(),
        layer_types=("lightning", "softmax") * 96,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        rotary_dim=64,
    )
    record = compile_small(job, model_config, tmp_path, mesh=mesh, seq=512, batch=batch)
    parts = record["hbm_parts"]
    # A copy of the keys alone would be half of what keys and values take.
    assert record["temp_bytes"] < parts["kv"] / 4
    assert record["temp_bytes"] < parts["state"] / 2
