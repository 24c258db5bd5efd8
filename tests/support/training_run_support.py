"""A tiny model, one compilation cache a module and the lines of metrics, for tests of whole runs.

A test module takes the fixture by assignment:
`compilation_cache = training_run_support.compilation_cache`.
"""

import dataclasses
import json
import pathlib

import jax
import pytest

from m1_jax import ModelConfig
from train import metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = dataclasses.replace(
    ModelConfig.tiny(), layer_types=("lightning", "softmax"), hidden_size=32, intermediate_size=32
)


class Cache:
    """The directory that `compilation_cache` made, for configs."""

    directory = ""


@pytest.fixture(autouse=True, scope="module")
def compilation_cache(tmp_path_factory):
    """Compile each program once for all tests, and leave the setting as it was."""
    before = jax.config.jax_compilation_cache_dir
    Cache.directory = str(tmp_path_factory.mktemp("xla"))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def read_metrics(workdir, kind="train", name=metrics.METRICS_FILE):
    """Return the lines of one kind of a run's metrics."""
    records = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [r for r in records if r.get("kind", kind) == kind]
