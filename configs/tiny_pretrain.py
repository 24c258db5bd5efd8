"""Continued pretraining of the tiny model on the demo's text, in two lengths.

    python -m train.pretrain --config=configs/tiny_pretrain.py --workdir=/tmp/tiny_pretrain

With --config=configs/tiny_pretrain.py:DIR it starts from a checkpoint, otherwise from random
weights. Two CPU cores, under a minute.
"""

from m1_jax.config import ModelConfig
from train.config import (
    DataConfig,
    DataSource,
    EvaluationConfig,
    LogConfig,
    SaveConfig,
    TrainConfig,
    TrainStage,
)

ROWS = 8


def get_config(arg: str = "") -> TrainConfig:
    return TrainConfig(
        checkpoint=arg,
        model=None if arg else ModelConfig.tiny(),
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=(
            TrainStage(seq_len=128, rows=ROWS, tokens=100 * ROWS * 128, learning_rate=3e-3,
                  warmup_tokens=10 * ROWS * 128),
            TrainStage(seq_len=256, rows=ROWS // 2, tokens=50 * ROWS * 128, learning_rate=1e-3,
                  shape="cosine"),
        ),
        data=DataConfig(sources=(DataSource("stories", "demo/data/text.jsonl", "text"),)),
        evaluation=EvaluationConfig(
            sources=(DataSource("held_out", "demo/data/text_held_out.jsonl", "text"),),
            every_steps=50,
        ),
        save=SaveConfig(every_steps=50),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
