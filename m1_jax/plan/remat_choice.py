"""The fastest rematerialisation that fits: `m1-plan --remat=auto`.

The leanest policy is compiled first. What another policy keeps on top of it is arithmetic, so of
the others only those are compiled that should fit, from the fastest on, until one does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from m1_jax import config as config_lib
from m1_jax.plan import config as plan_config
from m1_jax.plan import estimate, meshes, report, topology

*FASTER_POLICIES, LEANEST_POLICY = config_lib.REMAT_POLICIES


def compile_fastest_policy(
    config: plan_config.PlanConfig,
    compile_plan: Callable[[plan_config.PlanConfig], dict[str, Any]],
) -> dict[str, Any]:
    """Return the record of the fastest policy that fits, or of the leanest where none does.

    Its "tried_remat" has for each policy, from the leanest and then from the fastest on, bytes of
    HBM and whether they were compiled or predicted, and whether they fit.

    Args:
      config: a plan of training whose `remat` is `plan_config.AUTO_REMAT`.
      compile_plan: returns the record of a plan with one policy, as `command.run` does.
    """
    leanest = compile_plan(dataclasses.replace(config, remat=LEANEST_POLICY))
    tried = [_describe_trial(leanest, LEANEST_POLICY, leanest["hbm_bytes_per_chip"], True)]
    best = leanest
    for policy in FASTER_POLICIES if leanest["fits"] else ():
        predicted_bytes = leanest["hbm_bytes_per_chip"] + predict_extra_bytes(leanest, policy)
        if predicted_bytes > leanest["hbm_limit_bytes"]:
            tried.append(_describe_trial(leanest, policy, predicted_bytes, False))
            continue
        # On the same mesh, which a search need not find again.
        mesh = report.format_mesh(leanest["mesh"])
        record = compile_plan(dataclasses.replace(config, remat=policy, mesh=mesh))
        tried.append(_describe_trial(record, policy, record["hbm_bytes_per_chip"], True))
        if record["fits"]:
            best = record
            break
    return best | {"tried_remat": tried}


def predict_extra_bytes(record: dict[str, Any], policy: str) -> float:
    """Return by how many bytes a device keeps more with a policy than the plan of `record` does."""
    fields = {field.name for field in dataclasses.fields(plan_config.PlanConfig)}
    config = plan_config.PlanConfig(**{name: record[name] for name in fields})
    model_config = plan_config.read_model_config(config)
    devices = topology.get_slice_devices(topology.parse_slice(config.topology, config.slices))
    job = estimate.PlanJob(config.job, config.seq, config.batch, config.accumulate)
    layout = meshes.make_job_layout(model_config, record["mesh"], devices, job)
    tokens = job.batch / job.accumulate / layout.axis_size("batch")
    tokens *= job.seq / layout.axis_size("length")
    more, less = (
        estimate.count_saved_numbers(dataclasses.replace(model_config, remat=name), layout)
        for name in (policy, config.remat)
    )
    return tokens * estimate.BFLOAT16_BYTES * (more - less)


def _describe_trial(
    record: dict[str, Any], policy: str, hbm_bytes: float, was_compiled: bool
) -> dict[str, Any]:
    return {
        "remat": policy,
        "hbm_bytes_per_chip": hbm_bytes,
        "compiled": was_compiled,
        "fits": was_compiled and record["fits"],
    }
