"""CISPO against DAPO: what is read off curves, that the arms are paired, and that it all runs."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infer import prompt
from m1_jax import model as model_lib
from m1_jax import tokenizer as tokenizer_lib
from train import optim
from train.rl import batch as rl_batch
from train.rl import objective, row_packing
from train.rl import sample as sample_lib
from train.rl import step as rl_step

_REPO = pathlib.Path(__file__).resolve().parents[1]


@functools.cache
def load(name):
    """Load a benchmark file as the script does, under the name that its neighbours import."""
    spec = importlib.util.spec_from_file_location(name, _REPO / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


curves, tasks, report = map(load, ("cispo_curves", "cispo_tasks", "cispo_report"))
main = load("cispo_vs_dapo")


def outcome(rewards, fork=(0, 0), failed=False):
    return curves.measure_outcome(rewards, [100.0] * len(rewards), [fork] * len(rewards), failed)


# ---- curves


@pytest.mark.parametrize(
    ("rewards", "first", "for_good"),
    [
        ([0.1, 0.9, 0.9, 0.9, 1.0], 1, 1),
        ([0.9, 0.9, 0.9, 0.9], 0, 0),
        ([0.9, 0.9, 0.9, 0.1, 1.0, 1.0, 1.0], 0, 4),  # left again: the second time counts
        ([0.1, 1.0, 1.0, 1.0, 0.6], 1, None),  # left at the end
        ([0.7, 1.0, 1.0], 0, 0),  # a mean of three, not each
        ([0.1] * 5, None, None),
        ([1.0, 1.0], None, None),  # no window of three
    ],
)
def test_crossings(rewards, first, for_good):
    assert curves.first_crossing(rewards, 0.9) == first
    assert curves.sustained_crossing(rewards, 0.9) == for_good


def test_outcome_of_a_run():
    found = curves.measure_outcome(
        [0.1, 0.6, 0.8, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0],
        [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0],
        [(0, 2), (3, 4), (0, 0), (1, 2), (0, 0), (0, 0), (9, 9), (0, 0), (0, 0)],
    )
    assert (found.sustained, found.half, found.tokens) == (3, 0, 60)
    assert found.fork_clipped == 4 / 8  # of the first six batches
    assert (found.lowest, found.collapsed) == (0.6, False)
    np.testing.assert_allclose(found.mean, 7.3 / 9)


def test_collapse():
    assert outcome([0.1, 0.9, 0.9, 0.9] + [0.1] * 8).collapsed
    assert not outcome([0.1, 0.9, 0.9, 0.9] + [0.5] * 8).collapsed
    assert outcome([0.9] * 9, failed=True).collapsed
    assert outcome([0.9] * 9, failed=True).sustained is None


def test_unlike_columns_are_refused():
    with pytest.raises(ValueError, match="wanted one of each for every batch"):
        curves.measure_outcome([0.1, 0.2], [1.0], [(0, 0)])
    with pytest.raises(ValueError, match="at least one batch"):
        curves.measure_outcome([], [], [])


def test_ratio_of_what_did_not_arrive():
    assert curves.batch_ratio(6, 8) == 0.75
    assert curves.batch_ratio(None, 8) == math.inf
    assert curves.batch_ratio(6, None) == 0
    assert curves.batch_ratio(None, None) is None
    assert (curves.batch_ratio(0, 0), curves.batch_ratio(2, 0)) == (1, math.inf)


def test_paired_ratio():
    same = curves.paired_ratio([4, 6, 8], [8, 12, 16])
    assert (same.median, same.low, same.high, same.pairs) == (0.5, 0.5, 0.5, 3)
    found = curves.paired_ratio([8, 8, 8, 8, 8], [10, 9, 8, 16, 8])
    assert found.median == pytest.approx(8 / 9)
    assert (found.low, found.high) == (0.5, 1.0)
    assert found == curves.paired_ratio([8, 8, 8, 8, 8], [10, 9, 8, 16, 8])  # the seed is fixed


def test_paired_ratio_keeps_what_did_not_arrive():
    found = curves.paired_ratio([None, 4, None, 4, 4], [8, 8, None, None, 8])
    assert (found.median, found.pairs, found.unknown) == (0.5, 4, 1)
    assert found.low == 0
    assert found.high == math.inf
    assert curves.paired_ratio([None], [None]) is None


def test_median_of_an_even_number_is_the_geometric_mean():
    assert curves.paired_ratio([1, 4], [2, 2]).median == pytest.approx(1.0)
    assert curves.paired_ratio([1, None], [None, 1]).median == math.inf  # 0 and infinity: the worse


def test_best_rate():
    def runs(*batches):
        made = []
        for number in batches:
            before = 12 if number is None else number
            made.append(outcome([0.1] * before + [1.0] * (12 - before)))
        return made

    assert curves.best_rate({1e-3: runs(4, 6), 3e-4: runs(5, 7)}) == 1e-3
    assert curves.best_rate({1e-3: runs(2, None), 3e-4: runs(5, 7)}) == 3e-4  # arriving first
    assert curves.best_rate({1e-3: runs(5, 7), 3e-4: runs(5, 7)}) == 3e-4


# ---- what is printed


def section(cispo, dapo, task="a"):
    def make(batches):
        return [outcome([0.1] * n + [1.0] * (12 - n), (1, 2)) for n in batches]

    some = {"grpo": make(dapo), "dapo": make(dapo), "cispo": make(cispo)}
    rates = dict.fromkeys(some, 3e-4)
    tuning = {arm: {3e-4: found} for arm, found in some.items()}
    return report.Section(
        table="clip",
        task=task,
        updates=16,
        measured=(0.021, 0.99),
        batches=12,
        common_rate=3e-4,
        seeds=(0, 1),
        tuning_seeds=(),
        tuning=tuning,
        best_rates=rates,
        common=some,
        best=some,
        curves={"a-x-0": [0.1]},
        secs=[1.0],
    )


def test_sentence_follows_the_numbers():
    said = report.format_section(section([4, 4], [8, 8]), 782_848)
    assert "W begins 0.021 of the answers; after it 0.990 of the work is right" in said
    assert "0.8M-parameter toy" in said
    assert "in 0.50 (0.50 to 0.50) times" in said
    assert "This reproduces the mechanism of M1 section 3.1, not its AIME result." in said
    assert "Collapsed runs, at all rates: GRPO 0 of 2, DAPO 0 of 2, CISPO 0 of 2." in said
    assert "chosen on the very seeds" in said
    assert "does not show the mechanism" in report.format_section(section([8, 8], [8, 8]), 782_848)
    assert "no difference was expected" in report.format_section(
        section([8, 8], [8, 8], "b"), 782_848
    )


def test_what_did_not_arrive_is_shown():
    said = report.format_section(section([12, 12], [12, 12]), 1)
    assert ">12,>12" in said
    assert "Neither CISPO nor DAPO reached the target" in said
    json.dumps(report.to_json(section([12, 4], [4, 12])), allow_nan=False)


# ---- tasks and arms


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tasks.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer_lib.Tokenizer.load(directory)


def test_an_answer_with_the_work():
    assert tasks.format_answer("190562", "3", True) == "W100513\nAnswer: 3"
    assert tasks.format_answer("190562", "3", False) == "\nAnswer: 3"


def test_longest_sample_fits(tokenizer):
    digits, label = tasks.draw_problem(random.Random(0))
    asked = prompt.encode_prompt(tokenizer, [{"role": "user", "content": digits}])
    assert len(asked) == tasks.PROMPT_TOKENS
    said = tokenizer.encode(tasks.format_answer(digits, label, True))
    assert len(said) == 9
    assert len(said) + 1 <= tasks.ANSWER_TOKENS
    assert max(asked + said) < tasks.MODEL.vocab_size


def test_share_of_conversations(tmp_path):
    tasks.write_conversations(tmp_path / "set.jsonl", 4000, 0.1, seed=0)
    lines = (tmp_path / "set.jsonl").read_text().splitlines()
    said = [json.loads(line)["messages"][1]["content"] for line in lines]
    assert 0.08 < sum(one.startswith(tasks.FORK) for one in said) / 4000 < 0.12


def test_model_is_of_the_announced_shape():
    assert [kind == "softmax" for kind in tasks.MODEL.layer_types] == [False] * 7 + [True]
    assert 0.5e6 < tasks.count_parameters() < 1e6


def test_arms_differ_in_their_clip_alone():
    clip = {"name", "clip_low", "clip_high", "is_weight_max", "is_weight_min"}
    first, *others = main.ARMS["clip"].values()
    for other in others:
        names = {f.name for f in dataclasses.fields(first)}
        differing = {n for n in names if getattr(first, n) != getattr(other, n)}
        assert differing <= clip
    assert [one.clip_high for one in main.ARMS["clip"].values()] == [0.2, 0.28, None]


def test_plans_can_be_run():
    for plan in main.PLANS.values():
        assert all(plan.groups % updates == 0 for updates in plan.updates)
        assert not set(plan.seeds) & set(plan.tuning_seeds)
    assert len(main.plan_sections(main.PLANS["full"])) == 2 * 3 + 1


@pytest.fixture(scope="module")
def gradients(tokenizer):
    """Return what one microbatch's gradients are under an arm, `shift` after its anchor."""
    config = dataclasses.replace(tasks.MODEL, layer_types=("lightning", "softmax"))
    model = model_lib.MiniMaxM1(config, nnx.Rngs(0), dtype=jnp.float32)
    samples = []
    for i, text in enumerate(("W100513\nAnswer: 3", "\nAnswer: 7", "\nAnswer: 3", "\nAnswer: 9")):
        task = sample_lib.Task("t", ({"role": "user", "content": "190562"},), "sums", "3")
        said = tokenizer.encode(text) + [tokenizer.special_token_id(prompt.END_TOKEN)]
        sample = sample_lib.Sample(task, tuple(prompt.encode_prompt(tokenizer, task.messages)))
        made = tuple(said), (0.0,) * len(said), (0,) * len(said), "stop"
        sample.append_generated(sample_lib.Generation(*made))
        sample.reward = float(i in (0, 2))
        samples.append(sample)
    packed = rl_batch.pack_samples(samples, row_packing.RowShapes((4,), (32,)))
    packed.fill("advantages", [1.0, -1.0, 1.0, -1.0])
    packed.fill("coefficients", [0.05] * 4)
    rows = packed.make_rows(0)

    def run(arm: objective.Objective, shift: float):
        logp, _ = rl_step.score_logprobs(model, rl_batch.device_put_rows(rows), 1.0)
        moved = dataclasses.replace(rows, logp_old=np.asarray(logp) - shift)
        placed = rl_batch.device_put_rows(moved)
        settings = rl_step.RlStepSettings(optim.AdamW(1e-3), arm)
        grads, measured = rl_step.accumulate_gradients(
            None, model, placed, np.float32(1), None, settings
        )
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        return flat, np.asarray(measured.drops.clipped)

    return run


