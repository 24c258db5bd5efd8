"""A conversion that is killed leaves nothing that looks complete, and goes on where it stopped."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import m1_jax
from m1_jax import convert, testing
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release

_REPO = pathlib.Path(__file__).resolve().parents[1]
# Orbax's own records, which hold times.
_TIMED = ("params/_CHECKPOINT_METADATA", "params/commit_success.txt")
_SMALL = {"attn_type_list": [0, 1], "num_local_experts": 2, "num_experts_per_tok": 1}


def _convert(to, src, dst, **settings):
    return convert.run(convert.ConvertConfig(to, str(src), str(dst), progress=False, **settings))


def _files(directory):
    """Return the bytes of every file below a directory, by its relative path."""
    found = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in _TIMED}


def _write(directory, seed=0, num_shards=3, **overrides):
    hf = testing.tiny_config(**_SMALL | overrides)
    return testing.write_release(directory, hf, testing.random_tensors(hf, seed), num_shards)


def _read_shard(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two layers in three shards, with a tokenizer beside them; read only."""
    directory = _write(tmp_path_factory.mktemp("small") / "release")
    testing.write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def small_converted(small):
    return _convert("orbax", small, small.parent / "orbax")


class _Killed(BaseException):
    pass


@pytest.fixture
def stop_after(monkeypatch):
    """Make the next conversion die after so many steps; `stop_after(None)` lets it live."""

    def arm(steps, method):
        left = iter(range(steps)) if steps is not None else None
        original = originals[method]

        def step(self, *args):
            original(self, *args)
            if left is not None and next(left, None) is None:
                raise _Killed

        monkeypatch.setattr(convert._ConvertProgress, method, step)

    originals = {name: getattr(convert._ConvertProgress, name) for name in ("finish", "advance")}
    return arm


def _assert_unfinished(dst):
    assert not dst.exists()
    partial = dst.with_name(dst.name + ".partial")
    assert partial.is_dir()
    with pytest.raises(release.CheckpointError):
        m1_jax.load(partial)
    return partial


def _spy_on_reads(monkeypatch):
    seen = []
    original = release.ReleaseTensor.read
    monkeypatch.setattr(
        release.ReleaseTensor, "read", lambda tensor: seen.append(tensor.name) or original(tensor)
    )
    return seen


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_interrupted_import_goes_on(
    small, small_converted, tmp_path, monkeypatch, stop_after, steps
):
    dst = tmp_path / "orbax"
    stop_after(steps, "finish")
    with pytest.raises(_Killed):
        _convert("orbax", small, dst)
    partial = _assert_unfinished(dst)
    done = set((partial / "progress.txt").read_text().splitlines()[1:])
    assert len(done) == steps + 1

    stop_after(None, "finish")
    seen = _spy_on_reads(monkeypatch)
    _convert("orbax", small, dst)
    assert sorted(seen) == sorted(release.Release(small).tensors.keys() - done)
    assert _files(dst) == _files(small_converted)
    assert not partial.exists()


@pytest.mark.parametrize("tensors", [0, 10, 17])
def test_interrupted_export_goes_on(small, small_converted, tmp_path, stop_after, tensors):
    dst = tmp_path / "back"
    stop_after(tensors, "advance")
    with pytest.raises(_Killed):
        _convert("hf", small_converted, dst)
    partial = _assert_unfinished(dst)
    whole = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(whole) == {0: 0, 10: 0, 17: 1}[tensors] or whole

    stop_after(None, "advance")
    _convert("hf", small_converted, dst)
    assert _files(dst) == _files(small)
    for path, written in whole.items():  # not written again
        assert (dst / path.name).stat().st_mtime_ns == written


def test_a_journal_that_was_cut_off_is_used_up_to_its_last_line(small, tmp_path, stop_after):
    dst = tmp_path / "orbax"
    stop_after(4, "finish")
    with pytest.raises(_Killed):
        _convert("orbax", small, dst)
    journal = tmp_path / "orbax.partial" / "progress.txt"
    journal.write_text(journal.read_text()[:-3])
    stop_after(None, "finish")
    _convert("orbax", small, dst)
    assert _files(_convert("hf", dst, tmp_path / "back")) == _files(small)


