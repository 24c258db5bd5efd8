"""Two processes of one mesh serve as one does, bit-exact."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).with_name("engine_worker.py")
REPO = WORKER.parents[1]


def serve(processes: int):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(WORKER), str(port), str(processes)]
    env = {**os.environ, "PYTHONPATH": "."}
    started = [
        subprocess.Popen(
            [*command, str(index)], cwd=REPO, env=env, stdout=subprocess.PIPE, text=True
        )
        for index in range(processes)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes
    return json.loads(outputs[0].splitlines()[-1])


@pytest.mark.long(tenths=range(1, 10, 2))  # a minute of a core; even ones have mutations
def test_two_processes_serve_as_one():
    assert serve(2) == serve(1)
