"""Metrics of a run: one writer for JSONL, TensorBoard and the terminal."""

import collections
import json
import math
import os
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging

_SHOWN = ("loss", "learning_rate", "tokens_per_sec")
FILE, SAMPLES = "metrics.jsonl", "samples.jsonl"
# bfloat16 operations a second of a device, from the makers' data sheets, by jax's device_kind.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class Writer:
    """Writes what process 0 is told, by step; after a restart, over what came after `step`.

    Lines of metrics.jsonl are {"step", "kind": "train" | "eval" | "event", ...}.

    newest: the last step of each kind that was there before, on process 0.
    """

    def __init__(
        self, directory: pathlib.Path, step: int, total_steps: int, shown: Sequence[str] = _SHOWN
    ):
        """Open the files. shown: which numbers the terminal gets of a step."""
        self._shown = shown
        self._on = jax.process_index() == 0
        self.newest: dict[str, int] = {}
        if not self._on:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: _reopen(directory / name, step, self.newest) for name in (FILE, SAMPLES)
        }
        board = str(directory / "tensorboard")
        self._board = tensorboardX.SummaryWriter(board, purge_step=step + 1)
        quiet = not sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=total_steps, initial=step, unit="step", disable=quiet)
        self._quiet = quiet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._on:
            self._board.close()
            self._bar.close()
            for file in self._files.values():
                file.close()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record numbers of a step; also what is not finite, which JSON tells as a string."""
        if not self._on:
            return
        self._line(FILE, {"step": step, "kind": kind} | {k: _plain(v) for k, v in values.items()})
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = {k: f"{values[k]:.4g}" for k in self._shown if k in values}
        if kind == "train" and self._quiet:
            logging.info("step %d: %s", step, " ".join(f"{k} {v}" for k, v in shown.items()))
        elif kind == "train":
            self._bar.set_postfix(shown, refresh=False)
        else:
            told = " ".join(f"{k} {_plain(v)}" for k, v in values.items())
            self._bar.write(f"step {step}: {kind}: {told}", file=sys.stderr)

    def samples(self, step: int, rows: list[list[str]]) -> None:
        if self._on:
            self._line(SAMPLES, {"step": step, "samples": rows})

    def advance(self, step: int) -> None:
        if self._on:
            self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """Bring lines to the disk, before the checkpoint that they belong to."""
        if self._on:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())

    def _line(self, name: str, record: dict) -> None:
        self._files[name].write(json.dumps(record) + "\n")


class Spikes:
    """Tells losses that stand out from the last hundred."""

    def __init__(self, factor: float):
        self._factor, self._last = factor, collections.deque(maxlen=100)

    def is_one(self, loss: float) -> bool:
        enough = len(self._last) >= 10
        high = enough and loss > self._factor * statistics.median(self._last)
        if math.isfinite(loss) and not high:
            self._last.append(loss)
        return high


def peak_flops() -> float | None:
    """Return what all devices can do in a second, in bfloat16; None where it is not known."""
    one = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if one is None else one * jax.device_count()


def expert_load(load: np.ndarray) -> dict[str, float]:
    """Return the busiest and the idlest expert's share over the mean, worst of all layers."""
    scaled = np.asarray(load, np.float64) * load.shape[-1]
    return {"expert_load_max": float(scaled.max()), "expert_load_min": float(scaled.min())}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _reopen(path: pathlib.Path, step: int, newest: dict[str, int]):
    """Open a file for appending, without the lines of steps that will be made again.

    newest: takes the last step of each kind of line that stays. A run from step 0 begins anew.
    """
    kept = []
    if path.exists() and step:
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                break
            if record["step"] > step:
                break
            kept.append(line + "\n")
            newest[record.get("kind", "samples")] = record["step"]
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.rename(path)
    return path.open("a")
