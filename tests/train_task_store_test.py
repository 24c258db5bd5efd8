"""Generated tasks are the same in every process, are made once, and survive kills and damage."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from train.data import records
from train.rl import sample as sample_lib
from train.rl import task_json, task_maker, task_store, tasks
from train.rl.rewards import logic

ROOT = pathlib.Path(__file__).parents[1]
needs_generators = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="the extra 'rl'"
)
# Those that follow PYTHONHASHSEED, or the global `random`.
UNSTEADY = (
    "isomorphic_strings",
    "knight_swap",
    "list_functions",
    "polynomial_multiplication",
    "ransom_note",
    "word_ladder",
)
# Opens sources, and prints their fingerprints and how many of them it had to make.
OPEN_PROGRAM = """
import json, os, pathlib, sys
from train.rl import task_maker, task_store, tasks
directory, num_processes, sources = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
task_maker._MIN_TASKS_PER_PROCESS = 1
os.sched_getaffinity = lambda _: range(num_processes)
calls, make_file = [], task_store._make_file
task_store._make_file = lambda *arguments: (calls.append(0), make_file(*arguments))
opened = [
    tasks.GeneratedTasks(tasks.TaskSource(**source), pathlib.Path(directory)) for source in sources
]
print(json.dumps([[source.fingerprint() for source in opened], len(calls)]))
"""


def start_opening(directory, sources, hash_seed=0, num_processes=2):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN_PROGRAM, str(directory), str(num_processes)]
        + [json.dumps(sources)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ".", "PYTHONHASHSEED": str(hash_seed)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Return fingerprints and the number of sources that were made."""
    output, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


def recipe_of(source):
    return tasks.describe_source(source)


def stored_file(source, directory, suffix=".jsonl"):
    return task_store.source_path(recipe_of(source), directory, suffix)


@pytest.fixture
def lookup_source(tmp_path):
    """A source, and its file in `tmp_path`."""
    source = tasks.TaskSource("mine", make="lookup", size=20, seed=3)
    tasks.GeneratedTasks(source, tmp_path)
    return source, stored_file(source, tmp_path)


@pytest.fixture
def ordered_indices(monkeypatch):
    """The indices that each making from now on orders, in a list."""
    ordered, make_task_lines = [], task_maker.make_task_lines

    def make(recipe, options, indices, num_processes=None):
        ordered.append(list(indices))
        return make_task_lines(recipe, options, indices, num_processes)

    monkeypatch.setattr(task_maker, "make_task_lines", make)
    return ordered


# ---- the same tasks everywhere


def assert_same_everywhere(names, tmp_path, num_processes):
    """Make the same sources in two processes of different hash seeds and numbers of workers."""
    sources = [{"name": name, "make": f"logic:{name}", "size": 4} for name in names]
    processes = [
        start_opening(tmp_path / str(seed), sources, seed, number)
        for seed, number in ((11, 1), (22, num_processes))
    ]
    (first, num_first), (second, num_second) = map(finish, processes)
    assert num_first == num_second == len(sources)
    differing = [name for name, a, b in zip(names, first, second, strict=True) if a != b]
    assert not differing


@needs_generators
@pytest.mark.slow
def test_generators_that_follow_the_process_make_the_same_tasks(tmp_path):
    assert_same_everywhere(UNSTEADY, tmp_path, 1)


@needs_generators
# Some seven processes import the generators for each part. Even tenths have mutations of kernels.
@pytest.mark.parametrize(
    "fifth", [pytest.param(n, marks=pytest.mark.long(tenths=[2 * n + 1])) for n in range(5)]
)
# The data set behind two generators leaves its files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_all_generators_make_the_same_tasks(tmp_path, fifth):
    from reasoning_gym import factory

    # `composite` takes objects as options, which no config can hold.
    names = sorted(factory.DATASETS.keys() - {"composite"})
    assert len(names) >= 105
    names = names[fifth::5]
    for name in names:
        for task in logic.generate_tasks(name, 2, 0):
            assert task_json.task_from_line(task_json.task_to_line(task), task.source) == task
    assert_same_everywhere(names, tmp_path, 3)


@pytest.mark.slow
def test_environments_make_the_same_tasks(tmp_path):
    sources = [{"name": name, "make": name, "size": 3} for name in ("lookup", "files", "repair")]
    processes = [
        start_opening(tmp_path / str(seed), sources, seed, number)
        for seed, number in ((11, 1), (22, 3))
    ]
    assert finish(processes[0]) == finish(processes[1])


@needs_generators
def test_fingerprints_are_those_of_earlier_versions(tmp_path):
    """A checkpoint of a run that made its tasks in each process is gone on with."""
    source = tasks.TaskSource("c", make="logic:countdown", size=3, options=(("max_numbers", 4),))
    made = logic.generate_tasks("countdown", 3, 0, max_numbers=4)
    text = "\n".join(f"{task.messages!r} {task.label!r}" for task in made)
    saved = [["made", 3, hashlib.sha256(text.encode()).hexdigest()]]
    tasks.GeneratedTasks(source, tmp_path).check_fingerprint(saved)


