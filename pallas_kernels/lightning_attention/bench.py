"""Command: time the implementations of lightning attention on the device at hand.

    python -m pallas_kernels.lightning_attention.bench [--shapes=8k,64k_short,decode_64]
        [--implementations=chunked,tpu] [--repeats=100] [--json=FILE]

Times are those of the device to within launches: each repeat queues several calls back to back,
waits for the last, and divides; a decoding call takes the pool that the one before it returned.
Bandwidth is at the MINIMUM bytes (kernels.md section 3), whatever an implementation really moves;
the share is that of a large copy measured on the same device. The error stands against a float64
recurrence in numpy: relative L2 norm of o over the first row's first and last head and at most its
first 4,096 tokens; for decoding over all heads of the first sequence, in one step. Gradients are
timed and not compared here: tests/pallas_lightning_test.py does that.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_attention import api, shapes
from pallas_kernels.lightning_decode import api as decode_api
from pallas_kernels.lightning_decode import ring as decode_ring

CHECKED_TOKENS = 4096
WARM_UP_REPEATS = 3  # repeats that are thrown away; the first compiles
CALLS_PER_REPEAT = {"cpu": 1}  # calls queued in one repeat; 10 on accelerators
# Per element of o, in bfloat16: at D = 128 1,024 a token and head, and 1,856 more for the backward.
FORWARD_BYTES_PER_ELEMENT, TRAIN_BYTES_PER_ELEMENT = 8, 8 + 14.5


def time_calls(call, state, repeats: int) -> list[float]:
    """Return seconds per call of each repeat; state = call(state) runs in a chain."""
    count, seconds = CALLS_PER_REPEAT.get(jax.default_backend(), 10), []
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
    x = jnp.zeros((2**24 if jax.default_backend() == "cpu" else 2**28,), jnp.float32)
    seconds = time_calls(jax.jit(lambda x: x + 1, donate_argnums=0), x, repeats)
    return 2 * x.size * 4 / float(np.median(seconds))


def middle_layer_slopes(num_heads: int) -> np.ndarray:
    """Return the slopes of the release's middle layer, 40 of 80."""
    base = 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
    return np.asarray(base * (1 - 40 / 79 + 1e-5), np.float32)


def make_random_inputs(shape: shapes.TrainingShape):
    """Return qkv, silu of a normal as in the model, and a cotangent of o."""
    rng = np.random.default_rng(shapes.SEED)
    width = shape.num_heads * shape.head_dim
    x = rng.standard_normal((shape.batch_size, shape.length, 3 * width), np.float32)
    d_o = rng.standard_normal((shape.batch_size, shape.length, width), np.float32)
    return (jnp.asarray(a, shape.dtype) for a in (x / (1 + np.exp(-x)), d_o))


def relative_l2_error(actual, expected) -> float:
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def training_error(o, qkv, slopes, shape: shapes.TrainingShape) -> float:
    """Compare o with the float64 recurrence on two heads of the first tokens."""
    heads, count = sorted({0, shape.num_heads - 1}), min(shape.length, CHECKED_TOKENS)
    qkv = qkv[0, :count].reshape(count, shape.num_heads, 3, shape.head_dim)[:, np.array(heads)]
    x = np.asarray(qkv.astype(jnp.float32), np.float64)
    ids = shape.segment_ids()
    ids = np.ones(count, np.int32) if ids is None else ids[0, :count]
    wanted = np.zeros((count, len(heads), shape.head_dim))
    decay = np.exp(-np.float64(slopes[heads])).reshape(-1, 1, 1)
    state = np.zeros((len(heads), shape.head_dim, shape.head_dim))
    for t in range(count):
        if t and ids[t] != ids[t - 1]:
            state = np.zeros_like(state)
        state = decay * state + x[t, :, 1, :, None] * x[t, :, 2, None, :]
        wanted[t] = np.einsum("nk,nkv->nv", x[t, :, 0], state)
    got = o[0, :count].reshape(count, shape.num_heads, shape.head_dim)[:, np.array(heads)]
    return relative_l2_error(got, wanted)


def bench_training(
    shape_name: str, implementation: str, repeats: int, copy_bytes_per_sec: float
) -> list[dict]:
    """Time forward, and forward with backward, of one named shape."""
    shape, slopes = (
        shapes.TRAINING_SHAPES[shape_name],
        middle_layer_slopes(shapes.TRAINING_SHAPES[shape_name].num_heads),
    )
    (qkv, d_o), ids = make_random_inputs(shape), shape.segment_ids()
    run = functools.partial(
        api.lightning_attention,
        slopes=jnp.asarray(slopes),
        segment_ids=None if ids is None else jnp.asarray(ids),
        implementation=implementation,
    )
    forward = jax.jit(lambda qkv: run(qkv)[0])

    def both(qkv, d_o):
        o, pull = jax.vjp(lambda qkv: run(qkv)[0], qkv)
        return o, pull(d_o)[0]

    gradient = jax.jit(both)
    error = training_error(forward(qkv), qkv, slopes, shape)
    elements = shape.batch_size * shape.length * shape.num_heads * shape.head_dim
    scale = elements * jnp.dtype(shape.dtype).itemsize / 2
    passes = {
        "forward": (lambda _: forward(qkv), FORWARD_BYTES_PER_ELEMENT),
        "forward_backward": (lambda _: gradient(qkv, d_o), TRAIN_BYTES_PER_ELEMENT),
    }
    return [
        make_record(
            shape_name,
            what,
            implementation,
            time_calls(call, (), repeats),
            scale * least,
            copy_bytes_per_sec,
            error,
        )
        for what, (call, least) in passes.items()
    ]


