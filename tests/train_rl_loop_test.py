"""Reinforcement learning as a whole: resuming to the bit, metrics, meshes, evaluation."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import pytest
import training_run_support
from training_run_support import MODEL, ROOT, Cache, read_metrics

from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, metrics
from train.rl import loop as rl_loop
from train.rl import rollout
from train.rl.config import (
    PRESETS,
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
def _here(monkeypatch):
    """Run in the checkout; on one device, but for runs that name a mesh."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tests")  # the reward's module
    real = rl_loop.make_layouts
    alone = lambda config, model: real(config, model) if config.mesh else (None, None)  # noqa: E731
    monkeypatch.setattr(rl_loop, "make_layouts", alone)


def _config(start, rollout_fields=(), **kwargs):
    fields = {
        "groups": 4,
        "group_size": 2,
        "max_prompt_tokens": 32,
        "windows": LengthSchedule((12,)),
        "engine": ENGINE,
    }
    given = {
        "batches": 4,
        "sources": (SUMS,),
        "rewards": RewardsConfig(sources=(("sums", (LETTERS,)),), workers=1),
        "rollout": RolloutConfig(**fields | dict(rollout_fields)),
        "update": UpdateConfig(learning_rate=1e-3, minibatches=2, rows=2),
        "dtype": "float32",
        "save": SaveConfig(every_steps=2, keep=4),
        "log": LogConfig(every_steps=1, samples=True),
        "compilation_cache": Cache.directory,
    }
    return RlConfig(checkpoint=start, **given | kwargs)


def _told(workdir):
    """Return what must not depend on when a run was stopped: all but times."""
    lines = read_metrics(workdir)
    return [{k: v for k, v in one.items() if not k.endswith("_secs")} for one in lines]


def _end(workdir, config):
    with checkpoints.CheckpointStore(workdir, config.save) as saved:
        position = saved.read_info(saved.latest_step())
    return position.step, position.digest, position.data


_CARRIED = {
    "partial_tokens": 5,
    "max_staleness": 2,
    "oversample": 2.0,
    "dynamic": True,
    "replay_routes": True,
    "overlong_buffer_tokens": 6,
    "windows": LengthSchedule((8, 12), near=0.5, tolerance=10.0, patience=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, _CARRIED], ids=["plain", "carried"])
def test_a_run_that_was_stopped_goes_on_to_the_bit(start, tmp_path, monkeypatch, fields):
    config = _config(start, fields)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert rl_loop.run_rl_training(config, whole).step == 4
    for place in ("sampling", "training"):
        with monkeypatch.context() as patch:
            _break(patch, place)
            if place == "sampling":
                assert rl_loop.run_rl_training(config, parts).stopped_by == signal.SIGTERM
            else:
                with pytest.raises(KeyboardInterrupt):
                    rl_loop.run_rl_training(config, parts)
    assert rl_loop.run_rl_training(None, parts).step == 4  # the workdir is all it needs
    assert _told(whole) == _told(parts)
    samples = [read_metrics(path, name=metrics.SAMPLES_FILE) for path in (whole, parts)]
    assert samples[0] == samples[1]
    assert _end(whole, config) == _end(parts, config)
    if fields:
        assert max(one["staleness_max"] for one in _told(whole)) >= 1
        assert max(one["groups_open"] + one["groups_waiting"] for one in _told(whole)) > 0


def _break(patch, place):
    """Stop a run: by a signal while it samples for another batch, or between two updates."""
    real_run = rollout.RolloutSampler.run
    real_update = rl_loop.rl_update.PolicyUpdater._update_minibatch

    def run(self, make, on_done, sampling=None, should_stop=lambda: False):
        if place == "sampling" and self.version >= 1:
            should_stop.__self__.stop_request.signal_number = signal.SIGTERM
        return real_run(self, make, on_done, sampling, should_stop)

    updates = []

    def update(self, state, packed):
        updates.append(packed)
        if place == "training" and len(updates) == 2:
            raise KeyboardInterrupt
        return real_update(self, state, packed)

    patch.setattr(rollout.RolloutSampler, "run", run)
    patch.setattr(rl_loop.rl_update.PolicyUpdater, "_update_minibatch", update)


