"""From a run to a checkpoint that generates: SFT, LoRA, export."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import signal_support

import m1_jax
from m1_jax import ModelConfig, convert
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, loop, lora, metrics, resume, run_setup, sft
from train import export as export_run
from train.config import (
    DataConfig,
    DataSource,
    LogConfig,
    LoraConfig,
    SaveConfig,
    TrainConfig,
    TrainStage,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODEL = dataclasses.replace(ModelConfig.tiny(), layer_types=("lightning", "softmax"))
CHAT = DataConfig(sources=(DataSource("sums", "demo/data/chat.jsonl", "chat"),))


@pytest.fixture(autouse=True)
def _one_device_in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run_setup, "make_stage_layout", lambda stage, config: None)
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A converted checkpoint of random weights, with a tokenizer."""
    path = tmp_path_factory.mktemp("base") / "converted"
    model = params_lib.random_model(MODEL, jax.random.key(1), "float32")
    save_lib.save(model, path)
    format_lib.copy_small_files(ROOT / "demo/data/tokenizer", path)
    return path


def _run(tmp_path, steps=4, **kwargs):
    stage = TrainStage(seq_len=128, rows=4, tokens=steps * 512, learning_rate=3e-3)
    fields = {
        "stages": (stage,),
        "data": CHAT,
        "dtype": "float32",
        "save": SaveConfig(every_steps=2),
        "log": LogConfig(every_steps=1),
        "compilation_cache": str(tmp_path / "xla"),
    }
    return TrainConfig(**fields | kwargs)


def _losses(workdir):
    lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines)]


def test_an_exported_run_loads_and_goes_back_to_the_releases_form(tmp_path, base):
    config = _run(tmp_path, checkpoint=str(base))
    sft.run(config, tmp_path / "run")
    assert _losses(tmp_path / "run")[0] == pytest.approx(np.log(512), abs=0.5)
    export_run.run(tmp_path / "run", tmp_path / "new")
    convert.run(convert.ConvertConfig("hf", str(tmp_path / "new"), str(tmp_path / "release")))
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    logits = [m1_jax.load(path)(tokens) for path in (base, tmp_path / "new", tmp_path / "release")]
    np.testing.assert_array_equal(logits[1], logits[2])
    assert float(jnp.max(jnp.abs(logits[0] - logits[1]))) > 0.01
    assert (tmp_path / "release" / "tokenizer.json").is_file()
    with pytest.raises(FileExistsError):
        export_run.run(tmp_path / "run", tmp_path / "new")
    with pytest.raises(ValueError, match=r"got step 3; wanted one of \[2, 4\]"):
        export_run.run(tmp_path / "run", tmp_path / "other", step=3)


def test_lora_saves_adapters_alone_goes_on_and_merges(tmp_path, base, monkeypatch):
    base = shutil.copytree(base, tmp_path / "base")
    config = _run(tmp_path, checkpoint=str(base), lora=LoraConfig(rank=4, alpha=8.0))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.run_training(config, whole)
    with monkeypatch.context() as patch:
        signal_support.stop_after(patch, 2)
        loop.run_training(config, parts)
    loop.run_training(None, parts)
    assert _losses(whole) == _losses(parts)
    saved = (whole / "checkpoints" / "4" / "state").rglob("*")
    assert sum(file.stat().st_size for file in saved if file.is_file()) < 500_000
    export_run.run(whole, tmp_path / "merged")
    merged, old = m1_jax.load(tmp_path / "merged"), m1_jax.load(base)
    changed = {
        name
        for name, param in params_lib.params_by_path(merged).items()
        if not np.array_equal(param[...], params_lib.params_by_path(old)[name][...])
    }
    assert changed
    assert all(".attention." in name for name in changed)
    # Adapters belong to their base: another one of the same shapes is refused, and the old one
    # elsewhere is not.
    base.rename(tmp_path / "old")
    save_lib.save(params_lib.random_model(MODEL, jax.random.key(2), "float32"), base)
    format_lib.copy_small_files(ROOT / "demo/data/tokenizer", base)
    for use in (
        lambda: loop.run_training(None, whole),
        lambda: export_run.run(whole, tmp_path / "foreign"),
        lambda: loop.run_training(
            config, tmp_path / "third", resume.ResumeOptions(init_from=str(whole))
        ),
    ):
        with pytest.raises(checkpoints.ResumeError, match="was trained beside other weights"):
            use()
    assert not (tmp_path / "foreign").exists()
    moved = dataclasses.replace(
        config, checkpoint=str(tmp_path / "old"), lora=LoraConfig(rank=4, alpha=80.0)
    )
    allowed = resume.ResumeOptions(allow_change=("checkpoint", "lora.alpha"))
    assert loop.run_training(moved, whole, allowed).step == 4
    # What was trained with another alpha is merged with it.
    export_run.run(whole, tmp_path / "again")
    for name, param in params_lib.params_by_path(m1_jax.load(tmp_path / "again")).items():
        np.testing.assert_array_equal(param[...], params_lib.params_by_path(merged)[name][...])


def test_lora_of_random_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="random weights would stay random"):
        _run(tmp_path, model=MODEL, tokenizer="demo/data/tokenizer", lora=lora.LoraConfig())


@pytest.mark.long
@pytest.mark.parametrize("seed", ["0", "1"])
def test_the_tiny_configs_learn_a_text_and_then_a_format(tmp_path, seed):
    worker = pathlib.Path(__file__).with_name("learning_worker.py")
    # Computes more than it compiles: with LLVM's optimisations, other than the rest of the suite.
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": "."}
    command = [sys.executable, str(worker), str(tmp_path), seed]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["held_out"] < 0.25  # the text's own choices are worth about 0.11 a token
    for text in result["answers"]:
        assert "<think>" in text
        assert "\nAnswer: " in text
