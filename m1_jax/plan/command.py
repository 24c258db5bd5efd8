"""Command: compile a full-size program ahead of time for a TPU slice, and say what it needs.

    python -m m1_jax.plan --topology=v5p:8x8x8 --job=train|prefill|decode|serve|rl_update|reshard
        [--config=m1|DIR|FILE] [--mesh=fsdp=16,expert=32] [--seq=4096 --batch=512] [--json=FILE]
        [--serving_mesh=data=2,expert=32,tensor=8]

No TPU is needed, and weights are shapes only. The command prints HBM by part, operations and
collectives: the compiler's figures beside our own count. The exit status is 1 if the program does
not fit. Without --mesh, arithmetic ranks the sensible meshes and the best few are compiled. "A
chip" means a device, which on tpu7x is half a chip.
"""

import dataclasses
import json
import resource
import sys
from typing import Any

import jax
from absl import flags, logging

from m1_jax import command_help, local_path, quantize
from m1_jax import config as config_lib
from m1_jax.plan import aot, estimate, jobs, meshes, record, remat_choice, report, shapes, topology
from m1_jax.plan import config as plan_config

DEFAULT_TOKENS_PER_CHIP = 4096  # where --batch is not given for training
# What the record of the best mesh says of each mesh that was compiled.
_TRIED_MESH_FIELDS = ("mesh", "fits", "hbm_bytes_per_chip", "compile_secs")


def run(config: plan_config.PlanConfig) -> dict[str, Any]:
    """Compile, and return the record that --json writes. Progress goes to the log.

    Raises:
      PlanError, TopologyError, ConfigError: arguments that no program can be made of.
    """
    if config.remat == plan_config.AUTO_REMAT:
        return remat_choice.compile_fastest_policy(config, run)
    tpu_slice = topology.parse_slice(config.topology, config.slices)
    model_config = plan_config.read_model_config(config)
    devices = topology.get_slice_devices(tpu_slice)
    limit_bytes = aot.probe_hbm_limit_bytes(devices[0])
    is_training = config.job in ("train", "rl_update")
    tokens_per_chip = DEFAULT_TOKENS_PER_CHIP if is_training else config.seq
    batch = config.batch or max(len(devices) * tokens_per_chip // config.seq, 1)
    job = estimate.PlanJob(config.job, config.seq, batch, config.accumulate)
    if job.batch % job.accumulate:
        raise plan_config.PlanError(
            f"batch: got {job.batch} rows; wanted a multiple of the {job.accumulate} microbatches "
            "of --accumulate"
        )
    if config.mesh:
        mesh_shapes = [meshes.parse_mesh(config.mesh, len(devices))]
    else:
        model = shapes.abstract_job_model(model_config, job, weights=config.weights)
        mesh_shapes = meshes.rank_meshes(
            model_config, job, devices, config.slices, limit_bytes, model
        )[: config.tries]
    records = []
    for mesh_shape in mesh_shapes:
        logging.info("compiling %s on %s", config.job, mesh_shape)
        records.append(
            record.compile_job(
                config, model_config, job, mesh_shape, devices, limit_bytes, tpu_slice
            )
        )
        # Meshes are ranked by cost, so the first that fits is the best by our count.
        if records[-1]["fits"]:
            break
    best = min(records, key=lambda r: (not r["fits"], r["hbm_bytes_per_chip"]))
    best["tried"] = [{field: r[field] for field in _TRIED_MESH_FIELDS} for r in records]
    # ru_maxrss is in KiB on Linux.
    best["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config.json:
        local_path.resolve_path(config.json, "--json").write_text(json.dumps(best, indent=1) + "\n")
    return best


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # JAX and XLA log much; the user may ask for it
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there stays free
    try:
        fields = dataclasses.fields(plan_config.PlanConfig)
        config = plan_config.PlanConfig(**{f.name: getattr(flags.FLAGS, f.name) for f in fields})
        plan_record = run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report.format_report(plan_record))
    sys.exit(0 if plan_record["fits"] else 1)


def _define_flags() -> None:
    with command_help.flag_group("The program"):
        flags.DEFINE_string("topology", None, "Slice, like v5p:8x8x8.", required=True)
        flags.DEFINE_integer("slices", 1, "Number of slices.")
        jobs_list = list(jobs.JOB_TRACERS)
        flags.DEFINE_enum("job", None, jobs_list, "Program to compile.", required=True)
        text = "The model: m1, tiny, a config.json or a directory that holds one."
        flags.DEFINE_string("config", "m1", text)
        flags.DEFINE_integer("seq", 4096, "Tokens a row. In decode: room in the cache.")
        text = "Rows on all chips. 0: 4,096 tokens a chip in training, else one row a chip."
        flags.DEFINE_integer("batch", 0, text)
        flags.DEFINE_integer("accumulate", 1, "Microbatches of a training step.")
    with command_help.flag_group("How it is computed"):
        flags.DEFINE_string("mesh", "", "axis=size,... Default: search for a mesh.")
        flags.DEFINE_integer("tries", 3, "Most meshes that a search compiles.")
        text = "Mesh of the sampler, axis=size,... For rl_update and reshard only."
        flags.DEFINE_string("serving_mesh", "", text)
        policies = [*config_lib.REMAT_POLICIES, plan_config.AUTO_REMAT]
        text = "What training computes again. auto: the fastest that fits."
        flags.DEFINE_enum("remat", "layer", policies, text)
        text = "Lightning attention in XLA or by Pallas kernels. Default: as a run does."
        flags.DEFINE_enum("lightning", None, ["chunked", "tpu"], text)
        text = "Int8 weights, where nothing is trained. Default: bfloat16."
        flags.DEFINE_enum("weights", None, list(quantize.INT8_RECIPES), text)
    with command_help.flag_group("Output"):
        flags.DEFINE_string("json", "", "File to write the record to.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
