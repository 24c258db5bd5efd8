"""Two processes of one mesh learn from rewards as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from m1_jax import ModelConfig
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import metrics

WORKER = pathlib.Path(__file__).with_name("rl_worker.py")
ROOT = WORKER.parents[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of random weights."""
    model = params_lib.random_model(ModelConfig.tiny(), jax.random.key(0), jnp.float32)
    directory = tmp_path_factory.mktemp("start") / "model"
    save_lib.save(model, directory, None, jnp.float32)
    format_lib.copy_small_files(ROOT / "demo/data/tokenizer", directory)
    return str(directory)


def learn(processes, start, workdir):
    """Return the lines of the run's metrics."""
    with socket.socket() as free_socket:
        free_socket.bind(("localhost", 0))
        port = free_socket.getsockname()[1]
    command = [sys.executable, str(WORKER), str(port), str(processes)]
    env = {**os.environ, "PYTHONPATH": "."}
    started = [
        subprocess.Popen([*command, str(index), start, str(workdir)], cwd=ROOT, env=env)
        for index in range(processes)
    ]
    assert [process.wait(timeout=900) for process in started] == [0] * processes
    lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.long
def test_two_processes_learn_as_one(start, tmp_path):
    lines_of_one, lines_of_two = (
        learn(processes, start, tmp_path / str(processes)) for processes in (1, 2)
    )
    assert [line["kind"] for line in lines_of_one] == [line["kind"] for line in lines_of_two]
    for first, second in zip(lines_of_one, lines_of_two, strict=True):
        for name in ("tokens_sampled", "groups", "reward_sampled", "version"):
            assert first.get(name) == second.get(name), name
        for name in first.keys() & {"loss", "grad_norm", "entropy"}:
            assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-6), name
