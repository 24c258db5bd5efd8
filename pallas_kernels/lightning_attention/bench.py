"""Command: time the implementations of lightning attention on the device at hand.

    python -m pallas_kernels.lightning_attention.bench [--shapes=8k,64k_short,decode_64]
        [--implementations=chunked,tpu] [--repeats=100] [--json=FILE]

Times are those of the device to within launches: each repeat queues several calls back to back,
waits for the last, and divides. A decoding call takes the memory that the call before it returned.

Bandwidth counts the minimum bytes (docs/kernels.md, "Bytes and operations"), whatever an
implementation really moves. The share of copy is relative to the bandwidth of a large copy on the
same device.

The error is the relative L2 norm of o against a float64 recurrence in numpy. In training it covers
the first row's first and last head and at most its first 4,096 tokens. In decoding it covers all
heads of the first sequence, in one step. Gradients are timed and not compared:
tests/pallas_lightning_test.py compares them.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_attention import api, shapes
from pallas_kernels.lightning_serving import tpu as tpu_serving

CHECKED_TOKENS = 4096
WARM_UP_REPEATS = 3  # repeats that are thrown away. The first compiles.
CALLS_PER_REPEAT = {"cpu": 1}  # calls queued in one repeat, by backend
ACCELERATOR_CALLS_PER_REPEAT = 10  # queued, so that launches overlap with work
# Per element of o, in bfloat16. Forward: q, k, v and o. Backward: q, k, v, do, dq, dk and dv, and
# 64 bytes of saved state per token and head of 128.
FORWARD_BYTES_PER_ELEMENT, TRAIN_BYTES_PER_ELEMENT = 8, 8 + 14.5


def time_calls(call, state, repeats: int) -> list[float]:
    """Return seconds per call of each repeat.

    Calls run in a chain, state = call(state), so that they may donate their buffers.
    """
    seconds = []
    count = CALLS_PER_REPEAT.get(jax.default_backend(), ACCELERATOR_CALLS_PER_REPEAT)
    for _ in range(WARM_UP_REPEATS + repeats):
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(count):
            state = call(state)
        jax.block_until_ready(state)
        seconds.append((time.perf_counter() - start) / count)
    return seconds[WARM_UP_REPEATS:]


def measure_copy_bandwidth(repeats: int) -> float:
    """Return bytes read and written per second by x + 1 over a large array."""
    # 1 GiB on an accelerator, far more than its caches hold.
    x = jnp.zeros((2**24 if jax.default_backend() == "cpu" else 2**28,), jnp.float32)
    seconds = time_calls(jax.jit(lambda x: x + 1, donate_argnums=0), x, repeats)
    return 2 * x.size * 4 / float(np.median(seconds))


def middle_layer_slopes(num_heads: int) -> np.ndarray:
    """Return the slopes of the release's middle layer, 40 of 80."""
    # Layer l of 80 scales the base slopes by 1 - l / 79 + 1e-5.
    base = 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
    return np.asarray(base * (1 - 40 / 79 + 1e-5), np.float32)


def make_random_inputs(shape: shapes.TrainingShape):
    """Return (qkv, cotangent of o). qkv is silu of a normal, as in the model."""
    rng = np.random.default_rng(shapes.SEED)
    width = shape.num_heads * shape.head_dim
    x = rng.standard_normal((shape.batch_size, shape.length, 3 * width), np.float32)
    d_o = rng.standard_normal((shape.batch_size, shape.length, width), np.float32)
    return (jnp.asarray(a, shape.dtype) for a in (x / (1 + np.exp(-x)), d_o))


