"""Reinforcement learning as a whole: bit-exact resume, metrics, meshes, evaluation."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import pytest
import training_run_support
from training_run_support import MODEL, ROOT, Cache, read_metrics
from turns_support import take_turns

from m1_jax import file_lock
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, metrics, resume
from train.data import records
from train.rl import loop as rl_loop
from train.rl import rollout
from train.rl.config import (
    PRESETS,
    LengthSchedule,
    LogConfig,
    LoraConfig,
    RewardsConfig,
    RlConfig,
    RlEvaluationConfig,
    RolloutConfig,
    SaveConfig,
    TaskSource,
    UpdateConfig,
)

# Fixtures.
compilation_cache = training_run_support.compilation_cache

LETTERS = ("function", 1.0, (("path", "letters_reward:reward"),))
SUMS = TaskSource("sums", "demo/data/sums.jsonl")
ENGINE = (
    ("max_rows", 8),
    ("chunk_tokens", 16),
    ("prefill_tokens", (64,)),
    ("decode_steps", 4),
    ("num_snapshots", 4),
)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint of random weights."""
    model = params_lib.random_model(MODEL, jax.random.key(0), jnp.float32)
    directory = tmp_path_factory.mktemp("start") / "model"
    save_lib.save(model, directory, None, jnp.float32)
    format_lib.copy_small_files(ROOT / "demo/data/tokenizer", directory)
    return str(directory)