def test_arms_agree_at_the_first_update_and_part_later(gradients, tokenizer):
    fork = tokenizer.encode(tasks.FORK)[0]
    arms = main.ARMS["clip"]
    on, clipped = zip(*(gradients(arm, 0.0) for arm in arms.values()), strict=True)
    for other in on[1:]:
        # Ratios are 1 but for the order of sums in two programs.
        assert np.linalg.norm(other - on[0]) < 1e-4 * np.linalg.norm(on[0])
    assert all(one[0].sum() == 0 for one in clipped)
    assert all(tuple(one[:, fork]) == (0, 1) for one in clipped)
    # e^0.24 = 1.27 lies between the bounds of GRPO and DAPO.
    off, clipped = zip(*(gradients(arm, 0.24) for arm in arms.values()), strict=True)
    assert [tuple(one[:, fork]) for one in clipped] == [(1, 1), (0, 1), (0, 1)]
    assert np.linalg.norm(off[1] - off[2]) < 1e-4 * np.linalg.norm(off[2])
    assert np.linalg.norm(off[0] - off[2]) > 0.1 * np.linalg.norm(off[2])


# ---- the command


def test_plot_without_matplotlib_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.require_matplotlib()


def command(*arguments):
    """Run Python beside the tests: one device, as a user has it, and not the tests' eight."""
    # Computes more than it compiles: with LLVM's optimisations, other than the rest of the suite.
    env = os.environ | {"PYTHONPATH": f"{_REPO}:benchmarks", "XLA_FLAGS": ""}
    options = {"cwd": _REPO, "env": env}
    done = subprocess.run(
        [sys.executable, *arguments], **options, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_a_model_is_tuned_once(tmp_path):
    script = """if True:
        import pathlib, sys
        import cispo_tasks
        made = cispo_tasks.tune_model(pathlib.Path(sys.argv[1]), 0.02, 20, 5)
        print(*cispo_tasks.measure_fork(made, 4))
        print(cispo_tasks.fork_id(made))
    """
    first = command("-c", script, str(tmp_path))
    fork, work = map(float, first.splitlines()[-2].split())
    assert 0.02 < fork < 1  # four of five answers of the first stage begin with W
    assert work < 1e-3  # hardly taught yet
    files = [path for path in (tmp_path / "tuned").rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in files}
    assert times
    assert command("-c", script, str(tmp_path)) == first
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.long(tenths=[9])  # minutes: beside the shortest of the others
def test_clipping_drops_the_fork_and_one_update_a_batch_is_the_same_for_all(tmp_path):
    """The gates of the experiment, on the model that `--quick` tunes."""
    lab = main.Lab(main.PLANS["gate"], tmp_path)
    home = lab.home("a")
    shutil.copytree(_REPO / "tests" / "data" / "fork", home / "tuned")
    tasks.write_tasks(home / "tasks.jsonl", tasks.TASKS, seed=tasks.TASKS_SEED)
    run = ("benchmarks/cispo_vs_dapo.py", "--gate", f"--dir={tmp_path}")
    first = command(*run)
    one, many = json.loads((tmp_path / "gate.json").read_text())["sections"]
    assert 0.01 < one["measured"][0] < 0.04
    assert one["measured"][1] > 0.9
    # Ratios are 1: the arms differ by the order of sums in two programs, so by a sample at most.
    for some in zip(*one["curves"].values(), strict=True):
        assert max(some) - min(some) <= 1.01 / 512
    dropped = {arm: found[0]["fork_clipped"] for arm, found in many["common"].items()}
    assert dropped["grpo"] > 0.3
    assert dropped["dapo"] > 0.2
    assert dropped["cispo"] < 0.05
    # What is there is not made again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "gate").glob("*.json")}
    assert len(times) == 6
    assert command(*run) == first
    assert times == {path: path.stat().st_mtime_ns for path in times}
