"""Weights that a run reads and does not train: their digest, and checkpoints in buckets."""

import dataclasses
import os
import shutil
import types

import numpy as np
import pytest

from m1_jax import ModelConfig, local_path
from m1_jax.checkpoints import release
from train import base_digest, run_model
from train import export as export_run
from train.config import DataConfig, DataSource, TrainConfig, TrainStage
from train.rl import loop as rl_loop
from train.rl.config import PRESETS

KIBI = 1024


@pytest.fixture
def base(tmp_path):
    """Two shards of 1 MiB and a config."""
    directory = tmp_path / "base"
    directory.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (directory / f"{name}.safetensors").write_bytes(rng.bytes(KIBI * KIBI))
    (directory / "config.json").write_text("{}")
    return directory


def test_the_digest_is_that_of_the_weights(base, tmp_path):
    digest = base_digest.digest_weights(base)
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    (moved / "README.md").write_text("not a weight")
    os.utime(moved / "a.safetensors", (1, 1))
    assert base_digest.digest_weights(moved) == digest
    shard = moved / "a.safetensors"
    data = bytearray(shard.read_bytes())

    def changed():
        return base_digest.digest_weights(moved) != digest

    data[700_001] ^= 1
    shard.write_bytes(data)
    assert changed()
    data[700_001] ^= 1
    shard.write_bytes(data)
    assert not changed()
    shard.write_bytes(data[:-1])
    assert changed()
    shard.write_bytes(data)
    (moved / "b.safetensors").rename(moved / "c.safetensors")
    assert changed()


def test_large_files_are_sampled_to_both_ends(base, monkeypatch):
    monkeypatch.setattr(base_digest, "_NUM_BLOCKS", 8)
    monkeypatch.setattr(base_digest, "_BLOCK_BYTES", 4 * KIBI)
    shard = base / "a.safetensors"
    data = bytearray(shard.read_bytes())
    digests = set()
    for place in (None, 0, len(data) - 1):
        other = bytearray(data)
        if place is not None:
            other[place] ^= 1
        shard.write_bytes(other)
        digests.add(base_digest.digest_weights(base))
    assert len(digests) == 3
    # Other weights differ nearly everywhere.
    shard.write_bytes(bytes(byte ^ (i % 3 == 0) for i, byte in enumerate(data)))
    assert base_digest.digest_weights(base) not in digests


def test_arrays_of_a_converted_directory_count(tmp_path):
    array = tmp_path / "params" / "head.kernel"
    (array / "c").mkdir(parents=True)
    (array / "c" / "0").write_bytes(b"12")
    (tmp_path / "params" / "_METADATA").write_text("the time of the conversion")
    digest = base_digest.digest_weights(tmp_path)
    (tmp_path / "params" / "_METADATA").write_text("another time")
    assert base_digest.digest_weights(tmp_path) == digest
    (array / "c" / "0").write_bytes(b"13")
    assert base_digest.digest_weights(tmp_path) != digest
    with pytest.raises(release.CheckpointError, match="got no weights"):
        base_digest.digest_weights(tmp_path / "params" / "head.kernel" / "c")


def test_runs_that_use_the_weights_to_the_end_have_a_digest(base):
    model = types.SimpleNamespace(lora=None, checkpoint=str(base))
    assert run_model.digest_base(model) == ""
    assert run_model.digest_base(model, has_reference=True)
    assert run_model.digest_base(types.SimpleNamespace(lora=1, checkpoint=str(base)))
    for objective, has_reference in (
        (PRESETS["cispo"], False),
        (dataclasses.replace(PRESETS["cispo"], kl_coef=0.1), True),
        (dataclasses.replace(PRESETS["reinforce_pp"], reward_kl_coef=0.1), True),
    ):
        config = types.SimpleNamespace(objective=objective)
        assert rl_loop._has_reference(config) == has_reference


@pytest.mark.parametrize("field", ["checkpoint", "tokenizer"])
def test_a_checkpoint_in_a_bucket_is_refused_in_one_line(field):
    fields = {"checkpoint": "nowhere", "tokenizer": "demo/data/tokenizer"}
    config = TrainConfig(
        stages=(TrainStage(seq_len=8, rows=1, tokens=8, learning_rate=1e-3),),
        data=DataConfig(sources=(DataSource("text", "x.jsonl"),)),
        **fields | {field: "gs://bucket/m1"},
    )
    with pytest.raises(local_path.PathError, match=f"{field}: got 'gs://bucket/m1'; wanted a lo"):
        run_model.make_run_model(config, ModelConfig.tiny() if field == "tokenizer" else None)


@pytest.mark.parametrize("field", ["workdir", "dst"])
def test_the_export_is_local(tmp_path, field):
    paths = {"workdir": str(tmp_path), "dst": str(tmp_path / "new")}
    with pytest.raises(local_path.PathError, match=f"{field}: got 'gs://"):
        export_run.run(**paths | {field: "gs://bucket/x"})
