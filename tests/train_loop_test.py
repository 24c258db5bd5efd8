"""The training loop: stages, resuming to the bit, signals, evaluation, and errors before work."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import signal_support
import training_run_support
from training_run_support import MODEL, ROOT, Cache, read_metrics

from m1_jax import configlib
from m1_jax import params as params_lib
from train import checkpoints, loop, metrics, optim, run_setup, sft, step
from train.config import (
    DataConfig,
    DataSource,
    EvaluationConfig,
    LogConfig,
    SaveConfig,
    TrainConfig,
    TrainStage,
)
from train.data import records

# Fixtures.
compilation_cache = training_run_support.compilation_cache

ROWS, LENGTH = 8, 32


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Run in the checkout; on one device, but for stages that name a mesh."""
    monkeypatch.chdir(ROOT)
    real = run_setup.make_stage_layout
    alone = lambda stage, config: real(stage, config) if stage.mesh else None  # noqa: E731
    monkeypatch.setattr(run_setup, "make_stage_layout", alone)


def _stage(steps, length=LENGTH, rows=ROWS, **kwargs):
    kwargs = {"learning_rate": 3e-3} | kwargs
    return TrainStage(seq_len=length, rows=rows, tokens=steps * rows * length, **kwargs)


def _config(tmp_path, *stages, **kwargs):
    text = DataSource("stories", "demo/data/text.jsonl", "text")
    fields = {
        "model": MODEL,
        "tokenizer": "demo/data/tokenizer",
        "dtype": "float32",
        "data": DataConfig(sources=(text,)),
        "save": SaveConfig(every_steps=2),
        "log": LogConfig(every_steps=1, samples=True),
        "compilation_cache": Cache.directory,
    }
    return TrainConfig(stages=stages or (_stage(6),), **fields | kwargs)


def _losses(workdir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(workdir)]


def _weights(workdir, config):
    with checkpoints.CheckpointStore(workdir, config.save) as saved:
        step = saved.latest_step()
        position = saved.read_info(step)
    return step, position.digest, position.data


def _state():
    model = params_lib.random_model(MODEL, jax.random.key(0), "float32")
    return step.init_state(model, optim.AdamW(1.0))


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path, monkeypatch):
    config = _config(tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert loop.run_training(config, whole).step == 6
    with monkeypatch.context() as patch:
        signal_support.stop_after(patch, 3)
        summary = loop.run_training(config, parts)
    assert (summary.step, summary.stopped_by) == (3, signal.SIGTERM)
    assert loop.run_training(None, parts).step == 6  # the workdir is all it needs
    assert _losses(whole) == _losses(parts)
    samples = [read_metrics(path, name=metrics.SAMPLES_FILE) for path in (whole, parts)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 6
    assert _weights(whole, config) == _weights(parts, config)


def test_a_killed_run_makes_its_lost_steps_again(tmp_path, monkeypatch):
    config = _config(tmp_path, save=SaveConfig(every_steps=4))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run_training(config, whole)

    real = loop.TrainSession._log_step

    def dies(self, index, step, *rest):
        real(self, index, step, *rest)
        if step == 5:
            raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_log_step", dies)
        with pytest.raises(OSError, match="killed"):
            loop.run_training(config, parts)
    with (parts / metrics.METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "ki')  # a line cut off
    assert loop.run_training(config, parts).step == 6
    assert _losses(whole) == _losses(parts)
    assert _weights(whole, config) == _weights(parts, config)


@pytest.mark.long
def test_another_number_of_devices_goes_on_with_the_same_samples(tmp_path, monkeypatch):
    one = _stage(6, mesh=(("fsdp", 4), ("expert", 1), ("data", 2)), rows=8)
    other = dataclasses.replace(one, mesh=(("expert", 4), ("tensor", 2)))
    config = _config(tmp_path, one)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run_training(config, whole)
    with monkeypatch.context() as patch:
        signal_support.stop_after(patch, 3)
        loop.run_training(config, parts)
    loop.run_training(dataclasses.replace(config, stages=(other,)), parts)
    np.testing.assert_allclose(_losses(whole), _losses(parts), rtol=2e-4)
    assert read_metrics(whole, name=metrics.SAMPLES_FILE) == read_metrics(
        parts, name=metrics.SAMPLES_FILE
    )


@pytest.mark.slow
def test_stages_change_length_rows_rate_and_mesh_and_no_sample_is_lost(tmp_path, monkeypatch):
    stages = (
        _stage(3, warmup_tokens=2 * ROWS * LENGTH, mesh=(("fsdp", 4), ("data", 2)), rows=8),
        _stage(3, length=64, rows=8, learning_rate=1e-3, shape="linear",
               mesh=(("fsdp", 4), ("context", 2))),
    )  # fmt: skip
    config = _config(tmp_path, *stages)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run_training(config, whole)
    rates = [r["learning_rate"] for r in read_metrics(whole)]
    per, per2 = 3e-3, (1e-3 - 3e-3) / 3
    np.testing.assert_allclose(
        rates, [3e-3 * 0.5, per, per, per, per + per2, per + 2 * per2], rtol=1e-5
    )  # 8 rows to a step: the warm-up is one step long
    assert [r["stage"] for r in read_metrics(whole)] == [0, 0, 0, 1, 1, 1]
    with monkeypatch.context() as patch:
        signal_support.stop_after(patch, 3)
        loop.run_training(config, parts)
    loop.run_training(config, parts)
    assert _losses(whole) == _losses(parts)
    lines = read_metrics(whole, name=metrics.SAMPLES_FILE)
    seen = [sample for line in lines for row in line["samples"] for sample in row]
    assert len(set(seen)) > 20


def test_evaluation_tells_the_loss_of_each_source(tmp_path):
    held_out = DataSource("held_out", "demo/data/text_held_out.jsonl", "text")
    config = _config(
        tmp_path, _stage(2), evaluation=EvaluationConfig((held_out,), every_steps=2, batches=2)
    )
    loop.run_training(config, tmp_path / "run")
    (record,) = read_metrics(tmp_path / "run", "eval")
    assert record["loss"] == pytest.approx(record["loss/held_out"])
    assert record["loss"] == pytest.approx(record["loss_from/0"])
    assert 4 < record["loss"] < 8


def test_steps_that_are_not_finite_are_told_and_end_the_run(tmp_path):
    config = _config(tmp_path, max_skipped=2)
    broken = dataclasses.replace(config, model=dataclasses.replace(MODEL, initializer_range=1e30))
    with pytest.raises(FloatingPointError, match="2 steps in a row without a finite gradient"):
        loop.run_training(broken, tmp_path / "run")
    events = read_metrics(tmp_path / "run", "event")
    assert [e["not_finite"] for e in events] == ["skipped", "skipped"]


def test_a_damaged_checkpoint_is_found(tmp_path):
    config = _config(tmp_path, _stage(2))
    loop.run_training(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "2" / "run" / "metadata"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"digest": record["digest"] ^ 1}))
    with (
        checkpoints.CheckpointStore(tmp_path / "run", config.save) as saved,
        pytest.raises(checkpoints.ResumeError, match="damaged"),
    ):
        saved.restore(2, _state())


def test_the_digest_sees_every_bit_and_no_layout():
    state = _state()
    one = int(checkpoints.digest_state(state))
    kernel = state.model.head.kernel
    value = kernel[...]
    kernel.set_value(value.at[3, 5].add(1e-7))
    assert int(checkpoints.digest_state(state)) != one
    swapped = value.at[0, 0].set(value[0, 1]).at[0, 1].set(value[0, 0])
    kernel.set_value(swapped)
    assert int(checkpoints.digest_state(state)) != one


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: {"stages": (dataclasses.replace(c.stages[0], learning_rate=1.0),)},
         checkpoints.ResumeError, "stages.0.learning_rate: 0.003 -> 1.0"),
        (lambda c: {"seed": 5}, checkpoints.ResumeError, "seed: 0 -> 5"),
    ],
)  # fmt: skip
def test_a_workdir_of_another_run_is_refused(tmp_path, change, error, words):
    config = _config(tmp_path, _stage(1))
    loop.run_training(config, tmp_path / "run")
    with pytest.raises(error, match=words):
        loop.run_training(dataclasses.replace(config, **change(config)), tmp_path / "run")