@pytest.mark.parametrize("moment", ["copy", "rename"])
def test_interrupted_at_the_very_end(small, small_converted, tmp_path, monkeypatch, moment):
    """With all tensors written, but before the result has its name."""
    dst = tmp_path / "orbax"

    def die(*_):
        raise _Killed

    with monkeypatch.context() as patch:
        if moment == "copy":
            patch.setattr(format_lib, "copy_small_files", die)
        else:
            patch.setattr(pathlib.Path, "rename", _dies_on(dst, pathlib.Path.rename))
        with pytest.raises(_Killed):
            _convert("orbax", small, dst)
    assert not dst.exists()
    seen = _spy_on_reads(monkeypatch)
    _convert("orbax", small, dst)
    assert not seen
    assert _files(dst) == _files(small_converted)


def test_an_export_without_its_last_file_does_not_load(
    small, small_converted, tmp_path, monkeypatch
):
    copy, left = format_lib.shutil.copyfile, iter(("tokenizer.json", "tokenizer_config.json"))

    def copy_or_die(src, dst):
        if next(left, None) is None:
            raise _Killed
        copy(src, dst)

    with monkeypatch.context() as patch:
        patch.setattr(format_lib.shutil, "copyfile", copy_or_die)
        with pytest.raises(_Killed):
            _convert("hf", small_converted, tmp_path / "back")
    partial = _assert_unfinished(tmp_path / "back")
    assert (partial / release.INDEX_FILE).exists()
    _convert("hf", small_converted, tmp_path / "back")
    assert _files(tmp_path / "back") == _files(small)


def _dies_on(target, rename):
    def renamed(path, to):
        if to == target:
            raise _Killed
        return rename(path, to)

    return renamed


_KILL = """
import os, signal, sys
from m1_jax import convert
count, original = int(sys.argv[4]), convert._ConvertProgress.advance
def advance(self, nbytes):
    global count
    original(self, nbytes)
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
convert._ConvertProgress.advance = advance
convert.run(convert.ConvertConfig(*sys.argv[1:4], progress=False))
"""


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_a_killed_process_leaves_nothing_that_looks_complete(small, small_converted, tmp_path, to):
    src = {"orbax": small, "hf": small_converted}[to]
    dst = tmp_path / "result"
    arguments = [sys.executable, "-c", _KILL, to, str(src), str(dst), "15"]
    killed = subprocess.run(arguments, cwd=_REPO, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    _assert_unfinished(dst)
    _convert(to, src, dst)
    assert _files(dst) == _files({"orbax": small_converted, "hf": small}[to])


def test_a_partial_result_of_other_weights_is_refused(small, tmp_path, stop_after):
    """Of the same shapes, names and shards, as the two released models are."""
    other = _write(tmp_path / "other", seed=1)
    for shard in other.glob("*.safetensors"):
        assert _read_shard(shard)[0] == _read_shard(small / shard.name)[0]
        os.utime(shard, ns=(10**18, 10**18))
    dst = tmp_path / "orbax"
    stop_after(3, "finish")
    with pytest.raises(_Killed):
        _convert("orbax", small, dst)
    stop_after(None, "finish")
    before = (tmp_path / "orbax.partial" / "progress.txt").read_text()
    with pytest.raises(FileExistsError, match=r"orbax\.partial .* another source.*Remove it"):
        _convert("orbax", other, dst)
    assert (tmp_path / "orbax.partial" / "progress.txt").read_text() == before
    _convert("orbax", small, dst)


def test_a_partial_result_of_the_other_direction_is_refused(
    small, small_converted, tmp_path, stop_after
):
    dst = tmp_path / "result"
    stop_after(3, "finish")
    with pytest.raises(_Killed):
        _convert("orbax", small, dst)
    stop_after(None, "finish")
    with pytest.raises(FileExistsError, match="another source"):
        _convert("hf", small_converted, dst)


def test_a_partial_directory_of_somebody_else_is_left_alone(small, tmp_path):
    (tmp_path / "orbax.partial").mkdir()
    (tmp_path / "orbax.partial" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not made by this command"):
        _convert("orbax", small, tmp_path / "orbax")
    assert [path.name for path in (tmp_path / "orbax.partial").iterdir()] == ["thesis.tex"]
