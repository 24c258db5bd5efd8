"""What m1-plan predicts of the timed programs, for each TPU generation.

The figures lie in `predicted_times.json`, which this command makes on any machine with libtpu:

    python -m infer.selfcheck.predict

They are not made anew where a TPU is at hand: compiling for a prediction would take the minutes
that m1-selfcheck has.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple

from pallas_kernels.lightning_attention import tiling

DATA_FILE = pathlib.Path(__file__).parent / "predicted_times.json"


class TimePrediction(NamedTuple):
    """Seconds by m1-plan's two models, "low" and "high", or None, and a note on them."""

    secs: dict[str, float] | None
    note: str


@functools.cache
def read_predictions() -> dict[str, Any]:
    """Return the figures that are shipped: versions, and seconds by generation and program."""
    return json.loads(DATA_FILE.read_text(encoding="utf-8"))


def find_prediction(device_kind: str, program_name: str) -> TimePrediction:
    """Return what is predicted of a program on a kind of device."""
    generation = tiling.KINDS.get(device_kind)
    if generation is None:
        return TimePrediction(None, f"none: m1-plan predicts no times for {device_kind}")
    data = read_predictions()
    secs = data["programs"].get(generation, {}).get(program_name)
    versions = data["versions"]
    made_with = f"jax {versions['jax']}, libtpu {versions['libtpu']}"
    if secs is None:
        return TimePrediction(None, f"none of this program for {generation} ({made_with})")
    return TimePrediction(secs, f"for {generation}, made with {made_with}")
