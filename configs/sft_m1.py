"""Cold-start SFT of MiniMax-M1 on long chains of thought, up to 32K tokens.

    python -m train.sft --distributed --config=configs/sft_m1.py:CHECKPOINT \\
        --workdir=/mnt/run --set=save.directory=gs://BUCKET/RUN

512 chips of TPU v5p (8x8x8), 64 packed rows of 32,768 tokens in a step. Compiled for that slice:
37.1 of 95.7 GiB of HBM a chip, 1,687 TFLOP a chip and step with what is recomputed, 168 s to
compile (`python -m m1_jax.plan --topology=v5p:8x8x8 --job=train --seq=32768 --batch=64
--mesh=fsdp=2,expert=32,context=8`). Not yet run on TPUs, so no time is given.
"""

from train.config import DataConfig, DataSource, SaveConfig, TrainConfig, TrainStage

ROWS, LENGTH = 64, 32_768


def get_config(arg: str = "") -> TrainConfig:
    return TrainConfig(
        checkpoint=arg or "MiniMax-M1-80k",
        remat="layer",
        stages=(
            TrainStage(
                seq_len=LENGTH,
                rows=ROWS,
                tokens=2_000 * ROWS * LENGTH,
                learning_rate=1e-5,
                warmup_tokens=50 * ROWS * LENGTH,
                shape="cosine",
                mesh=(("fsdp", 2), ("expert", 32), ("context", 8)),
            ),
        ),
        data=DataConfig(
            sources=(DataSource("thoughts", "data/sft-*.array_record", "chat"),),
            overlong="drop",
            thinking="keep",
            workers=8,
        ),
        save=SaveConfig(every_steps=200, keep=3),
    )
