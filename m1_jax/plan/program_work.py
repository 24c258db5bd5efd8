"""What a program has to do at least: the work that a predicted time is held against."""

import dataclasses

from m1_jax import params as params_lib
from m1_jax import sharding
from m1_jax.plan import jobs, shapes, time_assumptions


@dataclasses.dataclass(frozen=True)
class ProgramWork:
    """The work of one run.

    Attributes:
      tokens: of all devices. 0 for a program that has no tokens.
      flops: operations of the model on one device, without what is computed again.
      roofline_bytes: HBM that one device must read, where that and not operations bounds the time,
        as in decoding. None elsewhere.
    """

    tokens: float
    flops: float
    roofline_bytes: float | None = None


def count_work(
    setting: jobs.JobSetting,
    program: jobs.TracedProgram,
    assumptions: time_assumptions.TimeAssumptions,
) -> ProgramWork:
    """Return what one run of a job's program has to do."""
    job = setting.job
    flops = program.flops[0] / setting.layout.mesh.size
    tokens = job.batch * job.new_tokens if flops else 0  # a step of an optimizer has none
    if job.mode != sharding.DECODE:
        return ProgramWork(tokens, flops)
    # Every weight of a chosen expert, all other weights but the embedding's rows, and the caches,
    # each once.
    expert_bytes = sum(
        shapes.local_bytes(value)
        for value in params_lib.params_by_path(setting.model).values()
        if "experts" in value.get_metadata()["logical_axes"]
    )
    caches = sum(shapes.local_bytes(program.arguments[name]) for name in ("state", "kv"))
    total = shapes.local_bytes(setting.model) - shapes.local_bytes(setting.model.embed) + caches
    num_local = setting.config.num_local_experts / setting.layout.axis_size("experts")
    busy = assumptions.num_busy_experts
    idle_share = 0.0 if busy is None else 1 - busy / num_local
    return ProgramWork(tokens, flops, total - idle_share * expert_bytes)
