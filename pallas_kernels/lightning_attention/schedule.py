"""Command: compile every kernel for four TPU generations and count its static schedule.

    python -m pallas_kernels.lightning_attention.schedule [--json=FILE] [--chips=v5e,v6e]

No TPU is needed and nothing is timed. A bundle is one VLIW instruction word, issued in a cycle at
best. So static time is a lower bound that leaves out DMA waits and stalls. Where static time over
HBM time of the minimum bytes is at most 1, memory and not issue is the limit.

The command counts per token and head:
- training: the loops over chunks.
- serving: a tile of a decoding sequence in the middle of a call. It is a run of its own, so it
  loads its slot, and in one tile of C it closes its chunk. The rest of the step's body counts once
  for all tiles of a step.
- paged attention, per key and kv head: a decoding tile of 8 rows for 8 query heads, after 4,096
  keys. Seven of eight blocks of keys are whole, and one is masked.
- spills: registers stored to the spill area anywhere in the counted loops.

Training leaves out what surrounds its loops, which runs once in a grid step.
"""

import argparse
import dataclasses
import functools
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import stages
from jax.experimental import topologies

from pallas_kernels.lightning_attention import shapes, tiling, tpu_bwd, tpu_fwd
from pallas_kernels.lightning_serving import tpu as tpu_serving
from pallas_kernels.paged_attention import tpu as tpu_paged

# Topology, and of one TensorCore the assumed clock in Hz and the HBM bandwidth in bytes per second.
CHIP_SPECS = {
    "v5e": ("v5e:2x2", 1.5e9, 820e9),
    "v5p": ("v5p:2x2x1", 1.75e9, 1230e9),
    "v6e": ("v6e:2x2", 1.75e9, 1640e9),
    "tpu7x": ("tpu7x:2x2x1", 2.2e9, 3700e9),
}
TRAIN_SHAPE = shapes.TRAINING_SHAPES["schedule"]
DECODE_SHAPE = shapes.DECODE_SHAPES["schedule"]
PAGED_QUERY_HEADS, PAGED_KEYS = 8, 4096  # of a kv head, and of a sequence


# ---- how to trace each kernel. array(dtype, *dims) makes an argument on the chip.

MakeArray = Callable[..., jax.ShapeDtypeStruct]


def trace_training(array: MakeArray, backward: bool) -> stages.Traced:
    """Trace one of the two training kernels at `TRAIN_SHAPE`."""
    shape, block_sizes = TRAIN_SHAPE, training_block_sizes()
    batch, heads, head_dim = shape.batch_size, shape.num_heads, shape.head_dim
    qkv, d_o = (
        array(shape.dtype, batch, shape.length, slices * heads * head_dim) for slices in (3, 1)
    )
    slopes = array("float32", heads)
    state = array("float32", batch, heads, head_dim, head_dim)
    if not backward:
        return tpu_fwd.lightning_forward.trace(
            qkv, slopes, None, state, block_sizes=block_sizes, save_superblock_states=True
        )
    superblocks = shape.length // block_sizes.superblock_tokens
    superblock_states = array("float32", batch, heads, superblocks, head_dim, head_dim)
    return tpu_bwd.lightning_backward.trace(
        qkv, slopes, None, superblock_states, d_o, state, block_sizes=block_sizes
    )


def trace_serving(array: MakeArray) -> stages.Traced:
    """Trace a decoding step at `DECODE_SHAPE`."""
    shape = DECODE_SHAPE
    rows, heads, head_dim = shape.batch_size, shape.num_heads, shape.head_dim
    qkv = array(shape.dtype, rows, shape.attention_tile, heads * 3 * head_dim)
    slopes, slots = array("float32", heads), array("int32", rows)
    positions = array("int32", rows, shape.attention_tile)
    states = array("float32", 1, 1, rows, heads, head_dim, head_dim)
    keys = array(shape.dtype, 1, 1, rows, heads, shape.chunk_tokens, head_dim)
    memory = tpu_serving.SlotArrays(states, keys, keys)
    attend = functools.partial(tpu_serving.attend_tiles, stack_index=(0, 0))
    return jax.jit(attend, donate_argnums=4).trace(qkv, slopes, slots, positions, memory)


def trace_paged(array: MakeArray) -> stages.Traced:
    """Trace a decoding step's softmax attention: the rows and tiles of `DECODE_SHAPE`."""
    shape = DECODE_SHAPE
    rows, tile, chunk = shape.batch_size, shape.attention_tile, shape.chunk_tokens
    pages = PAGED_KEYS // chunk
    queries = array(shape.dtype, rows, 1, PAGED_QUERY_HEADS * tile, shape.head_dim)
    cache = array(shape.dtype, 1, 1, rows * pages + 1, 1, chunk, shape.head_dim)
    positions, stack_index = array("int32", rows), array("int32", 2)
    page_table = array("int32", rows, pages)
    return tpu_paged.attend_pages.trace(
        queries, positions, positions, page_table, stack_index, cache, cache, tile=tile
    )


