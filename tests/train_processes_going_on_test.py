"""Two processes of a run: an error of one's data is saved by both, and process 0 has the lock."""

import json
import os
import socket
import subprocess
import sys

import pytest
from training_run_support import ROOT, read_metrics

from m1_jax import file_lock

_CONFIG = """
import dataclasses
from m1_jax.config import ModelConfig
from train import config as c

def get_config():
    return c.TrainConfig(
        model=dataclasses.replace(
            ModelConfig.tiny(), layer_types=("lightning",), hidden_size=32, intermediate_size=32
        ),
        tokenizer="demo/data/tokenizer", dtype="float32",
        stages=(c.TrainStage(seq_len=32, rows=2, tokens=64 * 200, learning_rate=1e-3),),
        data=c.DataConfig(sources=(c.DataSource("own", {data!r}, "text"),), lanes=2, lookahead=1),
        save=c.SaveConfig(every_steps=1000), log=c.LogConfig(every_steps=1),
        compilation_cache={cache!r},
    )
"""


def _run_both(*arguments):
    """Run a command in two processes, and return the exit status and the errors of each."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "train.pretrain", "--distributed", *arguments]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_NUM_PROCESSES": "2"}
    env |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "PYTHONPATH": "."}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


@pytest.mark.long
def test_both_processes_save_before_an_error_of_ones_data_and_one_has_the_lock(tmp_path):
    lines = (ROOT / "demo/data/text.jsonl").read_text().splitlines(keepends=True)[:40]
    lines[20] = '{"text": 5}\n'
    data, workdir = tmp_path / "text.jsonl", tmp_path / "run"
    data.write_text("".join(lines))
    config = tmp_path / "config.py"
    config.write_text(_CONFIG.format(data=str(data), cache=str(tmp_path / "xla")))
    arguments = (f"--config={config}", f"--workdir={workdir}")
    workdir.mkdir()
    with file_lock.hold_lock(workdir / "run", "trains in"):
        codes, errors = _run_both(*arguments)
    assert codes == [1, 1]
    assert f"process {os.getpid()} on" in errors[0]
    assert not list(workdir.iterdir())
    codes, errors = _run_both(*arguments)
    assert codes == [1, 1], errors
    assert "text.jsonl" in errors[0]
    assert not [error for error in errors if "Traceback" in error]
    (event,) = [e for e in read_metrics(workdir, "event") if "data_error" in e]
    assert event["step"] > 0
    (checkpoint,) = (workdir / "checkpoints").iterdir()
    assert int(checkpoint.name) == event["step"]
    # The data of both processes are those after the same batch.
    state = json.loads((checkpoint / "data" / "metadata").read_text())
    assert state["step"] == event["step"]
