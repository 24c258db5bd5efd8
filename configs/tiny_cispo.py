"""CISPO on the tiny model: sums that it answers wrong at first.

    python -m train.rl --config=configs/tiny_cispo.py:CHECKPOINT --workdir=/tmp/tiny_cispo

CHECKPOINT is what configs/tiny_sft.py made, exported (`make demo` does all of it).
"""

from train.rl_config import Evaluation, Log, Rewards, Rollout, Run, Save, Source, Update, Windows

SUMS = Source("sums", "demo/data/sums.jsonl")


def get_config(arg: str = "") -> Run:
    return Run(
        checkpoint=arg or "demo/out/tuned",
        batches=24,
        sources=(SUMS,),
        rewards=Rewards(sources=(("sums", (("exact", 1.0, ()),)),)),
        rollout=Rollout(
            groups=32,
            group_size=8,
            max_prompt_tokens=32,
            windows=Windows((64,)),
            engine=(
                ("max_rows", 64), ("chunk_tokens", 16), ("prefill_tokens", (64, 256)),
                ("num_snapshots", 32), ("decode_steps", 8), ("row_tile", 8),
            ),
        ),
        update=Update(learning_rate=3e-4, minibatches=8, rows=8),
        dtype="float32",
        evaluation=Evaluation(sources=(SUMS,), every_batches=4),
        save=Save(every_steps=8),
        log=Log(every_steps=1),
    )  # fmt: skip
