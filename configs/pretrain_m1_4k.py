"""Continued pretraining of MiniMax-M1 at 4,096 tokens: the M1 report's constant rate and decay.

    python -m train.pretrain --distributed --config=configs/pretrain_m1_4k.py:CHECKPOINT \\
        --workdir=/mnt/run --set=save.directory=gs://BUCKET/RUN

512 chips of TPU v5p (8x8x8), 2,048 rows of 4,096 tokens in a step: with 16,384 tokens a chip,
parameters are gathered a quarter as often as with 4,096. Compiled for that slice: 46.0 of 95.7 GiB
of HBM a chip, 6,287 TFLOP a chip and step with what is recomputed, 331 CPU seconds to compile.
Predicted: 17.5 to 20.2 s a step, 51 to 58 % of peak (`python -m m1_jax.plan --topology=v5p:8x8x8
--job=train --seq=4096 --batch=2048 --mesh=fsdp=16,expert=32`). Not yet run on TPUs.
"""

from train.config import DataConfig, DataSource, SaveConfig, TrainConfig, TrainStage

ROWS, LENGTH = 2048, 4096
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
        save=SaveConfig(every_steps=200, keep=3, keep_every=4_000),
    )
