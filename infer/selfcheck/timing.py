"""How long programs take on the device at hand, beside what m1-plan predicts."""

import functools
import time
from typing import Any

import jax
import numpy as np

from infer.selfcheck import check, predictions, programs
from m1_jax import compiler_options, memory_check

# Calls that are queued in one sample, so that launches overlap with work, where a call is shorter
# than `SHORT_SECS`.
QUEUED_CALLS, SHORT_SECS = 10, 0.02
MAX_SAMPLES, MAX_SECS, MIN_SAMPLES = 20, 4.0, 3


def time_program(program: programs.TimedProgram, options: dict[str, Any]) -> dict[str, float]:
    """Return seconds of one call: the median of samples, and their 90th percentile.

    Args:
      options: compiler options of the device.
    """
    carry, inputs = jax.jit(program.make_arguments)(jax.random.key(0))
    step = program.jit_step(compiler_options=options)

    def run_sample(count: int) -> float:
        nonlocal carry
        jax.block_until_ready(carry)
        start = time.perf_counter()
        for _ in range(count):
            carry = step(carry, inputs)
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / count

    start = time.perf_counter()
    run_sample(1)
    compile_secs = time.perf_counter() - start
    count = QUEUED_CALLS if run_sample(1) < SHORT_SECS else 1
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < MIN_SAMPLES or (
        len(samples) < MAX_SAMPLES and time.perf_counter() - start < MAX_SECS
    ):
        samples.append(run_sample(count))
    return {
        "median_secs": float(np.median(samples)),
        "p90_secs": float(np.percentile(samples, 90)),
        "num_samples": len(samples),
        "compile_secs": compile_secs,
    }


def check_time(program: programs.TimedProgram, setting: check.DeviceSetting) -> check.CheckFindings:
    """Measure a program. Only one that does not run fails."""
    options = compiler_options.options_for(jax.local_devices()[0])
    measured = time_program(program, options)
    prediction = predictions.find_prediction(setting.kind, program.name)
    details = {
        "use": program.use,
        "form": program.form,
        "measured": measured,
        "predicted_secs": prediction.secs,
        "prediction": prediction.note,
    }
    if prediction.secs:
        details["measured_over_predicted"] = {
            model: measured["median_secs"] / secs for model, secs in prediction.secs.items()
        }
    return check.CheckFindings(details=details)


def list_checks(setting: check.DeviceSetting) -> list[check.DeviceCheck]:
    """Return a check for each program, the heaviest last."""
    hbm_bytes = memory_check.device_limit_bytes(jax.local_devices()[0])
    sizes = programs.make_sizes(setting.is_small, hbm_bytes)
    return [
        check.DeviceCheck(
            f"time of {program.name}", "times", functools.partial(check_time, program)
        )
        for program in programs.list_programs(sizes, setting.platform)
    ]
