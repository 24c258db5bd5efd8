"""The small parts of a run of reinforcement learning: windows, tasks, processes, samples."""

import dataclasses
import importlib.util
import json
import types
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from train import checkpoints, resume
from train.data import records as records_lib
from train.rl import config as rl_config
from train.rl import groups, length_schedule, saved_state, tasks
from train.rl import sample as sample_lib
from train.rl.environments import catalog, lookup

# ---- what a checkpoint has beside arrays


def test_saved_state_comes_back_from_json():
    columns = {"x": np.arange(3)}
    state = saved_state.RlSavedState(
        {"number": 3}, 2, {"index": 1}, {"s": [["f", 1, "hash"]]}, columns, 4
    )
    written = json.loads(json.dumps(state.to_json()))
    keys = ["collector", "version", "window", "fingerprints", "skipped_in_row"]
    assert list(written) == keys
    assert saved_state.RlSavedState.from_parts(written, columns) == state
    # As before the count of idle batches was kept.
    del written["skipped_in_row"]
    older_state = saved_state.RlSavedState.from_parts(written, columns)
    assert older_state == dataclasses.replace(state, num_skipped_in_row=0)


@pytest.mark.parametrize(
    ("without", "columns", "words"),
    [
        (("window",), {"x": np.arange(3)}, "an RL state without window"),
        (("version", "fingerprints"), {"x": np.arange(3)}, "state without version, fingerprints"),
        ((), {}, "a collector's state without columns"),
    ],
)
def test_saved_states_of_earlier_versions_are_refused(without, columns, words):
    written = saved_state.RlSavedState({"number": 3}, 2, {"index": 1}, {"s": []}).to_json()
    older = {key: value for key, value in written.items() if key not in without}
    with pytest.raises(ValueError, match=f"{words}, which an earlier version.*--init_from"):
        saved_state.RlSavedState.from_parts(older, columns)


def test_a_config_of_an_earlier_version_is_refused_with_a_way_on(tmp_path):
    (tmp_path / "config.json").write_text('{"checkpoint": "x", "tile_rows": 4}')
    with pytest.raises(checkpoints.ResumeError, match="earlier version.*'tile_rows'") as refusal:
        resume.read_config(rl_config.RlConfig, tmp_path)
    assert str(refusal.value).endswith(f"--init_from={tmp_path}")


class _Store:
    """A store of one checkpoint."""

    def __init__(self, data):
        self._data = data

    def read_info(self, step):
        return types.SimpleNamespace(data=self._data)

    def read_columns(self, step):
        return {"x": np.arange(3)}


def test_sources_may_be_added_but_not_lost_while_groups_wait(tmp_path):
    collector = {"ready": {"groups": [{"source": "old"}] * 2}, "open": {"groups": []}}
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    opened = tasks.FileTasks(tasks.TaskSource("old", f"{tmp_path}/a.jsonl"))
    written = saved_state.RlSavedState(collector, 1, {}, {"old": opened.fingerprint()}).to_json()
    store: Any = _Store(json.loads(json.dumps(written)))
    both = saved_state.read_saved_state(store, 3, {"old": opened, "new": opened})
    assert both.collector == collector
    with pytest.raises(records_lib.DataError, match="tasks old: 2 groups.*allow_change=curriculum"):
        saved_state.read_saved_state(store, 3, {"new": opened})


# ---- windows


def test_the_window_grows_when_answers_fill_it_and_their_perplexity_stays():
    stage = length_schedule.LengthStage(
        length_schedule.LengthSchedule((100, 200), near=0.9, tolerance=0.1, patience=3)
    )
    assert [stage.push(90, nll) for nll in (1.0, 1.05)] == [False, False]  # too few batches
    assert stage.window_tokens == 100
    assert not stage.push(89, 1.0)  # answers are too short
    assert stage.push(90, 1.0)
    assert (stage.index, stage.window_tokens) == (1, 200)
    assert [stage.push(200, 1.0) for _ in range(9)] == [False] * 9  # there is no other window


def test_the_window_waits_for_a_perplexity_that_still_falls():
    stage = length_schedule.LengthStage(
        length_schedule.LengthSchedule((8, 16, 32), tolerance=0.1, patience=2)
    )
    assert not any(stage.push(8, nll) for nll in (2.0, 1.5, 1.2, 1.0))
    assert stage.push(8, 0.95)
    assert not stage.push(16, 0.95)  # what was before this window does not count
    assert stage.push(16, 0.95)


