"""`~` is the home in every path, and buckets are refused before anything is made."""

import pathlib

import convert_support
import pytest

import m1_jax
from m1_jax import convert, local_path, verify
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import release

small = convert_support.small


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("~/m1", "/home/me/m1"),
        ("~", "/home/me"),
        (pathlib.Path("~/m1"), "/home/me/m1"),
        ("a/~b", "a/~b"),
        ("run:1/x", "run:1/x"),
        ("/a b", "/a b"),
    ],
)
def test_home_directories(monkeypatch, path, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path.resolve_path(path) == pathlib.Path(wanted)


@pytest.mark.parametrize(
    "path",
    ["gs://b/m1", pathlib.Path("gs://b/m1"), "s3://b/m1", "file:///m1", "hf://a/b", "https://a/b"],
)
def test_urls_are_refused(path):
    with pytest.raises(local_path.PathError, match=r"--dst: got .*; wanted a local path\. Mount"):
        local_path.resolve_path(path, "--dst")


@pytest.mark.parametrize("path", ["", "a\0b", "~nobody-of-this-name/x", "gs://" + "x" * 9000])
def test_what_is_no_path_is_one_short_line(path):
    with pytest.raises(local_path.PathError) as refused:
        local_path.resolve_path(path)
    assert len(str(refused.value)) < 300


def test_every_function_takes_the_home_and_refuses_buckets(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "release").symlink_to(small)
    converted = convert_support.run_convert("orbax", "~/release", "~/new/orbax")
    assert converted == tmp_path / "new" / "orbax"
    model = m1_jax.load("~/new/orbax")
    assert m1_jax.save(model, "~/saved", source="~/release") == tmp_path / "saved"
    assert release.Release("~/release").directory == tmp_path / "release"
    assert load_lib.read_config("~/saved") == model.config
    assert m1_jax.ModelConfig.from_file("~/saved/config.json") == model.config
    assert tokenizer_lib.Tokenizer.load("~/saved").vocab_size == 512
    before = sorted(tmp_path.rglob("*"))
    for refused in (
        lambda: convert.run(convert.ConvertConfig("orbax", str(small), "gs://b/m1")),
        lambda: convert.run(convert.ConvertConfig("hf", "gs://b/m1", "~/x")),
        lambda: m1_jax.save(model, "gs://b/m1"),
        lambda: m1_jax.save(model, "~/x", source="gs://b/m1"),
        lambda: m1_jax.load("gs://b/m1"),
        lambda: tokenizer_lib.Tokenizer.load("gs://b/m1"),
        lambda: verify.run(verify.VerifyConfig("~/saved", "gs://b/g.npz")),
    ):
        with pytest.raises(local_path.PathError, match="wanted a local path"):
            refused()
    assert sorted(tmp_path.rglob("*")) == before