def test_the_global_random_is_left_alone():
    import random

    random.seed(1)
    state = random.getstate()
    if importlib.util.find_spec("reasoning_gym") is not None:
        list(logic.generate_tasks("list_functions", 2, 0))
    assert random.getstate() == state


# ---- made once


def test_later_starts_make_nothing(tmp_path, lookup_source, ordered_indices):
    source, path = lookup_source
    content = path.read_bytes()
    assert len(tasks.GeneratedTasks(source, tmp_path)) == 20
    assert ordered_indices == []
    assert path.read_bytes() == content
    assert not stored_file(source, tmp_path, ".making").exists()
    header = json.loads(path.read_text().splitlines()[1])
    assert header["recipe"] == {
        "name": "mine", "make": "lookup", "size": 20, "seed": 3, "options": []
    }  # fmt: skip


@needs_generators
def test_the_file_says_what_made_the_tasks(tmp_path, caplog):
    source = tasks.TaskSource("s", make="logic:chain_sum", size=2, options=(("max_terms", 3),))
    tasks.GeneratedTasks(source, tmp_path)
    path = stored_file(source, tmp_path)
    header = json.loads(path.read_text().splitlines()[1])
    assert header["versions"]["reasoning-gym"] == importlib.metadata.version("reasoning-gym")
    assert header["recipe"]["options"] == [["max_terms", 3]]
    # Another version reads the file, but says so.
    text = path.read_text().partition("\n")[2].replace(
        json.dumps(header["versions"]), json.dumps({**header["versions"], "reasoning-gym": "0.0.1"})
    )  # fmt: skip
    path.write_text(f"sha256 {hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    with caplog.at_level("WARNING"):
        assert len(tasks.GeneratedTasks(source, tmp_path)) == 2
    assert "made with 0.0.1" in caplog.text


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"size": 21}, {"name": "other/name"}, {"make": "files"}]
)
def test_a_changed_source_has_another_file(tmp_path, lookup_source, change):
    source, path = lookup_source
    changed = tasks.GeneratedTasks(dataclasses.replace(source, **change), tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    assert changed[0].source == change.get("name", "mine")
    assert path.exists()


@needs_generators
def test_changed_options_have_another_file(tmp_path):
    sources = [
        tasks.TaskSource("s", make="logic:chain_sum", size=8, options=options)
        for options in ((), (("max_terms", 2),))
    ]
    prints = [tasks.GeneratedTasks(source, tmp_path).fingerprint() for source in sources]
    assert len({json.dumps(fingerprint) for fingerprint in prints}) == 2
    assert len(list(tmp_path.glob("*.jsonl"))) == 2
    # A config that was saved has tuples in place of lists.
    as_list, as_tuple = (
        dataclasses.replace(sources[0], options=(("operators", kind(("+", "-"))),))
        for kind in (list, tuple)
    )
    assert stored_file(as_list, tmp_path) == stored_file(as_tuple, tmp_path)


# ---- kills, and two processes


@pytest.mark.slow
def test_a_killed_making_goes_on(tmp_path, ordered_indices):
    source = tasks.TaskSource("s", make="repair", size=400)
    process = start_opening(tmp_path, [{"name": "s", "make": "repair", "size": 400}])
    journal = stored_file(source, tmp_path, ".making")
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_journaled = journal.read_bytes().count(b"\n") - 1  # the first line is no task
    assert not stored_file(source, tmp_path).exists()
    continued = tasks.GeneratedTasks(source, tmp_path)
    assert len(ordered_indices[0]) == 400 - num_journaled
    unbroken = tasks.GeneratedTasks(source, tmp_path / "unbroken")
    assert continued.fingerprint() == unbroken.fingerprint()
    name = stored_file(source, tmp_path).name
    assert (tmp_path / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def write_journal(path, lookup_source, change_lines):
    """Put a whole journal in place of the source's file, after a change of its lines."""
    source, stored = lookup_source
    header, *lines = stored.read_text().splitlines()[1:]
    identity = {key: value for key, value in json.loads(header).items() if key != "fingerprint"}
    texts = [json.dumps(identity), *(f"{index} {line}" for index, line in enumerate(lines))]
    stored.unlink()
    journal = [task_store._with_checksum(text) for text in texts]
    stored.with_suffix(".making").write_text("".join(change_lines(journal)))
    return source


@pytest.mark.parametrize(
    ("change_lines", "missing"),
    [
        (lambda lines: lines, []),
        (lambda lines: [*lines[:-1], lines[-1][:-9]], [19]),  # torn
        (lambda lines: [*lines[:-1], lines[-1][:-1]], [19]),  # torn at its very end
        (lambda lines: [*lines[:5], lines[5].replace("Get", "Got"), *lines[6:]], [4]),
        (lambda lines: [*lines[:5], "\0" * 64 + "\n", *lines[6:]], [4]),
        (lambda lines: [lines[0], *lines[:0:-1]], []),  # in another order
        (lambda lines: [lines[0], *lines[1:], lines[7]], []),  # twice
        (lambda lines: lines[:1], list(range(20))),
        (lambda lines: [], list(range(20))),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 0'), *lines[1:]], None),
        (lambda lines: [task_store._with_checksum('{"format": 1}'), *lines[1:]], None),
    ],
)
def test_what_a_crash_leaves_of_a_journal(
    tmp_path, lookup_source, ordered_indices, change_lines, missing
):
    content = lookup_source[1].read_bytes()
    source = write_journal(tmp_path, lookup_source, change_lines)
    tasks.GeneratedTasks(source, tmp_path)
    assert ordered_indices == [list(range(20)) if missing is None else missing]
    assert lookup_source[1].read_bytes() == content


@pytest.mark.slow
def test_two_runs_share_a_directory(tmp_path):
    sources = [
        {"name": "s", "make": "repair", "size": 60},
        {"name": "t", "make": "files", "size": 2},
    ]
    results = [finish(p) for p in [start_opening(tmp_path, sources) for _ in range(2)]]
    assert results[0][0] == results[1][0]
    assert results[0][1] + results[1][1] == 2  # each source was made by one of them
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".jsonl", ".jsonl"]


# ---- damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.replace(b"Get", b"Got", 1), "is damaged"),
        (lambda data: data[:-200], "is damaged"),
        (lambda data: data + b"\n", "is damaged"),
        (lambda data: data.replace(b'"seed": 3', b'"seed": 4'), "is damaged"),
        (lambda data: b"", "is damaged"),
        (lambda data: b"\xff" * 100, "is damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, lookup_source, damage, message):
    source, path = lookup_source
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(records.DataError, match=f"got .*; wanted .*{message}. Delete the file"):
        tasks.GeneratedTasks(source, tmp_path)
    path.unlink()  # as the message says
    assert len(tasks.GeneratedTasks(source, tmp_path)) == 20


def test_the_file_of_another_source_is_refused(tmp_path, lookup_source):
    source, path = lookup_source
    other = dataclasses.replace(source, seed=9)
    path.rename(stored_file(other, tmp_path))
    with pytest.raises(records.DataError, match="'seed': 3.*; wanted .*'seed': 9.*Delete the file"):
        tasks.GeneratedTasks(other, tmp_path)


# ---- processes that make tasks


@pytest.fixture
def started_processes(monkeypatch):
    started, start = [], task_maker._start_process

    def start_process():
        started.append(start())
        return started[-1]

    monkeypatch.setattr(task_maker, "_start_process", start_process)
    return started


def test_a_process_that_dies_is_an_error(started_processes):
    recipe = recipe_of(tasks.TaskSource("s", make="repair", size=2000))
    lines = task_maker.make_task_lines(recipe, {}, range(2000), 2)
    next(lines)
    started_processes[1].kill()
    with pytest.raises(RuntimeError, match="tasks s: a process .* died with status -9"):
        list(lines)
    assert all(process.poll() is not None for process in started_processes)


def test_processes_end_with_the_making(started_processes):
    recipe = recipe_of(tasks.TaskSource("s", make="repair", size=2000))
    lines = task_maker.make_task_lines(recipe, {}, range(2000), 2)
    next(lines)
    lines.close()
    assert [process.poll() for process in started_processes] == [-9, -9]


@needs_generators
def test_an_error_of_a_generator_is_told():
    recipe = recipe_of(tasks.TaskSource("s", make="logic:chain_sum", size=4))
    with pytest.raises(ValueError, match="tasks s: ValueError: logic: got .*'no': 1"):
        list(task_maker.make_task_lines(recipe, {"no": 1}, range(4), 1))
    with pytest.raises(ValueError, match="got the generator 'no_such'"):
        task_maker.check_recipe(dict(recipe, make="logic:no_such"), {})
    with pytest.raises(ValueError, match=r"got a builtins.set: \{1\}; wanted text"):
        task_json.encode_value({"a": [{1}]})


# ---- lines


@pytest.mark.parametrize(
    "value",
    [
        None, True, 10**40, 0.1, float("inf"), "é\n\u2028\x85\ud800", [], (), {}, [1, (2, [3])],
        {"a": {"b": ()}}, {0: "red", "0": "blue"}, {(0, 1): [2]}, {None: 1, True: 2},
        {"__tuple__": [1]}, {"__pairs__": [[1, 2]]}, {"__tuple__": (1,), "a": 2},
    ],
)  # fmt: skip
def test_values_come_back(value):
    task = sample_lib.Task("t", ({"role": "user", "content": "p"},), "s", value, {"value": value})
    line = task_json.task_to_line(task)
    assert line.isascii()
    assert "\n" not in line
    # repr tells a tuple from a list, and 1 from True.
    assert repr(task_json.task_from_line(line, "s")) == repr(task)


def test_scalars_of_numpy_become_those_of_python():
    value = task_json.encode_value([np.str_("a"), np.int64(2), np.float32(0.5), np.bool_(True)])
    assert [type(item) for item in value] == [str, int, float, bool]
    assert value == ["a", 2, 0.5, True]
    for refused in (np.arange(3), {1}, object(), b"a"):
        with pytest.raises(ValueError, match="wanted text, numbers, and lists"):
            task_json.encode_value(refused)
