"""Supervised fine-tuning of the tiny model on sums, answered in a fixed form after a thought.

    python -m train.sft --config=configs/tiny_sft.py --workdir=/tmp/tiny_sft

With --config=configs/tiny_sft.py:DIR it starts from a checkpoint, otherwise from random weights.
Two CPU cores, under a minute.
"""

from m1_jax.config import ModelConfig
from train.config import DataConfig, DataSource, LogConfig, SaveConfig, TrainConfig, TrainStage

ROWS = 8


def get_config(arg: str = "") -> TrainConfig:
    return TrainConfig(
        checkpoint=arg,
        model=None if arg else ModelConfig.tiny(),
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=(
            TrainStage(seq_len=256, rows=ROWS, tokens=100 * ROWS * 256, learning_rate=3e-3,
                  warmup_tokens=5 * ROWS * 256),
        ),
        data=DataConfig(
            sources=(DataSource("sums", "demo/data/chat.jsonl", "chat"),), overlong="error"
        ),
        save=SaveConfig(every_steps=50),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
