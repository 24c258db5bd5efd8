"""Paths that are no checkpoint: the error says what is there, and what to do."""

import json
import re

import pytest

import m1_jax
from m1_jax import convert, tokenizer
from m1_jax.checkpoints import checkpoint_dir, release


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def _refusal(path):
    with pytest.raises(release.CheckpointError) as caught:
        checkpoint_dir.require_checkpoint(path, "--checkpoint")
    message = str(caught.value)
    assert message.startswith(f"--checkpoint: {path} ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("path", "command", "size"),
    [
        (
            "MiniMaxAI/MiniMax-M1-40k",
            "hf download MiniMaxAI/MiniMax-M1-40k --local-dir MiniMax-M1-40k",
            "912 GB",
        ),
        (
            "MiniMaxAI/MiniMax-M1-80k",
            "hf download MiniMaxAI/MiniMax-M1-80k --local-dir MiniMax-M1-80k",
            "912 GB",
        ),
        ("some-one/tiny.m1", "hf download some-one/tiny.m1 --local-dir tiny.m1", None),
    ],
)
def test_a_repository_is_told_from_a_path(folder, path, command, size):
    message = _refusal(path)
    assert f"run {command}, then give {path.split('/')[1]}." in message
    assert ("disk" in message) == (size is not None)
    assert size is None or f"takes {size} of disk" in message
    # A folder of this name is here: it is a path that is wrong.
    _write(folder / path.split("/")[0] / "else.txt", "")
    assert "hf download" not in _refusal(path)


@pytest.mark.parametrize("path", ["/nothing/at/all", "a/b/c", "./nowhere", "..x/y"])
def test_other_paths_are_no_repository(folder, path):
    message = checkpoint_dir.require_checkpoint
    with pytest.raises(release.CheckpointError, match="does not exist") as caught:
        message(path)
    assert "hf download" not in str(caught.value)


def test_nothing_there_names_what_is_near(folder):
    (folder / "m1-orbax").mkdir()
    assert "m1-orbx does not exist. Did you mean m1-orbax?" in _refusal("m1-orbx")
    assert "Is the path right?" in _refusal("xyz")
    deep = folder / "m1-orbax" / "a" / "b"
    assert f"The path is there as far as {folder / 'm1-orbax'}." in _refusal(deep)
    (folder / "link").symlink_to("gone")
    assert "link is a link to gone, which does not exist" in _refusal("link")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("config.json", "Give the directory that holds it, m1."),
        ("model-00000-of-00414.safetensors", "Give the directory that holds it, m1."),
        ("m1.gguf", "GGUF"),
        ("notes.txt", "Give the directory of a checkpoint."),
    ],
)
def test_a_file_is_not_a_directory(folder, name, advice):
    _write(folder / "m1" / name, "{}")
    message = _refusal(f"m1/{name}")
    assert f"m1/{name} is a file; wanted a directory" in message
    assert advice in message


@pytest.mark.parametrize("field", ["stages", "rollout"])
def test_the_directory_of_a_run_is_exported(folder, field):
    _write(folder / "run" / "config.json", {field: [], "seed": 0})
    command = "m1-export --workdir=run --dst=DIR"
    assert f"run is the directory of a run, not a checkpoint. Make one: {command}" in _refusal(
        "run"
    )
    (folder / "run" / "checkpoints" / "40").mkdir(parents=True)
    for path in ("run/checkpoints", "run/checkpoints/40"):
        message = _refusal(path)
        assert "lies in the directory of a run" in message
        assert f"m1-export --workdir={folder / 'run'} --dst=DIR" in message


def test_directories_of_other_kinds(folder):
    (folder / "empty").mkdir()
    (folder / "empty" / ".cache").mkdir()  # what a download begins with
    assert "empty is empty. Is the download complete?" in _refusal("empty")
    _write(folder / "m1" / "config.json", {"model_type": "minimax_m1"})
    _write(folder / "m1" / "params" / "final_norm" / "zarr.json", {})
    assert "part of a checkpoint that holds its arrays. Give m1." in _refusal("m1/params")
    _write(folder / "part" / "progress.txt", "source 1\n")
    (folder / "part" / "params").mkdir()
    assert "was left unfinished by the command that made it" in _refusal("part")
    _write(folder / "shards" / "model.safetensors", "")
    assert "shards has weights, but no config.json" in _refusal("shards")
    _write(folder / "converted" / "params" / "x" / "zarr.json", {})
    assert "converted has weights, but no config.json" in _refusal("converted")
    _write(folder / "lora" / "adapter_config.json", {})
    assert "lora holds adapters, not a model" in _refusal("lora")
    cache = "models--MiniMaxAI--MiniMax-M1-40k/snapshots/1234"
    _write(folder / "hub" / cache / "config.json", {})
    assert f"is a cache of Hugging Face. Give the snapshot in it, hub/{cache}." in _refusal(
        "hub/models--MiniMaxAI--MiniMax-M1-40k"
    )
    _write(folder / "models" / "a" / "config.json", {})
    _write(folder / "models" / "b" / "config.json", {})
    _write(folder / "models" / "run" / "config.json", {"stages": []})
    assert "Give models/a or models/b." in _refusal("models")
    _write(folder / "texts" / "a.txt", "")
    assert "has no config.json, so it is no checkpoint; wanted a release" in _refusal("texts")


def test_a_checkpoint_is_returned(golden_dir, folder):
    assert checkpoint_dir.require_checkpoint(golden_dir) == golden_dir
    (folder / "link").symlink_to(golden_dir)
    assert checkpoint_dir.require_checkpoint("link").name == "link"
    # What is wrong with its content is another error's matter.
    _write(folder / "damaged" / "config.json", "{")
    assert checkpoint_dir.require_checkpoint("damaged").name == "damaged"


def test_every_reader_says_so(folder):
    missing = re.escape("MiniMaxAI/MiniMax-M1-40k does not exist. It looks like a repository")
    for read, error in (
        (lambda path: m1_jax.load(path), release.CheckpointError),
        (lambda path: convert.run(convert.ConvertConfig("orbax", path, "d")), ValueError),
        (lambda path: tokenizer.Tokenizer.load(path), FileNotFoundError),
    ):
        with pytest.raises(error, match=missing):
            read("MiniMaxAI/MiniMax-M1-40k")
    assert not list(folder.iterdir())
