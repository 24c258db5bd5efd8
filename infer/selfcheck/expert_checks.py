"""Grouped products of experts against the oracle, as one layer and in a stack, int8 too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from infer.selfcheck import check, oracles
from m1_jax import experts, quantize

# Relative L2 of (y, gradients). float32: sums of another order. bfloat16: gate, up, hidden and y
# are rounded, 1.7e-3 each, and in gradients as many numbers again.
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (6.8e-3, 1.4e-2)}
# (rows, width, hidden units, experts) on a device, and in small.
DEVICE_SIZES, SMALL_SIZES = (1000, 1024, 1536, 8), (100, 64, 96, 8)
NAMES = ("y", "d_rows", "d_gate", "d_up", "d_down", "d_weights")


def _draw_inputs(dtype: str, setting: check.DeviceSetting):
    """Return (rows, gate, up, down, group_sizes, weights), and a cotangent of y."""
    num_rows, width, hidden, num_experts = SMALL_SIZES if setting.is_small else DEVICE_SIZES
    rng = np.random.default_rng(0)

    def draw(scale, *shape):
        return np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32) * scale, dtype))

    # One expert has no row, one has most of them, and the last rows have no expert.
    shares = rng.dirichlet(np.ones(num_experts - 1) / 2)
    group_sizes = np.insert((shares * (num_rows - 7)).astype(np.int32), 2, 0)
    return (
        draw(1, num_rows, width),
        *(draw(width**-0.5, num_experts, width, hidden) for _ in range(2)),
        draw(hidden**-0.5, num_experts, hidden, width),
        group_sizes,
        rng.uniform(0.2, 0.8, num_rows).astype(np.float32),
        draw(1, num_rows, width),
    )


def check_gradients(dtype: str, setting: check.DeviceSetting) -> check.CheckFindings:
    """Compare the grouped products of training: values and all gradients."""
    *inputs, d_y = _draw_inputs(dtype, setting)
    group_sizes = inputs[4]
    num_real = int(group_sizes.sum())
    has_expert = np.arange(len(d_y)) < num_real
    d_y = np.where(has_expert[:, None], d_y, 0).astype(d_y.dtype)

    @jax.jit
    def run(rows, gate, up, down, group_sizes, weights, d_y):
        def forward(rows, gate, up, down, weights):
            return experts.grouped_mlp(rows, gate, up, down, group_sizes, weights)

        y, pull_back = jax.vjp(forward, rows, gate, up, down, weights)
        return y, *pull_back(d_y)

    with check.compute_in_float32(dtype):
        outputs = run(*map(jnp.asarray, inputs), jnp.asarray(d_y))
    wanted = oracles.run_experts(*inputs, d_y=d_y)
    of_y, of_gradients = TOLERANCES[dtype]
    errors = []
    for name, got, expected in zip(NAMES, outputs, wanted, strict=True):
        if name in ("y", "d_rows", "d_weights"):  # rows without an expert are undefined
            got, expected = got[:num_real], expected[:num_real]
        error = oracles.relative_error(got, expected)
        errors.append(check.MeasuredError(name, error, of_y if name == "y" else of_gradients))
    return check.CheckFindings(errors)


def check_stack(dtype: str, is_int8: bool, setting: check.DeviceSetting) -> check.CheckFindings:
    """Compare the grouped products of serving: one layer of a stack, in float or int8."""
    rows, *matrices, group_sizes, weights, d_y = _draw_inputs(dtype, setting)
    num_real = int(group_sizes.sum())
    stacks, plain = [], []
    for matrix in matrices:
        if is_int8:
            values, scale = quantize.quantize_columns(matrix.astype(np.float32))
            plain.append(values.astype(np.float64) * scale[:, None])
            stacks.append(quantize.QuantizedMatrices(_stack(values), _stack(scale)))
        else:
            plain.append(matrix)
            stacks.append(_stack(matrix))

    @jax.jit
    def run(rows, gate, up, down, group_sizes, weights, repeat, layer):
        return experts.grouped_mlp_stacked(
            rows, gate, up, down, (repeat, layer), group_sizes, weights
        )

    @jax.jit
    def run_one_layer(rows, gate, up, down, group_sizes, weights):
        return experts.grouped_mlp(rows, gate, up, down, group_sizes, weights)

    rest = jnp.asarray(group_sizes), jnp.asarray(weights)
    with check.compute_in_float32(dtype):
        y = run(jnp.asarray(rows), *stacks, *rest, 1, 0)
        own = [jax.tree.map(lambda a: a[1, 0], stack) for stack in stacks]
        y_of_layer = run_one_layer(jnp.asarray(rows), *own, *rest)
    gate, up, down = plain
    no_d_y = np.zeros_like(d_y)
    wanted = oracles.run_experts(rows, gate, up, down, group_sizes, weights, no_d_y).y
    tolerance = TOLERANCES[dtype][0]
    errors = [
        check.MeasuredError(
            name, oracles.relative_error(got[:num_real], wanted[:num_real]), tolerance
        )
        for name, got in (("y, stack", y), ("y, layer", y_of_layer))
    ]
    return check.CheckFindings(errors)


def _stack(matrix: np.ndarray) -> jax.Array:
    """Return a stack of two repeats of one layer, of which the first is other numbers."""
    return jnp.asarray(np.stack([np.roll(matrix, 1, axis=0)[None], matrix[None]]))


def list_checks() -> list[check.DeviceCheck]:
    """Return the checks in float32, bfloat16 and int8."""
    checks = {
        f"experts, training, {dtype}": functools.partial(check_gradients, dtype)
        for dtype in TOLERANCES
    }
    checks |= {
        f"experts, serving, {dtype}": functools.partial(check_stack, dtype, False)
        for dtype in TOLERANCES
    }
    checks["experts, serving, int8"] = functools.partial(check_stack, "bfloat16", True)
    return [check.DeviceCheck(name, "kernels", run) for name, run in checks.items()]
