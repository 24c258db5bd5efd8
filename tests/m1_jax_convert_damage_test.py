"""Damages of a checkpoint that are mended, or told before any work is done."""

import json
import os
import shutil

import convert_support
import numpy as np
import pytest

import m1_jax
from m1_jax import convert, file_lock, hf_config, testing
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release, save

small = convert_support.small
small_converted = convert_support.small_converted
source = convert_support.source
converted = convert_support.converted


def refuse(to, src, tmp_path):
    """Convert in vain, and return the error's one short line."""
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises((ValueError, OSError)) as refused:
        convert_support.run_convert(to, src, tmp_path / "dst")
    assert {path.name for path in tmp_path.iterdir()} - before <= {"dst.partial"}
    message = str(refused.value)
    assert len(message) <= 300 + 2 * len(str(src))
    assert "\n" not in message
    return message


# ---- what is not damage


def test_byte_order_marks_and_windows_line_ends_come_back(source, tmp_path):
    for name in ("config.json", "tokenizer_config.json", release.INDEX_FILE):
        text = (source / name).read_bytes().replace(b"\n", b"\r\n")
        (source / name).write_bytes(b"\xef\xbb\xbf" + text)
    orbax = convert_support.run_convert("orbax", source, tmp_path / "orbax")
    back = convert_support.run_convert("hf", orbax, tmp_path / "back")
    assert convert_support.read_files(back) == convert_support.read_files(source)
    m1_jax.load(source)


# ---- small files


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "", "not valid JSON"),
        ("tokenizer.json", "{}", "got no model"),
        ("tokenizer_config.json", "[]", "wanted an object"),
        ("generation_config.json", "{", "not valid JSON"),
        ("tokenizer.model", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("config.json", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (release.INDEX_FILE, "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (release.INDEX_FILE, "[" * 100_000, "within each other"),
        ("config.json", '{"a":' * 100_000, "within each other"),
    ],
)
def test_small_files_are_looked_at_first(source, tmp_path, name, text, words):
    (source / name).write_text(text)
    message = refuse("orbax", source, tmp_path)
    assert name in message
    assert words in message
    assert not (tmp_path / "dst.partial").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantization_config": {"bits": 8}}, "bfloat16 release"),
        ({"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}}, "keys of their own"),
        ({"num_local_experts": 10**9}, "65536 at most"),
        ({"num_local_experts": 2**16, "attn_type_list": [0] * 9, "num_hidden_layers": 9}, "in all"),
        ({"rms_norm_eps": 10**39}, "float32"),
        ({"rope_theta": 1e-50}, "float32"),
        ({"attn_type_list": [False, True]}, "attn_type_list is False"),
        ({"attn_type_list": [0.0, 1.0]}, "attn_type_list is 0.0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0"),
        ({"attention_dropout": False}, "attention_dropout is False"),
        ({"x" * 9000: "y" * 9000}, "unknown key"),
        ({"model_type": "minimax", "num_hidden_layers": 3 * 10**6}, "num_hidden_layers is 3000000"),
    ],
)
def test_configs_are_refused_at_once(change, words):
    hf = testing.tiny_config(**convert_support.SMALL_CONFIG) | change
    if change.get("model_type") == "minimax":
        hf = change
    with pytest.raises(hf_config.ConfigError, match=words) as refused:
        m1_jax.ModelConfig.from_hf(hf)
    assert len(str(refused.value)) <= 300


# ---- names of files


@pytest.mark.parametrize("name", ["../x.safetensors", "a/x.safetensors", "progress.txt", "", 5])
def test_names_outside_of_the_directory_are_refused(source, converted, tmp_path, name):
    index = json.loads((source / release.INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (source / release.INDEX_FILE).write_text(json.dumps(index))
    assert "without a directory" in refuse("orbax", source, tmp_path)
    manifest = json.loads((converted / "release.json").read_text())
    shards = manifest["shards"]
    shards[str(name)] = shards.pop("model-00001-of-00003.safetensors")
    (converted / "release.json").write_text(json.dumps(manifest))
    assert "release.json" in refuse("hf", converted, tmp_path)
    with pytest.raises(release.CheckpointError, match=r"release\.json"):
        m1_jax.load(converted)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"shards": ...},
        {"shards": ["x"]},
        {"shards": {"model.safetensors": 5}},
        {"index": ...},
        {"index": 5},
        {"index": "{}"},
        {"index": None},
        {"shards": {"model.safetensors": "{"}},
        {"shards": {"model.safetensors": "[" * 100_000}},
    ],
)
def test_damaged_manifests_name_their_file(converted, tmp_path, change):
    manifest = json.loads((converted / "release.json").read_text()) | change
    manifest = {key: value for key, value in manifest.items() if value is not ...}
    (converted / "release.json").write_text(json.dumps(manifest))
    message = refuse("hf", converted, tmp_path)
    assert "release.json" in message
    assert "Run m1_jax.convert again" in message
    with pytest.raises(release.CheckpointError, match=r"release\.json"):
        m1_jax.load(converted)


def test_brackets_that_end_tensorstore_are_read_here_first(converted, tmp_path):
    array = converted / "params" / "norm.scale" / "zarr.json"
    array.write_text("[" * 200_000)
    assert "norm.scale/zarr.json is not valid JSON" in refuse("hf", converted, tmp_path)
    metadata = json.loads((converted / "params" / "head.kernel" / "zarr.json").read_text())
    metadata["codecs"][0]["configuration"]["endian"] = "big"
    array.write_text(json.dumps(metadata))
    assert "little-endian" in refuse("hf", converted, tmp_path)
    array.unlink()
    os.mkfifo(array)
    assert "norm.scale/zarr.json is not a file" in refuse("hf", converted, tmp_path)


# ---- interrupted conversions


@pytest.mark.parametrize("damage", ["lost", "empty", "a directory"])
def test_lost_chunks_and_shards_are_made_again(
    small, small_converted, tmp_path, monkeypatch, damage
):
    def die(*_):
        raise KeyboardInterrupt

    for to, src, wanted, lost in (
        ("orbax", small, small_converted, "params/layers.1.moe.up/c/0/0/1/0/0"),
        ("hf", small_converted, small, "model-00001-of-00003.safetensors"),
    ):
        dst = tmp_path / to
        with monkeypatch.context() as patch:
            patch.setattr(format_lib, "copy_small_files", die)
            with pytest.raises(KeyboardInterrupt):
                convert_support.run_convert(to, src, dst)
        file = tmp_path / f"{to}.partial" / lost
        file.unlink()
        if damage == "empty":
            file.write_bytes(b"")
        elif damage == "a directory" and to == "orbax":
            file.mkdir()
            with pytest.raises(OSError, match="c/0/0/1/0/0.*Remove orbax.partial") as refusal:
                convert_support.run_convert(to, src, dst)
            assert len(str(refusal.value)) - len(str(tmp_path)) <= 250
            file.rmdir()
        convert_support.run_convert(to, src, dst)
        assert convert_support.read_files(dst) == convert_support.read_files(wanted)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"", None])
