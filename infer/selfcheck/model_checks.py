"""A whole model against the release's own numbers, and the engine against itself."""

import pathlib
import random
import tempfile

import jax.numpy as jnp

from infer.selfcheck import check, engine_fuzz, fuzz_requests
from m1_jax import golden_comparison, golden_file, sharding, testing
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib

# A tiny checkpoint in the release's format, and what the release's own code computed with it.
GOLDEN_FOLDER = pathlib.Path(__file__).parent / "m1-tiny"
# Random operations on the engine, and requests that are served alone first.
DEVICE_OPERATIONS, SMALL_OPERATIONS = (600, 20), (60, 6)


def check_golden(setting: check.DeviceSetting) -> check.CheckFindings:
    """Compare the golden checkpoint: logits, states, decoding, gradients, as m1-verify does."""
    del setting  # the same everywhere
    model = load_lib.load(GOLDEN_FOLDER, jnp.float32, mode=sharding.PREFILL)
    path = str(GOLDEN_FOLDER / "golden.npz")
    arrays = golden_file.read_golden_arrays(path)
    golden = golden_file.GoldenFile(path, arrays, model.config, None)
    rows = golden_comparison.compare_golden(model, golden)
    return check.CheckFindings(
        [check.MeasuredError(row.name, row.difference, row.tolerance) for row in rows]
    )


def check_engine(setting: check.DeviceSetting) -> check.CheckFindings:
    """Serve requests alone, then under random operations: all bits must be equal."""
    num_operations, num_cases = SMALL_OPERATIONS if setting.is_small else DEVICE_OPERATIONS
    # The kernels for TPU take heads of 128, and what is served there is bfloat16.
    is_tpu = setting.platform == "tpu"
    dtype = jnp.dtype(jnp.float32 if setting.is_small else jnp.bfloat16)
    model = fuzz_requests.make_model(dtype, 128 if is_tpu else 32)
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = tokenizer_lib.Tokenizer.load(testing.write_tiny_tokenizer(directory))
    outcome = engine_fuzz.run_fuzz(
        model,
        tokenizer,
        random.Random(0),
        num_cases,
        fuzz_requests.BUSY_CONFIGS[:1],
        num_operations,
        deadline=setting.deadline,
    )
    problems = list(outcome.problems)
    if not outcome.counts["compared"]:
        problems.append("no request was compared: the time was over before")
    details = {
        "operations": outcome.num_operations,
        "requests_compared": outcome.counts["compared"],
        "untried": outcome.list_untried(),
        "dtype": dtype.name,
    }
    return check.CheckFindings(problems=problems[:5], details=details)


def list_checks() -> list[check.DeviceCheck]:
    """Return both checks."""
    return [
        check.DeviceCheck("golden checkpoint", "golden", check_golden),
        check.DeviceCheck("engine, bit-exact under random operations", "engine", check_engine),
    ]
