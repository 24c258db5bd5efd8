"""Going on: changed fields, earlier checkpoints, other runs' weights, locks, idle steps."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import training_run_support
from training_run_support import MODEL, ROOT, Cache, read_metrics

from m1_jax import configlib, file_lock
from train import checkpoints, loop, resume, run_setup, workdir
from train.config import (
    DataConfig,
    DataSource,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    SaveConfig,
    TrainConfig,
    TrainStage,
)
from train.data import records

# Fixtures.
compilation_cache = training_run_support.compilation_cache

ROWS, LENGTH = 8, 32
TEXT = DataSource("stories", "demo/data/text.jsonl", "text")
RATE = "stages.0.learning_rate"


@pytest.fixture(autouse=True)
def _one_device_in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run_setup, "make_stage_layout", lambda stage, config: None)


def _config(steps=4, rate=3e-3, **kwargs):
    stage = TrainStage(seq_len=LENGTH, rows=ROWS, tokens=steps * ROWS * LENGTH, learning_rate=rate)
    fields = {
        "stages": (stage,),
        "model": MODEL,
        "tokenizer": "demo/data/tokenizer",
        "dtype": "float32",
        "data": DataConfig(sources=(TEXT,)),
        "save": SaveConfig(every_steps=2, keep=4),
        "log": LogConfig(every_steps=1),
        "compilation_cache": Cache.directory,
    }
    return TrainConfig(**fields | kwargs)


def _allow(*fields, **kwargs):
    return resume.ResumeOptions(allow_change=fields, **kwargs)


def _die(*_):
    """Stand in for a run's steps, and end it as a kill does."""
    raise KeyboardInterrupt


def _losses(directory):
    return {line["step"]: line["loss"] for line in read_metrics(directory)}