# ---- reading the compiler's dumps


@dataclasses.dataclass(frozen=True)
class KernelBundles:
    """Parts of one kernel as ranges of its bundles, from a final_bundles dump."""

    grid_loop: range
    inner_loops: list[range]  # directly inside the grid's loop, in program order
    forward_branches: list[range]  # from each conditional branch to its target


def read_bundles(path: str) -> KernelBundles:
    """Read the loops and the conditional forward branches of one kernel.

    A bundle's line shows its address, a mark and its depth as that many ">". A bundle marked "LB"
    opens a loop. A bundle marked "PF" names regions that branches jump to.
    """
    # loops: [depth, first bundle, last bundle]. jumps: (bundle, region). ends: region -> bundle.
    loops, jumps, ends, total = [], [], {}, 0
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
            if jump := re.search(r"sbr\.rel \(%p\w+\) target = \$region(\d+)", line):
                jumps.append((total, jump.group(1)))
            if match.group(1) == "PF":
                ends.update(dict.fromkeys(re.findall(r"empty region (\d+)", line), total))
            total += 1
    # Depth 1 is the loop over the grid's steps. There is one.
    (grid,) = (range(first, last + 1) for depth, first, last in loops if depth == 1)
    inner = [range(first, last + 1) for depth, first, last in loops if depth == 2]
    return KernelBundles(grid, inner, [range(at, ends[to]) for at, to in jumps if to in ends])


def read_spill_counts(path: str) -> list[int]:
    """Return how many vector registers each bundle writes to the spill area."""
    with open(path) as file:
        lines = file.read().splitlines()
    # Line 1 names the columns with commas. From line 4 on, blanks separate a bundle's numbers.
    column = [name.strip() for name in lines[1].split(",")].index("VSTORE:SPILL")
    return [int(line.split()[column]) for line in lines[4:] if line.strip()]


def read_vmem_bytes(dump_dir: str, kernel: str) -> int | None:
    """Return the scoped VMEM of a kernel from the compiler's report, or None without an entry."""
    for path in glob.glob(f"{dump_dir}/*vmem_report.html"):
        with open(path) as file:
            text = file.read()
        # The report is a page whose script holds its figures as one JSON object.
        data, _ = json.JSONDecoder().raw_decode(text, text.index("{", text.index("const DATA")))
        for name, entry in data["hlo_breakdowns"].items():
            if re.fullmatch(rf"{kernel}(\.\d+)?", name):
                return entry["total_size"]
    return None


def find_dump_file(dump_dir: str, kernel: str, suffix: str) -> str:
    """Return the one dump of a kernel that ends with `suffix`."""
    # A pattern and not a wildcard: the name of one kernel may begin that of another.
    pattern = rf".*-{kernel}(\.\d+)?-\d+-{suffix}"
    (path,) = (path for path in glob.glob(f"{dump_dir}/*{suffix}") if re.fullmatch(pattern, path))
    return path


# ---- what to count: each function returns (bundles per token and head, the loops they lie in)


def count_backward_bundles(
    bundles: KernelBundles, block_sizes: tiling.TpuBlockSizes
) -> tuple[float, list[range]]:
    """Count the two loops over chunks, which are the longest. The others fill weights."""
    loops = sorted(bundles.inner_loops, key=len)[-2:]
    return sum(map(len, loops)) / (block_sizes.chunk_tokens * block_sizes.block_heads), loops


def count_forward_bundles(
    bundles: KernelBundles, block_sizes: tiling.TpuBlockSizes
) -> tuple[float, list[range]]:
    """Count the loop over chunks, which is the longest."""
    loop = max(bundles.inner_loops, key=len)
    return len(loop) / (
        block_sizes.chunk_tokens * block_sizes.block_heads * block_sizes.chunks_per_loop
    ), [loop]


def count_serving_bundles(
    bundles: KernelBundles, block_sizes: tiling.TpuBlockSizes
) -> tuple[float, list[range]]:
    """Count a decoding tile, and its share of the rest of a grid step.

    Raises:
      ValueError: the loop over tiles has other branches than expected.
    """
    loop = max(bundles.inner_loops, key=len)
    branches = [x for x in bundles.forward_branches if x.start in loop and x.stop <= loop.stop]
    # In program order: a run opens, within which a fresh state is filled with zeros; a tile of
    # tokens; a tile of padding; a chunk closes.
    if len(branches) != 5 or branches[1].stop > branches[0].stop:
        raise ValueError(f"got branches {branches} in the loop over tiles; wanted 5")
    _, fresh, _, padding, close = branches
    heads = tpu_serving.block_heads(DECODE_SHAPE.num_heads)
    # The branch that closes a chunk is a loop over heads.
    closing = len(close) * heads / DECODE_SHAPE.chunk_tokens
    tile = len(loop) - len(fresh) - len(padding) - len(close) + closing
    rest = (len(bundles.grid_loop) - len(loop)) / tpu_serving.TILES_PER_STEP
    return (tile + rest) / heads, [loop]