def relative_l2_error(actual, expected) -> float:
    """Return |actual - expected| / |expected|, in float64."""
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def training_error(o, qkv, slopes, shape: shapes.TrainingShape) -> float:
    """Compare o with the float64 recurrence on two heads of the first tokens."""
    heads, count = sorted({0, shape.num_heads - 1}), min(shape.length, CHECKED_TOKENS)
    qkv = qkv[0, :count].reshape(count, shape.num_heads, 3, shape.head_dim)[:, np.array(heads)]
    x = np.asarray(qkv.astype(jnp.float32), np.float64)
    ids = shape.segment_ids()
    ids = np.ones(count, np.int32) if ids is None else ids[0, :count]
    expected = np.zeros((count, len(heads), shape.head_dim))
    decay = np.exp(-np.float64(slopes[heads])).reshape(-1, 1, 1)
    state = np.zeros((len(heads), shape.head_dim, shape.head_dim))
    for t in range(count):
        # A new document starts from an empty state.
        if t and ids[t] != ids[t - 1]:
            state = np.zeros_like(state)
        state = decay * state + x[t, :, 1, :, None] * x[t, :, 2, None, :]
        expected[t] = np.einsum("nk,nkv->nv", x[t, :, 0], state)
    actual = o[0, :count].reshape(count, shape.num_heads, shape.head_dim)[:, np.array(heads)]
    return relative_l2_error(actual, expected)


def bench_training(
    shape_name: str, implementation: str, repeats: int, copy_bytes_per_sec: float
) -> list[dict]:
    """Time the forward pass, and both passes together, of one named shape."""
    shape = shapes.TRAINING_SHAPES[shape_name]
    slopes = middle_layer_slopes(shape.num_heads)
    (qkv, d_o), ids = make_random_inputs(shape), shape.segment_ids()
    attend = functools.partial(
        api.lightning_attention,
        slopes=jnp.asarray(slopes),
        segment_ids=None if ids is None else jnp.asarray(ids),
        implementation=implementation,
    )
    forward = jax.jit(lambda qkv: attend(qkv)[0])

    def run_both_passes(qkv, d_o):
        o, pull_back = jax.vjp(lambda qkv: attend(qkv)[0], qkv)
        # o is returned too: XLA would drop what it alone needs.
        return o, pull_back(d_o)[0]

    forward_backward = jax.jit(run_both_passes)
    error = training_error(forward(qkv), qkv, slopes, shape)
    elements = shape.batch_size * shape.length * shape.num_heads * shape.head_dim
    # The bytes per element are those of bfloat16, of 2 bytes.
    scale = elements * jnp.dtype(shape.dtype).itemsize / 2
    passes = {
        "forward": (lambda _: forward(qkv), FORWARD_BYTES_PER_ELEMENT),
        "forward_backward": (lambda _: forward_backward(qkv, d_o), TRAIN_BYTES_PER_ELEMENT),
    }
    return [
        make_record(
            shape_name,
            pass_name,
            implementation,
            time_calls(call, (), repeats),
            scale * bytes_per_element,
            copy_bytes_per_sec,
            error,
        )
        for pass_name, (call, bytes_per_element) in passes.items()
    ]


def bench_decode(
    shape_name: str, repeats: int, copy_bytes_per_sec: float, *, interpret: bool = False
) -> list[dict]:
    """Time one step of one named workload by the serving kernel."""
    shape = shapes.DECODE_SHAPES[shape_name]
    slopes = middle_layer_slopes(shape.num_heads)
    heads, width, batch = shape.num_heads, shape.head_dim, shape.batch_size
    chunk, tile = shape.chunk_tokens, shape.attention_tile
    qkv, _ = make_random_inputs(shapes.TrainingShape(1, batch, heads, width, shape.dtype))
    slots = jnp.asarray(shape.slots())
    rng = np.random.default_rng(shapes.SEED)
    states = jnp.asarray(rng.standard_normal((batch, heads, width, width), np.float32))
    q, k, v = np.moveaxis(np.asarray(qkv[0, 0], np.float64).reshape(heads, 3, width), 1, 0)
    # The recurrence in float64, of the first sequence.
    decay = np.exp(-np.float64(slopes))[:, None, None]
    next_state = decay * np.asarray(states[slots[0]], np.float64) + k[:, :, None] * v[:, None, :]
    expected = np.einsum("nk,nkv->nv", q, next_state).reshape(-1)
    lead = (1, 1, batch, heads)
    rows = jnp.zeros((*lead, chunk, width), shape.dtype)
    memory = tpu_serving.SlotArrays(states.reshape(*lead, width, width), rows, jnp.copy(rows))

    # (o, memory, position) to the same of the next step, as `time_calls` chains them.
    def decode(_, memory, position):
        row = jnp.arange(tile, dtype=jnp.int32)
        is_token = row == position % tile
        tiles = jnp.where(is_token[None, :, None], qkv[0][:, None], 0)
        positions = jnp.broadcast_to(jnp.where(is_token, position, -1), (batch, tile))
        o, memory = tpu_serving.attend_tiles(
            tiles, jnp.asarray(slopes), slots, positions, memory, (0, 0), interpret=interpret
        )
        return o[:, position % tile], memory, position + 1

    step = jax.jit(decode, donate_argnums=(0, 1, 2))
    # Past the first chunk, in which the kernel would not read the state.
    carry = step(jnp.zeros((batch, heads * width), shape.dtype), memory, jnp.int32(chunk))
    error = relative_l2_error(carry[0][0], expected)
    seconds = time_calls(lambda carry: step(*carry), carry, repeats)
    moved = batch * heads * tpu_serving.bytes_per_tile(tile, chunk, width, shape.dtype)
    return [make_record(shape_name, "decode", "tpu", seconds, moved, copy_bytes_per_sec, error)]


