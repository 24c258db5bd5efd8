"""Tiny runs that go on, for tests: their config, options, losses and events."""

import pytest
from training_run_support import MODEL, ROOT, Cache, read_metrics

from train import resume, run_setup
from train.config import DataConfig, DataSource, LogConfig, SaveConfig, TrainConfig, TrainStage

ROWS, LENGTH = 8, 32
TEXT = DataSource("stories", "demo/data/text.jsonl", "text")
RATE = "stages.0.learning_rate"


@pytest.fixture(autouse=True)
def one_device_in_the_checkout(monkeypatch):
    """Run in the checkout and on one device. A test module takes the fixture by assignment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run_setup, "make_stage_layout", lambda stage, config: None)


def make_config(steps=4, rate=3e-3, **kwargs):
    """Return the config of a tiny run on one device."""
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


def allow(*fields, **kwargs):
    """Return options that allow fields to change."""
    return resume.ResumeOptions(allow_change=fields, **kwargs)


def die(*_):
    """Stand in for a run's steps, and end it as a kill does."""
    raise KeyboardInterrupt


def read_losses(directory):
    """Return the loss of each step of a run."""
    return {line["step"]: line["loss"] for line in read_metrics(directory)}


def read_events(directory, name):
    """Return the events of a run that have a field of this name."""
    return [event for event in read_metrics(directory, "event") if name in event]