def test_a_window_goes_on_from_its_state():
    config = length_schedule.LengthSchedule((8, 16, 32), tolerance=0.1, patience=3)
    stage = length_schedule.LengthStage(config)
    for nll in (1.0, 1.0, 1.0, 1.1, 1.1):
        stage.push(16, nll)
    assert stage.index == 1
    continued = length_schedule.LengthStage(config, json.loads(json.dumps(stage.state())))
    assert (
        [stage.push(16, 1.1), stage.window_tokens]
        == [continued.push(16, 1.1), continued.window_tokens]
        == [True, 32]
    )


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": ()}, {"tokens": (8, 8)}, {"tokens": (9, 8)}, {"tokens": (0, 8)}, {"patience": 0},
     {"tolerance": 0}, {"near": 0}, {"near": 1.1}],
)  # fmt: skip
def test_windows_of_no_use_are_refused(wrong):
    with pytest.raises(ValueError, match="windows.*wanted"):
        length_schedule.LengthSchedule(**{"tokens": (8, 16)} | wrong)


# ---- tasks

TURN = {"role": "user", "content": "2 + 2?"}
TOOL = {"name": "get", "parameters": {}}


@pytest.fixture(name="read")
def fixture_read():
    """Opens sources that are closed after the test."""
    opened = []

    def read(source):
        opened.append(tasks.FileTasks(source))
        return opened[-1]

    yield read
    for source_tasks in opened:
        source_tasks.close()


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.mark.parametrize(
    ("record", "keys", "label", "metadata"),
    [
        ({"input": "2 + 2?", "label": "4", "metadata": {"a": 1}}, (), "4", {"a": 1}),
        ({"prompt": "2 + 2?", "label": "4"}, (), "4", {}),
        (
            {"data_source": "d", "prompt": [TURN], "reward_model": {"ground_truth": "4"},
             "extra_info": {"index": 3}}, (), "4", {"index": 3},
        ),
        (
            {"question": "2 + 2?", "answer": "4", "metadata": {"b": 2}, "difficulty": 1},
            (), "4", {"b": 2},
        ),
        ({"messages": [TURN], "ground_truth": 4}, (), 4, {}),
        ({"problem": "2 + 2?", "solution": "4"}, (), "4", {}),
        ({"messages": [TURN], "label": None}, (), None, {}),
        ({"prompt": None, "question": "2 + 2?", "label": "4"}, (), "4", {}),
        (
            {"input": "no", "q": {"text": "2 + 2?"}, "right": ["4"]},
            (("prompt", "q.text"), ("label", "right")), ["4"], {},
        ),
        ({"prompt": "2 + 2?", "label": "4", "metadata": {"a": 1}}, (("metadata", ""),), "4", {}),
        (
            {"prompt": "2 + 2?", "tool_calls": [{"name": "get"}]},
            (("metadata", "tool_calls"),), None, {"tool_calls": [{"name": "get"}]},
        ),
        (
            {"prompt": "2 + 2?", "extra": {"tool_calls": [1]}},
            (("metadata", "extra.tool_calls"),), None, {"tool_calls": [1]},
        ),
    ],
)  # fmt: skip
def test_keys_of_all_dialects(tmp_path, read, record, keys, label, metadata):
    file_tasks = read(tasks.TaskSource("s", write(tmp_path / "a.jsonl", record), keys))
    task = file_tasks[0]
    assert (len(file_tasks), task.id, task.source, task.messages) == (1, "s/0", "s", (TURN,))
    assert (task.label, task.metadata, task.tools) == (label, metadata, ())


def test_tools_are_lists_or_their_json(tmp_path, read):
    records = [{"prompt": "p", "tools": value} for value in (None, [TOOL], json.dumps([TOOL]))]
    file_tasks = read(tasks.TaskSource("s", write(tmp_path / "a.jsonl", *records)))
    # Nothing is in the first record's, and yet the key is found.
    assert [file_tasks[i].tools for i in range(3)] == [(), (TOOL,), (TOOL,)]
    for wrong in ("get", {"name": "get"}, ["get"], 3):
        path = write(tmp_path / "b.jsonl", {"prompt": "p", "tools": wrong})
        with pytest.raises(records_lib.DataError, match=r"b\.jsonl.*got the tools.*wanted a list"):
            read(tasks.TaskSource("s", path))[0]


