"""`m1-export` in several processes writes what it writes in one."""

import pytest
from command_process_support import run

FLAGS = [
    "--config=configs/tiny_pretrain.py",
    "--set=stages.0.warmup_tokens=0",
    "--set=stages.0.tokens=2048",
    "--set=stages.1.tokens=2048",
]
MESH = "--mesh=fsdp=2,expert=2"


@pytest.mark.long
def test_two_processes_export_as_one(tmp_path):
    workdir = tmp_path / "run"
    ((status, _, told),) = run(1, "train.pretrain", *FLAGS, f"--workdir={workdir}")
    assert status == 0, told

    def export(processes, mesh):
        destination = tmp_path / f"exported-{processes}"
        flags = [f"--workdir={workdir}", f"--dst={destination}", *mesh]
        ends = run(processes, "train.export", *flags)
        assert [status for status, *_ in ends] == [0] * processes, ends
        return destination

    release = [tmp_path / "release-1", tmp_path / "release-2"]
    exported = export(1, []), export(2, [MESH])
    for source, destination in zip(exported, release, strict=True):
        flags = ["--to=hf", f"--src={source}", f"--dst={destination}"]
        ((status, _, told),) = run(1, "m1_jax.convert", *flags)
        assert status == 0, told
    names = sorted(file.name for file in release[0].iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    assert names == sorted(file.name for file in release[1].iterdir())
    for name in names:
        assert (release[0] / name).read_bytes() == (release[1] / name).read_bytes(), name
    # What exists is refused on both, before anything is read.
    flags = [f"--workdir={workdir}", f"--dst={exported[0]}", MESH]
    first, second = run(2, "train.export", *flags)
    assert (first[0], second[0]) == (1, 1)
    assert "exists; wanted a new directory" in first[2]
