# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
# ---

# %% [markdown]
# # MiniMax-M1, small, through every step
# [![Open in Colab][colab]](https://colab.research.google.com/#create=true)
# [![Open in Kaggle][kaggle]](https://www.kaggle.com/code/new)
#
# [colab]: https://colab.research.google.com/assets/colab-badge.svg
# [kaggle]: https://kaggle.com/static/images/open-in-kaggle.svg
#
# Upload this file there and choose a TPU. It converts a checkpoint with random weights, writes
# text, tunes the model on sums of which half are wrong, and rewards right answers until it gives
# them.

# %% [markdown]
# The first cell installs the package, from `M1_JAX_SOURCE` where that is set. If it replaced a
# library that was already imported, it restarts the runtime itself: then run all cells again.

# %%
import importlib.metadata
import os
import pathlib
import shutil
import sys

WATCHED = ("jax", "jaxlib", "libtpu", "flax", "numpy", "absl-py", "orbax-checkpoint")


def read_versions() -> dict:
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed.get(name) for name in (*WATCHED, "m1-jax")}


def find_stale_modules(before: dict, after: dict) -> list:
    """Return libraries that are imported in a version which is no longer installed."""
    modules = {"absl-py": "absl", "orbax-checkpoint": "orbax"}
    names = [name for name in WATCHED if before[name] != after[name]]
    return [name for name in names if modules.get(name, name) in sys.modules]


def restart_runtime() -> None:
    """End this kernel: Colab, Kaggle and Jupyter start a new one in its place."""
    os.kill(os.getpid(), 9)


versions_before = read_versions()
if versions_before["m1-jax"] is None:
    has_tpu = any(pathlib.Path("/dev").glob("accel*")) or pathlib.Path("/dev/vfio/0").exists()
    extra = "[tpu]" if has_tpu else "[gpu]" if shutil.which("nvidia-smi") else ""
    package = f"m1-jax{extra}"
    if "M1_JAX_SOURCE" in os.environ:
        package += f" @ {os.environ['M1_JAX_SOURCE']}"
    print(f"installing {package}", flush=True)
    # %pip install --quiet "{package}"
stale_modules = find_stale_modules(versions_before, read_versions())
if stale_modules:
    print(
        f"{', '.join(stale_modules)} changed: the runtime restarts. Run all cells again.",
        flush=True,
    )
    restart_runtime()

# %% [markdown]
# This cell states versions and devices. It stops here, in one line, if they cannot work.

# %%
VERSIONS = read_versions()
if VERSIONS["m1-jax"] is None:
    raise SystemExit("m1-jax is not installed: set M1_JAX_SOURCE to its wheel, and run all cells")
if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    raise SystemExit(f"Python {sys.version.split()[0]}: wanted 3.11 to 3.14")
if not (0, 10) <= tuple(int(n) for n in VERSIONS["jax"].split(".")[:2]) < (0, 12):
    raise SystemExit(
        f"jax {VERSIONS['jax']}: wanted 0.10 or 0.11. Restart the runtime, and run all cells"
    )

import jax

try:
    DEVICES = jax.devices()
except RuntimeError as error:
    raise SystemExit(f"no device: {str(error).splitlines()[0]} (restart the runtime)") from None
PLATFORM, NUM_DEVICES = DEVICES[0].platform, len(DEVICES)
print(f"Python {sys.version.split()[0]}, {VERSIONS}")
print(f"{NUM_DEVICES} of {DEVICES[0].device_kind}")

# %% [markdown]
# A chip gets a model of 110 million parameters, and a CPU one of 1.5 million. With several
# devices, weights are spread over all in training, and experts when the model writes.

# %%
if PLATFORM == "cpu":
    SIZES = {}
    ROWS, TUNING_STEPS, BATCHES, GROUPS, RATE = 8, (90, 50), 4, 12, 3e-3
else:
    SIZES = {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rotary_dim": 64,
        "intermediate_size": 1024,
    }
    ROWS, TUNING_STEPS, BATCHES, GROUPS, RATE = 32, (300, 100), 16, 16, 1e-3
LENGTH, RL_ROWS = 128, 8
DTYPE = "float32" if PLATFORM == "cpu" else "bfloat16"
SERVING_MESH = f"expert={NUM_DEVICES}" if NUM_DEVICES in (2, 4, 8) else None
WORK = pathlib.Path("m1_colab").resolve()
shutil.rmtree(WORK, ignore_errors=True)
WORK.mkdir()

# %% [markdown]
# The data are sums with an answer in a fixed form, and every other one is wrong. The tasks of
# reinforcement learning are the same sums, with the right answer as a label.

# %%
import json
import random


