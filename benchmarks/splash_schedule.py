"""Static schedules of splash attention as the softmax layers of M1 run it, without a TPU.

    python benchmarks/splash_schedule.py --chip=v5p [--block=1024] [--length=4096]

It compiles the forward and the backward pass of one row with 8 query heads and a kv head, and
prints for each kernel the bundles of a step of its grid: a block of queries times a block of keys.
A bundle is one VLIW instruction word, issued in a cycle at best, so times are lower bounds. One
chip in a process, because libtpu reads its flags once. It takes about 45 s of CPU.
"""

import argparse
import glob
import os
import re
import tempfile

# Topology, assumed clock in Hz and bfloat16 FLOP/s of one TensorCore.
CHIPS = {
    "v5e": ("v5e:2x2", 1.5e9, 197e12),
    "v5p": ("v5p:2x2x1", 1.75e9, 459e12 / 2),
    "v6e": ("v6e:2x2", 1.75e9, 918e12),
    "tpu7x": ("tpu7x:2x2x1", 2.2e9, 1153e12),
}
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 1, 128
# Matrix products of a pair of a query and a key.
KERNEL_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def compile_attention(topology: str, block: int, length: int) -> float:
    """Compile both passes, and return the GiB of temporaries."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from m1_jax import splash_attention

    splash_attention.BLOCK_TOKENS = block
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    def run(q, k, v, segment_ids, d_o):
        def attend(q, k, v):
            return splash_attention.attend_rows(q, k, v, segment_ids)

        o, pull_back = jax.vjp(attend, q, k, v)
        return o, pull_back(d_o)

    q, k = (array(jnp.bfloat16, 1, length, n, HEAD_DIM) for n in (NUM_HEADS, NUM_KV_HEADS))
    traced = jax.jit(run).trace(q, k, k, array(jnp.int32, 1, length), q)
    memory = traced.lower(lowering_platforms=("tpu",)).compile().memory_analysis()
    assert memory is not None  # None is for backends without statistics
    return memory.temp_size_in_bytes / 2**30


def count_bundles(dump: str, kernel: str) -> float:
    (path,) = glob.glob(f"{dump}/*splash_mha_{kernel}*schedule-analysis_final_bundles.txt")
    with open(path, errors="replace") as file:
        match = re.search(r"([\d.]+) scheduled bundles", file.read())
    assert match is not None
    return float(match[1])


def main():
    parser = argparse.ArgumentParser(description="Static schedules of splash attention.")
    parser.add_argument("--chip", choices=CHIPS, required=True)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--length", type=int, default=4096)
    options = parser.parse_args()
    topology, clock, flops = CHIPS[options.chip]
    with tempfile.TemporaryDirectory() as dump:
        os.environ.update(
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            JAX_PLATFORMS="cpu",
            JAX_ENABLE_COMPILATION_CACHE="0",  # a program from the cache dumps nothing
        )
        gib = compile_attention(topology, options.block, options.length)
        print(f"{options.chip}, blocks of {options.block}: {gib:.3f} GiB of temporaries")
        for kernel, products in KERNEL_PRODUCTS.items():
            bundles = count_bundles(dump, kernel)
            secs, pairs = bundles / clock, options.block**2
            least_secs = 2 * products * pairs * HEAD_DIM / flops
            print(
                f"{kernel:>4} {bundles:7.0f} bundles a step, {secs * 1e6:5.2f} us, "
                f"{secs / pairs * 1e12:5.2f} ps a pair, {least_secs / secs:4.0%} of the matrix unit"
            )


if __name__ == "__main__":
    main()
