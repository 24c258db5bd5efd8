"""A few of the random damages of benchmarks/damage_checkpoints.py."""

import os
import pathlib
import subprocess
import sys

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_random_damages_are_refused_or_read():
    command = [sys.executable, "benchmarks/damage_checkpoints.py", "--cases=60", "--seed=5"]
    done = subprocess.run(
        command,
        cwd=_REPO,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "60 cases of seed 5" in done.stdout