def _events(directory, name):
    return [event for event in read_metrics(directory, "event") if name in event]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compilation_cache):
    """A run of 4 steps, with checkpoints of steps 2 and 4. Read only."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    before = os.getcwd()
    os.chdir(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "make_stage_layout", lambda stage, config: None)
        loop.run_training(_config(), directory)
    os.chdir(before)
    return directory


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_named_fields_may_change_and_the_log_has_them(run):
    longer = _config(steps=6, rate=1e-3)
    with pytest.raises(checkpoints.ResumeError, match=f"--allow_change={RATE}") as refused:
        loop.run_training(longer, run)
    # The message's own advice, read off as a user would.
    words = str(refused.value).replace(",", "").split()
    fields = [word.removeprefix("--allow_change=") for word in words if "--allow_change" in word]
    assert loop.run_training(longer, run, _allow(*fields)).step == 6
    (event,) = _events(run, "changed")
    assert event["step"] == 4
    assert f"{RATE}: 0.003 -> 0.001" in event["changed"]
    assert "stages.0.tokens: 1024 -> 1536" in event["changed"]
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run)}
    assert rates == pytest.approx({1: 3e-3, 2: 3e-3, 3: 3e-3, 4: 3e-3, 5: 1e-3, 6: 1e-3})
    # Without options it goes on as it is now, and the old config is refused.
    summary = loop.run_training(None, run)
    assert (summary.step, str(summary)) == (6, "6 steps were made before, and none is left")
    with pytest.raises(checkpoints.ResumeError, match="another config"):
        loop.run_training(_config(), run)


def test_a_change_that_was_allowed_survives_a_kill_before_the_next_checkpoint(run, monkeypatch):
    longer = _config(steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", _die)
        with pytest.raises(KeyboardInterrupt):
            loop.run_training(longer, run, _allow("stages"))
    assert loop.run_training(None, run).step == 6
    assert len(_events(run, "changed")) == 1


def test_a_run_goes_back_once(run, monkeypatch):
    before = _losses(run)
    back = _allow(RATE, from_step=2)
    other = _config(rate=1e-3)
    with pytest.raises(checkpoints.ResumeError, match=r"got step 3; wanted one of \[2, 4\]"):
        loop.run_training(other, run, _allow(RATE, from_step=3))
    assert loop.run_training(other, run, back).step == 4
    after = _losses(run)
    assert [after[i] == before[i] for i in (1, 2, 3, 4)] == [True, True, True, False]
    (event,) = _events(run, "went_back_to")
    assert (event["went_back_from"], event["went_back_to"]) == (4, 2)
    # The same command again, as after a preemption, does not lose the steps since.
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", _die)
        assert loop.run_training(other, run, back).step == 4
    assert "delete" in _events(run, "already_went_back_to")[0]["remedy"]
    # With another change it goes back again.
    assert loop.run_training(_config(rate=2e-3), run, back).step == 4
    assert _losses(run)[4] not in (after[4], before[4])


@pytest.mark.slow
def test_moments_are_found_where_weight_decay_begins(run):
    decayed = _config(steps=6, optimizer=OptimizerConfig(weight_decay=0.1))
    assert loop.run_training(decayed, run, _allow("stages", "optimizer")).step == 6


def test_the_advice_after_a_divergence_can_be_followed(run):
    config = _config(steps=10, rate=1e30, max_skipped=2)
    with pytest.raises(FloatingPointError, match="2 steps in a row") as error:
        loop.run_training(config, run, _allow("stages"))
    for words in ("--set=stages.0.learning_rate=RATE", "--allow_change=stages", "--from_step=N"):
        assert words in str(error.value)
    # The checkpoints since then have weights that are not finite either.
    lower = configlib.apply_override(config, "stages.0.learning_rate=1e-3")
    assert loop.run_training(lower, run, _allow("stages", from_step=4)).step == 10
    assert _losses(run)[10] < _losses(run)[1]


def test_a_damaged_checkpoint_is_left_for_the_one_before(run):
    path = run / "checkpoints" / "4" / "run" / "metadata"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"digest": value["digest"] ^ 1}))
    longer = _config(steps=6)
    with pytest.raises(checkpoints.ResumeError, match=r"damaged.*\(--from_step, of \[2\]\)"):
        loop.run_training(longer, run, _allow("stages"))
    assert loop.run_training(longer, run, _allow("stages", from_step=2)).step == 6


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", r"config\.json is damaged"),
        ("config.json", "[" * 9999, r"config\.json is damaged"),
        ("config.json", "5", "got 5; wanted an object"),
        ("resume.json", '{"step', r"resume\.json is damaged"),
        ("checkpoints/4/run/metadata", '{"conf', r"step 4 is damaged.*of \[2\]"),
        ("checkpoints/4/data/metadata", "", r"step 4 is damaged.*of \[2\]"),
    ],
)
def test_damaged_files_of_a_run_are_named(run, name, text, words):
    (run / name).write_text(text)
    with pytest.raises(checkpoints.ResumeError, match=words) as error:
        loop.run_training(None, run)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_source_may_be_read_no_more(tmp_path):
    other = DataSource("other", "demo/data/text_held_out.jsonl", "text")
    config = _config(steps=2, data=DataConfig(sources=(TEXT, other)))
    loop.run_training(config, tmp_path / "run")
    without = configlib.apply_override(config, "stages.0.tokens=1024")
    gone = dataclasses.replace(without, data=DataConfig(sources=(TEXT,)))
    options = _allow("data.sources", "stages")
    with pytest.raises(records.DataError, match="Give it weight 0"):
        loop.run_training(gone, tmp_path / "run", options)
    zero = configlib.apply_override(without, "data.sources.1.weight=0")
    assert loop.run_training(zero, tmp_path / "run", options).step == 4


def test_a_field_that_does_not_exist_is_refused_before_anything(run):
    with pytest.raises(configlib.ConfigFileError, match="did you mean learning_rate"):
        loop.run_training(None, run, _allow("stages.0.learning_rat"))
    with pytest.raises(configlib.ConfigFileError, match="one of the 1 items"):
        loop.run_training(None, run, _allow("stages.1"))


def test_the_checkpoints_own_config_is_compared(run, tmp_path):
    elsewhere = _config(rate=1e-3, save=SaveConfig(directory=str(run), every_steps=2))
    with pytest.raises(checkpoints.ResumeError, match=f"at step 4: {RATE}: 0.003 -> 0.001"):
        loop.run_training(elsewhere, tmp_path / "new")
    (run / resume.CONFIG_FILE).unlink()
    with pytest.raises(checkpoints.ResumeError, match="holds checkpoints of another config"):
        loop.run_training(_config(rate=1e-3), run)
    assert loop.run_training(_config(), run).step == 4
    # Those of another kind of run.
    path = run / "checkpoints" / "4" / "run" / "metadata"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"config": {"rollout": {}}}))
    with pytest.raises(checkpoints.ResumeError, match="has no field 'rollout'"):
        loop.run_training(_config(), run)


@pytest.mark.parametrize("moments", [False, True])
def test_a_run_begins_with_the_weights_of_another(finished, tmp_path, moments):
    options = resume.ResumeOptions(init_from=str(finished), from_step=2, init_moments=moments)
    # At the rate 0 the loss is that of the weights.
    config = _config(steps=1, rate=0.0)
    assert loop.run_training(config, tmp_path / "new", options).step == 1
    assert _losses(tmp_path / "new")[1] < _losses(finished)[1]
    (event,) = _events(tmp_path / "new", "init_from")
    assert event["init_from"] == f"{finished} step 2"
    with checkpoints.CheckpointStore(tmp_path / "new", SaveConfig(), read_only=True) as store:
        metadata = store._manager.item_metadata(1)["state"].tree
        assert "moments.count" in metadata
    # The same command goes on, and so does one without the option.
    assert loop.run_training(config, tmp_path / "new", options).step == 1
    assert loop.run_training(None, tmp_path / "new").step == 1
    other = dataclasses.replace(options, init_moments=not moments)
    with pytest.raises(checkpoints.ResumeError, match="a run that began with"):
        loop.run_training(config, tmp_path / "new", other)


def test_first_weights_are_kept_until_the_first_checkpoint(finished, tmp_path, monkeypatch):
    options = resume.ResumeOptions(init_from=str(finished))
    config = _config(steps=1, rate=0.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", _die)
        with pytest.raises(KeyboardInterrupt):
            loop.run_training(config, tmp_path / "new", options)
    loop.run_training(None, tmp_path / "new")
    assert _losses(tmp_path / "new")[1] < _losses(finished)[1] - 0.05


@pytest.mark.parametrize(
    ("directory", "words"),
    [("nowhere", "holds no other run"), ("new", "holds no other run"), ("gs://b/run", "mounted")],
)
def test_first_weights_that_are_not_there_are_refused(tmp_path, directory, words):
    path = directory if "://" in directory else str(tmp_path / directory)
    with pytest.raises(ValueError, match=words):
        loop.run_training(_config(), tmp_path / "new", resume.ResumeOptions(init_from=path))
    with pytest.raises(ValueError, match="init_moments"):
        resume.ResumeOptions(init_moments=True)


def test_a_second_process_is_refused_at_once(run, tmp_path):
    with (
        file_lock.hold_lock(run / workdir.LOCK_NAME, "trains in"),
        pytest.raises(file_lock.LockError, match=f"process {os.getpid()} on .* trains in it"),
    ):
        loop.run_training(_config(), run)
    elsewhere = _config(save=SaveConfig(directory=str(run), every_steps=2))
    with (
        file_lock.hold_lock(run / workdir.LOCK_NAME, "trains in"),
        pytest.raises(file_lock.LockError, match="trains in it"),
    ):
        loop.run_training(elsewhere, tmp_path / "new")
    # Held by nobody, it goes on. Its own directory may also be named as that of its checkpoints.
    assert loop.run_training(elsewhere, run).step == 4
    assert not (run / "run.lock").exists()


def test_a_reader_leaves_what_another_process_is_writing(run):
    unfinished = run / "checkpoints" / "6.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with checkpoints.CheckpointStore(run, SaveConfig(keep=1), read_only=True) as store:
        assert store.all_steps() == [2, 4]
    assert unfinished.exists()
    with checkpoints.CheckpointStore(run, SaveConfig(keep=4)):
        assert not unfinished.exists()


def _write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_steps_made_are_saved_before_an_error_of_the_data(tmp_path):
    lines = (ROOT / "demo/data/text.jsonl").read_text().splitlines(keepends=True)
    file = tmp_path / "text.jsonl"
    lines[len(lines) // 2] = '{"text": 5}\n'
    file.write_text("".join(lines))
    data = DataConfig(sources=(DataSource("own", str(file), "text"),), lanes=8, lookahead=1)
    config = _config(steps=400, data=data, save=SaveConfig(every_steps=1000))
    with pytest.raises(records.DataError, match=r"text\.jsonl"):
        loop.run_training(config, tmp_path / "run")
    (event,) = _events(tmp_path / "run", "data_error")
    with checkpoints.CheckpointStore(tmp_path / "run", config.save, read_only=True) as store:
        assert store.latest_step() == event["step"] == max(_losses(tmp_path / "run"))


def test_steps_made_are_saved_before_an_error_of_held_out_data(tmp_path, monkeypatch):
    # No token of the first evaluation has a weight.
    monkeypatch.setattr(
        loop.evaluate, "sum_losses", lambda *_: np.zeros((2, 1, loop.evaluate.NUM_BUCKETS))
    )
    config = _config(
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


def test_steps_without_a_token_to_learn_are_told_and_bounded(tmp_path):
    turns = [
        {"role": "user", "content": "word " * 6000},
        {"role": "assistant", "content": "c"},
    ]
    chat = DataSource("chat", _write(tmp_path / "chat.jsonl", {"messages": turns}), "chat")
    config = _config(
        steps=3,
        data=DataConfig(sources=(chat,), overlong="split", lanes=8),
        max_skipped=3,
        save=SaveConfig(every_steps=1000),
    )
    with pytest.raises(records.DataError, match="3 steps in a row without a token to learn"):
        loop.run_training(config, tmp_path / "run")
    # The advice: the same command with a larger bound, which needs no --allow_change.
    summary = loop.run_training(dataclasses.replace(config, max_skipped=9), tmp_path / "run")
    assert (summary.step, summary.num_skipped) == (3, 3)
    assert "3 of them skipped" in str(summary)
    lines = read_metrics(tmp_path / "run")
    assert all("loss" not in line and line["no_signal"] for line in lines)
    assert len(_events(tmp_path / "run", "no_signal")) == 3


@pytest.mark.slow
def test_the_command_takes_the_options_and_tells_the_owner_of_a_lock(run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import json, pathlib\n"
        "from m1_jax import configlib\n"
        "from train.config import TrainConfig\n"
        f"def get_config():\n"
        f"  text = pathlib.Path({str(run / 'config.json')!r}).read_text()\n"
        "  return configlib.from_json(TrainConfig, json.loads(text))\n"
    )
    command = [sys.executable, "-m", "train.pretrain", f"--config={config}", f"--workdir={run}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ".", "XLA_FLAGS": ""}

    def start(*arguments):
        return subprocess.run(
            [*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False
        )

    with file_lock.hold_lock(run / workdir.LOCK_NAME, "trains in"):
        done = start()
    assert done.returncode == 1
    assert f"process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr
    change = [f"--set={RATE}=1e-3", f"--allow_change={RATE}", "--from_step=2"]
    done = start(*change)
    assert done.returncode == 0, done.stderr
    assert "4 steps" in done.stderr
