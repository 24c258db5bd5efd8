"""Kills a tiny training run again and again, and compares it with a run that was never killed.

    python benchmarks/kill_training.py [--kills=30] [--steps=120] [--devices=1] [--workers=0]
    python benchmarks/kill_training.py --rl=CHECKPOINT --kills=20 --steps=12

Every start of the second run is killed after a random time, by SIGKILL or SIGTERM, until the given
number of kills. The last start ends by itself. Losses and sample ids of every step, weights,
moments and data positions must be bit-exact. --devices=1,2 and --workers=0,1 alternate over the
starts. With several numbers of devices, losses and weights are compared within float32 rounding
instead. --rl kills reinforcement learning from a checkpoint that configs/tiny_cispo.py takes, while
it samples, scores or trains. The exit status is 1 where anything differs.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorstore as ts
import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPARED_METRICS = (
    "loss",
    "balance_loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "expert_load_max",
)
COMPARED_METRICS += ("reward_mean", "reward_sampled", "tokens_sampled", "staleness_max")
ROWS, LENGTH = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save_every", type=int, default=3)
    parser.add_argument("--devices", default="1", help="devices of each start, in turn")
    parser.add_argument("--workers", default="0", help="data workers of each start, in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rl", default="", help="checkpoint for RL. Without it: pretraining")
    arguments = parser.parse_args()
    devices = [int(n) for n in arguments.devices.split(",")]
    workers = [int(n) for n in arguments.workers.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        # `reference` is never killed.
        reference, killed = pathlib.Path(temporary) / "whole", pathlib.Path(temporary) / "killed"
        wait_or_kill(start_training(reference, arguments, devices[0], workers[0]), None)
        # Timed in a second run, whose programs come from the compilation cache.
        start = time.monotonic()
        wait_or_kill(
            start_training(pathlib.Path(temporary) / "timed", arguments, devices[0], workers[0]),
            None,
        )
        run_secs = time.monotonic() - start
        counts = {"SIGKILL": 0, "SIGTERM": 0}
        rng, num_starts = random.Random(arguments.seed), 0
        with tqdm.tqdm(total=arguments.kills, unit="kill") as bar:
            while True:
                process = start_training(
                    killed,
                    arguments,
                    devices[num_starts % len(devices)],
                    workers[num_starts % len(workers)],
                )
                num_starts += 1
                # From before the first step of a run to after its last.
                secs = rng.uniform(0.2, 1.0) * run_secs if bar.n < arguments.kills else None
                name = wait_or_kill(process, secs, rng.choice([signal.SIGKILL, signal.SIGTERM]))
                if name is None and (bar.n >= arguments.kills or num_starts > 5 * arguments.kills):
                    break
                if name is not None:
                    counts[name] += 1
                    bar.update()
                else:  # ended before its kill: delete its last checkpoints and go on
                    rewind_checkpoints(killed)
        problems = compare_runs(reference, killed, exact=len(set(devices)) == 1)
    print(f"{counts}, {num_starts} starts, {arguments.steps} steps")
    print(
        *problems or ["losses, samples, weights, moments and data positions are the same"], sep="\n"
    )
    sys.exit(bool(problems))


def start_training(
    workdir: pathlib.Path, arguments, devices: int, workers: int
) -> subprocess.Popen:
    """Start a process that begins the run, or goes on with it."""
    rl_values = {
        "batches": arguments.steps,
        "rollout.groups": 8,
        "rollout.partial_tokens": 12,
        "rollout.oversample": 1.5,
        "evaluation.every_batches": 0,
    }
    values = (
        rl_values
        if arguments.rl
        else {
            "stages": f"[{{'seq_len': {LENGTH}, 'rows': {ROWS}, 'learning_rate': 3e-3, "
            f"'tokens': {arguments.steps * ROWS * LENGTH}}}]",
            "evaluation.every_steps": 0,
            "data.workers": workers,
        }
    )
    values |= {
        "save.every_steps": arguments.save_every,
        "save.keep": arguments.steps,  # for `rewind_checkpoints`
        "log.every_steps": 1,
        "log.samples": True,
        "compilation_cache": workdir.parent / "xla",
    }
    module, config = "train.pretrain", "configs/tiny_pretrain.py"
    if arguments.rl:
        module, config = "train.rl", f"configs/tiny_cispo.py:{arguments.rl}"
    command = [sys.executable, "-m", module, f"--workdir={workdir}", f"--config={config}"]
    command += [f"--set={name}={value}" for name, value in values.items()]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    log = open(workdir.with_suffix(".log"), "a")  # noqa: SIM115
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def wait_or_kill(
    process: subprocess.Popen, secs: float | None, signal_number=signal.SIGKILL
) -> str | None:
    """Kill the process after `secs`, and return the signal's name. None: it ended before that."""
    try:
        code = process.wait(secs)
    except subprocess.TimeoutExpired:
        process.send_signal(signal_number)
        code = process.wait()
        # A run that saves on SIGTERM ends by itself, with the status that a shell would report.
        if code in (-signal_number, 128 + signal_number):
            return signal.Signals(signal_number).name
    if code:
        raise SystemExit(f"a run ended with status {code}; its log: {read_log(process)}")
    return None


