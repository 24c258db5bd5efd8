"""Growing the context of MiniMax-M1 from 32K to 1M tokens, in the four stages of the M1 report.

    python -m train.pretrain --distributed --config=configs/pretrain_m1_1m.py:CHECKPOINT \\
        --workdir=/mnt/run --set=save.directory=gs://BUCKET/RUN

512 chips of TPU v5p (8x8x8), 2M tokens in every step. The length grows in stages, because early
and late lightning layers decay at different rates, and a jump in length makes gradients explode.
Compiled for that slice:

| length | rows | mesh | GiB of HBM, of 95.7 | TFLOP a chip and step | compile |
|---|---|---|---|---|---|
| 32K | 64 | fsdp=2,expert=32,context=8 | 24.3 | 1,687 | 447 s, busy |
| 128K | 16 | expert=16,context=32 | 26.1 | 2,083 | 278 s, busy |
| 512K | 4 | expert=4,context=128 | 36.7 | 3,666 | 176 s |
| 1M | 2 | expert=2,context=256 | 47.1 | 5,777 | 183 s |

A row comes from `python -m m1_jax.plan --topology=v5p:8x8x8 --job=train --seq=LENGTH --batch=ROWS
--mesh=MESH`. Not yet run on TPUs, so no time is given.
"""

from train.config import (
    DataConfig,
    DataSource,
    EvaluationConfig,
    SaveConfig,
    TrainConfig,
    TrainStage,
)

K = 1024
TOKENS_PER_STEP = 2 * K * K
BILLION = 10**9
STAGES = (
    (32 * K, (("fsdp", 2), ("expert", 32), ("context", 8))),
    (128 * K, (("expert", 16), ("context", 32))),
    (512 * K, (("expert", 4), ("context", 128))),
    (1024 * K, (("expert", 2), ("context", 256))),
)


def get_config(arg: str = "") -> TrainConfig:
    stages = tuple(
        TrainStage(
            seq_len=length,
            rows=TOKENS_PER_STEP // length,
            tokens=50 * BILLION,
            learning_rate=8e-6,
            mesh=mesh,
        )
        for length, mesh in STAGES
    )
    return TrainConfig(
        checkpoint=arg or "MiniMax-M1-80k",
        remat="layer",
        stages=stages,
        data=DataConfig(
            sources=(
                DataSource("long", "data/long-*.array_record", "text", weight=0.7),
                DataSource("web", "data/pretrain-*.array_record", "text", weight=0.3),
            ),
            workers=8,
        ),
        evaluation=EvaluationConfig(
            sources=(DataSource("held_out", "data/held-out-*.array_record", "text"),),
            every_steps=500,
        ),
        save=SaveConfig(every_steps=200, keep=3, keep_every=5_000),
    )
