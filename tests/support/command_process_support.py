"""Commands in one process or in several, with the same number of CPU devices together."""

import os
import pathlib
import re
import socket
import subprocess
import sys

REPO = pathlib.Path(__file__).resolve().parents[2]
DEVICES = 4  # of all processes together


def start(processes, module, *arguments, **variables):
    """Start a command in several processes of `DEVICES` CPU devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {**os.environ, "PYTHONPATH": ".", "JAX_NUM_CPU_DEVICES": str(DEVICES // processes)}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, "-m", module, *arguments, *["--distributed"] * (processes > 1)]
    return [
        subprocess.Popen(
            command,
            cwd=REPO,
            env={**env, "JAX_PROCESS_ID": str(index), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def finish(started, timeout=300):
    """Return (status, stdout, stderr) of each process, without what the collectives say."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()

    # Gloo prints from several threads, piece by piece, so that lines are mixed with each other.
    pieces = r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. | connected peer ranks is : "
    gloo_line = re.compile(rf"({pieces}|Expected number of)*")

    def clean(text):
        return "\n".join(line for line in text.splitlines() if not gloo_line.fullmatch(line))

    return [
        (process.returncode, clean(out), clean(err))
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


def run(processes, module, *arguments):
    return finish(start(processes, module, *arguments))
