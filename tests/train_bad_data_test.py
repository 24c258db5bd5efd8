"""Data that ends a run or teaches nothing: the steps made are saved, idle steps are bounded."""

import dataclasses
import json

import going_on_support
import numpy as np
import pytest
import training_run_support
from going_on_support import TEXT, make_config, read_events, read_losses
from training_run_support import ROOT, read_metrics

from train import checkpoints, loop
from train.config import DataConfig, DataSource, EvaluationConfig, SaveConfig
from train.data import records

# Fixtures.
compilation_cache = training_run_support.compilation_cache
one_device_in_the_checkout = going_on_support.one_device_in_the_checkout


def _write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_steps_made_are_saved_before_an_error_of_the_data(tmp_path):
    lines = (ROOT / "demo/data/text.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "text.jsonl"
    lines[len(lines) // 2] = '{"text": 5}\n'
    file.write_text("".join(lines))
    data = DataConfig(sources=(DataSource("own", str(file), "text"),), lanes=8, lookahead=1)
    config = make_config(steps=400, data=data, save=SaveConfig(every_steps=1000))
    with pytest.raises(records.DataError, match=r"text\.jsonl"):
        loop.run_training(config, tmp_path / "run")
    (event,) = read_events(tmp_path / "run", "data_error")
    with checkpoints.CheckpointStore(tmp_path / "run", config.save, read_only=True) as store:
        assert store.latest_step() == event["step"] == max(read_losses(tmp_path / "run"))


def test_steps_made_are_saved_before_an_error_of_held_out_data(tmp_path, monkeypatch):
    # No token of the first evaluation has a weight.
    monkeypatch.setattr(
        loop.evaluate, "sum_losses", lambda *_: np.zeros((2, 1, loop.evaluate.NUM_BUCKETS))
    )
    config = make_config(
        evaluation=EvaluationConfig((TEXT,), every_steps=2, batches=1),
        save=SaveConfig(every_steps=1000),
    )
    with pytest.raises(records.DataError, match="got no token to predict in 1 batches"):
        loop.run_training(config, tmp_path / "run")
    with checkpoints.CheckpointStore(tmp_path / "run", config.save, read_only=True) as store:
        assert store.latest_step() == 2
    # The advice: other sources or batches, which may change when a run goes on.
    changed = dataclasses.replace(config, evaluation=EvaluationConfig())
    assert loop.run_training(changed, tmp_path / "run").step == 4


def make_idle_config(tmp_path, **fields):
    """Return the config of a run whose rows have no token to learn."""
    turns = [
        {"role": "user", "content": "word " * 6000},
        {"role": "assistant", "content": "c"},
    ]
    chat = DataSource("chat", _write(tmp_path / "chat.jsonl", {"messages": turns}), "chat")
    return make_config(data=DataConfig(sources=(chat,), overlong="split", lanes=8), **fields)


def test_steps_without_a_token_to_learn_are_told_and_bounded(tmp_path):
    config = make_idle_config(tmp_path, steps=3, max_skipped=3, save=SaveConfig(every_steps=1000))
    with pytest.raises(records.DataError, match="3 steps in a row without a token to learn"):
        loop.run_training(config, tmp_path / "run")
    # The advice: the same command with a larger bound, which needs no --allow_change.
    summary = loop.run_training(dataclasses.replace(config, max_skipped=9), tmp_path / "run")
    assert (summary.step, summary.num_skipped) == (3, 3)
    assert "3 of them skipped" in str(summary)
    lines = read_metrics(tmp_path / "run")
    assert all("loss" not in line and line["no_signal"] for line in lines)
    assert len(read_events(tmp_path / "run", "no_signal")) == 3


def test_steps_in_a_row_are_counted_over_restarts(tmp_path):
    config = make_idle_config(tmp_path, steps=5, max_skipped=3, save=SaveConfig(every_steps=2))
    for _ in range(2):
        with pytest.raises(records.DataError, match="step 3: 3 steps in a row"):
            loop.run_training(config, tmp_path / "run")
    # The second start made the third step alone.
    assert [event["step"] for event in read_events(tmp_path / "run", "no_signal")] == [1, 2, 3]
    with pytest.raises(records.DataError, match="step 4: 4 steps in a row"):
        loop.run_training(dataclasses.replace(config, max_skipped=4), tmp_path / "run")
