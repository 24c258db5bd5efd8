"""CISPO on the tiny model with a tool, which looks up the value of a key.

    python -m train.sft --config=configs/tiny_agent_sft.py --workdir=/tmp/agent_sft
    python -m train.export --workdir=/tmp/agent_sft --dst=/tmp/agent_start --dtype=float32
    python -m train.rl --config=configs/tiny_agent.py:/tmp/agent_start --workdir=/tmp/agent

Half of the last demonstrations were careless: they look up another key. The environment rewards the
right value alone. `docs/log.md` has a run, under "Tiny CISPO".
"""

from train.rl.config import (
    AgentConfig,
    LengthSchedule,
    LogConfig,
    RlConfig,
    RlEvaluationConfig,
    RolloutConfig,
    SaveConfig,
    TaskSource,
    UpdateConfig,
)

LOOKUP = TaskSource("lookup", make="lookup", size=512, seed=1)
HELD_OUT = TaskSource("lookup", make="lookup", size=64, seed=2)


def get_config(arg: str = "") -> RlConfig:
    return RlConfig(
        checkpoint=arg or "/tmp/agent_start",
        batches=24,
        sources=(LOOKUP,),
        agent=AgentConfig("lookup", max_turns=3, turn_tokens=64),
        rollout=RolloutConfig(
            groups=16,
            group_size=16,
            max_rounds=2,
            max_prompt_tokens=32,
            windows=LengthSchedule((128,)),
            engine=(
                ("max_rows", 64), ("chunk_tokens", 16), ("prefill_tokens", (64, 256)),
                ("num_snapshots", 64), ("decode_steps", 8),
            ),
        ),
        update=UpdateConfig(
            learning_rate=3e-4, minibatches=2, warmup_steps=4, rows=4, row_tokens=320
        ),
        dtype="float32",
        evaluation=RlEvaluationConfig(sources=(HELD_OUT,), every_batches=4, temperature=1.0),
        save=SaveConfig(every_steps=10),
        log=LogConfig(every_steps=1),
    )  # fmt: skip