def test_tasks_of_a_table(tmp_path, read):
    rows = [{"prompt": [TURN], "reward_model": {"ground_truth": str(i)}} for i in range(3)]
    rows[0]["extra_info"], rows[1]["extra_info"] = None, {"index": 1}
    rows[2]["extra_info"] = {"split": "test"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table_tasks = read(tasks.TaskSource("s", str(tmp_path / "a.parquet")))
    assert table_tasks.keys == {
        "prompt": "prompt",
        "label": "reward_model.ground_truth",
        "metadata": "extra_info",
    }
    # A column has every key that any record has; what is null was not there.
    assert [table_tasks[i].metadata for i in range(3)] == [{}, {"index": 1}, {"split": "test"}]
    assert [table_tasks[i].label for i in range(len(table_tasks))] == ["0", "1", "2"]
    assert table_tasks[2].messages == (TURN,)


@pytest.mark.parametrize(
    ("record", "keys", "message"),
    [
        ({"text": "p"}, (), r"got the keys \['text'\]; wanted a prompt in one of prompt, messages"),
        ({"prompt": "p"}, (("label", "lable"),), "wanted lable, which keys= names for the label"),
        ({"prompt": ""}, (), r"a\.jsonl.*got the prompt ''; wanted a string or a list"),
        ({"prompt": ["p"]}, (), r"a\.jsonl.*got the prompt \['p'\]"),
        ({"prompt": []}, (), "got the prompt"),
    ],
)
def test_tasks_that_cannot_be_read(tmp_path, read, record, keys, message):
    with pytest.raises(records_lib.DataError, match=message):
        read(tasks.TaskSource("s", write(tmp_path / "a.jsonl", record), keys))[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "wanted either a path, or make"),
        ({"path": "a", "make": "lookup", "size": 1}, "wanted either a path, or make"),
        ({"make": "lookup"}, "a size of at least 1"),
        ({"path": "a", "keys": (("answer", "a"),)}, "got the key 'answer'; wanted some of prompt"),
        ({"make": "lookup", "size": 1, "keys": (("label", "a"),)}, "wanted keys with a path alone"),
        ({"make": "lookup", "size": 1, "options": (("a", 1),)}, "options with make='logic:NAME'"),
        ({"path": "a", "options": (("a", 1),)}, "options with make='logic:NAME'"),
    ],
)
def test_sources_that_contradict_themselves(fields, message):
    with pytest.raises(ValueError, match=message):
        tasks.TaskSource("s", **fields)


def test_made_tasks_are_the_same_again(tmp_path):
    source = tasks.TaskSource("mine", make="lookup", size=5, seed=3)
    first, second = (tasks.open_task_source(source, tmp_path / name) for name in "ab")
    assert [first[i] for i in range(5)] == [second[i] for i in range(len(second))]
    assert [first[i].label for i in range(5)] == [t.label for t in lookup.make_tasks(5, 3)]
    assert {first[i].source for i in range(5)} == {"mine"}
    fingerprint = json.loads(json.dumps(first.fingerprint()))
    second.check_fingerprint(fingerprint)
    changed = tasks.open_task_source(dataclasses.replace(source, seed=4), tmp_path)
    with pytest.raises(records_lib.DataError, match="as the run began with"):
        changed.check_fingerprint(fingerprint)


def test_files_are_told_from_others(tmp_path, read):
    source = tasks.TaskSource("s", write(tmp_path / "a.jsonl", {"prompt": "p"}))
    fingerprint = json.loads(json.dumps(read(source).fingerprint()))
    read(source).check_fingerprint(fingerprint)
    write(tmp_path / "a.jsonl", {"prompt": "q"})
    with pytest.raises(records_lib.DataError, match=r"a\.jsonl changed since the checkpoint"):
        read(source).check_fingerprint(fingerprint)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra 'rl'")
def test_generated_logic(tmp_path):
    source = tasks.TaskSource("sums", make="logic:chain_sum", size=3, options=(("max_terms", 2),))
    logic_tasks = tasks.open_task_source(source, tmp_path / "a")
    assert len(logic_tasks) == 3
    assert {logic_tasks[i].metadata["generator"] for i in range(3)} == {"chain_sum"}
    assert [logic_tasks[i].source for i in range(3)] == ["sums"] * 3
    logic_tasks.check_fingerprint(tasks.open_task_source(source, tmp_path / "b").fingerprint())
    with pytest.raises(ValueError, match="no_such_task"):
        tasks.open_task_source(dataclasses.replace(source, make="logic:no_such_task"), tmp_path)


def test_environments_by_name():
    for name, kind in catalog.ENVIRONMENT_CLASSES.items():
        world = catalog.make_environment(name)
        assert type(world) is kind
        assert catalog.make_environment(name) is not world
        task = catalog.make_task(name, 0, 0)
        world.start(task)  # each has tasks of its own kind
        world.close()
    for function in (catalog.make_environment, lambda name: catalog.make_task(name, 0, 0)):
        with pytest.raises(ValueError, match="got 'maze'; wanted one of files, lookup, repair"):
            function("maze")


# ---- samples


def test_a_reward_adds_to_the_environments_and_fails_with_it():
    sample = sample_lib.Sample(
        sample_lib.Task("t", (TURN,), "s"), (1,), reward=0.5, parts={"final": 0.5}
    )
    groups.apply_score(sample, sample_lib.RewardScore(0.25, {"exact": 0.25}))
    assert (sample.reward, sample.valid) == (0.75, True)
    assert sample.parts == {"final": 0.5, "exact": 0.25}
    groups.apply_score(sample, sample_lib.RewardScore(None, {}, "crash"))
    assert not sample.valid


def test_seeds_of_a_run_differ():
    seeds = {groups.sample_seed(0, group, index) for group in range(500) for index in range(16)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert groups.sample_seed(1, 0, 0) != groups.sample_seed(0, 0, 0)
