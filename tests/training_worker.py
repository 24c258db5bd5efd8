"""One of several processes of 8 devices together that train a tiny model.

training_worker.py PORT PROCESSES INDEX WORKDIR
"""

import dataclasses
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from m1_jax import ModelConfig
from train import config as config_lib
from train import loop


def main(port: str, processes: int, index: int, workdir: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    source = config_lib.DataSource("text", "demo/data/text.jsonl", "text")
    config = config_lib.TrainConfig(
        model=dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax")),
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        # On the second mesh each process holds all rows, so it goes on with lanes of the others.
        stages=tuple(
            config_lib.TrainStage(
                seq_len=64, rows=8, tokens=2 * 8 * 64, learning_rate=3e-3, mesh=mesh
            )
            for mesh in ((("fsdp", 2), ("expert", 2), ("context", 2)), (("context", 8),))
        ),
        data=config_lib.DataConfig(sources=(source,)),
        evaluation=config_lib.EvaluationConfig((source,), every_steps=4, batches=2),
        save=config_lib.SaveConfig(every_steps=2),
        log=config_lib.LogConfig(every_steps=1),
    )
    summary = loop.run_training(config, workdir)
    print(json.dumps({"step": summary.step, "loss": summary.loss}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
