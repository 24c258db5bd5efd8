"""CISPO on MiniMax-M1 from 40K to 80K tokens of thought, as in sections 3 to 5 of the M1 report.

    python -m train.rl --distributed --config=configs/cispo_m1.py:CHECKPOINT \\
        --workdir=/mnt/run --set=save.directory=gs://BUCKET/RUN

512 chips of TPU v5p (8x8x8), which trainer and sampler share. A batch is 32 tasks with 16 answers
each. It is trained on in 16 updates of 32 answers, packed into one or two microbatches of 16 rows,
of up to 86,016 tokens as the answers need. Compiled for that slice at this length, these programs
need so much of a chip's 95.7 GiB, together with the weights and moments that lie beside them:

| program | GiB a chip | compile, busy machine |
|---|---|---|
| scores, gradients (`add`), update | 24.5, 38.9, 24.8 | 306 s |
| weight sync (`reshard`) | 33.3 | 10 s |

    python -m m1_jax.plan --topology=v5p:8x8x8 --mesh=expert=16,context=32 --job=rl_update \\
        --serving_mesh=data=4,expert=16,tensor=8 --seq=86016 --batch=16

The second row has `--job=reshard`. The sampler's states and pages take 3.8 GiB more, counted from
their shapes, and its routes .1 GiB. Not yet run on TPUs, so no time is given.
"""

from train.rl.config import (
    PRESETS,
    CurriculumConfig,
    LengthBiasConfig,
    LengthSchedule,
    LogConfig,
    PassRateConfig,
    RewardsConfig,
    RlConfig,
    RolloutConfig,
    SaveConfig,
    TaskSource,
    UpdateConfig,
)

K = 1024
WINDOWS = (40 * K, 48 * K, 56 * K, 64 * K, 72 * K, 80 * K)
MESH = (("expert", 16), ("context", 32))
# The same number of expert shards as the trainer, so that experts move within few devices.
SERVING = (("data", 4), ("expert", 16), ("tensor", 8))
SANDBOX = "http://localhost:8080"  # runs the programs of the model
JUDGE = (("url", "http://localhost:8000/v1"), ("model", "judge"))
# Reasoning that rules check. The M1 report has 41 kinds of synthetic logic.
PUZZLES = ("countdown", "futoshiki", "knights_knaves", "mini_sudoku", "n_queens", "zebra_puzzles")

# Of each source the first reward says whether an answer is right, with 1 or more. Pass rates and
# dynamic sampling read that, and the form counts for the gradient alone.
FORMAT = ("format", 0.1, ())
REWARDS = (
    ("mathematics", (("mathematics", 1.0, ()), FORMAT)),
    *((name, (("logic", 1.0, (("strict", True),)), FORMAT)) for name in PUZZLES),
    ("code", (("code", 1.0, (("url", SANDBOX), ("partial", False), ("parallel", 64))), FORMAT)),
    ("general", (("graded", 1.0, JUDGE), FORMAT)),
)

# Reasoning comes first, and general tasks are mixed in gradually. The numbers are our choice.
RULES = (("mathematics", 0.4), *((name, 0.4 / len(PUZZLES)) for name in PUZZLES), ("code", 0.2))
MIXED = (*((name, 0.75 * weight) for name, weight in RULES), ("general", 0.25))


def get_config(arg: str = "") -> RlConfig:
    return RlConfig(
        checkpoint=arg or "m1-tuned",
        batches=1_000,
        sources=(
            TaskSource("mathematics", "data/rl-mathematics-*.jsonl"),
            *(TaskSource(name, make=f"logic:{name}", size=8_000) for name in PUZZLES),
            TaskSource("code", "data/rl-code-*.jsonl"),
            TaskSource("general", "data/rl-general-*.jsonl"),
        ),
        curriculum=CurriculumConfig(weights=((0, RULES), (200, RULES), (400, MIXED))),
        pass_rates=PassRateConfig(low=0.0, high=0.9, least=10),
        rewards=RewardsConfig(sources=REWARDS, workers=16, parallel=64),
        length_bias=LengthBiasConfig(pause=True),
        objective=PRESETS["cispo"],  # weights up to 5, tokens averaged over the whole update
        rollout=RolloutConfig(
            groups=32,
            group_size=16,
            max_prompt_tokens=4 * K,
            windows=LengthSchedule(WINDOWS),
            # An answer may be sampled over at most three batches.
            partial_tokens=32 * K,
            max_staleness=2,
            overlong_buffer_tokens=4 * K,
            replay_routes=True,
            engine=(
                # All answers of a batch at once: 8 rows in each of 64 groups of devices.
                ("max_rows", 512), ("num_pages", 512 * 84 * K // 64), ("num_snapshots", 64),
                ("prefill_tokens", (512, 4096)), ("attention_tile", 16),
                # Fast, but a resumed run is then not bit-exact.
                ("matmul_tile", 0),
            ),
        ),
        update=UpdateConfig(learning_rate=1e-6, minibatches=16, rows=16, warmup_steps=160),
        remat="layer",
        mesh=MESH,
        serving_mesh=SERVING,
        save=SaveConfig(every_steps=10, keep=3, keep_every=100),
        log=LogConfig(every_steps=1),
    )  # fmt: skip
