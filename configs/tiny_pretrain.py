"""Continued pretraining of the tiny model on the demo's text: a constant rate, then a falling one.

    python -m train.pretrain --config=configs/tiny_pretrain.py --workdir=/tmp/tiny_pretrain

With --config=configs/tiny_pretrain.py:DIR it starts from a checkpoint, otherwise from random
weights. Two CPU cores, under a minute. It reads the text once: in a second pass the tiny model
learns the stories' numbers by heart, and the held-out loss rises.
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

ROWS, LENGTH = 8, 256


def get_config(arg: str = "") -> TrainConfig:
    return TrainConfig(
        checkpoint=arg,
        model=None if arg else ModelConfig.tiny(),
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=(
            TrainStage(seq_len=LENGTH, rows=ROWS, tokens=28 * ROWS * LENGTH, learning_rate=3e-3,
                  warmup_tokens=4 * ROWS * LENGTH),
            TrainStage(seq_len=LENGTH, rows=ROWS, tokens=12 * ROWS * LENGTH, learning_rate=3e-4,
                  shape="cosine"),
        ),
        data=DataConfig(sources=(DataSource("stories", "demo/data/text.jsonl", "text"),)),
        evaluation=EvaluationConfig(
            sources=(DataSource("held_out", "demo/data/text_held_out.jsonl", "text"),),
            every_steps=8,
        ),
        save=SaveConfig(every_steps=20),
        log=LogConfig(every_steps=2),
    )  # fmt: skip
