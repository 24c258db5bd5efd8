"""CISPO on the tiny model: small sums that careless demonstrations left half wrong.

    python -m train.sft --config=configs/tiny_cispo_sft.py:CHECKPOINT --workdir=/tmp/sums_sft
    python -m train.export --workdir=/tmp/sums_sft --dst=/tmp/sums_start --dtype=float32
    python -m train.rl --config=configs/tiny_cispo.py:/tmp/sums_start --workdir=/tmp/tiny_cispo

The model has learnt to answer wrong as often as its demonstrations do. Only the right number after
"Answer:" is rewarded. Two busy cores, under six minutes: `docs/log.md` has five seeds under "Tiny
CISPO". Without :CHECKPOINT the first command starts from random weights.
"""

from train.rl.config import (
    LengthSchedule,
    LogConfig,
    RewardsConfig,
    RlConfig,
    RlEvaluationConfig,
    RolloutConfig,
    SaveConfig,
    TaskSource,
    UpdateConfig,
)

SUMS = TaskSource("sums", "demo/data/sums.jsonl")
ENGINE = {
    "max_rows": 64,
    "chunk_tokens": 16,
    "prefill_tokens": (64, 256),
    "num_snapshots": 32,
    "decode_steps": 8,
}


def get_config(arg: str = "") -> RlConfig:
    return RlConfig(
        checkpoint=arg or "/tmp/sums_start",
        batches=28,
        sources=(SUMS,),
        rewards=RewardsConfig(sources=(("sums", (("exact", 1.0, ()),)),)),
        rollout=RolloutConfig(
            groups=16,
            group_size=16,
            max_rounds=2,  # a model that is mostly right has few groups whose rewards vary
            max_prompt_tokens=32,
            windows=LengthSchedule((64,)),
            engine=tuple(ENGINE.items()),
        ),
        update=UpdateConfig(
            learning_rate=3e-4, minibatches=2, warmup_steps=4, rows=4, row_tokens=256
        ),
        dtype="float32",
        evaluation=RlEvaluationConfig(sources=(SUMS,), every_batches=4, samples=8, temperature=1.0),
        save=SaveConfig(every_steps=10),
        log=LogConfig(every_steps=1),
    )