def count_paged_bundles(
    bundles: KernelBundles, block_sizes: tiling.TpuBlockSizes
) -> tuple[float, list[range]]:
    """Count the loop over whole blocks of keys, and the masked block after them once.

    Raises:
      ValueError: the kernel has other loops than these two.
    """
    if len(bundles.inner_loops) != 2:
        raise ValueError(f"got {len(bundles.inner_loops)} loops in a tile; wanted 2")
    whole, masked = bundles.inner_loops
    num_whole = PAGED_KEYS // tpu_paged.BLOCK_KEYS - 1
    return (num_whole * len(whole) + len(masked)) / PAGED_KEYS, [whole, masked]


@dataclasses.dataclass(frozen=True)
class ScheduledKernel:
    """One kernel whose schedule is counted."""

    trace: Callable[[MakeArray], stages.Traced]
    minimum_bytes: float  # per token and head
    count_bundles: Callable[[KernelBundles, tiling.TpuBlockSizes], tuple[float, list[range]]]


# Bytes at a head width of 128 in bfloat16, see docs/kernels.md, "Bytes and operations".
SCHEDULED_KERNELS = {
    "lightning_fwd": ScheduledKernel(
        functools.partial(trace_training, backward=False), 1024, count_forward_bundles
    ),
    "lightning_bwd": ScheduledKernel(
        functools.partial(trace_training, backward=True), 1856, count_backward_bundles
    ),
    "lightning_serving": ScheduledKernel(
        trace_serving,
        tpu_serving.bytes_per_tile(
            DECODE_SHAPE.attention_tile,
            DECODE_SHAPE.chunk_tokens,
            DECODE_SHAPE.head_dim,
            DECODE_SHAPE.dtype,
        )
        + 4 * DECODE_SHAPE.head_dim**2 / DECODE_SHAPE.chunk_tokens,
        count_serving_bundles,
    ),
    "paged_attention": ScheduledKernel(
        trace_paged,
        2 * DECODE_SHAPE.head_dim * jnp.dtype(DECODE_SHAPE.dtype).itemsize,
        count_paged_bundles,
    ),
}


def training_block_sizes() -> tiling.TpuBlockSizes:
    """Return the block sizes of `TRAIN_SHAPE` for the generation compiled for."""
    block_sizes = tiling.choose_block_sizes(
        TRAIN_SHAPE.num_heads, TRAIN_SHAPE.head_dim, TRAIN_SHAPE.length, 2
    )
    assert block_sizes is not None  # the named shape is one that fits
    return block_sizes


def compile_kernels(chip: str) -> None:
    """Compile every kernel for one chip, in the process of `--compile`."""
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=CHIP_SPECS[chip][0]
    ).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    # The sharding says which chip to compile for: no such device is here.
    def array(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype), sharding=sharding)

    with tiling.compile_for(chip):
        for kernel in SCHEDULED_KERNELS.values():
            kernel.trace(array).lower(lowering_platforms=("tpu",)).compile()


def measure_schedule(chip: str) -> list[dict]:
    """Compile for one chip and return a record of each kernel."""
    _, clock, bandwidth = CHIP_SPECS[chip]
    with tiling.compile_for(chip):
        block_sizes = training_block_sizes()
    records = []
    with tempfile.TemporaryDirectory() as dump:
        # libtpu reads its flags once, when it is loaded, so a chip is compiled for in a process of
        # its own.
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "LIBTPU_INIT_ARGS": flags}
        # The process only compiles, so two may run at once. A program from the cache dumps nothing.
        settings |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        command = [sys.executable, "-m", __spec__.name, f"--compile={chip}"]
        subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
        for name, kernel in SCHEDULED_KERNELS.items():
            bundles = read_bundles(find_dump_file(dump, name, "final_bundles.txt"))
            with tiling.compile_for(chip):
                per_token_head, loops = kernel.count_bundles(bundles, block_sizes)
            spills = read_spill_counts(
                find_dump_file(dump, name, "final_hlo-static-per-bundle-utilization.txt")
            )
            # A bundle a cycle at best. Times in ns.
            static = per_token_head / clock * 1e9
            hbm = kernel.minimum_bytes / bandwidth * 1e9
            records.append(
                {
                    "kernel": name,
                    "chip": chip,
                    "bundles_per_token_head": round(per_token_head, 4),
                    "spills": sum(spills[i] for loop in loops for i in loop if i < len(spills)),
                    "vmem_bytes": read_vmem_bytes(dump, name),
                    "static_ns_per_token_head": round(static, 4),
                    "hbm_ns_per_token_head": round(hbm, 4),
                    "ratio": round(static / hbm, 3),
                }
            )
    return records


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="also write the records to this file")
    parser.add_argument("--chips", default=",".join(CHIP_SPECS))
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_kernels(args.compile)
        return
    records = [record for chip in args.chips.split(",") for record in measure_schedule(chip)]
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()
