"""Steps of the demo that are kept: what finished is not done again, what was cut is.

A finished step has a marker, `steps/NAME.json`, which is written atomically once all of its files
are. `inputs.sha256` is the digest of everything that decides the results. Where it differs from
today's, all files but the compiled programs are removed.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

from m1_jax import durable

DIGEST_FILE, MARKER_DIR = "inputs.sha256", "steps"
# What stays when the inputs changed: compiled programs, and the lock of the start that asks.
_KEPT_NAMES = ("xla", "demo.lock")
_IGNORED_PARTS = {"__pycache__", "out"}


@dataclasses.dataclass(frozen=True)
class DemoStep:
    """One step of the demo.

    Attributes:
      name: name of its marker, unique.
      title: what the terminal says.
      run: does the work, and returns results that JSON can hold.
      outputs: directories and files that are removed before the step begins. A directory that the
        step goes on from, such as a training run's, is not among them.
    """

    name: str
    title: str
    run: Callable[[], dict[str, Any]]
    outputs: tuple[str, ...] = ()


def digest_inputs(root: pathlib.Path, paths: Iterable[str], versions: Iterable[str]) -> str:
    """Return the SHA-256 of files below `root`, with their names, and of versions.

    Args:
      root: directory of the checkout.
      paths: files and directories below it.
      versions: strings that decide the results, too.
    """
    digest = hashlib.sha256("\n".join(versions).encode())
    for path in paths:
        found = root / path
        files = sorted(found.rglob("*")) if found.is_dir() else [found]
        for file in files:
            relative = file.relative_to(root)
            if file.is_file() and not _IGNORED_PARTS & set(relative.parts):
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                digest.update(f"\n{relative.as_posix()} {content}".encode())
    return digest.hexdigest()


def prepare_output(output_dir: pathlib.Path, digest: str) -> bool:
    """Make the directory, and empty it if its files come from other inputs.

    Compiled programs stay, as their own keys say what they belong to.

    Returns:
      Whether steps of an earlier start may be there.
    """
    stamp = output_dir / DIGEST_FILE
    if stamp.is_file() and stamp.read_text() == digest:
        return True
    stamp.unlink(missing_ok=True)  # first: a start that is cut here then begins anew
    output_dir.mkdir(parents=True, exist_ok=True)
    for path in output_dir.iterdir():
        if path.name not in _KEPT_NAMES:
            _remove(path)
    (output_dir / MARKER_DIR).mkdir()
    durable.write_text_atomically(stamp, digest)
    return False


def run_steps(output_dir: pathlib.Path, steps: list[DemoStep]) -> dict[str, dict[str, Any]]:
    """Do all steps without a marker, in order, and return every step's results and seconds.

    Returns:
      {name: {"secs": time of its last start, "results": what its `run` returned}}.
    """
    records = {}
    for number, step in enumerate(steps, 1):
        marker = output_dir / MARKER_DIR / f"{step.name}.json"
        progress = f"[{number}/{len(steps)}] {step.title}"
        if marker.is_file():
            records[step.name] = json.loads(marker.read_text())
            print(f"{progress}: kept from before", flush=True)
            continue
        print(progress, flush=True)
        for name in step.outputs:
            _remove(output_dir / name)
        start = time.perf_counter()
        results = step.run()
        secs = time.perf_counter() - start
        text = json.dumps({"secs": round(secs, 2), "results": results}, indent=1)
        durable.write_text_atomically(marker, text + "\n")
        # As it would be read by the next start: JSON has no tuples.
        records[step.name] = json.loads(text)
        print(f"      {secs:.1f} s", flush=True)
    return records


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def describe_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of packages that are installed."""
    return {"Python": sys.version.split()[0]} | {name: metadata.version(name) for name in packages}
