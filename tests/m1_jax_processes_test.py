"""Several processes on one machine give the numbers of one."""

import json
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).parent / "processes_worker.py"
TRAINER = pathlib.Path(__file__).parent / "training_worker.py"


def run(processes: int, directory, worker=WORKER) -> list[dict]:
    """Run a worker in `processes` processes of 8 devices together; return what each says."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, worker, str(port), str(processes), str(index), directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=WORKER.parents[1],
        )
        for index in range(processes)
    ]
    said = []
    try:
        for process in started:
            out, err = process.communicate(timeout=600)
            assert process.returncode == 0, err[-3000:]
            said.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return said


def files(directory) -> dict[str, bytes]:
    """Return what a saved model consists of, without Orbax's records of times and places."""
    found = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    own = ("params/_CHECKPOINT_METADATA", "params/commit_success.txt")
    return {k: p.read_bytes() for k, p in found.items() if k not in own}


@pytest.mark.long
def test_two_and_four_processes_equal_one(tmp_path):
    (wanted,) = run(1, tmp_path / "1")
    assert wanted["restored"]
    assert wanted["devices"] == 8
    for processes in (2, 4):
        said = run(processes, tmp_path / str(processes))
        assert files(tmp_path / str(processes)) == files(tmp_path / "1")
        assert all(one["devices"] == 8 for one in said)
        assert [one["local_devices"] for one in said] == [8 // processes] * processes
        for one in said:
            np.testing.assert_allclose(one["loss"], wanted["loss"], rtol=1e-6)
            np.testing.assert_allclose(one["logits"], wanted["logits"], rtol=1e-5)
            assert one["gradients"].keys() == wanted["gradients"].keys()
            for name, norm in one["gradients"].items():
                np.testing.assert_allclose(norm, wanted["gradients"][name], rtol=1e-5)
            assert one["restored"]
            assert one["error"] == wanted["error"] != ""


def _losses(workdir) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines)]


@pytest.mark.long
def test_two_processes_train_as_one_does_and_one_goes_on_for_two(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (wanted,) = run(1, one, TRAINER)
    said = run(2, two, TRAINER)
    assert wanted["step"] == 4
    assert [other["step"] for other in said] == [4, 4]
    assert len(_losses(one)) == 6  # four steps, and an evaluation at the end of both stages
    np.testing.assert_allclose(_losses(two), _losses(one), rtol=1e-5)
    shutil.rmtree(two / "checkpoints" / "4")
    run(1, two, TRAINER)
    np.testing.assert_allclose(_losses(two), _losses(one), rtol=1e-5)