def test_metrics_of_a_batch(start, tmp_path):
    config = _config(
        start, batches=1, evaluation=RlEvaluationConfig((SUMS,), every_batches=1, temperature=1.0)
    )
    rl_loop.run_rl_training(config, tmp_path)
    (told,) = read_metrics(tmp_path)
    assert told["logp_gap_max"] <= 1e-5  # sampler against trainer
    assert told["pearson"] > 0.9999
    assert told["updates"] == 2
    assert told["tokens_trained"] <= told["tokens_sampled"]
    parts = ("sampling_secs", "waiting_secs", "training_secs", "resharding_secs", "other_secs")
    assert sum(told[name] for name in parts) == pytest.approx(told["batch_secs"])
    assert 0 <= told["ppo_drop"] <= 1
    assert told["entropy"] > 0
    evaluated = read_metrics(tmp_path, "eval")
    number = len((ROOT / SUMS.path).read_text().splitlines())
    found = [(one["step"], one["version"], one["samples"]) for one in evaluated]
    assert found == [(0, 0, number), (1, 1, number)]


def test_an_evaluation_that_was_stopped_is_made_up_for(start, tmp_path, monkeypatch):
    config = _config(start, batches=1, evaluation=RlEvaluationConfig((SUMS,), every_batches=1))
    real = rl_loop.RlSession._evaluate

    def stopped(self):
        self.stop_request.signal_number = signal.SIGTERM if self.batch_number else None
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(rl_loop.RlSession, "_evaluate", stopped)
        assert rl_loop.run_rl_training(config, tmp_path).stopped_by == signal.SIGTERM
    assert [one["step"] for one in read_metrics(tmp_path, "eval")] == [0]
    for _ in range(2):  # made up for once
        assert rl_loop.run_rl_training(None, tmp_path).step == 1
        assert [one["step"] for one in read_metrics(tmp_path, "eval")] == [0, 1]
    (told,) = read_metrics(tmp_path, "event")
    assert "token-mean" in told["objective"]


@pytest.mark.long
def test_on_meshes_as_on_one_device(start, tmp_path):
    rows = {"update": UpdateConfig(learning_rate=1e-3, minibatches=2, rows=8), "batches": 1}
    alone = _config(start, **rows)
    rl_loop.run_rl_training(alone, tmp_path / "alone")
    mesh = (("fsdp", 4), ("expert", 2))
    over = _config(start, **rows, mesh=mesh, serving_mesh=(("expert", 2), ("data", 4)))
    rl_loop.run_rl_training(over, tmp_path / "mesh")
    (one,), (other,) = read_metrics(tmp_path / "alone"), read_metrics(tmp_path / "mesh")
    assert one["tokens_trained"] == other["tokens_trained"]
    for name in ("loss", "grad_norm", "entropy", "reward_mean", "pearson"):
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert other["logp_gap_max"] <= 1e-5


def test_errors_before_any_work(start, tmp_path):
    config = _config(start, {"max_prompt_tokens": 8})
    with pytest.raises(ValueError, match="got a prompt of 25 tokens; wanted at most 8"):
        rl_loop.run_rl_training(config, tmp_path)
    with pytest.raises(ValueError, match=r"a divisor of rollout.groups = 4"):
        _config(start, update=UpdateConfig(learning_rate=1e-3, minibatches=3))
    with pytest.raises(ValueError, match="engine"):
        rl_loop.run_rl_training(_config(start, {"engine": (("rows", 8),)}), tmp_path)


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp"])
@pytest.mark.slow
def test_other_objectives_run(start, tmp_path, name):
    objective = dataclasses.replace(PRESETS[name], kl_coef=0.01, entropy_coef=0.001)
    if name == "reinforce_pp":
        objective = dataclasses.replace(objective, reward_kl_coef=0.01)
    rl_loop.run_rl_training(_config(start, batches=1, objective=objective), tmp_path)
    (told,) = read_metrics(tmp_path)
    assert told["skipped"] == 0
    assert told["k3_ref"] >= 0
