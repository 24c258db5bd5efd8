"""Memory, meshes and dtypes of the commands, before a weight is read."""

import json
import shlex

import jax
import jax.numpy as jnp
import pytest

from infer import command, generate
from infer import config as config_lib
from m1_jax import command_mesh, memory_check, sharding, testing, verify
from m1_jax import config as model_config_lib
from m1_jax import params as params_lib
from m1_jax.plan import config as plan_config
from m1_jax.plan import meshes

GIB = 1 << 30
TINY = model_config_lib.ModelConfig.tiny()


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The release's config.json with a tokenizer, and no weights."""
    directory = tmp_path_factory.mktemp("release")
    config = model_config_lib.ModelConfig.m1().to_hf()
    (directory / "config.json").write_text(json.dumps(config))
    return testing.write_tiny_tokenizer(directory, vocab_size=512)


# ---- memory


def plan_flags(message):
    """Return the flags of the m1-plan line at the end of a message."""
    words = shlex.split(message[message.index("m1-plan ") :])
    return dict(word.removeprefix("--").split("=", 1) for word in words[1:])


def check_plan_line(message, release, job):
    """The line is one that the planner takes, and names a mesh of the slice."""
    values = plan_flags(message)
    chips = [int(n) for n in values["topology"].partition(":")[2].split("x")]
    assert values["job"] == job
    assert values["config"] == str(release)
    num_devices = 1
    for n in chips:
        num_devices *= n
    shape = meshes.parse_mesh(values["mesh"], num_devices)
    assert int(values["batch"]) % shape.get("expert", 1) == 0
    plan_config.PlanConfig(
        values["topology"], values["job"], seq=int(values["seq"]), batch=int(values["batch"])
    )


def test_the_release_on_one_host_is_refused_in_one_line(release):
    config = generate.GenerateConfig(checkpoint=str(release), prompt="hi", max_tokens=8)
    with pytest.raises(memory_check.MemoryCheckError) as caught:
        generate.prepare_run(config)
    message = str(caught.value)
    assert "\n" not in message
    # 456 billion parameters of 4 bytes, in GiB.
    assert "parameters 1,699.1 GiB" in message
    assert "on this host; wanted 1,69" in message or "on this host; wanted 1,70" in message
    check_plan_line(message, release, "serve")


def test_verify_of_the_release_is_refused_in_one_line(release, golden_dir):
    with pytest.raises(ValueError, match="outside of the vocabulary|memory: got") as caught:
        verify.run(verify.VerifyConfig(str(release), str(golden_dir / "golden.npz")))
    assert "\n" not in str(caught.value)
    assert "gradients 1,699.1 GiB" in str(caught.value)
    check_plan_line(str(caught.value), release, "prefill")


@pytest.mark.parametrize(
    ("kind", "limit_gib", "slice_name"),
    [("TPU v5 lite", 15.75, "v5e:8x16"), ("TPU v5p", 95.0, "v5p:2x2x4"), ("TPU7x", 94.7, "tpu7x:")],
)
def test_a_slice_of_the_same_generation_is_named(release, kind, limit_gib, slice_name, monkeypatch):
    sizes = config_lib.EngineConfig(max_length=8192, max_rows=8)
    choice = command.ModelChoice(str(release), "bfloat16", None, None)
    job = command.make_serve_job(choice, model_config_lib.ModelConfig.m1(), sizes)

    class Accelerator:
        device_kind, platform = kind, "tpu"

        def memory_stats(self):
            return {"bytes_limit": int(limit_gib * GIB)}

    monkeypatch.setattr(jax, "local_devices", lambda: [Accelerator()])
    monkeypatch.setattr(memory_check, "as_mesh_layout", lambda layout, _: layout or one_device())
    with pytest.raises(memory_check.MemoryCheckError) as caught:
        memory_check.check_memory(job, None, "bfloat16")
    message = str(caught.value)
    assert f"got {limit_gib:.1f} GiB on one {kind} device; wanted 8" in message
    assert f"--topology={slice_name}" in message


