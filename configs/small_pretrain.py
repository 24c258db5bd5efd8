"""Pretraining of a model of 120 million parameters on the demo's text, to measure speed.

    python -m train.pretrain --config=configs/small_pretrain.py --workdir=/tmp/small_pretrain

The shapes are those of `benchmarks/model_vs_transformers.py`. Two CPU cores, 8 s a step.
"""

from m1_jax.config import LIGHTNING, SOFTMAX, ModelConfig
from train.config import DataConfig, DataSource, LogConfig, SaveConfig, TrainConfig, TrainStage

ROWS, LENGTH, STEPS = 4, 512, 20


def get_config(arg: str = "") -> TrainConfig:
    model = ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        layer_types=(LIGHTNING,) * 7 + (SOFTMAX,),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=64,
        intermediate_size=1024,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    return TrainConfig(
        model=model,
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=(
            TrainStage(seq_len=LENGTH, rows=ROWS, tokens=STEPS * ROWS * LENGTH, learning_rate=1e-3),
        ),
        data=DataConfig(sources=(DataSource("stories", "demo/data/text.jsonl", "text"),)),
        save=SaveConfig(every_steps=1000),
        log=LogConfig(every_steps=1),
    )
