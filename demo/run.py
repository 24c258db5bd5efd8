"""`make demo`: a tiny MiniMax-M1 through every step that a real checkpoint takes.

The tiny checkpoint is in the release's own format, with random weights and the ratios of the real
shapes. It is converted to Orbax, checked against the release code's outputs, used to generate text,
and exported again with its bytes compared. Then it is trained: on a little text, and on sums with
answers in a fixed form, half of which are wrong. Last it learns from rewards to get them right. All
files are written to demo/out.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several steps serve the same model. With a cache its programs are compiled once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.dirname(__file__) + "/out/xla")

import contextlib
import io
import json
import pathlib
import shutil
import time

from absl import logging

from infer import generate
from m1_jax import configlib, convert, testing, verify
from train import export, metrics, pretrain, sft
from train.rl import __main__ as rl_command

DEMO_DIR = pathlib.Path(__file__).resolve().parent
SOURCE = DEMO_DIR.parent / "tests" / "data" / "m1-tiny"
OUTPUT_DIR = DEMO_DIR / "out"


def main() -> None:
    logging.set_verbosity(logging.ERROR)
    shutil.rmtree(OUTPUT_DIR, ignore_errors=True)
    release, orbax, back = OUTPUT_DIR / "release", OUTPUT_DIR / "orbax", OUTPUT_DIR / "exported"
    summary = []

    with print_step("1. a release directory: config.json, 3 safetensors shards, index, tokenizer"):
        shutil.copytree(SOURCE, release, ignore=shutil.ignore_patterns("golden.npz"))
        testing.write_tiny_tokenizer(release)
        print(*sorted(f"   {file.name}" for file in release.iterdir()), sep="\n")

    with print_step("2. release -> Orbax (python -m m1_jax.convert --to=orbax)"):
        convert.run(convert.ConvertConfig("orbax", str(release), str(orbax)))

    with print_step("3. check against the release code's outputs (python -m m1_jax.verify)"):
        rows = verify.run(verify.VerifyConfig(str(orbax), str(SOURCE / "golden.npz")))
        print(verify.format_table(rows))
        passed = sum(row.passed for row in rows)
        summary.append(f"{passed} of {len(rows)} golden quantities within tolerance")

    with print_step(
        "4. generate (python -m infer.generate); the weights are random, so is the text"
    ):
        prompts = OUTPUT_DIR / "prompts.txt"
        prompts.write_text("Why is the sky blue?\nWrite a haiku about matrices.\nCount to ten.\n")
        outputs, stats = generate.run(
            generate.GenerateConfig(checkpoint=str(orbax), prompts_file=str(prompts), max_tokens=48)
        )
        summary.append(f"{len(outputs)} prompts of different lengths: {stats}")

    with print_step("5. Orbax -> release (python -m m1_jax.convert --to=hf), bytes compared"):
        convert.run(convert.ConvertConfig("hf", str(orbax), str(back)))
        files = sorted(release.iterdir())
        same = [file.read_bytes() == (back / file.name).read_bytes() for file in files]
        summary.append(f"{sum(same)} of {len(files)} exported files equal byte for byte")
        with contextlib.redirect_stdout(io.StringIO()):
            greedy = [
                generate.run(
                    generate.GenerateConfig(
                        str(path), prompt="Hello", max_tokens=16, temperature=0.0
                    )
                )[0][0].tokens
                for path in (release, orbax, back)
            ]
        summary.append(f"greedy tokens equal from all three: {greedy[0] == greedy[1] == greedy[2]}")

    with print_step("6. continued pretraining (python -m train.pretrain), and its model exported"):
        run_training(pretrain, "tiny_pretrain", orbax, OUTPUT_DIR / "pretrain")
        losses = [record["loss"] for record in read_records(OUTPUT_DIR / "pretrain", "eval")]
        loss_curve = " -> ".join(f"{loss:.2f}" for loss in losses)
        summary.append(f"held-out loss in pretraining: {loss_curve}")
        export.run(OUTPUT_DIR / "pretrain", OUTPUT_DIR / "pretrained")

    with print_step("7. supervised fine-tuning on sums, half of them wrong (python -m train.sft)"):
        run_training(sft, "tiny_cispo_sft", OUTPUT_DIR / "pretrained", OUTPUT_DIR / "sft")
        export.run(OUTPUT_DIR / "sft", OUTPUT_DIR / "tuned", dtype="float32")

    with print_step("8. CISPO: the right answer is rewarded (python -m train.rl)"):
        run_training(
            rl_command, "tiny_cispo", OUTPUT_DIR / "tuned", OUTPUT_DIR / "cispo", ["batches=12"]
        )
        accuracy = [record["reward"] for record in read_records(OUTPUT_DIR / "cispo", "eval")]
        accuracy_curve = " -> ".join(f"{share:.0%}" for share in accuracy)
        summary.append(f"right answers during CISPO: {accuracy_curve}")

    with print_step("9. export to the release's format, and the answers"):
        export.run(OUTPUT_DIR / "cispo", OUTPUT_DIR / "learnt")
        convert.run(
            convert.ConvertConfig("hf", str(OUTPUT_DIR / "learnt"), str(OUTPUT_DIR / "final"))
        )
        prompts.write_text("What is 2 + 3?\nWhat is 4 + 4?\nWhat is 5 + 1?\n")
        answers, _ = generate.run(
            generate.GenerateConfig(
                checkpoint=str(OUTPUT_DIR / "final"),
                prompts_file=str(prompts),
                max_tokens=48,
                temperature=0.0,
            )
        )
        formed = sum("Answer: " in answer.text for answer in answers)
        summary.append(f"{formed} of {len(answers)} answers in the form that was taught")

    print("\nSummary")
    print(*(f"  {line}" for line in summary), sep="\n")
    print(
        f"  files in {OUTPUT_DIR.relative_to(DEMO_DIR.parent)}; "
        f"{time.perf_counter() - START_SECS:.0f} s in all"
    )
    equal = greedy[0] == greedy[1] == greedy[2]
    learnt = losses[-1] < losses[0] and accuracy[-1] > accuracy[0] and formed
    if passed < len(rows) or not all(same) or not equal or not learnt:
        raise SystemExit("demo: FAILED")


def run_training(
    command, name: str, checkpoint: pathlib.Path, workdir: pathlib.Path, overrides=()
) -> None:
    """Train by a config, with fields replaced by `overrides`, and print every third record."""
    os.chdir(DEMO_DIR.parent)  # the configs' paths of data begin there
    command.run(configlib.load_config(f"configs/{name}.py:{checkpoint}", overrides), workdir)
    for record in read_records(workdir, "train")[::3]:
        reward = record.get("reward_sampled")
        value = f"loss {record['loss']:.3f}" if reward is None else f"reward {reward:.2f}"
        print(f"   step {record['step']:4}  {value}")


def read_records(workdir: pathlib.Path, kind: str) -> list[dict]:
    lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@contextlib.contextmanager
def print_step(title: str):
    """Print a title before the step, and its seconds after it."""
    print(f"\n{title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


START_SECS = time.perf_counter()

if __name__ == "__main__":
    main()
