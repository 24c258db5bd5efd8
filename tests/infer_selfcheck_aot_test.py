"""m1-selfcheck's programs compile for TPUs at device sizes, and shipped predictions hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.selfcheck import check, command, oracles, predict, predictions, programs
from m1_jax.plan import aot
from pallas_kernels.lightning_attention import tiling

KERNEL_CHECKS = (
    "serving softmax attention (TPU kernel), bfloat16",
    "serving lightning attention (TPU kernel), bfloat16",
    "splash attention, bfloat16",
    "lightning attention (TPU kernels), bfloat16",
    "lightning attention (TPU kernels), float32",
    "experts, training, bfloat16",
    "experts, serving, int8",
)
# One with every landing, which takes seconds. The others take up to a minute, in turns.
CHECKS_BY_CHIP = [
    pytest.param(
        chip, name, marks=pytest.mark.slow if (chip, i) == ("v5p", 0) else pytest.mark.long
    )
    for chip in ("v5e", "v5p", "v6e")
    for i, name in enumerate(KERNEL_CHECKS)
]


@pytest.fixture(autouse=True)
def no_oracles(monkeypatch):
    """Nothing is compared here, and the oracles take seconds at these sizes."""

    def attend_lightning(qkv, slopes, segment_ids, state, d_o, d_final):
        return oracles.LightningResult(*(np.ones(x.shape) for x in (d_o, state, qkv, state)))

    def attend_softmax(q, k, v, segment_ids, d_o):
        return tuple(np.ones(x.shape) for x in (q, q, k, v))

    def run_experts(rows, gate, up, down, group_sizes, weights, d_y):
        return oracles.ExpertsResult(
            *(np.ones(x.shape) for x in (rows, rows, gate, up, down, weights))
        )

    for stub in (attend_lightning, attend_softmax, run_experts):
        monkeypatch.setattr(oracles, stub.__name__, stub)


def compile_instead_of_running(monkeypatch, chip):
    """Make `jax.jit` compile for a chip and return zeros. Return the programs' texts, by shapes."""
    device = predict.get_device(chip)
    where = jax.sharding.SingleDeviceSharding(device)
    real_jit, texts = jax.jit, {}

    def add_sharding(x):
        x = jnp.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def jit(function, **options):
        jitted = real_jit(function, **options)

        @functools.wraps(function)
        def compile_only(*arguments):
            shapes = jax.tree.map(add_sharding, arguments)
            if str(shapes) not in texts:
                with tiling.compile_for(chip):
                    lowered = jitted.trace(*shapes).lower(lowering_platforms=("tpu",))
                lowered.compile()
                # That of the compiled program fails inside XLA for some (`aot.py`).
                texts[str(shapes)] = lowered.as_text()
            outputs = jax.eval_shape(function, *arguments)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)

        return compile_only

    monkeypatch.setattr(jax, "jit", jit)
    return texts


@pytest.mark.parametrize(("chip", "name"), CHECKS_BY_CHIP)
def test_checks_compile_at_the_sizes_of_a_device(monkeypatch, chip, name):
    (device_check,) = [c for c in command.list_kernel_checks() if c.name == name]
    texts = compile_instead_of_running(monkeypatch, chip)
    kind = next(kind for kind, generation in tiling.KINDS.items() if generation == chip)
    findings = device_check.run(check.DeviceSetting("tpu", kind, is_small=False))
    assert findings.errors
    assert texts
    # None fell back to XLA's form. Grouped products become kernels as they are compiled.
    kernel = "ragged_dot" if name.startswith("experts") else "tpu_custom_call"
    assert all(kernel in text for text in texts.values())


def find_programs(chip, words):
    device = predict.get_device(chip)
    limit_bytes = aot.probe_hbm_limit_bytes(device)
    found = predict.list_device_programs(limit_bytes)
    return device, limit_bytes, [program for program in found if words in program.name]


# What takes seconds to compile, with every landing. All the rest takes minutes.
@pytest.mark.parametrize(
    ("chip", "words"),
    [
        pytest.param("v6e", "serving softmax attention", marks=pytest.mark.slow),
        pytest.param("v5e", "lightning attention", marks=pytest.mark.long),
        pytest.param("v6e", "softmax attention, 4096", marks=pytest.mark.long),
        pytest.param("v5e", "training", marks=pytest.mark.long),
        pytest.param("v6e", "decoding", marks=pytest.mark.long),
    ],
)
def test_shipped_predictions_are_what_the_planner_says(chip, words):
    """Run `python -m infer.selfcheck.predict` where they are not."""
    device, limit_bytes, found = find_programs(chip, words)
    assert found
    for program in found:
        shipped = predictions.read_predictions()["programs"][chip][program.name]
        secs = predict.predict_program(program, chip, device, limit_bytes)
        # Three digits are written. Another libtpu would schedule otherwise.
        assert secs == pytest.approx(shipped, rel=0.05), program.name


@pytest.mark.parametrize(
    ("gigabytes", "num_experts"), [(8, 4), (16.9, 16), (33.5, 32), (102, 32), (3, 2)]
)
def test_a_layer_has_the_experts_that_fit(gigabytes, num_experts):
    assert programs.count_fitting_experts(gigabytes * 1e9) == num_experts
    sizes = programs.make_sizes(False, gigabytes * 1e9)
    assert sizes.layer.num_local_experts == num_experts
    assert f"{num_experts} experts of 9216" in programs.describe_layer(sizes.layer)
