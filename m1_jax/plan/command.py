"""Command: compile a full-size program ahead of time for a TPU slice, and say what it needs.

    python -m m1_jax.plan --topology=v5p:8x8x8 --job=train|prefill|decode|serve|rl_update|reshard
        [--config=m1|DIR|FILE] [--mesh=fsdp=16,expert=32] [--seq=4096 --batch=512] [--json=FILE]
        [--serving_mesh=data=2,expert=32,tensor=8]

No TPU is needed, and weights are shapes only. Prints HBM by part, operations and collectives, each
as the compiler has it beside our own count; the exit status is 1 if the program does not fit.
Without --mesh, arithmetic ranks the sensible meshes and the best few are compiled. "A chip" is a
device: on tpu7x half a chip, of which each has two.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging

from m1_jax import config as config_lib
from m1_jax import quantize, sharding
from m1_jax.plan import aot, estimate, hlo, report, topology
from m1_jax.plan import jobs as plan_jobs
from pallas_kernels.lightning_attention import tiling

MODEL_PRESETS = {"m1": config_lib.ModelConfig.m1, "tiny": config_lib.ModelConfig.tiny}
COLOCATED_JOBS = ("rl_update", "reshard")  # with a sampler on the trainer's devices
CAPACITY_LENGTHS = (8_192, 131_072, 1_048_576)  # of which a plan says how many rows fit
DEFAULT_TOKENS_PER_CHIP = 4096  # a chip, where --batch is not given for training


class PlanError(ValueError):
    """A plan that cannot be made; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What to compile, and for what.

    Args:
      topology: a slice, like v5p:8x8x8. slices: how many of them.
      job: train (a whole optimizer step), prefill (seq tokens into an empty state), decode (one
        token each, with room for seq in the cache), serve (the engine's decoding of batch
        requests of seq tokens), rl_update (the programs of an RL update, for microbatches of batch
        rows), reshard (the copy of a trainer's weights for the sampler on the same devices).
      config: m1, tiny, a config.json or a directory that holds one.
      mesh: axis=size, comma separated; empty: search, compiling at most `tries` meshes.
      serving_mesh: the sampler's, of rl_update and reshard; as mesh.
      seq, batch: tokens a row, and rows of all chips; batch 0: 4,096 tokens a chip in training,
        else one row a chip.
      accumulate, remat: of training; see `train.step.Settings` and `ModelConfig`.
      lightning: chunked (XLA) or tpu (the Pallas kernels).
      weights: None (bfloat16) or, where nothing is trained, one of `quantize.INT8_RECIPES`.
    """

    topology: str
    job: str
    config: str = "m1"
    mesh: str = ""
    serving_mesh: str = ""
    seq: int = 4096
    batch: int = 0
    slices: int = 1
    accumulate: int = 1
    remat: str = "layer"
    lightning: str = "chunked"
    weights: str | None = None
    tries: int = 3
    json: str = ""

    def __post_init__(self):
        if self.job not in plan_jobs.JOB_TRACERS:
            raise PlanError(
                f"job: got {self.job!r}; wanted one of {', '.join(plan_jobs.JOB_TRACERS)}"
            )
        if (self.job in COLOCATED_JOBS) != bool(self.serving_mesh):
            raise PlanError(
                f"serving_mesh: got {self.serving_mesh!r} for the job {self.job}; wanted "
                f"axis=size,... of the sampler for {' and '.join(COLOCATED_JOBS)}, and for no other"
            )
        if self.job == "reshard" and not self.mesh:
            raise PlanError("mesh: got none; wanted axis=size,... of the trainer, for reshard")
        if self.job == "rl_update" and self.accumulate != 1:
            raise PlanError(
                f"accumulate: got {self.accumulate}; wanted 1 for rl_update, whose microbatches "
                "are runs of one program: give the rows of one as --batch"
            )
        if min(self.seq, self.accumulate, self.tries) < 1 or self.batch < 0:
            raise PlanError("seq, batch, accumulate, tries: wanted at least 1 of each")
        quantize.check_recipe(self.weights)
        if self.job in ("train", *COLOCATED_JOBS) and self.weights is not None:
            raise PlanError(f"weights: {self.weights} cannot be trained; leave --weights out")
        if self.lightning not in ("chunked", "tpu"):
            raise PlanError(f"lightning: got {self.lightning!r}; wanted chunked or tpu")


# ---- the command


def run(config: PlanConfig) -> dict[str, Any]:
    """Compile, and return the record that --json writes; progress goes to the log.

    Raises:
      PlanError, TopologyError, ConfigError: arguments that no program can be made of.
    """
    where = topology.parse_slice(config.topology, config.slices)
    model_config = read_model_config(config)
    devices = topology.get_slice_devices(where)
    limit = aot.probe_hbm_limit_bytes(devices[0])
    tokens = (
        DEFAULT_TOKENS_PER_CHIP if config.job in ("train", "rl_update") else config.seq
    )  # of a chip
    batch = config.batch or max(len(devices) * tokens // config.seq, 1)
    job = estimate.PlanJob(config.job, config.seq, batch, config.accumulate)
    if job.batch % job.accumulate:
        raise PlanError(f"batch {job.batch} does not divide into {job.accumulate} microbatches")
    if config.mesh:
        ranked = [parse_mesh(config.mesh, len(devices))]
    else:
        shapes = plan_jobs.abstract_job_model(model_config, job, weights=config.weights)
        ranked = rank_meshes(model_config, job, devices, config.slices, limit, shapes)[
            : config.tries
        ]
    records = []
    for mesh in ranked:
        logging.info("compiling %s on %s", config.job, mesh)
        records.append(plan_mesh(config, model_config, job, mesh, devices, limit, where))
        if records[-1]["fits"]:
            break
    best = min(records, key=lambda r: (not r["fits"], r["hbm_bytes_per_chip"]))
    tried = ("mesh", "fits", "hbm_bytes_per_chip", "compile_secs")
    best["tried"] = [{key: record[key] for key in tried} for record in records]
    best["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(best, indent=1) + "\n")
    return best


def rank_meshes(
    model_config, job: estimate.PlanJob, devices, num_slices: int, limit_bytes: float, model
):
    """Return the meshes that should fit by hand, cheapest first; if none does, the nearest one.

    Raises:
      PlanError: there are none.
    """
    found: list[tuple[tuple[bool, float], dict[str, int]]] = []
    for shape in estimate.iterate_meshes(model_config, job, devices, num_slices):
        layout = make_layout(model_config, shape, devices, job)
        guess = plan_jobs.estimate_job(model_config, job, layout, model)
        over = guess.total_bytes > limit_bytes
        found.append(((over, guess.total_bytes if over else guess.cost(job)), shape))
    if not found:
        raise PlanError(
            f"no mesh of {len(devices)} devices divides {job.batch} rows of {job.seq} tokens "
            f"in {job.accumulate} microbatches; choose another --batch, or give --mesh"
        )
    found.sort(key=lambda pair: pair[0])
    return [shape for (over, _), shape in found if not over] or [found[0][1]]


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Read axis=size,axis=size.

    Raises:
      PlanError: an unknown axis, a size that is none, or sizes that do not make all devices.
    """
    shape = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sharding.MESH_AXES or axis in shape or not size.isdecimal() or int(size) < 1:
            raise PlanError(
                f"mesh: got {part!r}; wanted axis=size, the axis once and one of "
                f"{', '.join(sharding.MESH_AXES)}"
            )
        shape[axis] = int(size)
    if math.prod(shape.values()) != num_devices:
        raise PlanError(
            f"mesh: {text} makes {math.prod(shape.values())} devices; wanted {num_devices}, "
            "all of the topology"
        )
    return shape


def make_layout(config: config_lib.ModelConfig, mesh_shape, devices, job: estimate.PlanJob):
    """Return the layout of a job on a mesh; raises ValueError where it cannot lie on it."""
    found = sharding.make_layout(sharding.make_mesh(mesh_shape, devices), config, job.mode)
    assert found is not None
    estimate.check_job_layout(job, found)
    return found


def plan_mesh(
    config: PlanConfig, model_config, job, mesh_shape, devices, limit_bytes, tpu_slice
) -> dict[str, Any]:
    """Compile the programs of one job on one mesh; return the record of what needs most memory.

    Of a job with several programs, "programs" has all of them, and times are of all together.
    """
    layout = make_layout(model_config, mesh_shape, devices, job)
    model = plan_jobs.abstract_job_model(model_config, job, layout, config.weights)
    serving = None
    if config.serving_mesh:
        sizes = parse_mesh(config.serving_mesh, len(devices))
        serving = plan_jobs.make_serving_layout(model_config, layout, sizes)
    setting = plan_jobs.JobSetting(model_config, job, layout, model, serving)
    started = time.perf_counter()
    kernels = config.lightning == "tpu"
    chip = tiling.compile_for(tpu_slice.generation) if kernels else contextlib.nullcontext()
    with chip:
        traced = plan_jobs.JOB_TRACERS[job.kind](setting)
        traced_secs = time.perf_counter() - started
        programs = [_compile_to_record(program, limit_bytes, len(devices)) for program in traced]
    most = max(programs, key=lambda program: program["hbm_bytes_per_chip"])
    return {
        **dataclasses.asdict(config),
        "mesh": dict(mesh_shape),
        "batch": job.batch,
        "devices": len(devices),
        "devices_per_chip": len(devices) // tpu_slice.num_chips,
        **most,
        "fits": all(program["fits"] for program in programs),
        "programs": programs,
        "capacity": _count_rows_in_free_hbm(setting, most),
        "trace_secs": traced_secs,
        "compile_secs": sum(program["compile_secs"] for program in programs),
        "compile_cpu_secs": sum(program["compile_cpu_secs"] for program in programs),
        "versions": {name: _get_package_version(name) for name in ("jax", "libtpu")},
    }


def _compile_to_record(
    program: plan_jobs.TracedProgram, limit_bytes: float, num_devices: int
) -> dict[str, Any]:
    """Compile a program; the memory of what lies beside it counts as its own."""
    beside = {name: estimate.local_bytes(tree) for name, tree in program.co_resident.items()}
    logging.info("compiling %s", program.name)
    compiled = aot.compile_program(program.traced, limit_bytes)
    needed = compiled.needed_bytes + sum(beside.values())
    arguments = {name: estimate.local_bytes(tree) for name, tree in program.arguments.items()}
    results = {name: estimate.local_bytes(tree) for name, tree in program.results.items()}
    parts: dict[str, float] = {**arguments, **results}
    held = compiled.argument_bytes or sum(arguments.values())
    parts["activations"] = compiled.needed_bytes - sum(parts.values())
    counted, unknown = hlo.count_collectives(compiled.hlo_text) if compiled.hlo_text else ({}, 0)
    model_flops, again = program.flops
    return {
        "program": program.name,
        "fits": needed <= compiled.limit_bytes and compiled.fits,
        "hbm_bytes_per_chip": needed,
        "hbm_limit_bytes": compiled.limit_bytes,
        "hbm_parts": parts,
        "hbm_beside": beside,
        "hbm_estimate": dict(program.resource_estimate.hbm_bytes),
        "argument_bytes": held,
        "temp_bytes": compiled.temp_bytes or compiled.needed_bytes - held,
        "flops_per_chip": (model_flops + again) / num_devices,
        "flops_again_per_chip": again / num_devices,
        "flops_compiler_per_chip": compiled.flops,
        "collectives": _traffic_to_json(counted),
        "collectives_estimate": _traffic_to_json(program.resource_estimate.collectives),
        "unknown_loops": unknown,
        "compile_secs": compiled.compile_secs,
        "compile_cpu_secs": compiled.compile_cpu_secs,
    }


def _count_rows_in_free_hbm(
    setting: plan_jobs.JobSetting, peak_program: Mapping[str, Any]
) -> dict[int, int]:
    """Return `count_fitting_rows` with what the program that needs most leaves free."""
    job, layout = setting.job, setting.layout
    free = peak_program["hbm_limit_bytes"] - peak_program["hbm_bytes_per_chip"]
    if job.kind == "rl_update":  # the sampler's memory of its requests stays there, too
        assert setting.serving_layout is not None
        serve = dataclasses.replace(job, kind="serve")
        return count_fitting_rows(setting.config, setting.serving_layout, serve, free, (job.seq,))
    if job.mode == sharding.TRAIN:
        return {}
    held = sum(plan_jobs.state_and_kv_bytes(setting.config, layout, job))
    return count_fitting_rows(setting.config, layout, job, free + held)


def count_fitting_rows(
    model_config,
    layout,
    job: estimate.PlanJob,
    free_bytes: float,
    lengths: Sequence[int] = CAPACITY_LENGTHS,
) -> dict[int, int]:
    """Return by length in tokens how many rows fit into so much of a chip's memory."""
    both = plan_jobs.state_and_kv_bytes(model_config, layout, job)
    state, kv = (size / job.batch for size in both)
    spread = 1 if job.kind == "serve" else layout.axis_size("batch")
    found = {}
    for length in lengths:
        each = state + kv * length / job.seq
        found[length] = max(int(free_bytes / each), 0) // spread * spread
    return found


def read_model_config(config: PlanConfig) -> config_lib.ModelConfig:
    if config.config in MODEL_PRESETS:
        read = MODEL_PRESETS[config.config]()
    else:
        path = pathlib.Path(config.config)
        if not path.exists():
            raise PlanError(
                f"config: got {config.config!r}; wanted {' or '.join(MODEL_PRESETS)}, a "
                "config.json or "
                "the directory of one"
            )
        read = config_lib.ModelConfig.from_file(path / "config.json" if path.is_dir() else path)
    remat = config.remat if config.job in ("train", "rl_update") else "none"
    return dataclasses.replace(read, remat=remat, lightning_implementation=config.lightning)


def _traffic_to_json(
    collectives: Mapping[str, hlo.CollectiveTraffic],
) -> dict[str, dict[str, float]]:
    return {kind: dataclasses.asdict(traffic) for kind, traffic in collectives.items()}


def _get_package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there stays free
    try:
        config = PlanConfig(
            **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(PlanConfig)}
        )
        record = run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report.format_report(record))
    sys.exit(0 if record["fits"] else 1)


