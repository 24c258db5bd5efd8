"""Tasks of files: typed columns, prompts without answers, and what rewards need of each task."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from train.data import records
from train.rl import task_checks, tasks
from train.rl.environments import lookup
from train.rl.rewards import compose

TURN = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "It is \\boxed{4}."}


@pytest.fixture(name="read")
def fixture_read(tmp_path):
    """Reads records through a file of JSON lines. The files are closed after the test."""
    opened = []

    def read(*rows, keys=(), name="a"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        opened.append(tasks.FileTasks(tasks.TaskSource(name, str(path), keys)))
        return opened[-1]

    yield read
    for file_tasks in opened:
        file_tasks.close()


@pytest.mark.parametrize("key", ["prompt", "messages"])
@pytest.mark.parametrize("write", [list, json.dumps])
def test_a_prompt_does_not_hold_the_answer(read, key, write):
    file_tasks = read(
        {key: write([TURN])}, {key: write([TURN, REPLY])}, {key: write([REPLY, TURN])}
    )
    assert file_tasks[0].messages == (TURN,)
    with pytest.raises(
        records.DataError,
        match=rf"a\.jsonl:2: got a prompt in {key} that ends with a turn of the assistant.*keys=",
    ):
        file_tasks[1]
    assert file_tasks[2].messages == (REPLY, TURN)


def test_the_columns_are_told(read, caplog):
    # The logger is named: other tests may have quietened it.
    with caplog.at_level(logging.INFO, logger="absl"):
        read({"messages": [TURN, REPLY], "prompt": "2 + 2?", "answer": "4"})
    assert "1 records, read from the columns prompt (prompt), answer (label)" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ('[{"role": "user", "content": "2', "wanted JSON"),
        ("[{'role': 'user', 'content': '2 + 2?'}]", "wanted JSON"),
        ([{"from": "human", "value": "2 + 2?"}], "wanted a role of system"),
        ([{"role": "gpt", "content": "2 + 2?"}], "wanted a role of system"),
        ({"role": "user", "content": "2 + 2?"}, "wanted a string or a list of messages"),
        (4, "wanted a string or a list of messages"),
    ],
)
def test_prompts_of_other_types_are_refused(read, prompt, message):
    with pytest.raises(records.DataError, match=rf"a\.jsonl:1: got .*{message}"):
        read({"prompt": prompt})[0]


def test_text_that_begins_with_a_bracket_is_text(read):
    file_tasks = read({"prompt": "[1, 2] sorted?"}, {"prompt": '[{"a": 1}] has which keys?'})
    assert [task.messages[0]["content"] for task in file_tasks] == [
        "[1, 2] sorted?",
        '[{"a": 1}] has which keys?',
    ]


@pytest.mark.parametrize(
    ("record", "keys", "metadata"),
    [
        ({"metadata": '{"tests": [1]}'}, (), {"tests": [1]}),
        ({"extra_info": '{"a": {"b": 1}}'}, (), {"a": {"b": 1}}),
        ({"metadata": ""}, (), {}),
        ({"metadata": None}, (), {}),
        ({"tool_calls": "[1]"}, (("metadata", "tool_calls"),), {"tool_calls": [1]}),
        ({"test": "assert f()"}, (("metadata", "test"),), {"test": "assert f()"}),
        (
            {"test": "assert f()", "entry_point": "f", "task_id": "1"},
            (),
            {"test": "assert f()", "entry_point": "f"},
        ),
        (
            {"test_list": ["assert f()"], "metadata": {"a": 1}},
            (),
            {"test_list": ["assert f()"], "a": 1},
        ),
        ({"fn_name": "g", "metadata": {"fn_name": "f"}}, (), {"fn_name": "f"}),
        ({"tests": [1]}, (("metadata", ""),), {}),
    ],
)
def test_metadata_may_be_json(read, record, keys, metadata):
    assert read({"prompt": "2 + 2?", **record}, keys=keys)[0].metadata == metadata


@pytest.mark.parametrize("value", ["hard", 3, '{"a": ', "[1"])
def test_metadata_of_other_types_is_refused(read, value):
    with pytest.raises(records.DataError, match=r"a\.jsonl:1: got .* in metadata.*wanted"):
        read({"prompt": "2 + 2?", "metadata": value})[0]


def test_json_text_in_a_table(tmp_path):
    rows = [{"prompt": json.dumps([TURN]), "metadata": '{"tests": []}', "tools": '[{"name": "f"}]'}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    table_tasks = tasks.FileTasks(tasks.TaskSource("s", str(tmp_path / "a.parquet")))
    task = table_tasks[0]
    table_tasks.close()
    assert (task.messages, task.metadata, task.tools) == ((TURN,), {"tests": []}, ({"name": "f"},))


def test_the_data_source_is_the_records_own(read):
    file_tasks = read(
        {"prompt": "p", "data_source": "openai/gsm8k"},
        {"prompt": "p", "data_source": "taco"},
        {"prompt": "p"},
    )
    assert [task.data_source for task in file_tasks] == ["openai/gsm8k", "taco", None]
    with pytest.raises(records.DataError, match=r"got the data_source \['a'\]"):
        read({"prompt": "p", "data_source": ["a"]}, name="b")[0]


def _check(source_tasks, *rewards, environment=None):
    terms = tuple((name, 1.0, ()) for name in rewards)
    config = compose.RewardsConfig(sources=(("*", terms),)) if rewards else None
    task_checks.check_needs(source_tasks, "a", config, environment)


OPENAI_CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "get", "arguments": '{"key": "a"}'},
}


@pytest.mark.parametrize(
    ("reward", "good", "bad", "message"),
    [
        ("exact", {"label": "4"}, {}, "got no label"),
        ("exact", {"label": ["4", "four"]}, {"label": {"target": ["34"]}}, "KEY.target"),
        ("mathematics", {"label": "4"}, {"label": None}, "got no label"),
        ("mathematics", {"label": 0}, {"label": ""}, "not empty"),
        ("mathematics", {"label": "\\frac{1}{2}"}, {"label": "\\frac{1}{"}, "wanted a formula"),
        ("mathematics", {"label": ["1"]}, {"label": [["1"]]}, "wanted text, a number, or a list"),
        ("code", {"test_list": ["assert f()"]}, {"test_list": ["f()"]}, "without an assertion"),
        ("code", {"tests": '[{"input": "", "output": ""}]'}, {"tests": "[]"}, "got no tests"),
        (
            "tool_calls",
            {"tool_calls": [OPENAI_CALL]},
            {"tool_calls": [{"name": 1}]},
            "name and arg",
        ),
        ("tool_calls", {"metadata": {"tool_calls": []}}, {"metadata": {}}, "got tool_calls None"),
        ("logic", {"metadata": {"generator": "g", "entry": {}}}, {}, "wanted generator and entry"),
        ("graded", {"label": "4"}, {}, "wanted a reference answer"),
        ("pairwise", {"metadata": {"reference": "4"}}, {}, "got no reference"),
    ],
)
def test_what_rewards_need_is_checked(read, reward, good, bad, message):
    good, bad = ({"prompt": "p", **record} for record in (good, bad))
    _check(read(good, good), reward, "format")
    with pytest.raises(
        records.DataError,
        match=rf"tasks a: 2 of 3 lack .*a\.jsonl:2: .*{message}.*needed by the reward '{reward}'",
    ):
        _check(read(good, bad, bad), reward, "format")
    # A reward that reads the text alone needs nothing.
    _check(read(bad), "format")


def test_what_environments_need_is_checked(read):
    task = lookup.make_task(0, 0)
    row = {"messages": list(task.messages), "label": task.label, "metadata": task.metadata}
    _check(read(row), environment="lookup")
    with pytest.raises(
        records.DataError, match=r"a\.jsonl:2: .*needed by the environment 'lookup'"
    ):
        _check(read(row, {"messages": [TURN]}), environment="lookup")


def test_generated_tasks_have_what_they_need(tmp_path):
    source = tasks.TaskSource("a", make="lookup", size=3)
    generated = tasks.open_task_source(source, tmp_path)
    _check(generated, "exact", environment="lookup")
    with pytest.raises(records.DataError, match=r"3 of 3 .*task lookup-0-0: got no tests"):
        _check(generated, "code")
