"""Pretraining of a model of 120 million parameters on the demo's text: for measuring, not for use.

    python -m train.pretrain --config=configs/small_pretrain.py --workdir=/tmp/small_pretrain

The shapes of `benchmarks/model_vs_transformers.py`. Two CPU cores, 8 s a step.
"""

from m1_jax.config import LIGHTNING, SOFTMAX, ModelConfig
from train.config import Data, Log, Run, Save, Source, Stage

ROWS, LENGTH, STEPS = 4, 512, 20


def get_config(arg: str = "") -> Run:
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
    return Run(
        model=model,
        tokenizer="demo/data/tokenizer",
        dtype="float32",
        stages=(
            Stage(seq_len=LENGTH, rows=ROWS, tokens=STEPS * ROWS * LENGTH, learning_rate=1e-3),
        ),
        data=Data(sources=(Source("stories", "demo/data/text.jsonl", "text"),)),
        save=Save(every_steps=1000),
        log=Log(every_steps=1),
    )