def one_device():
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return sharding.MeshLayout(mesh, sharding.DECODE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, "expert=4,tensor=2"])
def test_what_is_counted_is_what_there_is(dtype, mesh):
    """The count of a tiny engine's weights and memory is that of the arrays on a device."""
    from infer.execution import device

    layout = command_mesh.make_command_layout(mesh, TINY, sharding.DECODE)
    sizes = config_lib.EngineConfig(max_length=128, max_rows=2, num_snapshots=1)
    choice = command.ModelChoice("x", dtype, None, mesh)
    parts = command.make_serve_job(choice, TINY, sizes).count_parts(layout, dtype)
    model = params_lib.random_model(
        TINY, jax.random.key(0), command_mesh.DTYPES[dtype], layout=layout
    )

    def bytes_of_first_device(tree):
        first = jax.local_devices()[0]
        shards = [s for a in jax.tree.leaves(tree) for s in a.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert parts["parameters"] == bytes_of_first_device(model)
    engine_device = object.__new__(device.Device)
    engine_device._compile_programs = lambda: None
    device.Device.__init__(engine_device, model, sizes)
    buffers = engine_device._buffers
    assert parts["states and pages"] == bytes_of_first_device(buffers["state"])
    # The batch of a dispatch is counted with the sampling state, and is small.
    sampling = bytes_of_first_device(buffers["sampling"])
    assert sampling <= parts["sampling"] <= 1.1 * sampling + 10_000


def test_memory_that_suffices_is_no_error(monkeypatch):
    sizes = config_lib.EngineConfig(max_length=128, max_rows=2)
    choice = command.ModelChoice("x", None, None, None)
    job = command.make_serve_job(choice, TINY, sizes)
    parts = sum(job.count_parts(None, "float32").values())
    for limit, fits in ((parts, True), (parts - 1, False), (None, True)):
        monkeypatch.setattr(memory_check, "device_limit_bytes", lambda _, limit=limit: limit)
        if fits:
            memory_check.check_memory(job, None, "float32")
        else:
            with pytest.raises(memory_check.MemoryCheckError, match="MiB for float32"):
                memory_check.check_memory(job, None, "float32")


def test_a_container_has_its_own_limit(tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file 0\ninactive_file {GIB // 4}\n")
    files = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))
    monkeypatch.setattr(memory_check, "_CGROUP_FILES", (files,))
    assert memory_check.available_host_bytes() == GIB + GIB // 4
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory_check.available_host_bytes() or 0) > 0


# ---- meshes and dtypes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert", "mesh: got 'expert'; wanted axis=size"),
        ("experts=2", "mesh: got 'experts=2'; wanted axis=size, the axis once and one of data"),
        ("expert=2,expert=2", "mesh: got 'expert=2'"),
        ("expert=0", "mesh: got 'expert=0'"),
        ("expert=-2", "mesh: got 'expert=-2'"),
        ("expert=-1,tensor=-1", "wanted -1 at most once"),
    ],
)
def test_refused_meshes(text, message):
    with pytest.raises(ValueError, match=message):
        command_mesh.parse_axis_sizes(text)
    with pytest.raises(ValueError, match=message):  # before any file is opened
        generate.GenerateConfig(checkpoint="x", prompt="a", mesh=text)
    with pytest.raises(plan_config.PlanError, match=message):
        meshes.parse_mesh(text, 8)


def test_one_size_takes_what_is_left():
    assert meshes.parse_mesh("expert=-1,tensor=2", 8) == {"expert": 4, "tensor": 2}
    layout = command_mesh.make_command_layout("expert=-1,tensor=2", TINY, sharding.DECODE)
    assert command_mesh.format_axis_sizes(layout) == "expert=4,tensor=2"
    with pytest.raises(ValueError, match="fsdp=8 cannot be used to decode"):
        command_mesh.make_command_layout("fsdp=-1", TINY, sharding.DECODE)


def test_without_a_mesh_accelerators_split_the_experts(monkeypatch):
    assert command_mesh.make_command_layout(None, TINY, sharding.DECODE) is None
    assert command_mesh.resolve_dtype(None) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    layout = command_mesh.make_command_layout(None, TINY, sharding.DECODE)
    assert command_mesh.format_axis_sizes(layout) == f"expert={jax.device_count()}"
    assert command_mesh.resolve_dtype(None) == "bfloat16"
    assert command_mesh.resolve_dtype("float32") == "float32"
    monkeypatch.setattr(jax, "device_count", lambda: 6)
    with pytest.raises(ValueError, match=r"--mesh: got none for 6 devices, over which \d+ experts"):
        command_mesh.make_command_layout(None, TINY, sharding.DECODE)


def test_bytes_of_shapes():
    layout = command_mesh.make_command_layout("expert=8", TINY, sharding.DECODE)
    assert layout is not None
    shapes = memory_check.shard_shapes(
        (jax.ShapeDtypeStruct((8, 3), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)),
        (jax.sharding.PartitionSpec("expert"), jax.sharding.PartitionSpec()),
        layout,
    )
    assert memory_check.local_bytes(shapes) == 3 * 2 + 8 * 4
    assert memory_check.local_bytes(shapes, bfloat16_bytes=4) == 3 * 4 + 8 * 4
