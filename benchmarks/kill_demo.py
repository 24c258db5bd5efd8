"""Kills the demo again and again, and compares its results with those of a demo never killed.

    PYTHONPATH=. python benchmarks/kill_demo.py [--kills=20] [--seed=0] [--until=pretrain]

Two demos write to folders of their own, with one cache of compiled programs. Every start of the
second one is killed after a random time, by SIGKILL or SIGINT, until the given number of kills.
The last start ends by itself. All results of all steps must be the same: losses, rewards, texts and
counts, to the last bit. The exit status is 1 where they differ. --until leaves later steps out. It
takes some five times as long as the demo.
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
from collections.abc import Callable

import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
# How a start may end: complete, killed, or stopped by SIGINT.
STATUSES = (0, -signal.SIGKILL, -signal.SIGINT, 130)


def start_demo(out: pathlib.Path, programs: pathlib.Path, arguments: list[str]) -> subprocess.Popen:
    """Start a process that begins the demo in `out`, or goes on with it."""
    env = os.environ | {"M1_DEMO_OUT": str(out), "JAX_COMPILATION_CACHE_DIR": str(programs)}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with open(out.with_suffix(".log"), "a") as log:
        command = [sys.executable, str(ROOT / "demo" / "run.py"), *arguments]
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def wait_or_kill(process: subprocess.Popen, secs: float | None, signal_number: int) -> bool:
    """Wait `secs`, then send the signal. Return whether the demo ended by itself.

    Raises:
      SystemExit: the demo failed.
    """
    try:
        status = process.wait(secs)
    except subprocess.TimeoutExpired:
        process.send_signal(signal_number)
        status = process.wait()
    if status not in STATUSES:
        raise SystemExit(f"the demo ended with status {status}")
    return status == 0


def kill_again_and_again(
    start: Callable[[], subprocess.Popen],
    out: pathlib.Path,
    num_kills: int,
    demo_secs: float,
    seed: int,
) -> dict[str, int]:
    """Kill the demo in `out` so often, then let it end. Return the number of each signal."""
    rng, counts = random.Random(seed), {"SIGKILL": 0, "SIGINT": 0}
    for _ in tqdm.trange(num_kills, unit="kill"):
        number = rng.choice([signal.SIGKILL, signal.SIGINT])
        # Short enough that all kills fit in, long enough to come past the imports.
        secs = rng.uniform(0.0, 3 * demo_secs / num_kills) + rng.choice([0.5, 5.0])
        if wait_or_kill(start(), secs, number):
            # It ended before its kill: another demo begins, whose steps are there to be cut.
            shutil.rmtree(out)
        else:
            counts[signal.Signals(number).name] += 1
    if not wait_or_kill(start(), None, signal.SIGKILL):
        raise SystemExit("the last start did not end by itself")
    return counts


def read_results(out: pathlib.Path) -> dict[str, dict]:
    """Return the results of each step, without its time."""
    markers = sorted((out / "steps").glob("*.json"))
    return {marker.stem: json.loads(marker.read_text())["results"] for marker in markers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", help="name of the last step")
    arguments = parser.parse_args()
    demo_arguments = [f"--until={arguments.until}"] if arguments.until else []
    with tempfile.TemporaryDirectory() as temporary:
        programs = pathlib.Path(temporary) / "programs"
        whole, killed = pathlib.Path(temporary) / "whole", pathlib.Path(temporary) / "killed"
        begin = time.monotonic()
        wait_or_kill(start_demo(whole, programs, demo_arguments), None, signal.SIGKILL)
        counts = kill_again_and_again(
            lambda: start_demo(killed, programs, demo_arguments),
            killed,
            arguments.kills,
            time.monotonic() - begin,
            arguments.seed,
        )
        expected, results = read_results(whole), read_results(killed)
    print(f"{counts}; {len(results)} steps have results")
    differing = [name for name in expected | results if expected.get(name) != results.get(name)]
    print(f"these steps differ: {', '.join(differing)}" if differing else "all are the same")
    sys.exit(bool(differing) or not results)


if __name__ == "__main__":
    main()
