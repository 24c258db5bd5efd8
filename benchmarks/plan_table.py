"""The smallest slices that hold each job of the released model: writes docs/plan.md.

    python benchmarks/plan_table.py [--out=docs/plan.md] [--records=.cache/plan]

Runs `python -m m1_jax.plan` for one slice after another, the smallest first. Each plan takes
minutes, in a process of its own. Every record is kept, so that an interrupted run goes on where it
was. The table is written after every job. Delete a record to compile its plan again.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import tqdm

from m1_jax.plan import report

GIB = 2**30
NUM_PARAMETERS = 456_089_655_296
# A slice is left out where parameters, moments and gradients alone take more than this share.
MAX_PARAMETER_SHARE = 0.8
# (topology, number of slices), the smallest first.
SLICES_2D = [("4x4", 1), ("4x8", 1), ("8x8", 1), ("8x16", 1), *(("16x16", n) for n in (1, 2, 4, 8))]
SLICES_3D = ("2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# HBM of a device in GiB, devices of a chip, slices. The first two leave out what cannot fit.
CHIPS = {
    "v5e": (15.75, 1, SLICES_2D),
    "v5p": (95.73, 1, [(shape, 1) for shape in SLICES_3D]),
    "v6e": (31.24, 1, SLICES_2D),
    "tpu7x": (94.74, 2, [(shape, 1) for shape in SLICES_3D]),
}
ACCUMULATE_FLAG = "--accumulate=4"
# Long caches have one row for 8 devices, the most that a row's 8 heads are spread over.
INT8_FLAGS = ["--job=decode", "--weights=int8-experts"]
DEVICES_PER_ROW, ROWS_FLAG = 8, "--batch={rows}"
# (name, least bytes a parameter, flags). Training holds master weights, moments and gradients.
JOBS = [
    ("pretraining, 4k", 16, ["--job=train", "--seq=4096"]),
    ("pretraining, 32k", 16, ["--job=train", "--seq=32768"]),
    ("pretraining, 1M", 16, ["--job=train", "--seq=1048576"]),
    ("SFT, 8k, rematerialised, 4 parts", 16, ["--job=train", "--seq=8192", ACCUMULATE_FLAG]),
    ("decoding, 8k", 2, ["--job=decode", "--seq=8192"]),
    ("decoding, 128k", 2, ["--job=decode", "--seq=131072", ROWS_FLAG]),
    ("decoding, 1M", 2, ["--job=decode", "--seq=1048576", ROWS_FLAG]),
    ("decoding, int8 experts, 8k", 1, [*INT8_FLAGS, "--seq=8192"]),
    ("decoding, int8 experts, 128k", 1, [*INT8_FLAGS, "--seq=131072", ROWS_FLAG]),
    ("decoding, int8 experts, 1M", 1, [*INT8_FLAGS, "--seq=1048576", ROWS_FLAG]),
]
# The file begins with pages written by hand. The table replaces what follows this heading.
TABLE_HEADING = "## Smallest slices\n"
TABLE_HEADER = f"""{TABLE_HEADING}
Written by `python benchmarks/plan_table.py`, which compiles the released model ahead of time for
larger and larger slices until it fits. The first slice tried is the smallest whose memory is filled
to at most four fifths by the parameters, and in training by their moments and gradients too. GiB
are those of a device, which is half a chip on tpu7x. Nothing here was timed. Decoding has room for
as many tokens as the job says, with one row a device at 8k and one row for 8 devices above. A
training step has 4,096 tokens a chip: all at once, or in 4 parts where only parts fit.

| job | slice | mesh | rows | GiB used / granted | tried smaller |
|---|---|---|---|---|---|
"""


def candidate_slices(chip: str, item_bytes: int):
    """Yield (topology, number of slices, devices) that could hold the job, smallest first."""
    gib, devices, shapes = CHIPS[chip]
    for shape, num_slices in shapes:
        num_devices = devices * num_slices
        for size in shape.split("x"):
            num_devices *= int(size)
        if NUM_PARAMETERS * item_bytes < MAX_PARAMETER_SHARE * num_devices * gib * GIB:
            yield f"{chip}:{shape}", num_slices, num_devices


def compile_plan(records: pathlib.Path, topology: str, num_slices: int, flags: list[str]) -> dict:
    """Return the record of one plan, compiled now or before. {"error": ...} if it failed."""
    name = "_".join([topology.replace(":", "-"), str(num_slices), *(f.strip("-") for f in flags)])
    file = records / f"{name}.json"
    if not file.exists():
        part = file.with_suffix(".part")
        command = [sys.executable, "-m", "m1_jax.plan", f"--topology={topology}"]
        command += [f"--slices={num_slices}", f"--json={part}", *flags]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if not part.exists():
            last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
            # Only the planner's own refusal is recorded. Any other failure is tried again.
            if not last_line.startswith("error: "):
                return {"error": last_line}
            part.write_text(json.dumps({"error": last_line.removeprefix("error: ")}) + "\n")
        part.rename(file)
    return json.loads(file.read_text())


def make_row(
    records: pathlib.Path, job: str, chip: str, item_bytes: int, flags: list[str], bar
) -> str:
    """Return the table's row of a job on the smallest slice that holds it."""
    smaller = []  # slices that did not hold it, and why
    for topology, num_slices, devices in candidate_slices(chip, item_bytes):
        name = topology if num_slices == 1 else f"{num_slices} x {topology}"
        bar.set_postfix_str(f"{job} on {name}")
        own_flags = [flag.format(rows=devices // DEVICES_PER_ROW) for flag in flags]
        record, parts = compile_plan(records, topology, num_slices, own_flags), 1
        if not record.get("fits") and "--job=train" in flags and ACCUMULATE_FLAG not in flags:
            accumulated = compile_plan(records, topology, num_slices, [*own_flags, ACCUMULATE_FLAG])
            if accumulated.get("fits"):
                record, parts = accumulated, 4
        if record.get("fits"):
            used_gib, limit_gib = (
                record["hbm_bytes_per_chip"] / GIB,
                record["hbm_limit_bytes"] / GIB,
            )
            used = f"{used_gib:.1f} / {limit_gib:.1f}"
            mesh = report.format_mesh(record["mesh"]) + (f", {parts} parts" if parts > 1 else "")
            tried = ", ".join(smaller)
            return f"| {job} | {name} | {mesh} | {record['batch']} | {used} | {tried} |\n"
        reason = record.get("error") or f"{record['hbm_bytes_per_chip'] / GIB:.0f} GiB"
        reason = reason[:100]
        smaller.append(f"{name} ({reason})")
    return f"| {job} | none of {chip} | | | | {', '.join(smaller)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/plan.md"))
    parser.add_argument("--records", type=pathlib.Path, default=pathlib.Path(".cache/plan"))
    parser.add_argument("--chips", default=",".join(CHIPS), help="generations of chips, by commas")
    parser.add_argument(
        "--jobs", default="", help="parts of jobs' names, by semicolons. Empty: all"
    )
    arguments = parser.parse_args()
    arguments.records.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in JOBS if any(part in job[0] for part in arguments.jobs.split(";"))]
    todo = [(job, chip) for job in jobs for chip in arguments.chips.split(",")]
    by_hand = ""
    if arguments.out.exists():
        by_hand = arguments.out.read_text().partition(TABLE_HEADING)[0]
    text = by_hand + TABLE_HEADER
    with tqdm.tqdm(todo) as bar:
        for (job, item_bytes, flags), chip in bar:
            text += make_row(arguments.records, job, chip, item_bytes, flags, bar)
            arguments.out.write_text(text)


if __name__ == "__main__":
    main()