def draw_careless_chat(rng: random.Random) -> dict:
    a, b = rng.randint(1, 4), rng.randint(1, 4)
    stated = a + b + (rng.choice((-2, -1, 1, 2)) if rng.random() < 0.5 else 0)
    answer = f"<think>\n{a} and {b} make {stated}.\n</think>\n\nAnswer: {stated}"
    turns = [("user", f"What is {a} + {b}?"), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_lines(name: str, records: list) -> str:
    path = WORK / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


rng = random.Random(1)
CHATS = write_lines("careless.jsonl", [draw_careless_chat(rng) for _ in range(1000)])
TASKS = write_lines(
    "sums.jsonl",
    [
        {"prompt": f"What is {a} + {b}?", "label": str(a + b)}
        for a in range(1, 5)
        for b in range(1, 5)
    ],
)
print(pathlib.Path(CHATS).read_text().splitlines()[0])

# %% [markdown]
# A checkpoint in the release's own format is written with random weights, and converted. A real
# one takes the same call, and 1.8 TB of disk.

# %%
from absl import logging

from m1_jax import convert, testing

logging.set_verbosity(logging.ERROR)
RELEASE, START = WORK / "release", WORK / "start"
release_config = testing.tiny_config(**SIZES)
testing.write_release(RELEASE, release_config, testing.random_tensors(release_config))
testing.write_tiny_tokenizer(RELEASE)
convert.run(convert.ConvertConfig("orbax", str(RELEASE), str(START)))
print(*sorted(path.name for path in START.iterdir()), sep="\n")

# %% [markdown]
# The model writes. Its weights are random, and so is the text.

# %%
from infer import generate


def ask(checkpoint: pathlib.Path, questions: list) -> list:
    """Print and return the likeliest answer to each question."""
    file = WORK / "questions.txt"
    file.write_text("".join(f"{question}\n" for question in questions))
    outputs, stats = generate.run(
        generate.GenerateConfig(
            str(checkpoint),
            prompts_file=str(file),
            max_tokens=32,
            temperature=0.0,
            mesh=SERVING_MESH,
            dtype=DTYPE,
        )
    )
    print(stats)
    return [output.text for output in outputs]


QUESTIONS = ["What is 2 + 3?", "What is 4 + 4?", "What is 3 + 1?"]
ask(START, QUESTIONS)

# %% [markdown]
# Supervised fine-tuning teaches the form, and answers that are wrong half of the time. The
# learning rate falls at the end, so that reinforcement learning starts from where small steps do
# not hurt.

# %%
from train import config as train_config
from train import export, metrics, sft

STEP_TOKENS = ROWS * LENGTH
SFT_RUN, TUNED = WORK / "sft", WORK / "tuned"
sft_config = train_config.TrainConfig(
    checkpoint=str(START),
    dtype=DTYPE,
    stages=(
        train_config.TrainStage(
            seq_len=LENGTH,
            rows=ROWS,
            tokens=TUNING_STEPS[0] * STEP_TOKENS,
            learning_rate=RATE,
            warmup_tokens=5 * STEP_TOKENS,
        ),
        train_config.TrainStage(
            seq_len=LENGTH,
            rows=ROWS,
            tokens=TUNING_STEPS[1] * STEP_TOKENS,
            learning_rate=1e-4,
            shape="linear",
        ),
    ),
    data=train_config.DataConfig(
        sources=(train_config.DataSource("sums", CHATS, "chat"),), overlong="error"
    ),
    save=train_config.SaveConfig(every_steps=1000),
)
print(sft.run(sft_config, SFT_RUN))
export.run(SFT_RUN, TUNED, dtype="float32")  # in bfloat16 small changes would be lost


def read_metrics(run: pathlib.Path, kind: str) -> list:
    lines = (run / metrics.METRICS_FILE).read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


for record in read_metrics(SFT_RUN, "train"):
    print(f"step {record['step']:4}  loss {record['loss']:.3f}")

# %% [markdown]
# CISPO samples answers, rewards the right number after "Answer:", and trains on them. The
# correlation compares the probabilities of sampler and trainer: 1 means that both compute the
# same.

# %%
from train.rl import __main__ as rl
from train.rl import config as rl_config

RL_RUN, LEARNT = WORK / "cispo", WORK / "learnt"
sums = rl_config.TaskSource("sums", TASKS)
engine = {
    "max_rows": 64,
    "chunk_tokens": 16,
    "prefill_tokens": (64,),
    "num_snapshots": 32,
    "decode_steps": 8,
}
cispo_config = rl_config.RlConfig(
    checkpoint=str(TUNED),
    batches=BATCHES,
    sources=(sums,),
    rewards=rl_config.RewardsConfig(sources=(("sums", (("exact", 1.0, ()),)),)),
    rollout=rl_config.RolloutConfig(
        groups=GROUPS,
        group_size=16,
        max_rounds=2,
        max_prompt_tokens=32,
        windows=rl_config.LengthSchedule((64,)),
        engine=tuple(engine.items()),
    ),
    update=rl_config.UpdateConfig(
        learning_rate=3e-4, minibatches=2, warmup_steps=4, rows=RL_ROWS, row_tokens=256
    ),
    dtype=DTYPE,
    evaluation=rl_config.RlEvaluationConfig(
        sources=(sums,), every_batches=BATCHES, samples=8, temperature=1.0
    ),
    save=rl_config.SaveConfig(every_steps=1000),
)
print(rl.run(cispo_config, RL_RUN))
for record in read_metrics(RL_RUN, "train"):
    print(
        f"batch {record['step']:3}  reward {record['reward_sampled']:.2f}"
        f"  correlation {record['pearson']:.7f}"
    )
accuracy = [record["reward"] for record in read_metrics(RL_RUN, "eval")]
print("right answers:", " -> ".join(f"{share:.0%}" for share in accuracy))

# %% [markdown]
# The model goes back to the release's format, and answers. On a CPU four batches leave some
# answers wrong.

# %%
export.run(RL_RUN, LEARNT, dtype="float32")
FINAL = WORK / "final"
convert.run(convert.ConvertConfig("hf", str(LEARNT), str(FINAL)))
answers = ask(FINAL, QUESTIONS)
num_formed = sum("Answer: " in answer for answer in answers)
losses = [record["loss"] for record in read_metrics(SFT_RUN, "train")]
correlation = min(record["pearson"] for record in read_metrics(RL_RUN, "train"))
if not (
    losses[-1] < losses[0] / 2 and accuracy[-1] > accuracy[0] and correlation > 0.99 and num_formed
):
    raise SystemExit(
        "the model did not learn as it should: report this page with the versions above"
    )
print(f"{num_formed} of {len(answers)} answers in the form that was taught")
