"""Sixteen processes in the order of a torus: a run that is killed goes on to the bit."""

import importlib.util
import json
import pathlib
import signal
import time

import numpy as np
import pytest

from m1_jax import sharding

_REPO = pathlib.Path(__file__).resolve().parents[1]
NUM_PROCESSES, DEVICES_EACH = 16, 2
# As many chips as there are devices.
TOPOLOGY = "v5p:4x4x2"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, _REPO / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pod_failures, pod_worker = _load("pod_failures"), _load("pod_worker")


def _torus_order(file):
    """Write which device, counted by host, each place of the mesh has on a torus."""
    pytest.importorskip("libtpu", reason="its compiler knows the torus")
    from m1_jax.plan import topology

    devices = topology.get_slice_devices(topology.parse_slice(TOPOLOGY))
    by_host = sorted(devices, key=lambda device: (device.process_index, device.id))
    numbers = {device.id: number for number, device in enumerate(by_host)}
    mesh, _ = pod_worker.MESHES[NUM_PROCESSES * DEVICES_EACH]
    laid_out = sharding.make_mesh(mesh, devices).devices
    order = [numbers[device.id] for device in laid_out.flat]
    assert order != sorted(order)  # else the test would be about nothing
    file.write_text(json.dumps({"x".join(map(str, laid_out.shape)): order}))
    return str(file)


def _run(job, checkpoint, workdir, order, kill_after=None):
    """Run all processes to the end, or kill them once a checkpoint is there."""
    processes = pod_failures.start_processes(
        NUM_PROCESSES, job, checkpoint, str(workdir), "", order, POD_DEVICES=str(DEVICES_EACH)
    )
    try:
        if kill_after is not None:
            while not (workdir / "checkpoints" / str(kill_after)).exists():
                assert all(process.poll() is None for process in processes)
                time.sleep(0.2)
            for process in processes:
                process.send_signal(signal.SIGKILL)
        errors = [process.communicate(timeout=1500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = {process.returncode for process in processes}
    assert statuses == {0 if kill_after is None else -signal.SIGKILL}, errors[0][-2000:]


def _outcome(workdir, last_step):
    """Return what must be equal to the bit: samples and metrics of all steps, and the state."""
    timed = ("secs", "per_sec", "time")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {name: value for name, value in line.items() if not any(t in name for t in timed)}
        for line in lines
        if line["kind"] in ("train", "eval")
    ]
    run = json.loads((workdir / "checkpoints" / str(last_step) / "run" / "metadata").read_text())
    return (workdir / "samples.jsonl").read_text(), metrics, run["digest"]


@pytest.mark.long
@pytest.mark.parametrize(("job", "killed_at", "last_step"), [("pretrain", 2, 6), ("rl", 1, 2)])
def test_a_killed_run_goes_on_to_the_bit(job, killed_at, last_step, tmp_path):
    order = _torus_order(tmp_path / "order.json")
    checkpoint = tmp_path / "model"
    pod_failures.write_checkpoint(checkpoint)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _run(job, str(checkpoint), whole, order)
    _run(job, str(checkpoint), killed, order, kill_after=killed_at)
    _run(job, str(checkpoint), killed, order)
    samples, metrics, digest = _outcome(whole, last_step)
    assert _outcome(killed, last_step) == (samples, metrics, digest)
    assert len(samples.splitlines()) == last_step
    assert np.isfinite([line["loss"] for line in metrics if line["kind"] == "train"]).all()
