"""The demo, killed a few times, has the results of one that was not."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_killed_demo_has_the_same_results():
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "benchmarks" / "kill_demo.py")]
    process = subprocess.run(
        [*command, "--kills=4", "--until=pretrain"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr[-2000:]
    assert "6 steps have results" in process.stdout
