"""One of several processes of 4 devices together that train a tiny model on rewards.

rl_worker.py PORT PROCESSES INDEX CHECKPOINT WORKDIR
"""

import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from train.rl import loop as rl_loop
from train.rl.config import (
    LengthSchedule,
    LogConfig,
    RewardsConfig,
    RlConfig,
    RlEvaluationConfig,
    RolloutConfig,
    SaveConfig,
    TaskSource,
    UpdateConfig,
)

SUMS = TaskSource("sums", "demo/data/sums.jsonl")
LETTERS = ("function", 1.0, (("path", "letters_reward:reward"),))


def main(port: str, processes: int, index: int, checkpoint: str, workdir: str) -> None:
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    sys.path.append(str(pathlib.Path(__file__).parent))
    engine = {"max_rows": 8, "chunk_tokens": 16, "prefill_tokens": (64,), "decode_steps": 4}
    config = RlConfig(
        checkpoint=checkpoint,
        batches=2,
        sources=(SUMS,),
        rewards=RewardsConfig(sources=(("sums", (LETTERS,)),), workers=1),
        rollout=RolloutConfig(
            groups=4,
            group_size=2,
            max_prompt_tokens=32,
            windows=LengthSchedule((12,)),
            engine=tuple(engine.items()),
            replay_routes=True,
        ),
        update=UpdateConfig(learning_rate=1e-4, minibatches=2, rows=4),
        mesh=(("fsdp", 2), ("expert", 2)),
        serving_mesh=(("expert", 2), ("tensor", 2)),
        dtype="float32",
        evaluation=RlEvaluationConfig((SUMS,), every_batches=2),
        save=SaveConfig(every_steps=1),
        log=LogConfig(every_steps=1),
    )
    print(rl_loop.run_rl_training(config, workdir), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
