"""Supervised fine-tuning of the tiny model on lookups with a tool, first careful, then careless.

    python -m train.sft --config=configs/tiny_agent_sft.py --workdir=/tmp/agent_sft

With --config=configs/tiny_agent_sft.py:DIR it starts from a checkpoint, otherwise from random
weights. `configs/tiny_agent.py` continues from its export.
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
            TrainStage(seq_len=256, rows=ROWS, tokens=200 * ROWS * 256, learning_rate=3e-3,
                  warmup_tokens=5 * ROWS * 256),
            # Reinforcement learning starts from where small steps no longer hurt.
            TrainStage(seq_len=256, rows=ROWS, tokens=80 * ROWS * 256, learning_rate=1e-4,
                  shape="linear"),
        ),
        data=DataConfig(
            sources=(
                DataSource("careful", "demo/data/agent_careful.jsonl", "chat"),
                DataSource("careless", "demo/data/agent.jsonl", "chat"),
            ),
            weights=((0, (("careful", 1.0),)), (180, (("careless", 1.0),))),
            lanes=8,
            lookahead=4,  # so that careless records do not wait behind hundreds of careful ones
            overlong="error",
        ),
        save=SaveConfig(every_steps=100),
        log=LogConfig(every_steps=10),
    )  # fmt: skip
