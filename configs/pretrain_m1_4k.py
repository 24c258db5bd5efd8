"""Continued pretraining of MiniMax-M1 at 4,096 tokens: the M1 report's constant rate and decay.

    python -m train.pretrain --distributed --config=configs/pretrain_m1_4k.py:CHECKPOINT \\
        --workdir=/mnt/run --set=save.directory=gs://BUCKET/RUN

512 chips of TPU v5p (8x8x8), 512 rows of 4,096 tokens in a step. Compiled for that slice:
24.6 of 95.7 GiB of HBM a chip, 1,572 TFLOP a chip and step with what is recomputed, 163 s to
compile (`python -m m1_jax.plan --topology=v5p:8x8x8 --job=train --seq=4096 --batch=512
--mesh=fsdp=16,expert=32`). Not yet run on TPUs, so no time is given.
"""

from train.config import DataConfig, DataSource, SaveConfig, TrainConfig, TrainStage

ROWS, LENGTH = 512, 4096
MESH = (("fsdp", 16), ("expert", 32))
TRILLION = 10**12


def get_config(arg: str = "") -> TrainConfig:
    def stage(tokens: int, rate: float, **kwargs) -> TrainStage:
        return TrainStage(
            seq_len=LENGTH, rows=ROWS, tokens=tokens, learning_rate=rate, mesh=MESH, **kwargs
        )

    return TrainConfig(
        checkpoint=arg or "MiniMax-M1-80k",
        remat="layer",
        stages=(
            stage(5 * TRILLION // 2, 8e-5, warmup_tokens=10**10),
            stage(5 * TRILLION, 8e-6, shape="linear"),
        ),
        data=DataConfig(
            sources=(DataSource("web", "data/pretrain-*.array_record", "text"),), workers=8
        ),
        save=SaveConfig(every_steps=500, keep=3, keep_every=10_000),
    )
