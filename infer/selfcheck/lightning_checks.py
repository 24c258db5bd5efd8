"""Lightning attention of training against the oracle: values and gradients, packed and plain."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infer.selfcheck import check, oracles
from m1_jax import config as config_lib
from m1_jax import lightning
from pallas_kernels.lightning_attention import chunked, gpu, gpu_tiling, tiling, tpu

# Relative L2, of the worst head, as in the tests of the kernels: (o, state, gradients).
# float32: sums of another order. bfloat16: rounding o alone is 1.7e-3. The kernels round
# k lambda^n as well, and in gradients the pairs, dS, what is added to it, and the result. XLA's own
# form computes in float32 and rounds o and the gradient of qkv alone.
TOLERANCES = {
    "float32": (1e-5, 1e-5, 1e-4),
    "bfloat16": (3e-3, 2.5e-3, 3.4e-3),
}
# Sizes on a device: two superblocks, the second one ragged. In small: several blocks all the same.
DEVICE_SIZES, SMALL_SIZES = (2, 1224, 8, 128), (2, 150, 3, 16)
SMALL_TPU_BLOCKS = tiling.TpuBlockSizes(32, 64, 1)
SMALL_GPU_BLOCKS = gpu_tiling.GpuBlockSizes(32, 64, 16)


def choose_slopes(num_heads: int) -> np.ndarray:
    """Return decay rates of the release: its fastest and slowest heads, and heads between."""
    by_layer = lightning.decay_slopes(config_lib.ModelConfig.m1())
    all_slopes = np.sort(by_layer[[0, 40, 78]].reshape(-1))[::-1]
    return np.ascontiguousarray(
        all_slopes[np.linspace(0, len(all_slopes) - 1, num_heads).astype(int)]
    )


def make_segment_ids(batch: int, length: int) -> np.ndarray:
    """Return documents that start inside chunks and at their ends, a hole, and padding."""
    ids = np.zeros((batch, length), np.int32)
    cuts = np.asarray([1, 63, 65, 128, 128 + length // 3, length])
    cuts = np.minimum(cuts, length)
    ids[0] = np.repeat([3, 1, 2, 9, 4, 7], np.diff(cuts, prepend=0))
    # The other rows: one document with a hole, and padding at both ends.
    ids[1:, 5 : length // 2] = 1
    ids[1:, length // 2 + 5 : length - 9] = 1
    return ids


def find_kernel(name: str, setting: check.DeviceSetting) -> Callable[..., Any]:
    """Return (qkv, slopes, segment_ids, state) -> (o, state) of an implementation.

    Raises:
      CheckSkipped: it does not run on this device.
    """
    if name == "chunked":
        return chunked.lightning_attention
    interpret = setting.interpret_kernel(name)
    module, blocks = {"tpu": (tpu, SMALL_TPU_BLOCKS), "gpu": (gpu, SMALL_GPU_BLOCKS)}[name]
    return functools.partial(
        module.lightning_attention,
        block_sizes=blocks if setting.is_small else None,
        interpret=interpret,
    )


class LightningCase(NamedTuple):
    """Inputs of one comparison, and what the oracle makes of them.

    Attributes:
      arrays: qkv, state, cotangents of o and of the state, segment ids or None.
      wanted: the oracle's outputs and gradients.
    """

    arrays: tuple[np.ndarray | None, ...]
    wanted: oracles.LightningResult


# The forms of one dtype are compared with the same numbers, and the oracle takes seconds.
@functools.lru_cache(maxsize=4)
def make_case(dtype: str, sizes: tuple[int, int, int, int], is_packed: bool) -> LightningCase:
    """Draw inputs of sizes (rows, tokens, heads, width), and run the oracle."""
    batch, length, heads, size = sizes
    rng = np.random.default_rng(0)

    def draw(*shape):
        return np.asarray(jnp.asarray(rng.standard_normal(shape, np.float32), dtype))

    qkv, d_o = (draw(batch, length, heads * n * size) for n in (3, 1))
    state, d_state = (rng.standard_normal((batch, heads, size, size), np.float32) for _ in range(2))
    segment_ids = None
    if is_packed:
        segment_ids = make_segment_ids(batch, length)
        # What padding holds must reach nothing.
        qkv, d_o = (
            np.where(segment_ids[:, :, None] > 0, x.astype(np.float32), np.nan).astype(x.dtype)
            for x in (qkv, d_o)
        )
    slopes = choose_slopes(heads)
    wanted = oracles.attend_lightning(qkv, slopes, segment_ids, state, d_o, d_state)
    return LightningCase((qkv, state, d_o, d_state, segment_ids), wanted)


def check_kernel(name: str, dtype: str, setting: check.DeviceSetting) -> check.CheckFindings:
    """Compare an implementation in a dtype with the oracle."""
    attend = find_kernel(name, setting)
    batch, *others = SMALL_SIZES if setting.is_small else DEVICE_SIZES
    errors = []
    for is_packed in (False, True):
        # One row alone, then several with documents.
        sizes = (batch if is_packed else 1, *others)
        errors += _compare(attend, dtype, sizes, is_packed)
    return check.CheckFindings(errors)


def _compare(attend, dtype: str, sizes: Any, is_packed: bool) -> list[check.MeasuredError]:
    arrays, wanted = make_case(dtype, sizes, is_packed)
    heads = sizes[2]
    slopes = choose_slopes(heads)

    @jax.jit
    def run(qkv, state, d_o, d_state, segment_ids):
        def forward(qkv, state):
            return attend(qkv, jnp.asarray(slopes), segment_ids, state)

        outputs, pull_back = jax.vjp(forward, qkv, state)
        return *outputs, *pull_back((d_o, d_state))

    with check.compute_in_float32(dtype):
        o, after, d_qkv, d_before = run(*arrays)
    label = "packed" if is_packed else "plain"
    of_o, of_state, of_gradients = TOLERANCES[dtype]
    pairs = {
        "o": (oracles.worst_head_error(o, wanted.o, heads), of_o),
        "state": (oracles.worst_state_error(after, wanted.state), of_state),
        "d_qkv": (oracles.worst_head_error(d_qkv, wanted.d_qkv, heads), of_gradients),
        "d_state": (oracles.worst_state_error(d_before, wanted.d_state), of_gradients),
    }
    return [check.MeasuredError(f"{name}, {label}", *pair) for name, pair in pairs.items()]


def list_checks() -> list[check.DeviceCheck]:
    """Return the checks of every implementation."""
    names = {
        "tpu": "lightning attention (TPU kernels)",
        "gpu": "lightning attention (GPU kernels)",
        "chunked": "lightning attention (XLA)",
    }
    return [
        check.DeviceCheck(
            f"{title}, {dtype}", "kernels", functools.partial(check_kernel, name, dtype)
        )
        for name, title in names.items()
        for dtype in TOLERANCES
    ]
