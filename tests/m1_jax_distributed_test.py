"""Processes that do not find each other, and errors that end all."""

import os
import subprocess
import sys

import pytest

from m1_jax import distributed

VARIABLES = (
    distributed.ADDRESS_VARIABLE,
    distributed.COUNT_VARIABLE,
    distributed.INDEX_VARIABLE,
)


@pytest.mark.parametrize("module", ["infer.generate", "infer.offline", "m1_jax.verify"])
def test_without_peers_a_command_says_what_to_set(module):
    flags = {
        "infer.generate": ["--checkpoint=x", "--prompt=hi"],
        "infer.offline": ["--checkpoint=x", "--input=x", "--output=x"],
        "m1_jax.verify": ["--checkpoint=x", "--golden=x"],
    }
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # No question to a metadata server, which this machine need not have.
    env["TPU_SKIP_MDS_QUERY"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *flags[module], "--distributed"],
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: --distributed: got no processes that JAX can find")
    assert all(name in line for name in VARIABLES)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("localhost", "2", "0"), "got JAX_COORDINATOR_ADDRESS='localhost'; wanted HOST:PORT"),
        (("localhost:1", "two", "0"), "got JAX_NUM_PROCESSES='two'; wanted a whole number"),
        (("localhost:1", "2", "2"), "got JAX_PROCESS_ID=2 of JAX_NUM_PROCESSES=2; wanted 0 to"),
    ],
)
def test_wrong_variables_are_refused(values, message, monkeypatch):
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.initialize_distributed()


def test_one_process_raises_its_own_errors():
    def fail():
        raise FileNotFoundError("no file\nat all")

    with pytest.raises(FileNotFoundError):
        distributed.run_on_all(fail)
    with pytest.raises(FileNotFoundError):
        distributed.run_on_first(fail)
    with pytest.raises(SystemExit) as stop:
        distributed.run_to_exit(fail)
    assert stop.value.code == "error: no file at all"
    with pytest.raises(SystemExit) as stop:
        distributed.run_to_exit(lambda: 7)
    assert stop.value.code == 7
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        distributed.run_to_exit(lambda: 1 // 0)