def _define_flags() -> None:
    flags.DEFINE_string("topology", None, "slice, like v5p:8x8x8", required=True)
    flags.DEFINE_enum("job", None, list(plan_jobs.JOB_TRACERS), "program to compile", required=True)
    flags.DEFINE_string("config", "m1", "m1, tiny, a config.json or the directory of one")
    flags.DEFINE_string("mesh", "", "axis=size,... ; empty: search for one")
    flags.DEFINE_string("serving_mesh", "", "axis=size,... of the sampler; rl_update, reshard")
    flags.DEFINE_integer("seq", 4096, "tokens a row; decode: room in the cache")
    flags.DEFINE_integer("batch", 0, "rows on all chips; 0: 4,096 tokens a chip, or one row")
    flags.DEFINE_integer("slices", 1, "number of slices")
    flags.DEFINE_integer("accumulate", 1, "microbatches of a training step")
    flags.DEFINE_enum(
        "remat", "layer", list(config_lib.REMAT_POLICIES), "what training computes again"
    )
    flags.DEFINE_enum("lightning", "chunked", ["chunked", "tpu"], "XLA or the Pallas kernels")
    recipes = list(quantize.INT8_RECIPES)
    flags.DEFINE_enum("weights", None, recipes, "int8 weights of decode and prefill; else bfloat16")
    flags.DEFINE_integer("tries", 3, "meshes to compile at most")
    flags.DEFINE_string("json", "", "file for the record")


def cli() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    cli()
