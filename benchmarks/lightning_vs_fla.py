"""Time flash-linear-attention on the GPU at hand, in the records of the kernels' own benchmark.

    python benchmarks/lightning_vs_fla.py [--shape=8k] [--repeats=100]

M1's attention is `simple_gla` with scale 1 and g_gamma = -slope. fla's function named after
lightning attention has other slopes and scales q by 1 / sqrt(H), so it does not compute M1's. The
command needs torch with CUDA and fla, and says so and ends where they are absent. Errors are as in
`pallas_kernels.lightning_attention.bench`.
"""

import argparse
import importlib

import jax.numpy as jnp
import numpy as np

from pallas_kernels.lightning_attention import bench, shapes

FORMS = ("chunk_simple_gla", "fused_chunk_simple_gla")


def measure_form(torch, gla, form: str, name: str, repeats: int) -> dict:
    """Return the median and p90 of the forward pass by CUDA events, and its error."""
    shape = shapes.TRAINING_SHAPES[name]
    qkv, _ = bench.make_random_inputs(shape)
    slopes = bench.middle_layer_slopes(shape.num_heads)
    split = np.asarray(qkv.astype(jnp.float32)).reshape(*qkv.shape[:2], shape.num_heads, 3, -1)
    q, k, v = (
        torch.tensor(split[:, :, :, i], device="cuda", dtype=torch.bfloat16) for i in range(3)
    )
    gamma = torch.tensor(-slopes, device="cuda")

    def call():
        return getattr(gla, form)(q, k, v, g_gamma=gamma, scale=1.0)[0]

    seconds = []
    for _ in range(20 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        o = call()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    flat = jnp.asarray(o.float().cpu().numpy().reshape(*qkv.shape[:2], -1))
    error = bench.training_error(flat, qkv, slopes, shape)
    moved = (
        bench.FORWARD_BYTES_PER_ELEMENT
        * shape.batch_size
        * shape.length
        * shape.num_heads
        * shape.head_dim
    )
    median, p90 = np.median(seconds[20:]), np.percentile(seconds[20:], 90)
    speed = moved / median / 1e9
    return {
        "form": form,
        "median_secs": median,
        "p90_secs": p90,
        "gb_per_sec": speed,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="8k", help="one without packed documents")
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    try:
        torch = importlib.import_module("torch")
        gla = importlib.import_module("fla.ops.simple_gla")
    except ImportError as error:
        print(f"flash-linear-attention not timed: {error}")
        return
    if not torch.cuda.is_available():
        print("flash-linear-attention not timed: torch sees no GPU")
        return
    for form in FORMS:
        print(measure_form(torch, gla, form, args.shape, args.repeats))


if __name__ == "__main__":
    main()
