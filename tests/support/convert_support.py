"""Small releases, conversions of them, and copies to damage; for the converter's tests.

A test module takes the fixtures by assignment, as in `small = convert_support.small`.
"""

import json
import pathlib
import shutil

import pytest

from m1_jax import convert, testing

# Orbax's own records, which hold times.
TIMED_FILES = ("params/_CHECKPOINT_METADATA", "params/commit_success.txt")
# A lightning and a softmax layer.
SMALL_CONFIG = {"attn_type_list": [0, 1], "num_local_experts": 2, "num_experts_per_tok": 1}


def run_convert(to, src, dst, **settings):
    """Convert a directory and return the result's path."""
    return convert.run(convert.ConvertConfig(to, str(src), str(dst), progress=False, **settings))


def read_files(directory):
    """Return the bytes of every file below a directory, by its relative path."""
    paths = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if name not in TIMED_FILES}


def write_small_release(directory, seed=0, num_shards=3, **overrides):
    """Write a release of `SMALL_CONFIG` with random weights; return its directory."""
    hf = testing.tiny_config(**SMALL_CONFIG | overrides)
    return testing.write_release(directory, hf, testing.random_tensors(hf, seed), num_shards)


def read_shard(path):
    """Return (header, bytes of the tensors) of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_shard(path, header, data, padding=""):
    """Write a safetensors file whose header may be wrong."""
    raw = (json.dumps(header) + padding).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers in three shards, with a tokenizer beside them; read only."""
    directory = write_small_release(tmp_path_factory.mktemp("small") / "release")
    testing.write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def small_converted(small):
    """The converted `small`; read only."""
    return run_convert("orbax", small, small.parent / "orbax")


@pytest.fixture
def source(small, tmp_path):
    """A copy of `small` to damage."""
    return pathlib.Path(shutil.copytree(small, tmp_path / "release"))


@pytest.fixture
def converted(small_converted, tmp_path):
    """A copy of the converted `small` to damage."""
    return pathlib.Path(shutil.copytree(small_converted, tmp_path / "orbax"))