def bench_decode(
    shape_name: str, implementation: str, repeats: int, copy_bytes_per_sec: float
) -> list[dict]:
    """Time one step in place and in the ring form, of one named workload."""
    shape, slopes = (
        shapes.DECODE_SHAPES[shape_name],
        middle_layer_slopes(shapes.DECODE_SHAPES[shape_name].num_heads),
    )
    heads, width, batch = shape.num_heads, shape.head_dim, shape.batch_size
    qkv, _ = make_random_inputs(shapes.TrainingShape(1, batch, heads, width, shape.dtype))
    qkv, slots, rate = qkv[0], jnp.asarray(shape.slots()), jnp.asarray(slopes)
    rng = np.random.default_rng(shapes.SEED)
    states = jnp.asarray(rng.standard_normal((batch, heads, width, width), np.float32))
    q, k, v = np.moveaxis(np.asarray(qkv[0], np.float64).reshape(heads, 3, width), 1, 0)
    before = np.asarray(states[slots[0]], np.float64)
    after = np.exp(-np.float64(slopes))[:, None, None] * before + k[:, :, None] * v[:, None, :]
    wanted = np.einsum("nk,nkv->nv", q, after).reshape(-1)

    def in_place(_, pool, position):
        call = decode_api.lightning_decode
        o, pool = call(qkv, rate, pool, slots, implementation=implementation)
        return o, pool, position

    def in_ring(_, pool, position):
        call, positions = decode_api.lightning_decode_ring, jnp.full((batch,), position)
        o, pool = call(qkv, rate, pool, slots, positions, implementation=implementation)
        return o, pool, position + 1

    ring = decode_api.init_ring_pool(batch, heads, width, window=shape.window)
    ring = decode_ring.write_states(ring, jnp.arange(batch), states, jnp.zeros((batch,), jnp.int32))
    forms = {
        "decode": (in_place, states, decode_ring.bytes_per_step_in_place(width)),
        "decode_ring": (in_ring, ring, decode_ring.bytes_per_step(width, shape.window)),
    }
    records = []
    for what, (function, pool, least) in forms.items():
        step = jax.jit(function, donate_argnums=(0, 1, 2))
        carry = step(jnp.zeros_like(qkv[:, : heads * width]), pool, jnp.zeros((), jnp.int32))
        error = relative_l2_error(carry[0][0], wanted)
        seconds = time_calls(lambda carry, step=step: step(*carry), carry, repeats)
        moved = batch * heads * least
        records.append(
            make_record(shape_name, what, implementation, seconds, moved, copy_bytes_per_sec, error)
        )
    return records


def make_record(
    shape_name, pass_name, implementation, seconds, minimum_bytes, copy_bytes_per_sec, error
) -> dict:
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
    """Return a record of each shape, pass and implementation; decoding has no "chunked" form.

    Raises:
      ValueError: a shape or an implementation that does not exist.
    """
    known = [*shapes.TRAINING_SHAPES, *shapes.DECODE_SHAPES]
    for name in shape_names:
        if name not in known:
            raise ValueError(f"shape is {name!r}; wanted one of {known}")
    for name in implementations:
        if name not in api.IMPLEMENTATIONS:
            raise ValueError(f"implementation is {name!r}; wanted {list(api.IMPLEMENTATIONS)}")
    copy, records = measure_copy_bandwidth(repeats), []
    for name in shape_names:
        for implementation in implementations:
            # A few names, such as cpu_smoke, are both a training and a decoding workload.
            if name in shapes.TRAINING_SHAPES:
                records += bench_training(name, implementation, repeats, copy)
            if name in shapes.DECODE_SHAPES and implementation in decode_api.DECODE_IMPLEMENTATIONS:
                records += bench_decode(name, implementation, repeats, copy)
    return records


def main() -> None:
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
    for r in records:
        print(
            f"{r['shape']:18} {r['pass']:16} {r['implementation']:10} "
            f"median {r['median_secs'] * 1e3:9.3f} ms  p90 {r['p90_secs'] * 1e3:9.3f} ms  "
            f"{r['gb_per_sec']:8.2f} GB/s  {r['share_of_copy']:6.1%} of copy  "
            f"error {r['error']:.1e}"
        )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
