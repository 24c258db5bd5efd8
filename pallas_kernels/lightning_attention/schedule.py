"""Command: compile the training kernels for four TPU generations and count their schedule.

    python -m pallas_kernels.lightning_attention.schedule [--json=FILE] [--chips=v5e,v6e]

No TPU is needed and nothing is timed: a bundle is one VLIW instruction word, issued in a cycle at
best, so static time is a lower bound that leaves out DMA waits and stalls. Static time over HBM
time of the minimum bytes at or under 1 says that memory, not issue, is the limit.
"""

import argparse
import glob
import json
import os
import re
import subprocess
import sys
import tempfile

# Topology, assumed clock and HBM bandwidth of one TensorCore (kernels.md section 4).
CHIPS = {
    "v5e": ("v5e:2x2", 1.5e9, 820e9),
    "v5p": ("v5p:2x2x1", 1.75e9, 1230e9),
    "v6e": ("v6e:2x2", 1.75e9, 1640e9),
    "tpu7x": ("tpu7x:2x2x1", 2.2e9, 3700e9),
}
# Least traffic of a token of a head at D = 128 in bfloat16 (kernels.md section 3).
MINIMUM_BYTES = {"lightning_fwd": 1024, "lightning_bwd": 1856}
NOISE = 20  # bundles: a smaller loop fills or copies, it is not a loop over chunks


def compile_kernels(chip: str) -> None:
    """Compile forward and backward of the schedule's shape; runs in a process of its own."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from pallas_kernels.lightning_attention import shapes, tpu_bwd, tpu_fwd

    shape = shapes.SHAPES["schedule"]
    tile = block_sizes(chip)
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]
    where = jax.sharding.SingleDeviceSharding(device)

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    dims, width = (shape.batch, shape.length), shape.heads * shape.head_dim
    square = (shape.head_dim, shape.head_dim)
    qkv, d_o = (array(jnp.dtype(shape.dtype), *dims, n * width) for n in (3, 1))
    slopes = array(jnp.float32, shape.heads)
    state = array(jnp.float32, shape.batch, shape.heads, *square)
    steps = shape.length // tile.superblock
    saved = array(jnp.float32, shape.batch, shape.heads, steps, *square)
    none = (None, None)
    forward = tpu_fwd.forward.trace(qkv, slopes, none, state, tile=tile, checkpoints=True)
    backward = tpu_bwd.backward.trace(qkv, slopes, none, saved, d_o, state, tile=tile)
    for traced in (forward, backward):
        traced.lower(lowering_platforms=("tpu",)).compile()


def block_sizes(chip: str):
    from pallas_kernels.lightning_attention import shapes, tiling

    shape = shapes.SHAPES["schedule"]
    tile = tiling.choose(shape.heads, shape.head_dim, shape.length, 2, chip)
    assert tile is not None  # the named shape is one that fits
    return tile


def chunk_loops(path: str) -> list[range]:
    """Return the bundles of each loop inside the grid's loop, from a final_bundles dump."""
    loops, total = [], 0
    with open(path, errors="replace") as lines:
        for line in lines:
            match = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+(\w\w)?\s*:\s*(>*)\s*\{", line)
            if not match:
                continue
            depth = len(match.group(2))
            if match.group(1) == "LB":
                loops.append([depth, total, total])
            for loop in loops:
                # Idle bundles may show a lower depth, so a loop spans its first to last bundle.
                if depth >= loop[0] and loop is [x for x in loops if x[0] <= depth][-1]:
                    loop[2] = total
            total += 1
    spans = [range(first, last + 1) for depth, first, last in loops if depth == 2]
    return [span for span in spans if len(span) >= NOISE]


def spill_rows(path: str) -> list[int]:
    """Return the vector registers each bundle writes to the spill area."""
    with open(path) as file:
        lines = file.read().splitlines()
    column = [name.strip() for name in lines[1].split(",")].index("VSTORE:SPILL")
    return [int(line.split()[column]) for line in lines[4:] if line.strip()]


def vmem_bytes(dump: str, kernel: str) -> int | None:
    """Return the scoped VMEM of a kernel from the compiler's report."""
    for path in glob.glob(f"{dump}/*vmem_report.html"):
        with open(path) as file:
            text = file.read()
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))
        for name, entry in data["hlo_breakdowns"].items():
            if kernel in name:
                return entry["total_size"]
    return None


def measure(chip: str) -> list[dict]:
    """Compile for one chip and return a record of each kernel."""
    _, clock, bandwidth = CHIPS[chip]
    records, tile = [], block_sizes(chip)
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": flags}
        # Only compiles: two such processes may run at once.
        settings["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
        command = [sys.executable, "-m", __spec__.name, f"--compile={chip}"]
        subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
        for kernel, least in MINIMUM_BYTES.items():
            (bundles,) = glob.glob(f"{dump}/*{kernel}*-final_bundles.txt")
            (slots,) = glob.glob(f"{dump}/*{kernel}*-final_hlo-static-per-bundle-utilization.txt")
            loops, spills = chunk_loops(bundles), spill_rows(slots)
            chunks = tile.group if kernel == "lightning_fwd" else 1  # in one loop body
            per_token_head = sum(map(len, loops)) / (chunks * tile.chunk * tile.heads)
            static, hbm = per_token_head / clock * 1e9, least / bandwidth * 1e9
            records.append(
                {
                    "kernel": kernel,
                    "chip": chip,
                    "bundles_per_token_head": round(per_token_head, 4),
                    "spills": sum(spills[i] for loop in loops for i in loop if i < len(spills)),
                    "vmem_bytes": vmem_bytes(dump, kernel),
                    "static_ns_per_token_head": round(static, 4),
                    "hbm_ns_per_token_head": round(hbm, 4),
                    "ratio": round(static / hbm, 3),
                }
            )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="also write the records to this file")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_kernels(args.compile)
        return
    records = [record for chip in args.chips.split(",") for record in measure(chip)]
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