def read_log(process: subprocess.Popen) -> str:
    workdir = next(a for a in process.args if a.startswith("--workdir=")).partition("=")[2]
    return pathlib.Path(workdir).with_suffix(".log").read_text()[-3000:]


def rewind_checkpoints(workdir: pathlib.Path) -> None:
    """Delete all checkpoints but the oldest, so that a finished run has steps to do again."""
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    for step in steps[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))


def compare_runs(reference: pathlib.Path, killed: pathlib.Path, exact: bool) -> list[str]:
    """Return the differences of two runs, at most 20.

    Args:
      exact: demand equal bits. Else only closeness, but of sample ids and token counts.
    """
    problems = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        reference_records, killed_records = (
            [json.loads(line) for line in (path / name).read_text().splitlines()]
            for path in (reference, killed)
        )
        if [r["step"] for r in reference_records] != [r["step"] for r in killed_records]:
            problems.append(f"{name}: other steps")
            continue
        for a, b in zip(reference_records, killed_records, strict=True):
            for key in a.keys() & b.keys() & {*COMPARED_METRICS, "samples"}:
                same = a[key] == b[key]
                if not exact and key not in ("samples", "tokens"):
                    same = np.isclose(a[key], b[key], rtol=2e-3, atol=1e-6)
                if not same:
                    problems.append(f"step {a['step']}: {key} {a[key]} against {b[key]}")
    reference_arrays, killed_arrays = (read_arrays(path) for path in (reference, killed))
    if reference_arrays.keys() != killed_arrays.keys():
        problems.append("other arrays")
    for name in reference_arrays.keys() & killed_arrays.keys():
        a, b = reference_arrays[name], killed_arrays[name]
        close = np.allclose(a, b, rtol=1e-2, atol=1e-3)
        if not (np.array_equal(a, b) if exact else close):
            gap = np.abs(a.astype(float) - b).max()
            problems.append(f"{name} differs by {gap:.2g}")
    positions = [newest_checkpoint(path) / "data" / "metadata" for path in (reference, killed)]
    if positions[0].read_text() != positions[1].read_text():
        problems.append("the position in the data differs")
    return problems[:20]


def newest_checkpoint(workdir: pathlib.Path) -> pathlib.Path:
    return max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))


def read_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Read all arrays of the newest checkpoint, as Orbax stores them."""
    directory = newest_checkpoint(workdir) / "state"
    base = {"driver": "ocdbt", "base": f"file://{directory}/"}
    keys = ts.KvStore.open(base).result().list().result()
    names = sorted({key.decode().rsplit("/", 1)[0] for key in keys if key.endswith(b"/.zarray")})
    spec = {"driver": "zarr"}
    return {
        n: ts.open(spec | {"kvstore": base | {"path": f"{n}/"}}).result().read().result()
        for n in names
    }


if __name__ == "__main__":
    main()
