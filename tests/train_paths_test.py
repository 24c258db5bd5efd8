"""Paths of training commands: `~` is the home, and buckets are refused before anything is made."""

import dataclasses
import os
import shutil

import pytest
from training_run_support import ROOT

from m1_jax import configlib, local_path
from train import checkpoints, export, loop, prepare, resume, run_model
from train.config import SaveConfig

BUCKETS = ["gs://bucket/x", "s3://bucket/x", "gs:/bucket/x"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home and, beside it, an empty directory to work in."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_home_is_where_a_run_lies(home, monkeypatch):
    """Shells leave `--workdir=~/run` as it is."""
    started = []
    monkeypatch.setattr(
        loop.workdir_lib, "open_and_run", lambda *arguments: started.append(arguments[3])
    )
    loop.run_training(None, "~/run")
    assert started == [home / "run"]
    assert resume.ResumeOptions(init_from="~/run").init_directory == home / "run"
    saved = checkpoints.find_save_directory(home / "run", SaveConfig(directory="~/saved"))
    assert str(saved) == str(home / "saved")
    assert os.listdir() == []


def test_the_home_is_where_config_checkpoint_and_tokenizer_lie(home):
    shutil.copytree(ROOT / "demo/data/tokenizer", home / "tokenizer")
    shutil.copy(ROOT / "configs/tiny_pretrain.py", home)
    config = configlib.load_config(
        "~/tiny_pretrain.py", ["tokenizer=~/tokenizer", "model.vocab_size=512"]
    )
    assert run_model.make_run_model(config, config.model).tokenizer.vocab_size == 512


@pytest.mark.parametrize("path", BUCKETS)
def test_buckets_are_refused_and_nothing_is_made(home, path):
    config = configlib.load_config(str(ROOT / "configs/tiny_pretrain.py"))
    options = {"workdir": "~/run", "dst": "~/exported"}
    for name in options:
        with pytest.raises(local_path.PathError, match=f"{name}: got '{path}'; wanted a local"):
            export.run(**{**options, name: path})
    with pytest.raises(local_path.PathError, match="workdir: got"):
        loop.run_training(config, path)
    with pytest.raises(local_path.PathError, match="init_from: got"):
        resume.ResumeOptions(init_from=path)
    for name, changes in (("checkpoint", {"model": None}), ("tokenizer", {})):
        changed = dataclasses.replace(config, **{name: path}, **changes)
        with pytest.raises(local_path.PathError, match=f"{name}: got"):
            run_model.make_run_model(changed, changed.model)
    with pytest.raises(local_path.PathError, match="--dst: got"):
        prepare.PrepareConfig(src=str(home / "*.jsonl"), dst=path)
    assert os.listdir() == []


def test_a_bucket_may_have_the_checkpoints(home):
    saved = checkpoints.find_save_directory(home, SaveConfig(directory="gs://bucket/run"))
    assert str(saved) == "gs://bucket/run"
