"""A conversion that is killed leaves nothing that looks complete, and goes on where it stopped."""

import os
import pathlib
import signal
import subprocess
import sys

import convert_support
import pytest

import m1_jax
from m1_jax import convert
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release

# Fixtures.
small = convert_support.small
small_converted = convert_support.small_converted

_REPO = pathlib.Path(__file__).resolve().parents[1]


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
        convert_support.run_convert("orbax", small, dst)
    partial = _assert_unfinished(dst)
    done = set((partial / "progress.txt").read_text().splitlines()[1:])
    assert len(done) == steps + 1

    stop_after(None, "finish")
    seen = _spy_on_reads(monkeypatch)
    convert_support.run_convert("orbax", small, dst)
    assert sorted(seen) == sorted(release.Release(small).tensors.keys() - done)
    assert convert_support.read_files(dst) == convert_support.read_files(small_converted)
    assert not partial.exists()


@pytest.mark.parametrize("tensors", [0, 10, 17])
def test_interrupted_export_goes_on(small, small_converted, tmp_path, stop_after, tensors):
    dst = tmp_path / "back"
    stop_after(tensors, "advance")
    with pytest.raises(_Killed):
        convert_support.run_convert("hf", small_converted, dst)
    partial = _assert_unfinished(dst)
    whole = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert len(whole) == {0: 0, 10: 0, 17: 1}[tensors] or whole

    stop_after(None, "advance")
    convert_support.run_convert("hf", small_converted, dst)
    assert convert_support.read_files(dst) == convert_support.read_files(small)
    for path, written in whole.items():  # not written again
        assert (dst / path.name).stat().st_mtime_ns == written


def test_a_journal_that_was_cut_off_is_used_up_to_its_last_line(small, tmp_path, stop_after):
    dst = tmp_path / "orbax"
    stop_after(4, "finish")
    with pytest.raises(_Killed):
        convert_support.run_convert("orbax", small, dst)
    journal = tmp_path / "orbax.partial" / "progress.txt"
    journal.write_text(journal.read_text()[:-3])
    stop_after(None, "finish")
    convert_support.run_convert("orbax", small, dst)
    assert convert_support.read_files(
        convert_support.run_convert("hf", dst, tmp_path / "back")
    ) == convert_support.read_files(small)


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
            convert_support.run_convert("orbax", small, dst)
    assert not dst.exists()
    seen = _spy_on_reads(monkeypatch)
    convert_support.run_convert("orbax", small, dst)
    assert not seen
    assert convert_support.read_files(dst) == convert_support.read_files(small_converted)


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
            convert_support.run_convert("hf", small_converted, tmp_path / "back")
    partial = _assert_unfinished(tmp_path / "back")
    assert (partial / release.INDEX_FILE).exists()
    convert_support.run_convert("hf", small_converted, tmp_path / "back")
    assert convert_support.read_files(tmp_path / "back") == convert_support.read_files(small)


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
    convert_support.run_convert(to, src, dst)
    assert convert_support.read_files(dst) == convert_support.read_files(
        {"orbax": small_converted, "hf": small}[to]
    )


def test_a_partial_result_of_other_weights_is_refused(small, tmp_path, stop_after):
    """Of the same shapes, names and shards, as the two released models are."""
    other = convert_support.write_small_release(tmp_path / "other", seed=1)
    for shard in other.glob("*.safetensors"):
        assert (
            convert_support.read_shard(shard)[0]
            == convert_support.read_shard(small / shard.name)[0]
        )
        os.utime(shard, ns=(10**18, 10**18))
    dst = tmp_path / "orbax"
    stop_after(3, "finish")
    with pytest.raises(_Killed):
        convert_support.run_convert("orbax", small, dst)
    stop_after(None, "finish")
    before = (tmp_path / "orbax.partial" / "progress.txt").read_text()
    with pytest.raises(FileExistsError, match=r"orbax\.partial .* another source.*Remove it"):
        convert_support.run_convert("orbax", other, dst)
    assert (tmp_path / "orbax.partial" / "progress.txt").read_text() == before
    convert_support.run_convert("orbax", small, dst)


def test_a_partial_result_of_the_other_direction_is_refused(
    small, small_converted, tmp_path, stop_after
):
    dst = tmp_path / "result"
    stop_after(3, "finish")
    with pytest.raises(_Killed):
        convert_support.run_convert("orbax", small, dst)
    stop_after(None, "finish")
    with pytest.raises(FileExistsError, match="another source"):
        convert_support.run_convert("hf", small_converted, dst)


def test_a_partial_directory_of_somebody_else_is_left_alone(small, tmp_path):
    (tmp_path / "orbax.partial").mkdir()
    (tmp_path / "orbax.partial" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not made by this command"):
        convert_support.run_convert("orbax", small, tmp_path / "orbax")
    assert [path.name for path in (tmp_path / "orbax.partial").iterdir()] == ["thesis.tex"]
