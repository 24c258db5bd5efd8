"""The record of a plan: one job compiled on one mesh, and what that takes, as --json writes it."""

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from absl import logging

from m1_jax import compiler_options, lightning, physical_mesh, sharding
from m1_jax import config as config_lib
from m1_jax.plan import (
    aot,
    chip_specs,
    collectives,
    estimate,
    jobs,
    meshes,
    program_work,
    shapes,
    time_assumptions,
    time_summary,
    topology,
)
from m1_jax.plan import config as plan_config
from pallas_kernels.lightning_attention import tiling

CAPACITY_LENGTHS = (8_192, 131_072, 1_048_576)  # tokens a row: how many such rows fit is reported


def compile_job(
    config: plan_config.PlanConfig,
    model_config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    mesh_shape: dict[str, int],
    devices: Sequence[Any],
    limit_bytes: float,
    tpu_slice: topology.TpuSlice,
) -> dict[str, Any]:
    """Compile the programs of one job on one mesh, and return a record.

    Its sizes are of the program that needs most memory. "programs" has those of all programs, and
    times are of all together.

    Args:
      limit_bytes: HBM that the compiler grants a device.
    """
    layout = meshes.make_job_layout(model_config, mesh_shape, devices, job)
    model = shapes.abstract_job_model(model_config, job, layout, config.weights)
    serving_layout = None
    if config.serving_mesh:
        axis_sizes = meshes.parse_mesh(config.serving_mesh, len(devices))
        serving_layout = jobs.make_serving_layout(model_config, layout, axis_sizes)
    setting = jobs.JobSetting(model_config, job, layout, model, serving_layout)
    start_secs = time.perf_counter()
    # Kernels choose their tiles for a chip. This process has none to ask.
    with tiling.compile_for(tpu_slice.generation):
        traced_programs = jobs.JOB_TRACERS[job.kind](setting)
        trace_secs = time.perf_counter() - start_secs
        # What a run on these devices compiles with.
        options = compiler_options.options_for(devices[0])
        programs = [
            _compile_program(setting, p, limit_bytes, tpu_slice, options) for p in traced_programs
        ]
    peak_program = max(programs, key=lambda program: program["hbm_bytes_per_chip"])
    return {
        **dataclasses.asdict(config),
        "mesh": dict(mesh_shape),
        "batch": job.batch,
        "devices": len(devices),
        "devices_per_chip": len(devices) // tpu_slice.num_chips,
        "lightning_runs": lightning.resolve_implementation(model_config, jnp.bfloat16, layout),
        "compiler_options": options,
        **peak_program,
        "fits": all(program["fits"] for program in programs),
        "programs": programs,
        "warnings": [
            *meshes.describe_padded_columns(model_config, job, serving_layout or layout, model),
            *meshes.describe_cut_axes(layout.mesh, tpu_slice),
        ],
        "mesh_dimensions": _describe_mesh_dimensions(layout),
        "closed_dimensions": list(tpu_slice.closed_dims),
        "capacity": _count_rows_in_free_hbm(setting, peak_program),
        "trace_secs": trace_secs,
        "compile_secs": sum(program["compile_secs"] for program in programs),
        "compile_cpu_secs": sum(program["compile_cpu_secs"] for program in programs),
        "versions": {name: _get_package_version(name) for name in ("jax", "libtpu")},
    }


def _describe_mesh_dimensions(layout: sharding.MeshLayout) -> dict[str, list[str]]:
    return {
        axis: [str(share) for share in shares]
        for axis, shares in physical_mesh.describe_axes(layout.mesh).items()
    }