def make_record(
    shape_name, pass_name, implementation, seconds, minimum_bytes, copy_bytes_per_sec, error
) -> dict:
    """Return what the command prints and writes of one measurement. `seconds` are of one call."""
    median = float(np.median(seconds))
    return {
        "shape": shape_name,
        "pass": pass_name,
        "implementation": implementation,
        "device": jax.devices()[0].device_kind,
        "median_secs": median,
        "p90_secs": float(np.percentile(seconds, 90)),
        "minimum_bytes": minimum_bytes,
        "gb_per_sec": minimum_bytes / median / 1e9,
        "copy_gb_per_sec": copy_bytes_per_sec / 1e9,
        "share_of_copy": minimum_bytes / median / copy_bytes_per_sec,
        "error": error,
    }


def run_benchmarks(shape_names: list[str], implementations: list[str], repeats: int) -> list[dict]:
    """Return a record of each shape, pass and implementation.

    A decoding shape is left out for all implementations but "tpu".

    Raises:
      ValueError: a shape or an implementation that does not exist.
    """
    known_shapes = [*shapes.TRAINING_SHAPES, *shapes.DECODE_SHAPES]
    for name in shape_names:
        if name not in known_shapes:
            raise ValueError(f"shape is {name!r}; wanted one of {known_shapes}")
    for name in implementations:
        if name not in api.IMPLEMENTATIONS:
            raise ValueError(f"implementation is {name!r}; wanted {list(api.IMPLEMENTATIONS)}")
    copy_bandwidth, records = measure_copy_bandwidth(repeats), []
    for name in shape_names:
        for implementation in implementations:
            # A name, such as "schedule", may be both a training and a decoding workload.
            if name in shapes.TRAINING_SHAPES:
                records += bench_training(name, implementation, repeats, copy_bandwidth)
            if name in shapes.DECODE_SHAPES and implementation == "tpu":
                records += bench_decode(name, repeats, copy_bandwidth)
    return records


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_tpu = jax.default_backend() == "tpu"
    parser.add_argument("--shapes", default="8k,decode_64" if on_tpu else "cpu_smoke")
    parser.add_argument(
        "--implementations", default="tpu,chunked" if on_tpu else "chunked,reference"
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--json", help="also write the records to this file")
    args = parser.parse_args()
    records = run_benchmarks(args.shapes.split(","), args.implementations.split(","), args.repeats)
    for record in records:
        print(
            f"{record['shape']:18} {record['pass']:16} {record['implementation']:10} "
            f"median {record['median_secs'] * 1e3:9.3f} ms  "
            f"p90 {record['p90_secs'] * 1e3:9.3f} ms  "
            f"{record['gb_per_sec']:8.2f} GB/s  {record['share_of_copy']:6.1%} of copy  "
            f"error {record['error']:.1e}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