def test_damaged_journals_name_their_file(small, tmp_path, content):
    journal = tmp_path / "dst.partial" / "progress.txt"
    journal.parent.mkdir()
    journal.mkdir() if content is None else journal.write_bytes(content)
    message = refuse("orbax", small, tmp_path)
    assert "dst.partial" in message
    assert "to start anew" in message


# ---- two processes, one destination


def test_one_process_writes_a_destination(small, small_converted, tmp_path):
    model = m1_jax.load(small)
    for write in (
        lambda dst: convert_support.run_convert("orbax", small, dst),
        lambda dst: convert_support.run_convert("hf", small_converted, dst),
        lambda dst: save.save(model, dst),
    ):
        dst = tmp_path / "new" / "dst"
        dst.parent.mkdir()
        with file_lock.hold_lock(dst, "converts to"):
            with pytest.raises(
                file_lock.LockError, match=f"process {os.getpid()} .* (converts to|writes) it"
            ):
                write(dst)
            assert sorted(path.name for path in dst.parent.iterdir()) == ["dst.lock"]
        write(dst)
        assert [path.name for path in dst.parent.iterdir()] == ["dst"]
        shutil.rmtree(dst.parent)


# ---- dtypes


def test_decay_rates_rounded_to_float16_are_read(tmp_path):
    """As transformers' `half()` saves them: the last layer's rates are subnormal numbers."""
    hf = testing.tiny_config(attn_type_list=[1, 0, 0, 0], num_local_experts=2)
    tensors = {name: value.astype(np.float16) for name, value in testing.random_tensors(hf).items()}
    slopes = 2.0 ** (-2.0 * np.arange(1, 5))  # of 4 heads
    for layer in (1, 2, 3):
        rates = slopes * (1 - layer / (3 + 1e-5) + 1e-5)
        name = f"model.layers.{layer}.self_attn.slope_rate"
        tensors[name] = rates.astype(np.float16).reshape(4, 1, 1)
    directory = testing.write_release(tmp_path / "release", hf, tensors)
    assert release.Release(directory).tensors.keys() == testing.tensor_shapes(hf).keys()
    tensors[name] = tensors[name] + np.float16(1e-5)
    testing.write_release(directory, hf, tensors)
    with pytest.raises(release.CheckpointError, match="decay rates"):
        release.Release(directory)


def test_settings_of_conversions_are_checked_before_paths():
    with pytest.raises(ValueError, match="--to is"):
        convert.ConvertConfig("gs://b", "a", "b")
