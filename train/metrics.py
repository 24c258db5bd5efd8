"""Metrics of a run: a writer for JSONL, TensorBoard and the terminal, and what it is given."""

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
from absl import logging

from m1_jax import durable, progress_bar

# What the terminal shows of a step.
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
    """Writes metrics by step, on process 0. On the other processes every method does nothing.

    Lines of metrics.jsonl are {"step", "kind": "train" | "eval" | "event", ...}. After a restart,
    lines of steps that will be made again are cut off first.

    Attributes:
      last_steps: the step of the last line of each kind in the files before the restart. Empty on
        processes other than 0.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        step: int,
        total_steps: int,
        terminal_metrics: Sequence[str] = _TERMINAL_METRICS,
    ):
        """Open the files.

        Args:
          directory: directory of the run.
          step: number of steps made before. Later lines in the files are cut off.
          total_steps: number of the run's steps, for the progress bar.
          terminal_metrics: names of the metrics that the terminal shows of a step.
        """
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
        # TensorBoard then hides earlier events from this step on.
        self._tensorboard = tensorboardX.SummaryWriter(board, purge_step=step + 1)
        self._progress_bar = progress_bar.open_bar("train", total_steps, "step", initial=step)
        # Where the bar is a line now and then, `logging` has all steps, with --verbose.
        self._logs_steps = not sys.stderr.isatty()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._is_primary:
            self._tensorboard.close()
            self._progress_bar.close()
            for file in self._files.values():
                file.close()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Write the metrics of a step. JSON has numbers that are not finite as strings."""
        if not self._is_primary:
            return
        self._write_line(
            METRICS_FILE,
            {"step": step, "kind": kind} | {k: _to_json_value(v) for k, v in values.items()},
        )
        for name, value in values.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        terminal_values = {k: f"{values[k]:.4g}" for k in self._terminal_metrics if k in values}
        if kind == "train":
            self._progress_bar.set_postfix(terminal_values, refresh=False)
            if self._logs_steps:
                text = " ".join(f"{k} {v}" for k, v in terminal_values.items())
                logging.info("step %d: %s", step, text)
        else:
            # Evaluations and events are rare, so the terminal shows all of their values.
            text = " ".join(f"{k} {_to_json_value(v)}" for k, v in values.items())
            self._progress_bar.write(f"step {step}: {kind}: {text}", file=sys.stderr)

    def write_samples(self, step: int, rows: list[list[str]]) -> None:
        """Write the sample ids of each row of a step into samples.jsonl."""
        if self._is_primary:
            self._write_line(SAMPLES_FILE, {"step": step, "samples": rows})

    def advance(self, step: int) -> None:
        """Move the progress bar to a step."""
        if self._is_primary:
            self._progress_bar.update(step - self._progress_bar.n)

    def flush(self) -> None:
        """Write all lines to the disk. Call it before the checkpoint that they belong to."""
        if self._is_primary:
            for file in self._files.values():
                durable.flush_to_disk(file)

    def _write_line(self, name: str, record: dict) -> None:
        self._files[name].write(json.dumps(record) + "\n")


class SpikeDetector:
    """Finds losses that exceed the median of the last hundred by a factor."""

    def __init__(self, factor: float):
        self._factor, self._recent_losses = factor, collections.deque(maxlen=100)

    def is_spike(self, loss: float) -> bool:
        """Return whether a loss is a spike. If it is none, it joins the recent losses."""
        has_enough = len(self._recent_losses) >= 10  # a median of fewer says little
        high = has_enough and loss > self._factor * statistics.median(self._recent_losses)
        # Spikes stay out, so that a plateau of them keeps being reported.
        if math.isfinite(loss) and not high:
            self._recent_losses.append(loss)
        return high


class StepTimer:
    """Measures seconds a step in the interval between two readings."""

    def __init__(self, step: int):
        self._start_secs, self._start_step = time.perf_counter(), step

    def restart(self, step: int) -> None:
        """Begin the next interval after `step`."""
        self._start_secs, self._start_step = time.perf_counter(), step

    def secs_per_step(self, step: int) -> float:
        """Return the interval's mean up to `step`, and begin the next interval."""
        now_secs = time.perf_counter()
        # At least 1: after an evaluation a reading may come at the step of the restart.
        secs = (now_secs - self._start_secs) / max(step - self._start_step, 1)
        self._start_secs, self._start_step = now_secs, step
        return secs


def peak_flops() -> float | None:
    """Return the bfloat16 operations of all devices in a second, None where they are not known."""
    device_flops = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if device_flops is None else device_flops * jax.device_count()


def summarize_expert_load(load: np.ndarray) -> dict[str, float]:
    """Return the largest and the smallest share of an expert over the mean, of all layers.

    Args:
      load: [layers, experts], shares of the tokens. A layer's shares sum to 1.
    """
    # The mean share is 1 / experts.
    scaled = np.asarray(load, np.float64) * load.shape[-1]
    return {"expert_load_max": float(scaled.max()), "expert_load_min": float(scaled.min())}


def _to_json_value(value: Any) -> Any:
    # JSON has neither NaN nor infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _reopen_log(path: pathlib.Path, step: int, last_steps: dict[str, int]):
    """Open a file for appending, without the lines of steps that will be made again.

    Args:
      path: path of the file.
      step: the last one whose lines stay. With step 0 the file begins anew.
      last_steps: gets the last step of each kind of line that stays.
    """
    remaining_lines = []
    if path.exists() and step:
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a kill
                break
            if record["step"] > step:
                break
            remaining_lines.append(line + "\n")
            last_steps[record.get("kind", "samples")] = record["step"]
    # Written beside and renamed: a kill leaves the old file or the new one.
    part = path.with_suffix(".part")
    part.write_text("".join(remaining_lines))
    part.rename(path)
    # By lines: a run that is killed leaves all lines but the last, whenever it was saved before.
    return path.open("a", buffering=1)
