"""Metrics of a run: one writer for JSONL, TensorBoard and the terminal."""

import collections
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm
from absl import logging

from m1_jax import durable

_TERMINAL_METRICS = ("loss", "learning_rate", "tokens_per_sec")
METRICS_FILE, SAMPLES_FILE = "metrics.jsonl", "samples.jsonl"
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


class MetricsWriter:
    """Writes what process 0 is told, by step; after a restart, over what came after `step`.

    Lines of metrics.jsonl are {"step", "kind": "train" | "eval" | "event", ...}.

    newest: the last step of each kind that was there before, on process 0.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        step: int,
        total_steps: int,
        terminal_metrics: Sequence[str] = _TERMINAL_METRICS,
    ):
        """Open the files. shown: which numbers the terminal gets of a step."""
        self._terminal_metrics = terminal_metrics
        self._is_primary = jax.process_index() == 0
        self.last_steps: dict[str, int] = {}
        if not self._is_primary:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: _reopen_log(directory / name, step, self.last_steps)
            for name in (METRICS_FILE, SAMPLES_FILE)
        }
        board = str(directory / "tensorboard")
        self._tensorboard = tensorboardX.SummaryWriter(board, purge_step=step + 1)
        quiet = not sys.stderr.isatty()
        self._progress_bar = tqdm.tqdm(total=total_steps, initial=step, unit="step", disable=quiet)
        self._is_quiet = quiet

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._is_primary:
            self._tensorboard.close()
            self._progress_bar.close()
            for file in self._files.values():
                file.close()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Record numbers of a step; also what is not finite, which JSON tells as a string."""
        if not self._is_primary:
            return
        self._write_line(
            METRICS_FILE,
            {"step": step, "kind": kind} | {k: _to_json_value(v) for k, v in values.items()},
        )
        for name, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        shown = {k: f"{values[k]:.4g}" for k in self._terminal_metrics if k in values}
        if kind == "train" and self._is_quiet:
            logging.info("step %d: %s", step, " ".join(f"{k} {v}" for k, v in shown.items()))
        elif kind == "train":
            self._progress_bar.set_postfix(shown, refresh=False)
        else:
            told = " ".join(f"{k} {_to_json_value(v)}" for k, v in values.items())
            self._progress_bar.write(f"step {step}: {kind}: {told}", file=sys.stderr)

    def write_samples(self, step: int, rows: list[list[str]]) -> None:
        if self._is_primary:
            self._write_line(SAMPLES_FILE, {"step": step, "samples": rows})

    def advance(self, step: int) -> None:
        if self._is_primary:
            self._progress_bar.update(step - self._progress_bar.n)

    def flush(self) -> None:
        """Bring lines to the disk, before the checkpoint that they belong to."""
        if self._is_primary:
            for file in self._files.values():
                durable.flush_to_disk(file)

    def _write_line(self, name: str, record: dict) -> None:
        self._files[name].write(json.dumps(record) + "\n")


class SpikeDetector:
    """Tells losses that stand out from the last hundred."""

    def __init__(self, factor: float):
        self._factor, self._recent_losses = factor, collections.deque(maxlen=100)

    def is_spike(self, loss: float) -> bool:
        enough = len(self._recent_losses) >= 10
        high = enough and loss > self._factor * statistics.median(self._recent_losses)
        if math.isfinite(loss) and not high:
            self._recent_losses.append(loss)
        return high


class StepTimer:
    """Measures seconds a step, between readings."""

    def __init__(self, step: int):
        self._start_secs, self._start_step = time.perf_counter(), step

    def restart(self, step: int) -> None:
        """Begin the next interval after `step`."""
        self._start_secs, self._start_step = time.perf_counter(), step

    def secs_per_step(self, step: int) -> float:
        """Return the interval's mean up to `step`, and begin the next interval."""
        now_secs = time.perf_counter()
        secs = (now_secs - self._start_secs) / max(step - self._start_step, 1)
        self._start_secs, self._start_step = now_secs, step
        return secs


def peak_flops() -> float | None:
    """Return what all devices can do in a second, in bfloat16; None where it is not known."""
    one = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if one is None else one * jax.device_count()


def summarize_expert_load(load: np.ndarray) -> dict[str, float]:
    """Return the busiest and the idlest expert's share over the mean, worst of all layers."""
    scaled = np.asarray(load, np.float64) * load.shape[-1]
    return {"expert_load_max": float(scaled.max()), "expert_load_min": float(scaled.min())}


def _to_json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _reopen_log(path: pathlib.Path, step: int, last_steps: dict[str, int]):
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
            last_steps[record.get("kind", "samples")] = record["step"]
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    part.rename(path)
    return path.open("a")
