"""Going on: changed fields, earlier checkpoints, other runs' weights, locks and damaged files."""

import dataclasses
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time

import going_on_support
import pytest
import training_run_support
from going_on_support import RATE, TEXT, allow, die, make_config, read_events, read_losses
from training_run_support import ROOT, read_metrics

from m1_jax import configlib, file_lock
from train import checkpoints, loop, resume, run_setup, workdir
from train.config import DataConfig, DataSource, OptimizerConfig, SaveConfig
from train.data import records

# Fixtures.
compilation_cache = training_run_support.compilation_cache
one_device_in_the_checkout = going_on_support.one_device_in_the_checkout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compilation_cache):
    """A run of 4 steps, with checkpoints of steps 2 and 4. Read only."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    before = os.getcwd()
    os.chdir(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_setup, "make_stage_layout", lambda stage, config: None)
        loop.run_training(make_config(), directory)
    os.chdir(before)
    return directory


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


def test_named_fields_may_change_and_the_log_has_them(run):
    longer = make_config(steps=6, rate=1e-3)
    with pytest.raises(checkpoints.ResumeError, match=f"--allow_change={RATE}") as refused:
        loop.run_training(longer, run)
    # The message's own advice, read off as a user would.
    words = str(refused.value).replace(",", "").split()
    fields = [word.removeprefix("--allow_change=") for word in words if "--allow_change" in word]
    assert loop.run_training(longer, run, allow(*fields)).step == 6
    (event,) = read_events(run, "changed")
    assert event["step"] == 4
    assert f"{RATE}: 0.003 -> 0.001" in event["changed"]
    assert "stages.0.tokens: 1024 -> 1536" in event["changed"]
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(run)}
    assert rates == pytest.approx({1: 3e-3, 2: 3e-3, 3: 3e-3, 4: 3e-3, 5: 1e-3, 6: 1e-3})
    # Without options it goes on as it is now, and the old config is refused.
    summary = loop.run_training(None, run)
    assert (summary.step, str(summary)) == (6, "the run is finished: all 6 steps were made before")
    with pytest.raises(checkpoints.ResumeError, match="another config"):
        loop.run_training(make_config(), run)


def test_a_change_that_was_allowed_survives_a_kill_before_the_next_checkpoint(run, monkeypatch):
    longer = make_config(steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", die)
        with pytest.raises(KeyboardInterrupt):
            loop.run_training(longer, run, allow("stages"))
    assert loop.run_training(None, run).step == 6
    assert len(read_events(run, "changed")) == 1


def test_a_run_goes_back_once(run, monkeypatch):
    before = read_losses(run)
    back = allow(RATE, from_step=2)
    other = make_config(rate=1e-3)
    with pytest.raises(checkpoints.ResumeError, match=r"got step 3; wanted one of \[2, 4\]"):
        loop.run_training(other, run, allow(RATE, from_step=3))
    assert loop.run_training(other, run, back).step == 4
    after = read_losses(run)
    assert [after[i] == before[i] for i in (1, 2, 3, 4)] == [True, True, True, False]
    (event,) = read_events(run, "went_back_to")
    assert (event["went_back_from"], event["went_back_to"]) == (4, 2)
    # The same command again, as after a preemption, does not lose the steps since.
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", die)
        assert loop.run_training(other, run, back).step == 4
    assert "delete" in read_events(run, "already_went_back_to")[0]["remedy"]
    # With another change it goes back again.
    assert loop.run_training(make_config(rate=2e-3), run, back).step == 4
    assert read_losses(run)[4] not in (after[4], before[4])


@pytest.mark.slow
def test_moments_are_found_where_weight_decay_begins(run):
    decayed = make_config(steps=6, optimizer=OptimizerConfig(weight_decay=0.1))
    assert loop.run_training(decayed, run, allow("stages", "optimizer")).step == 6


def test_the_advice_after_a_divergence_can_be_followed(run):
    config = make_config(steps=10, rate=1e30, max_skipped=2)
    with pytest.raises(FloatingPointError, match="2 steps in a row") as error:
        loop.run_training(config, run, allow("stages"))
    for words in ("--set=stages.0.learning_rate=RATE", "--allow_change=stages", "--from_step=N"):
        assert words in str(error.value)
    # The checkpoints since then have weights that are not finite either.
    lower = configlib.apply_override(config, "stages.0.learning_rate=1e-3")
    assert loop.run_training(lower, run, allow("stages", from_step=4)).step == 10
    assert read_losses(run)[10] < read_losses(run)[1]


def test_a_damaged_checkpoint_is_left_for_the_one_before(run):
    path = run / "checkpoints" / "4" / "run" / "metadata"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"digest": value["digest"] ^ 1}))
    longer = make_config(steps=6)
    with pytest.raises(checkpoints.ResumeError, match=r"damaged.*\(--from_step, of \[2\]\)"):
        loop.run_training(longer, run, allow("stages"))
    assert loop.run_training(longer, run, allow("stages", from_step=2)).step == 6


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


# Orbax leaves its other reads behind. They end when they are collected, which tells nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["cut", "gone", "metadata"])
def test_damaged_arrays_of_a_checkpoint_are_named(run, damage):
    state = run / "checkpoints" / "4" / "state"
    files = [file for file in state.rglob("*") if file.is_file()]
    file = max(files, key=lambda file: file.stat().st_size)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "gone":
        file.unlink()
    else:
        (state / "_METADATA").write_bytes(b"\x84")
    with (
        checkpoints.CheckpointStore(run, SaveConfig(), read_only=True) as store,
        pytest.raises(checkpoints.ResumeError, match=r"step 4 is damaged.*of \[2\]") as error,
    ):
        store.restore(4, _abstract_state())
    assert len(str(error.value)) < 500
    del error
    gc.collect()


def _abstract_state():
    """Return the state of the runs here as shapes."""
    setup = run_setup.make_train_setup(make_config())
    return setup.model.abstract_state(None, setup.step_settings(0).optimizer)


def test_a_source_may_be_read_no_more(tmp_path):
    other = DataSource("other", "demo/data/text_held_out.jsonl", "text")
    config = make_config(steps=2, data=DataConfig(sources=(TEXT, other)))
    loop.run_training(config, tmp_path / "run")
    without = configlib.apply_override(config, "stages.0.tokens=1024")
    gone = dataclasses.replace(without, data=DataConfig(sources=(TEXT,)))
    options = allow("data.sources", "stages")
    with pytest.raises(records.DataError, match="Give it weight 0") as refusal:
        loop.run_training(gone, tmp_path / "run", options)
    zero = configlib.apply_override(without, "data.sources.1.weight=0")
    with pytest.raises(checkpoints.ResumeError, match="data.sources.1.weight: 1.0 -> 0.0"):
        loop.run_training(zero, tmp_path / "run", allow("stages"))
    # As the message says.
    advice = re.findall(r"--allow_change=([\w.]*\w)", str(refusal.value))
    assert loop.run_training(zero, tmp_path / "run", allow("stages", *advice)).step == 4


def test_a_source_with_weights_by_step_may_be_read_no_more(tmp_path):
    other = DataSource("other", "demo/data/text_held_out.jsonl", "text")
    data = DataConfig(sources=(TEXT, other), weights=((0, ((TEXT.name, 1.0), ("other", 1.0))),))
    config = make_config(steps=2, data=data)
    loop.run_training(config, tmp_path / "run")
    longer = configlib.apply_override(config, "stages.0.tokens=1024")
    zero = dataclasses.replace(data, weights=((0, ((TEXT.name, 1.0), ("other", 0.0))),))
    gone = dataclasses.replace(data, sources=(TEXT,), weights=((0, ((TEXT.name, 1.0),)),))
    gone_config = dataclasses.replace(longer, data=gone)
    options = allow("data.sources", "data.weights", "stages")
    with pytest.raises(records.DataError, match="Give it weight 0") as refusal:
        loop.run_training(gone_config, tmp_path / "run", options)
    advice = re.findall(r"--allow_change=([\w.]*\w)", str(refusal.value))
    zero_config = dataclasses.replace(longer, data=zero)
    assert loop.run_training(zero_config, tmp_path / "run", allow("stages", *advice)).step == 4


def test_a_field_that_does_not_exist_is_refused_before_anything(run):
    with pytest.raises(configlib.ConfigFileError, match="did you mean learning_rate"):
        loop.run_training(None, run, allow("stages.0.learning_rat"))
    with pytest.raises(configlib.ConfigFileError, match="one of the 1 items"):
        loop.run_training(None, run, allow("stages.1"))


def test_the_checkpoints_own_config_is_compared(run, tmp_path):
    elsewhere = make_config(rate=1e-3, save=SaveConfig(directory=str(run), every_steps=2))
    with pytest.raises(checkpoints.ResumeError, match=f"at step 4: {RATE}: 0.003 -> 0.001"):
        loop.run_training(elsewhere, tmp_path / "new")
    (run / resume.CONFIG_FILE).unlink()
    with pytest.raises(checkpoints.ResumeError, match="holds checkpoints of another config"):
        loop.run_training(make_config(rate=1e-3), run)
    assert loop.run_training(make_config(), run).step == 4
    # Those of another kind of run.
    path = run / "checkpoints" / "4" / "run" / "metadata"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | {"config": {"rollout": {}}}))
    with pytest.raises(checkpoints.ResumeError, match="has no field 'rollout'"):
        loop.run_training(make_config(), run)


@pytest.mark.parametrize("moments", [False, True])
def test_a_run_begins_with_the_weights_of_another(finished, tmp_path, moments):
    options = resume.ResumeOptions(init_from=str(finished), from_step=2, init_moments=moments)
    # At the rate 0 the loss is that of the weights.
    config = make_config(steps=1, rate=0.0)
    assert loop.run_training(config, tmp_path / "new", options).step == 1
    assert read_losses(tmp_path / "new")[1] < read_losses(finished)[1]
    (event,) = read_events(tmp_path / "new", "init_from")
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
    config = make_config(steps=1, rate=0.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainSession, "_run_stage", die)
        with pytest.raises(KeyboardInterrupt):
            loop.run_training(config, tmp_path / "new", options)
    loop.run_training(None, tmp_path / "new")
    assert read_losses(tmp_path / "new")[1] < read_losses(finished)[1] - 0.05


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        ("nowhere", "holds no other run"),
        ("new", "holds no other run"),
        ("gs://b/run", "Mount the bucket"),
    ],
)
def test_first_weights_that_are_not_there_are_refused(tmp_path, directory, words):
    path = directory if "://" in directory else str(tmp_path / directory)
    with pytest.raises(ValueError, match=words):
        loop.run_training(make_config(), tmp_path / "new", resume.ResumeOptions(init_from=path))
    with pytest.raises(ValueError, match="init_moments"):
        resume.ResumeOptions(init_moments=True)


def test_a_second_process_is_refused_at_once(run, tmp_path):
    with (
        file_lock.hold_lock(run / workdir.LOCK_NAME, "trains in"),
        pytest.raises(file_lock.LockError, match=f"process {os.getpid()} on .* trains in it"),
    ):
        loop.run_training(make_config(), run)
    elsewhere = make_config(save=SaveConfig(directory=str(run), every_steps=2))
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
        # Orbax does it in a thread, for which it waits at the next save.
        deadline = time.monotonic() + 60
        while unfinished.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not unfinished.exists()


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_reader_tells_of_a_checkpoint_that_its_run_deletes(run, is_whole):
    steps = run / "checkpoints"
    with (
        checkpoints.CheckpointStore(run, SaveConfig(keep=1), read_only=True) as reader,
        checkpoints.CheckpointStore(run, SaveConfig(keep=2), read_only=True) as other,
    ):
        shutil.rmtree(steps / "2" if is_whole else steps / "2" / "data")
        words = r"step 2 was deleted while it was read.* save\.keep=1.*newest of "
        with pytest.raises(checkpoints.ResumeError, match=words):
            reader.read_info(2)
        # A run that keeps two has not deleted the older one.
        words = "was deleted" if is_whole else r"step 2 is damaged.*--from_step, of \[4\]"
        with pytest.raises(checkpoints.ResumeError, match=words):
            other.read_info(2)
        (steps / "4" / "run" / "metadata").unlink()
        with pytest.raises(checkpoints.ResumeError, match="step 4 is damaged"):
            reader.read_info(4)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_tells_of_arrays_that_its_run_deletes(run):
    with checkpoints.CheckpointStore(run, SaveConfig(keep=1), read_only=True) as reader:
        for file in (run / "checkpoints" / "2" / "state").rglob("d/*"):
            file.unlink()
        with pytest.raises(checkpoints.ResumeError, match="step 2 was deleted while") as error:
            reader.restore(2, _abstract_state())
    del error
    gc.collect()


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