def _compile_program(
    setting: jobs.JobSetting,
    program: jobs.TracedProgram,
    limit_bytes: float,
    tpu_slice: topology.TpuSlice,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Compile a program. The memory of what lies beside it counts as its own."""
    beside_bytes = {name: shapes.local_bytes(tree) for name, tree in program.co_resident.items()}
    logging.info("compiling %s", program.name)
    compiled = aot.compile_program(program.traced, limit_bytes, options)
    needed_bytes = compiled.needed_bytes + sum(beside_bytes.values())
    arguments = {name: shapes.local_bytes(tree) for name, tree in program.arguments.items()}
    results = {name: shapes.local_bytes(tree) for name, tree in program.results.items()}
    parts: dict[str, float] = {**arguments, **results}
    # The compiler tells only the total of a program that does not fit.
    argument_bytes = compiled.argument_bytes or sum(arguments.values())
    # What remains: temporaries, code, and the padding of tiles in arguments.
    parts["activations"] = compiled.needed_bytes - sum(parts.values())
    assumptions = time_assumptions.make_assumptions(setting.config, setting.job, setting.layout)
    traffic, num_unknown_loops = {}, 0
    if compiled.hlo_text:
        traffic, num_unknown_loops = collectives.count_collectives(
            compiled.hlo_text, assumptions.find_trips, assumptions.find_branch_share
        )
    model_flops, recomputed_flops = program.flops
    num_devices = tpu_slice.num_devices
    return {
        "program": program.name,
        "fits": needed_bytes <= compiled.limit_bytes and compiled.fits,
        "hbm_bytes_per_chip": needed_bytes,
        "hbm_limit_bytes": compiled.limit_bytes,
        "hbm_parts": parts,
        "hbm_beside": beside_bytes,
        "hbm_estimate": dict(program.resource_estimate.hbm_bytes),
        "argument_bytes": argument_bytes,
        "temp_bytes": compiled.temp_bytes or compiled.needed_bytes - argument_bytes,
        "flops_per_chip": (model_flops + recomputed_flops) / num_devices,
        "flops_again_per_chip": recomputed_flops / num_devices,
        "flops_compiler_per_chip": compiled.flops,
        "collectives": _traffic_to_json(traffic),
        "collectives_estimate": _traffic_to_json(program.resource_estimate.collectives),
        "unknown_loops": num_unknown_loops,
        "time": time_summary.summarize_time(
            compiled.codegen_text,
            chip_specs.CHIP_SPECS[tpu_slice.generation],
            assumptions,
            program_work.count_work(setting, program, assumptions),
            tpu_slice.num_chips,
        ),
        "compile_secs": compiled.compile_secs,
        "compile_cpu_secs": compiled.compile_cpu_secs,
    }


def _count_rows_in_free_hbm(
    setting: jobs.JobSetting, peak_program: Mapping[str, Any]
) -> dict[int, int]:
    """Return `count_fitting_rows` with what the program that needs most leaves free."""
    job, layout = setting.job, setting.layout
    free_bytes = peak_program["hbm_limit_bytes"] - peak_program["hbm_bytes_per_chip"]
    if job.kind == "rl_update":
        # The sampler keeps its requests' memory during an update, and these decode.
        assert setting.serving_layout is not None
        serve_job = dataclasses.replace(job, kind="serve")
        return count_fitting_rows(
            setting.config, setting.serving_layout, serve_job, free_bytes, (job.seq,)
        )
    if job.mode == sharding.TRAIN:
        return {}
    # The job's own rows make room for others.
    state_bytes = sum(jobs.state_and_kv_bytes(setting.config, layout, job))
    return count_fitting_rows(setting.config, layout, job, free_bytes + state_bytes)


def count_fitting_rows(
    model_config: config_lib.ModelConfig,
    layout: sharding.MeshLayout,
    job: estimate.PlanJob,
    free_bytes: float,
    lengths: Sequence[int] = CAPACITY_LENGTHS,
) -> dict[int, int]:
    """Return by length in tokens how many rows fit into so much of a chip's memory."""
    state_bytes, kv_bytes = (
        total / job.batch for total in jobs.state_and_kv_bytes(model_config, layout, job)
    )
    row_shards = layout.axis_size("batch")  # rows are split evenly over these devices
    num_rows = {}
    for length in lengths:
        bytes_per_row = state_bytes + kv_bytes * length / job.seq
        num_rows[length] = max(int(free_bytes / bytes_per_row), 0) // row_shards * row_shards
    return num_rows


def _traffic_to_json(
    traffic: Mapping[str, collectives.CollectiveTraffic],
) -> dict[str, dict[str, float]]:
    return {kind: dataclasses.asdict(total) for kind, total in traffic.items()}


def _get_package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
