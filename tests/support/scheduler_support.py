"""A small scheduler, and a device that answers its plans at once; for the scheduler's tests."""

import dataclasses

from infer import config as config_lib
from infer.scheduling import plan as plan_lib
from infer.scheduling import scheduler

C = 4  # tokens of a chunk
CONFIG = config_lib.EngineConfig(
    chunk_tokens=C,
    max_length=100,
    max_queue=8,
    max_rows=4,
    prefill_tokens=(16,),
    decode_steps=4,
    snapshot_every_tokens=0,
    swap_tokens=1000,
    attention_tile=2,
    matmul_tile=0,
)
LIMITS = plan_lib.DeviceLimits(
    num_slots=6,
    num_pages=40,
    max_prefill_chunks=4,
    cache_bytes=10_000,
    state_bytes=10,
)


def split_changes(changes):
    """Return changes of the config and changes of the limits; pools are the limits'."""
    names = {field.name for field in dataclasses.fields(plan_lib.DeviceLimits)}
    limits = {name: value for name, value in changes.items() if name in names}
    return {name: changes[name] for name in changes.keys() - names}, limits


def make_scheduler(**changes):
    """Return a scheduler of the sizes above, some of them changed."""
    config, limits = split_changes(changes)
    return scheduler.Scheduler(
        dataclasses.replace(CONFIG, **config), dataclasses.replace(LIMITS, **limits)
    )


def chunk_tokens_of(letters):
    """Return a chunk of equal tokens for each letter."""
    return [ord(letter) for letter in letters for _ in range(C)]


def make_result(count, **fields):
    return plan_lib.StepResult(count, new_tokens=(7,) * count, **fields)


def answer(plan, finished=()):
    """Return results of a plan in which every row used all its steps."""
    results = {}
    for chunk in plan.prefill_chunks:
        results[chunk.sequence_id] = make_result(int(chunk.is_last and not chunk.is_resumed))
    for row in plan.decode_rows:
        results[row.sequence_id] = make_result(plan.max_steps)
    return {
        sequence_id: dataclasses.replace(result, is_finished=sequence_id in finished)
        for sequence_id, result in results.items()
    }


def step(sched, finished=()):
    """Plan and report at once."""
    plan = sched.plan()
    if plan is not None:
        sched.report(answer(plan, finished))
    return plan


def spans(plan):
    """Return start and end of every prefill chunk, by sequence."""
    return {
        chunk.sequence_id: (chunk.start, chunk.start + chunk.num_tokens)
        for chunk in plan.prefill_chunks
    }
