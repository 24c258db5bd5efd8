"""`make demo`: a tiny MiniMax-M1 through every step that a real checkpoint takes.

The tiny checkpoint is in the release's own format, with random weights and the ratios of the real
shapes. It is converted to Orbax, checked against the release code's outputs, used to generate text,
and exported again with its bytes compared. Then it is trained: on a little text, and on sums with
answers in a fixed form, half of which are wrong. Last it learns from rewards to get them right.

All files are written to demo/out, and `report.html` there shows the curves. A demo that was stopped
goes on with the step that was cut. `make demo-clean` begins anew.
"""

import os
import pathlib

DEMO_DIR = pathlib.Path(__file__).resolve().parent
OUTPUT_DIR = pathlib.Path(os.environ.get("M1_DEMO_OUT", DEMO_DIR / "out")).resolve()

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several steps run the same programs, and a demo that goes on runs them again.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(OUTPUT_DIR / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import argparse  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402

import finished_steps  # noqa: E402
from absl import logging  # noqa: E402

from infer import generate  # noqa: E402
from m1_jax import configlib, convert, durable, file_lock, testing, verify  # noqa: E402
from train import export, metrics, pretrain, sft  # noqa: E402
from train.rl import __main__ as rl_command  # noqa: E402

try:
    import report_page
except ModuleNotFoundError as error:
    sys.exit(f"demo: {error}; wanted the extra `demo`: pip install -e '.[demo]'")

SOURCE = DEMO_DIR.parent / "tests" / "data" / "m1-tiny"
# Everything that decides the results. The report is written anew each time.
INPUTS = ("m1_jax", "pallas_kernels", "train", "infer", "configs", "demo/data", "demo/run.py")
INPUTS += ("demo/finished_steps.py", "tests/data/m1-tiny")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
QUESTIONS = ("What is 2 + 3?", "What is 4 + 4?", "What is 3 + 1?")
STEP_TOKENS = 8 * 256  # of pretraining and fine-tuning alike
RELEASE, ORBAX = OUTPUT_DIR / "release", OUTPUT_DIR / "orbax"


def make_release() -> dict:
    shutil.copytree(SOURCE, RELEASE, ignore=shutil.ignore_patterns("golden.npz"))
    testing.write_tiny_tokenizer(RELEASE)
    names = sorted(file.name for file in RELEASE.iterdir())
    print(f"      {', '.join(names)}")
    return {"files": names}


def convert_to_orbax() -> dict:
    convert.run(convert.ConvertConfig("orbax", str(RELEASE), str(ORBAX)))
    return {}


def verify_outputs() -> dict:
    rows = verify.run(verify.VerifyConfig(str(ORBAX), str(SOURCE / "golden.npz")))
    print(verify.format_table(rows))
    return {"passed": sum(bool(row.passed) for row in rows), "quantities": len(rows)}


def generate_text() -> dict:
    prompts = OUTPUT_DIR / "prompts.txt"
    prompts.write_text("Why is the sky blue?\nWrite a haiku about matrices.\nCount to ten.\n")
    outputs, stats = generate.run(
        generate.GenerateConfig(checkpoint=str(ORBAX), prompts_file=str(prompts), max_tokens=32)
    )
    print(f"      {stats}")
    return {"tokens": [len(output.tokens) for output in outputs]}


def export_back() -> dict:
    exported = OUTPUT_DIR / "exported"
    convert.run(convert.ConvertConfig("hf", str(ORBAX), str(exported)))
    files = sorted(RELEASE.iterdir())
    num_same = sum(file.read_bytes() == (exported / file.name).read_bytes() for file in files)
    tokens = []
    for path in (RELEASE, ORBAX, exported):
        config = generate.GenerateConfig(str(path), prompt="Hello", max_tokens=16, temperature=0.0)
        outputs, _ = generate.run(config, io.StringIO())
        tokens.append([int(token.id) for token in outputs[0].tokens])
    return {
        "same_files": num_same,
        "files": len(files),
        "greedy_equal": tokens[0] == tokens[1] == tokens[2],
    }


def pretrain_model() -> dict:
    # One pass over the text, in rows of one length. In a second pass the stories' numbers would be
    # learnt by heart, and losses of other lengths could not be compared: held-out loss would rise.
    stages = [
        {"seq_len": 256, "rows": 8, "tokens": 28 * STEP_TOKENS, "learning_rate": 3e-3,
         "warmup_tokens": 4 * STEP_TOKENS},
        {"seq_len": 256, "rows": 8, "tokens": 12 * STEP_TOKENS, "learning_rate": 3e-4,
         "shape": "cosine"},
    ]  # fmt: skip
    changes = (f"stages={stages}", "evaluation.every_steps=8", "save.every_steps=20")
    changes += ("log.every_steps=2",)
    return train_model(pretrain, "tiny_pretrain", ORBAX, "pretrain", changes)


def tune_model() -> dict:
    # Less than half of the recipe's steps: after 60 the form and the sums are learnt.
    changes = (f"stages.0.tokens={60 * STEP_TOKENS}", f"stages.1.tokens={30 * STEP_TOKENS}")
    return train_model(sft, "tiny_cispo_sft", OUTPUT_DIR / "pretrained", "sft", changes)


def reinforce_model() -> dict:
    changes = ("batches=8", "evaluation.every_batches=4", "save.every_steps=2")
    return train_model(rl_command, "tiny_cispo", OUTPUT_DIR / "tuned", "cispo", changes)


def answer_questions() -> dict:
    final = OUTPUT_DIR / "final"
    convert.run(convert.ConvertConfig("hf", str(OUTPUT_DIR / "learnt"), str(final)))
    prompts = OUTPUT_DIR / "questions.txt"
    prompts.write_text("".join(f"{question}\n" for question in QUESTIONS))
    config = generate.GenerateConfig(
        checkpoint=str(final), prompts_file=str(prompts), max_tokens=32, temperature=0.0
    )
    answers, _ = generate.run(config)
    return {"answers": [answer.text for answer in answers]}


def export_step(name: str, run: str, checkpoint: str, dtype: str = "") -> finished_steps.DemoStep:
    """Return the step that writes the model of a run as a checkpoint."""

    def export_run() -> dict:
        export.run(OUTPUT_DIR / run, OUTPUT_DIR / checkpoint, dtype=dtype)
        return {}

    title = f"export the model of {run} (m1-export)"
    return finished_steps.DemoStep(name, title, export_run, (checkpoint,))


def make_steps() -> list[finished_steps.DemoStep]:
    step = finished_steps.DemoStep
    return [
        step("release", "a release: config.json, 3 shards, tokenizer", make_release, ("release",)),
        step("orbax", "release to Orbax (m1-convert --to=orbax)", convert_to_orbax, ("orbax",)),
        step("verify", "compare with the release code's outputs (m1-verify)", verify_outputs),
        step("generate", "generate (m1-generate); the weights are random, so is the text",
             generate_text),
        step("exported", "Orbax to release (m1-convert --to=hf), bytes compared", export_back,
             ("exported",)),
        step("pretrain", "continued pretraining on small stories (m1-pretrain)", pretrain_model),
        export_step("pretrained", "pretrain", "pretrained"),
        step("sft", "fine-tuning on sums, half of them wrong (m1-sft)", tune_model),
        # In bfloat16 the small changes of reinforcement learning would begin from rounded weights.
        export_step("tuned", "sft", "tuned", "float32"),
        step("cispo", "CISPO: right answers are rewarded (m1-rl)", reinforce_model),
        export_step("learnt", "cispo", "learnt"),
        step("answers", "to the release's format, and the answers", answer_questions, ("final",)),
    ]  # fmt: skip


def train_model(command, name: str, checkpoint: pathlib.Path, run: str, changes=()) -> dict:
    """Train by a config, or go on with a run that was cut, and return what it logged.

    Raises:
      KeyboardInterrupt: a signal stopped the run, which has saved.
    """
    workdir = OUTPUT_DIR / run
    os.chdir(DEMO_DIR.parent)  # the configs' paths of data begin there
    changes = [*changes, f"compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}"]
    summary = command.run(
        configlib.load_config(f"configs/{name}.py:{checkpoint}", changes), workdir
    )
    if summary.stopped_by is not None:
        raise KeyboardInterrupt
    lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    wanted = ("step", "loss", "held_out", "reward", "reward_sampled", "pearson")
    results = {
        kind: [
            {key: record[key] for key in wanted if key in record}
            for record in records
            if record["kind"] == kind
        ]
        for kind in ("train", "eval")
    }
    for record in results["train"][:: max(1, len(results["train"]) // 4)]:
        key = "reward_sampled" if "reward_sampled" in record else "loss"
        print(f"      step {record['step']:4}  {key} {record[key]:.3f}")
    return results


def summarize(results: dict[str, dict]) -> tuple[list[str], bool]:
    """Return the summary's lines, and whether everything was as it should be."""
    verified, exported = results["verify"], results["exported"]
    losses = [record["loss"] for record in results["pretrain"]["eval"]]
    accuracy = [record["reward"] for record in results["cispo"]["eval"]]
    answers = results["answers"]["answers"]
    correlation = min(record["pearson"] for record in results["cispo"]["train"])
    formed = sum("Answer: " in answer for answer in answers)
    lines = [
        f"{verified['passed']} of {verified['quantities']} golden quantities within tolerance",
        f"{exported['same_files']} of {exported['files']} exported files equal byte for byte",
        f"greedy tokens equal from all three: {exported['greedy_equal']}",
        "held-out loss in pretraining: " + " -> ".join(f"{loss:.2f}" for loss in losses),
        "right answers during CISPO: " + " -> ".join(f"{share:.0%}" for share in accuracy),
        f"correlation of sampler and trainer: at least {correlation:.7f}",
        f"{formed} of {len(answers)} answers in the form that was taught",
    ]
    passed = verified["passed"] == verified["quantities"]
    passed &= exported["same_files"] == exported["files"] and exported["greedy_equal"]
    passed &= losses[-1] == min(losses) and accuracy[-1] > accuracy[0] and formed > 0
    return lines, passed


def write_report(summary: list[str], records: dict[str, dict], titles: dict[str, str]) -> None:
    """Write report.html and, for programs to compare, summary.txt."""
    results = {name: record["results"] for name, record in records.items()}

    def curve(label: str, run: str, kind: str, key: str):
        points = [record for record in results[run][kind] if key in record]
        return label, [p["step"] for p in points], [p[key] for p in points]

    svg = report_page.draw_curves(
        [
            ("Pretraining on stories", "loss, nats a token",
             [curve("trained", "pretrain", "train", "loss"),
              curve("held out", "pretrain", "eval", "loss")]),
            ("Fine-tuning on sums, half wrong", "loss, nats a token",
             [curve("trained", "sft", "train", "loss")]),
            ("CISPO", "reward, 1 is right",
             [curve("sampled", "cispo", "train", "reward_sampled"),
              curve("evaluated", "cispo", "eval", "reward")]),
            ("Sampler and trainer", "Pearson correlation",
             [curve("of each batch", "cispo", "train", "pearson")]),
        ]
    )  # fmt: skip
    page = report_page.make_page(
        summary,
        svg,
        list(zip(QUESTIONS, results["answers"]["answers"], strict=True)),
        {titles[name]: record["secs"] for name, record in records.items()},
        finished_steps.describe_versions(PACKAGES) | {"Machine": platform.platform()},
    )
    durable.write_text_atomically(OUTPUT_DIR / "report.html", page)
    durable.write_text_atomically(OUTPUT_DIR / "summary.txt", "\n".join(summary) + "\n")


def main() -> None:
    names = [step.name for step in make_steps()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", choices=names, help="end after this step, without a summary")
    until = parser.parse_args().until
    logging.set_verbosity(logging.ERROR)
    versions = [f"{k} {v}" for k, v in finished_steps.describe_versions(PACKAGES).items()]
    settings = [os.environ.get(name, "") for name in ("JAX_PLATFORMS", "XLA_FLAGS")]
    digest = finished_steps.digest_inputs(DEMO_DIR.parent, INPUTS, [*versions, *settings])
    steps = make_steps()[: None if until is None else names.index(until) + 1]
    OUTPUT_DIR.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock.hold_lock(OUTPUT_DIR / "demo", "makes the demo of"):
            finished_steps.prepare_output(OUTPUT_DIR, digest)
            records = finished_steps.run_steps(OUTPUT_DIR, steps)
    except KeyboardInterrupt:
        print("\ndemo: stopped; `make demo` goes on with this step, `make demo-clean` begins anew")
        sys.exit(130)
    except file_lock.LockError as error:
        sys.exit(f"demo: {error}")
    if until is not None:
        return
    summary, passed = summarize({name: record["results"] for name, record in records.items()})
    write_report(summary, records, {step.name: step.title for step in steps})
    secs = sum(record["secs"] for record in records.values())
    print("\nSummary", *summary, f"report: {OUTPUT_DIR / 'report.html'}; {secs:.0f} s of steps",
          sep="\n  ")  # fmt: skip
    if not passed:
        raise SystemExit("demo: FAILED")


if __name__ == "__main__":
    main()
