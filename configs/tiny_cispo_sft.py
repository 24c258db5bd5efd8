"""Supervised fine-tuning of the tiny model on small sums, half of which are wrong.

    python -m train.sft --config=configs/tiny_cispo_sft.py:CHECKPOINT --workdir=/tmp/sums_sft

Without :CHECKPOINT it starts from random weights. `configs/tiny_cispo.py` repairs the model. Two
CPU cores, under two minutes.
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
            TrainStage(seq_len=256, rows=ROWS, tokens=120 * ROWS * 256, learning_rate=3e-3,
                  warmup_tokens=5 * ROWS * 256),
            # Reinforcement learning starts from where small steps no longer hurt.
            TrainStage(seq_len=256, rows=ROWS, tokens=80 * ROWS * 256, learning_rate=1e-4,
                  shape="linear"),
        ),
        data=DataConfig(
            sources=(DataSource("sums", "demo/data/careless.jsonl", "chat"),), overlong="error"
        ),
        save=SaveConfig(every_steps=100),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