@pytest.fixture(autouse=True)
def _one_device(monkeypatch):
    """Run in the checkout, and on one device unless the run names a mesh."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests")  # the reward's module
    real_layouts = rl_loop.make_layouts

    def make_layouts(config, model):
        return real_layouts(config, model) if config.mesh else (None, None)

    monkeypatch.setattr(rl_loop, "make_layouts", make_layouts)


def _config(start, rollout_fields=(), **kwargs):
    rollout_defaults = {
        "groups": 4,
        "group_size": 2,
        "max_prompt_tokens": 32,
        "windows": LengthSchedule((12,)),
        "engine": ENGINE,
    }
    defaults = {
        "batches": 4,
        "sources": (SUMS,),
        "rewards": RewardsConfig(sources=(("sums", (LETTERS,)),), workers=1),
        "rollout": RolloutConfig(**rollout_defaults | dict(rollout_fields)),
        "update": UpdateConfig(learning_rate=1e-3, minibatches=2, rows=2),
        "dtype": "float32",
        "save": SaveConfig(every_steps=2, keep=4),
        "log": LogConfig(every_steps=1, samples=True),
        "compilation_cache": Cache.directory,
    }
    return RlConfig(checkpoint=start, **defaults | kwargs)


def _untimed_lines(workdir):
    """Return the lines that must not depend on when a run was stopped, without their times."""
    lines = read_metrics(workdir)
    return [{k: v for k, v in line.items() if not k.endswith("_secs")} for line in lines]


def _last_checkpoint(workdir, config):
    with checkpoints.CheckpointStore(workdir, config.save) as store:
        checkpoint_info = store.read_info(store.latest_step())
    return checkpoint_info.step, checkpoint_info.digest, checkpoint_info.data


_CARRIED = {
    "partial_tokens": 5,
    "max_staleness": 2,
    "oversample": 2.0,
    "dynamic": True,
    "replay_routes": True,
    "overlong_buffer_tokens": 6,
    "windows": LengthSchedule((8, 12), near=0.5, tolerance=10.0, patience=1),
}


@pytest.mark.parametrize("fields", take_turns({}, _CARRIED, ids=["plain", "carried"]))
def test_a_run_that_was_stopped_goes_on_bit_exact(start, tmp_path, monkeypatch, fields):
    config = _config(start, fields)
    unbroken_dir, broken_dir = tmp_path / "whole", tmp_path / "parts"
    assert rl_loop.run_rl_training(config, unbroken_dir).step == 4
    for phase in ("sampling", "training"):
        with monkeypatch.context() as patch:
            _interrupt(patch, phase)
            if phase == "sampling":
                assert rl_loop.run_rl_training(config, broken_dir).stopped_by == signal.SIGTERM
            else:
                with pytest.raises(KeyboardInterrupt):
                    rl_loop.run_rl_training(config, broken_dir)
    assert rl_loop.run_rl_training(None, broken_dir).step == 4  # the workdir is all it needs
    assert _untimed_lines(unbroken_dir) == _untimed_lines(broken_dir)
    samples = [read_metrics(path, name=metrics.SAMPLES_FILE) for path in (unbroken_dir, broken_dir)]
    assert samples[0] == samples[1]
    assert _last_checkpoint(unbroken_dir, config) == _last_checkpoint(broken_dir, config)
    if fields:
        # The run did carry samples and groups from one batch to the next.
        lines = _untimed_lines(unbroken_dir)
        assert max(line["staleness_max"] for line in lines) >= 1
        assert max(line["groups_open"] + line["groups_waiting"] for line in lines) > 0


def _interrupt(patch, phase):
    """Stop a run by a signal while it samples another batch, or by an error between two updates."""
    real_run = rollout.RolloutSampler.run
    real_update = rl_loop.rl_update.PolicyUpdater._update_minibatch

    def run(self, make_jobs, on_done, sampling=None, should_stop=lambda: False):
        if phase == "sampling" and self.version >= 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_run(self, make_jobs, on_done, sampling, should_stop)

    updates = []

    def update(self, state, packed):
        updates.append(packed)
        if phase == "training" and len(updates) == 2:
            raise KeyboardInterrupt
        return real_update(self, state, packed)

    patch.setattr(rollout.RolloutSampler, "run", run)
    patch.setattr(rl_loop.rl_update.PolicyUpdater, "_update_minibatch", update)


def test_metrics_of_a_batch(start, tmp_path):
    config = _config(
        start, batches=1, evaluation=RlEvaluationConfig((SUMS,), every_batches=1, temperature=1.0)
    )
    rl_loop.run_rl_training(config, tmp_path)
    (line,) = read_metrics(tmp_path)
    assert line["logp_gap_max"] <= 1e-5  # sampler against trainer
    assert line["pearson"] > 0.9999
    assert line["updates"] == 2
    assert line["tokens_trained"] <= line["tokens_sampled"]
    timed = ("sampling_secs", "waiting_secs", "training_secs", "resharding_secs", "other_secs")
    assert sum(line[name] for name in timed) == pytest.approx(line["batch_secs"])
    assert 0 <= line["ppo_drop"] <= 1
    assert line["entropy"] > 0
    evaluated = read_metrics(tmp_path, "eval")
    num_tasks = len((ROOT / SUMS.path).read_text().splitlines())
    evaluations = [
        (eval_line["step"], eval_line["version"], eval_line["samples"]) for eval_line in evaluated
    ]
    assert evaluations == [(0, 0, num_tasks), (1, 1, num_tasks)]


def test_idle_batches_are_counted_over_restarts(start, tmp_path):
    # No answer of random weights is right, so no token has an advantage.
    rewards = RewardsConfig(sources=(("sums", (("exact", 1.0, ()),)),))
    save = SaveConfig(every_steps=1)
    config = _config(start, batches=3, rewards=rewards, save=save, max_skipped=2)
    for _ in range(2):  # the second start goes on after the first batch
        with pytest.raises(records.DataError, match="batch 2: 2 batches in a row"):
            rl_loop.run_rl_training(config, tmp_path)
    assert _last_checkpoint(tmp_path, config)[0] == 1


def test_an_evaluation_that_was_stopped_is_made_up_for(start, tmp_path, monkeypatch):
    config = _config(start, batches=1, evaluation=RlEvaluationConfig((SUMS,), every_batches=1))
    real_evaluate = rl_loop.RlSession._evaluate

    def evaluate_stopped(self):
        if self.batch_number:
            os.kill(os.getpid(), signal.SIGTERM)
        real_evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(rl_loop.RlSession, "_evaluate", evaluate_stopped)
        assert rl_loop.run_rl_training(config, tmp_path).stopped_by == signal.SIGTERM
    assert [line["step"] for line in read_metrics(tmp_path, "eval")] == [0]
    for _ in range(2):  # made up for once
        assert rl_loop.run_rl_training(None, tmp_path).step == 1
        assert [line["step"] for line in read_metrics(tmp_path, "eval")] == [0, 1]
    (event,) = read_metrics(tmp_path, "event")
    assert "token-mean" in event["objective"]


@pytest.mark.long(tenths=range(0, 10, 2))
def test_a_run_goes_back_changes_and_is_what_another_begins_with(start, tmp_path):
    config = _config(start, batches=2, save=SaveConfig(every_steps=1, keep=4))
    workdir = tmp_path / "run"
    rl_loop.run_rl_training(config, workdir)
    first = _untimed_lines(workdir)
    update = dataclasses.replace(config.update, learning_rate=2e-3)
    lower = dataclasses.replace(config, update=update)
    with pytest.raises(checkpoints.ResumeError, match="allow_change=update.learning_rate"):
        rl_loop.run_rl_training(lower, workdir)
    with (
        file_lock.hold_lock(workdir / "run", "trains in"),
        pytest.raises(file_lock.LockError, match=f"process {os.getpid()} on"),
    ):
        rl_loop.run_rl_training(config, workdir)
    options = resume.ResumeOptions(allow_change=("update",), from_step=1)
    for _ in range(2):  # the same command again does not go back again
        assert rl_loop.run_rl_training(lower, workdir, options).step == 2
        second = _untimed_lines(workdir)
        assert second[0] == first[0]
        assert second[1]["learning_rate"] == pytest.approx(2e-3)
        events = read_metrics(workdir, "event")
        assert sum("went_back_to" in event for event in events) == 1
        assert sum("changed" in event for event in events) == 1
    options = resume.ResumeOptions(init_from=str(workdir))
    once = dataclasses.replace(config, batches=1)
    assert rl_loop.run_rl_training(once, tmp_path / "next", options).step == 1
    (line,) = read_metrics(tmp_path / "next")
    assert line["nll"] != first[0]["nll"]  # sampled from other weights
    events = read_metrics(tmp_path / "next", "event")
    assert [e["init_from"] for e in events if "init_from" in e] == [f"{workdir} step 2"]


@pytest.mark.long
def test_on_meshes_as_on_one_device(start, tmp_path):
    fields = {"update": UpdateConfig(learning_rate=1e-3, minibatches=2, rows=8), "batches": 1}
    one_device = _config(start, **fields)
    rl_loop.run_rl_training(one_device, tmp_path / "alone")
    mesh = (("fsdp", 4), ("expert", 2))
    on_mesh = _config(start, **fields, mesh=mesh, serving_mesh=(("expert", 2), ("data", 4)))
    rl_loop.run_rl_training(on_mesh, tmp_path / "mesh")
    (device_line,), (mesh_line,) = read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "mesh")
    assert device_line["tokens_trained"] == mesh_line["tokens_trained"]
    for name in ("loss", "grad_norm", "entropy", "reward_mean", "pearson"):
        assert device_line[name] == pytest.approx(mesh_line[name], rel=1e-4, abs=1e-6), name
    assert mesh_line["logp_gap_max"] <= 1e-5


def test_errors_before_any_work(start, tmp_path):
    config = _config(start, {"max_prompt_tokens": 8})
    with pytest.raises(ValueError, match="got a prompt of 25 tokens; wanted at most 8"):
        rl_loop.run_rl_training(config, tmp_path)
    with pytest.raises(ValueError, match=r"a divisor of rollout.groups = 4"):
        _config(start, update=UpdateConfig(learning_rate=1e-3, minibatches=3))
    with pytest.raises(ValueError, match="engine"):
        rl_loop.run_rl_training(_config(start, {"engine": (("rows", 8),)}), tmp_path)


@pytest.mark.parametrize("name", take_turns("grpo", "reinforce_pp"))
def test_other_objectives_run(start, tmp_path, name):
    objective = dataclasses.replace(PRESETS[name], kl_coef=0.01, entropy_coef=0.001)
    if name == "reinforce_pp":
        objective = dataclasses.replace(objective, reward_kl_coef=0.01)
    rl_loop.run_rl_training(_config(start, batches=1, objective=objective), tmp_path)
    (line,) = read_metrics(tmp_path)
    assert line["skipped"] == 0
    assert line["k3_ref"] >= 0


@pytest.mark.long(tenths=range(1, 10, 2))
def test_adapters_are_trained_and_served(start, tmp_path):
    rl_loop.run_rl_training(_config(start, batches=2, lora=LoraConfig(rank=2)), tmp_path)
    lines = read_metrics(tmp_path)
    assert len(lines) == 2
    for line in lines:
        assert line["handover_share"] == pytest.approx(1, abs=1e-4)
        assert line["pearson"] > 0.9999
        assert line["stale_tokens"] == 0
    assert not read_metrics(tmp_path, "event")[1:]  # the objective alone, and no alarm
