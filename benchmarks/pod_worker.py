"""One of several processes of CPU devices that train a tiny model as the hosts of a pod do.

    python benchmarks/pod_worker.py PORT PROCESSES INDEX JOB CHECKPOINT WORKDIR [FAULT] [ORDER]

JOB is pretrain or rl. FAULT is KIND:PHASE:PROCESS, see `plant_fault`. ORDER is a JSON file with the
numbers of the devices in the order in which the mesh has them, as a torus gives it.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import signal
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax._src import compiler, distributed

from infer.execution import device as device_lib
from m1_jax import ModelConfig, process_watch, sharding
from train import checkpoints, loop
from train import config as config_lib
from train.rl import config as rl_config
from train.rl import loop as rl_loop
from train.rl import rollout, weight_sync
from train.rl import update as rl_update

ROOT = pathlib.Path(__file__).resolve().parents[1]
# (data, fsdp, expert, tensor, context) of the trainer, and of the sampler, by number of devices.
MESHES = {
    2: ({"expert": 2}, {"tensor": 2}),
    4: ({"fsdp": 2, "expert": 2}, {"expert": 2, "tensor": 2}),
    32: ({"fsdp": 2, "expert": 8, "context": 2}, {"data": 2, "expert": 8, "tensor": 2}),
}
# The second stage of pretraining: every host has other rows, and so other lanes. With 16 processes
# there is none: one stage's programs take 10 GiB of a machine.
SECOND_MESHES = {2: [{"context": 2}], 4: [{"fsdp": 4}], 32: []}


# More processes than these share a few cores for so long that a busy one seems to be gone.
MAX_PUNCTUAL_PROCESSES = 4
BARRIER_MS = 600_000


def plant_fault(fault: str, index: int) -> None:
    """Make this process fail in a phase of a run.

    Args:
      fault: KIND:PHASE:PROCESS. KIND is error (an exception), silence (the process is stopped, as
        its host may be) or term (SIGTERM, as a preemption sends it). PHASE is sampling, scoring,
        update, handover, save or close.
      index: number of this process.
    """
    kind, phase, culprit = fault.split(":")
    if index != int(culprit):
        return
    owner, name = {
        "sampling": (device_lib.Device, "run_program"),
        "scoring": (rl_update.PolicyUpdater, "__call__"),
        "update": (rl_update.PolicyUpdater, "_update_minibatch"),
        "handover": (weight_sync.WeightSync, "__call__"),
        "save": (checkpoints.CheckpointStore, "save"),
        "close": (rollout.RolloutSampler, "close"),
    }[phase]
    real, calls = getattr(owner, name), []

    def fail(self, *arguments, **options):
        calls.append(1)
        # Not the first call: handover and sampling begin with one that makes the engine.
        if len(calls) == (20 if phase == "sampling" else 2 if phase == "handover" else 1):
            print(f"fault {time.time():.1f}", flush=True)
            if kind == "error":
                raise OSError(f"planted in {phase} of process {index}")
            signals = {"silence": signal.SIGSTOP, "term": signal.SIGTERM}
            os.kill(os.getpid(), signals[kind])
        return real(self, *arguments, **options)

    setattr(owner, name, fail)


def lay_out_as_torus(order_file: str) -> None:
    """Give meshes the order of devices that a torus would give them."""
    order = json.loads(pathlib.Path(order_file).read_text())

    def create_device_mesh(shape, devices, **_):
        ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
        numbers = order["x".join(map(str, shape))]
        return np.array([ordered[number] for number in numbers]).reshape(shape)

    sharding.mesh_utils.create_device_mesh = create_device_mesh


def compile_together() -> None:
    """Let all processes begin to run each program together.

    Many processes on few cores compile at different speeds, and the collectives of CPU devices wait
    for each other for half a minute only.
    """
    compile_alone, numbers = compiler.compile_or_get_cached, collections.Counter()

    def compile_and_wait(backend, computation, devices, *arguments, **options):
        executable = compile_alone(backend, computation, devices, *arguments, **options)
        if len({device.process_index for device in devices.flatten()}) > 1:
            name = str(computation.operation.attributes["sym_name"])
            numbers[name] += 1
            barrier = f"compiled/{name}/{numbers[name]}"
            distributed.global_state.client.wait_at_barrier(barrier, BARRIER_MS)
        return executable

    compiler.compile_or_get_cached = compile_and_wait


def make_pretrain_config(num_devices: int, checkpoint: str) -> config_lib.TrainConfig:
    """Return a run of six steps, in one stage or two."""
    del checkpoint  # the weights are random
    source = config_lib.DataSource("text", "demo/data/text.jsonl", "text")
    rows = max(16, num_devices)
    meshes = [MESHES[num_devices][0], *SECOND_MESHES[num_devices]]
    tokens = 6 // len(meshes) * rows * 64
    return config_lib.TrainConfig(
        model=dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax")),
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=tuple(
            config_lib.TrainStage(64, rows, tokens, 3e-3, mesh=tuple(mesh.items()))
            for mesh in meshes
        ),
        data=config_lib.DataConfig(sources=(source,)),
        evaluation=config_lib.EvaluationConfig((source,), 0 if num_devices == 32 else 3, 1),
        save=config_lib.SaveConfig(every_steps=2, keep=9),
        log=config_lib.LogConfig(every_steps=1, samples=True),
    )


def make_rl_config(num_devices: int, checkpoint: str) -> rl_config.RlConfig:
    """Return a run of two batches."""
    mesh, serving_mesh = MESHES[num_devices]
    rows = 16 if num_devices == 32 else 4
    engine = {"max_rows": 8, "chunk_tokens": 16, "prefill_tokens": (64,), "decode_steps": 4}
    sums = rl_config.TaskSource("sums", "demo/data/sums.jsonl")
    letters = ("function", 1.0, (("path", "letters_reward:reward"),))
    return rl_config.RlConfig(
        checkpoint=checkpoint,
        batches=2,
        sources=(sums,),
        rewards=rl_config.RewardsConfig(sources=(("sums", (letters,)),), workers=1),
        rollout=rl_config.RolloutConfig(
            groups=4,
            group_size=2,
            max_prompt_tokens=32,
            windows=rl_config.LengthSchedule((16,)),
            partial_tokens=8,
            engine=tuple(engine.items()),
            replay_routes=True,
        ),
        update=rl_config.UpdateConfig(learning_rate=1e-4, minibatches=2, rows=rows),
        mesh=tuple(mesh.items()),
        serving_mesh=tuple(serving_mesh.items()),
        dtype="float32",
        save=rl_config.SaveConfig(every_steps=1, keep=9),
        log=rl_config.LogConfig(every_steps=1, samples=True),
    )


def main(port: str, processes: int, index: int, job: str, checkpoint: str, workdir: str) -> None:
    devices_per_process = int(os.environ.get("POD_DEVICES", "1"))
    jax.config.update("jax_num_cpu_devices", devices_per_process)
    jax.distributed.initialize(f"localhost:{port}", processes, index)
    sys.path.append(str(ROOT / "tests"))  # letters_reward
    fault, order_file = (*sys.argv[7:], "", "")[:2]
    if order_file:
        lay_out_as_torus(order_file)
    if fault:
        plant_fault(fault, index)
    num_devices = processes * devices_per_process
    if processes > MAX_PUNCTUAL_PROCESSES:
        compile_together()
        limits = process_watch.WatchLimits(silent_secs=300)
        process_watch.watch_processes = functools.partial(process_watch.watch_processes, limits)
    try:
        if job == "rl":
            config = make_rl_config(num_devices, checkpoint)
            summary: loop.TrainSummary | rl_loop.RlSummary = rl_loop.run_rl_training(
                config, workdir
            )
        else:
            summary = loop.run_training(make_pretrain_config(num_devices, checkpoint), workdir)
    except Exception as error:
        process_watch.exit_with_error(error)
    print(summary, flush=True)
    if summary.stopped_by is not None:
        sys.exit(128 + summary.stopped_by)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7])
