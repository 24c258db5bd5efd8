"""The demo keeps steps that finished, and does again the one that was cut."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import demo_modules
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


finished_steps = demo_modules.load_demo_module("finished_steps")


def make_steps(directory, calls, fails_at=None):
    """Return three steps that write files, of which one may fail halfway."""

    def make_step(name):
        def run():
            calls.append(name)
            target = directory / f"{name}_files"
            target.mkdir()  # raises if a half of it was left
            if name == fails_at:
                raise KeyboardInterrupt
            (target / "content").write_text(name)
            return {"value": (len(name), name)}

        return finished_steps.DemoStep(name, f"step {name}", run, (f"{name}_files",))

    return [make_step(name) for name in ("first", "second", "third")]


def test_goes_on_with_the_step_that_was_cut(tmp_path, capsys):
    calls = []
    assert not finished_steps.prepare_output(tmp_path, "a")
    with pytest.raises(KeyboardInterrupt):
        finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls, fails_at="second"))
    assert finished_steps.prepare_output(tmp_path, "a")
    records = finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls))
    assert calls == ["first", "second", "second", "third"]
    # Results that were kept are those that were computed, tuples and all.
    assert {name: r["results"] for name, r in records.items()} == {
        name: {"value": [len(name), name]} for name in ("first", "second", "third")
    }
    assert "[1/3] step first: kept from before" in capsys.readouterr().out


def test_nothing_is_done_twice(tmp_path):
    calls = []
    finished_steps.prepare_output(tmp_path, "a")
    first = finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls))
    assert finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls)) == first
    assert len(calls) == 3


def test_other_inputs_begin_anew_and_keep_programs(tmp_path):
    calls = []
    finished_steps.prepare_output(tmp_path, "a")
    (tmp_path / "xla").mkdir()
    (tmp_path / "xla" / "program").write_text("compiled")
    finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls))
    assert not finished_steps.prepare_output(tmp_path, "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inputs.sha256", "steps", "xla"]
    assert (tmp_path / "xla" / "program").read_text() == "compiled"
    finished_steps.run_steps(tmp_path, make_steps(tmp_path, calls))
    assert len(calls) == 6


def test_start_cut_while_it_empties_begins_anew(tmp_path, monkeypatch):
    finished_steps.prepare_output(tmp_path, "a")
    finished_steps.run_steps(tmp_path, make_steps(tmp_path, []))

    def cut(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(finished_steps, "_remove", cut)
    with pytest.raises(KeyboardInterrupt):
        finished_steps.prepare_output(tmp_path, "b")
    monkeypatch.undo()
    # The old inputs are back, and the old files are not to be trusted.
    assert not finished_steps.prepare_output(tmp_path, "a")
    assert not any((tmp_path / "steps").iterdir())


def test_digest_sees_content_names_and_versions(tmp_path):
    (tmp_path / "code").mkdir()
    file = tmp_path / "code" / "a.py"
    file.write_text("1")

    def digest(versions=("jax 1",)):
        return finished_steps.digest_inputs(tmp_path, ["code"], versions)

    seen = [digest()]
    (tmp_path / "code" / "__pycache__").mkdir()
    (tmp_path / "code" / "__pycache__" / "a.pyc").write_text("1")
    assert digest() == seen[0]
    file.write_text("2")
    seen.append(digest())
    file.rename(tmp_path / "code" / "b.py")
    seen.append(digest())
    seen.append(digest(("jax 2",)))
    assert len(set(seen)) == 4


KILLED_PROGRAM = """
import os, pathlib, signal, sys
sys.path.insert(0, {folder!r})
import finished_steps
out = pathlib.Path(sys.argv[1])
def make(name):
    def run():
        with open(out.parent / "calls", "a") as file:
            file.write(name + " ")
        (out / name).mkdir()
        if os.environ.get("KILLED") == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return {{"name": name}}
    return finished_steps.DemoStep(name, name, run, (name,))
finished_steps.prepare_output(out, "a")
print(finished_steps.run_steps(out, [make(name) for name in "abc"]))
"""


def test_killed_by_sigkill_in_a_step(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED_PROGRAM.format(folder=str(ROOT / "demo")))
    command = [sys.executable, str(script), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, env=env | {"KILLED": "b"}, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text().split() == list("abbc")
    markers = sorted((tmp_path / "out" / "steps").iterdir())
    assert [json.loads(m.read_text())["results"]["name"] for m in markers] == list("abc")