def test_data_that_changed_since_the_checkpoint_is_refused(tmp_path):
    file = tmp_path / "text.jsonl"
    lines = (ROOT / "demo/data/text.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    config = _config(
        tmp_path, _stage(2), data=DataConfig(sources=(DataSource("own", str(file), "text"),))
    )
    loop.run_training(config, tmp_path / "run")
    file.write_text("".join(lines[1:]))
    with pytest.raises(records.DataError, match="changed|fingerprint"):
        loop.run_training(config, tmp_path / "run")


def test_errors_come_before_the_first_step(tmp_path):
    def refused(words, error=ValueError, **kwargs):
        with pytest.raises(error, match=words):
            loop.run_training(_config(tmp_path, **kwargs), tmp_path / "none")
        assert not (tmp_path / "none" / "checkpoints" / "1").exists()

    refused("vocabulary ends at 99", model=dataclasses.replace(MODEL, vocab_size=100))
    refused("nowhere.jsonl", data=DataConfig(sources=(DataSource("x", "nowhere.jsonl", "text"),)))
    refused("nowhere does not exist", checkpoint="nowhere", model=None)
    with pytest.raises(checkpoints.ResumeError, match="holds no run"):
        loop.run_training(None, tmp_path / "none_there")
    text = DataSource("stories", "demo/data/text.jsonl", "text")
    with pytest.raises(ValueError, match="wanted 'chat'"):
        sft.run(_config(tmp_path, data=DataConfig(sources=(text,))), tmp_path / "none")


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "configs").glob("*.py")))
def test_every_config_loads_and_survives_json(name):
    config = configlib.load_config(str(ROOT / "configs" / name))
    assert configlib.from_json(type(config), configlib.to_json(config)) == config


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments",
    [
        ["--kills=3", "--steps=24", "--devices=1,2"],
        ["--kills=4", "--steps=24", "--workers=0,2"],
    ],
)
def test_a_run_that_is_killed_again_and_again_is_the_same_run(arguments):
    command = [sys.executable, "benchmarks/kill_training.py", *arguments]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
