"""Plants 20 failures into RL runs of several processes, and measures how long all take to end.

    python benchmarks/pod_failures.py [--trials=20] [--processes=4]

An exception on the first, the second and the last process, in sampling, scoring, update, handover,
save and close: all processes end within 30 s with a status that is not 0, and print the error. A
process that is stopped (SIGSTOP): the others end within 30 s. SIGTERM to one process: all end with
143, and leave a checkpoint from which the run goes on. The exit status is 1 where a trial fails.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp

from m1_jax import ModelConfig
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKER = pathlib.Path(__file__).with_name("pod_worker.py")
PHASES = ("sampling", "scoring", "update", "handover", "save", "close")
XLA_FLAGS = "--xla_backend_optimization_level=0"  # compiles twice as fast
MAX_SECS_TO_END, MAX_SECS_TO_SAVE = 30.0, 60.0


def list_faults(processes: int) -> list[str]:
    """Return the faults of the trials, as `pod_worker.plant_fault` takes them."""
    last = processes - 1
    errors = [f"error:{phase}:{index}" for phase in PHASES for index in (0, 1, last)]
    # SIGTERM in the first update: what is saved is the batch that it belongs to.
    return ["term:update:1", f"silence:update:{last}", *errors]


def write_checkpoint(directory: pathlib.Path) -> None:
    """Write a tiny model of random weights with a tokenizer."""
    # Two layers: nearly all of a trial's time is compilation, on each process.
    config = dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax"))
    model = params_lib.random_model(config, jax.random.key(0), jnp.float32)
    save_lib.save(model, directory, None, jnp.float32)
    format_lib.copy_small_files(ROOT / "demo/data/tokenizer", directory)


def start_processes(processes: int, *arguments: str, **env: str) -> list[subprocess.Popen]:
    """Start a run of several processes. Their stdout and stderr are pipes."""
    with socket.socket() as free_socket:
        free_socket.bind(("localhost", 0))
        port = free_socket.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(port), str(processes), str(index), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": ".", "XLA_FLAGS": XLA_FLAGS, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]


def run_trial(fault: str, processes: int, checkpoint: str, workdir: str) -> tuple[bool, str]:
    """Return whether a trial went as it should, and what happened."""
    kind, phase, culprit = fault.split(":")
    started = start_processes(processes, "rl", checkpoint, workdir, fault)
    culprit_output = started[int(culprit)].stdout
    assert culprit_output is not None
    began = next((float(line.split()[1]) for line in culprit_output if "fault " in line), None)
    waited = [p for i, p in enumerate(started) if not (kind == "silence" and i == int(culprit))]
    try:
        outputs = [process.communicate(timeout=300) for process in waited]
    except subprocess.TimeoutExpired:
        return False, "not ended after 300 s"
    finally:
        for process in started:
            process.kill()
    if began is None:
        return False, "the fault was not reached"
    secs = time.time() - began
    statuses = [process.returncode for process in waited]
    if kind == "term":
        is_saved = any((pathlib.Path(workdir) / "checkpoints").glob("[0-9]*"))
        is_right = set(statuses) == {128 + signal.SIGTERM} and secs <= MAX_SECS_TO_SAVE
        return is_right and is_saved, f"{secs:.1f} s, statuses {statuses}, saved {is_saved}"
    line = f"planted in {phase}" if kind == "error" else "has not answered for"
    told = sum(line in err for _, err in outputs)
    is_right = all(statuses) and told == len(waited) and secs <= MAX_SECS_TO_END
    return is_right, f"{secs:.1f} s, statuses {statuses}, told by {told} of {len(waited)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    num_right = 0
    faults = list_faults(arguments.processes)[: arguments.trials]
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = pathlib.Path(temporary) / "model"
        write_checkpoint(checkpoint)
        for number, fault in enumerate(faults):
            workdir = pathlib.Path(temporary) / str(number)
            is_right, text = run_trial(fault, arguments.processes, str(checkpoint), str(workdir))
            num_right += is_right
            print(f"{'right' if is_right else 'WRONG'} {fault}: {text}", flush=True)
            shutil.rmtree(workdir, ignore_errors=True)
    print(f"{num_right} of {len(faults)} trials")
    sys.exit(num_right < len(faults))


if __name__ == "__main__":
    main()
