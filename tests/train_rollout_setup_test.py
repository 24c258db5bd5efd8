"""Tasks of a run: files before making, process 0 alone, and prompts that are encoded once."""

import contextlib
import dataclasses
import json
import pathlib

import jax
import pytest

from m1_jax import tokenizer as tokenizer_lib
from train.data import records
from train.rl import config as rl_config
from train.rl import length_schedule, rollout_setup, task_maker
from train.rl import tasks as tasks_lib
from train.rl.rewards import catalog

TOKENIZER = pathlib.Path(__file__).parents[1] / "demo" / "data" / "tokenizer"
EXACT = (("exact", 1.0, ()),)


@pytest.fixture
def tokenizer():
    return tokenizer_lib.Tokenizer.load(TOKENIZER)


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that are encoded from now on, in a list."""
    prompts, encode_prompt = [], rollout_setup.prompt.encode_prompt

    def encode(tokenizer, messages, tools=None):
        prompts.append(messages[0]["content"])
        return encode_prompt(tokenizer, messages, tools)

    monkeypatch.setattr(rollout_setup.prompt, "encode_prompt", encode)
    return prompts


def write_prompts(path, *prompts):
    rows = [{"prompt": prompt, "label": "1"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_config(*sources, held_out=(), max_prompt_tokens=100):
    return rl_config.RlConfig(
        checkpoint="c",
        batches=9,
        sources=sources,
        rollout=rl_config.RolloutConfig(
            2, length_schedule.LengthSchedule((20,)), max_prompt_tokens, group_size=2
        ),
        update=rl_config.UpdateConfig(1e-3, minibatches=1),
        evaluation=rl_config.RlEvaluationConfig(held_out),
        rewards=rl_config.RewardsConfig(
            sources=tuple((source.name, EXACT) for source in {s.name: s for s in sources}.values())
        ),
    )


def open_tasks(config, tokenizer, workdir):
    with contextlib.ExitStack() as stack:
        return rollout_setup.open_run_tasks(config, tokenizer, workdir, stack)


def test_sources_keep_their_order_and_share_names(tmp_path, tokenizer):
    made = tasks_lib.TaskSource("made", make="lookup", size=4, seed=1)
    file = tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", "one", "two"))
    held_out = dataclasses.replace(made, seed=2, size=3)
    tasks, held_out_tasks = open_tasks(
        make_config(made, file, held_out=(held_out,)), tokenizer, tmp_path
    )
    assert {name: len(source) for name, source in tasks.items()} == {"made": 4, "file": 2}
    assert list(tasks) == ["made", "file"]
    assert len(held_out_tasks["made"]) == 3
    assert tasks["made"][0] != held_out_tasks["made"][0]
    assert len(list((tmp_path / "tasks").glob("made-*.jsonl"))) == 2


def test_nothing_is_made_before_an_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(task_maker, "make_task_lines", None)  # calling it would raise TypeError
    made = tasks_lib.TaskSource("made", make="lookup", size=4)
    missing = tasks_lib.TaskSource("file", str(tmp_path / "missing.jsonl"))
    wrong = tasks_lib.TaskSource("wrong", make="maze", size=4)
    with pytest.raises(records.DataError, match=r"missing\.jsonl"):
        open_tasks(make_config(made, missing), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="got 'maze'; wanted one of"):
        open_tasks(make_config(made, wrong), tokenizer, tmp_path)
    long_source = tasks_lib.TaskSource("long", write_prompts(tmp_path / "a.jsonl", "one " * 99))
    with pytest.raises(ValueError, match="task long/0 of long: got a prompt of"):
        open_tasks(make_config(made, long_source), tokenizer, tmp_path)


@pytest.mark.parametrize("is_held_out", [False, True])
def test_tasks_without_what_their_rewards_need_are_refused(tmp_path, tokenizer, is_held_out):
    good = tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", "one"))
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "label": "1"}\n{"prompt": "two"}\n')
    bad = dataclasses.replace(good, path=str(tmp_path / "b.jsonl"))
    config = make_config(good, held_out=(bad,)) if is_held_out else make_config(bad)
    for _ in range(2):  # what failed is not remembered as checked
        with pytest.raises(records.DataError, match=r"1 of 2 lack .*b\.jsonl:2: got no label"):
            open_tasks(config, tokenizer, tmp_path)
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "label": "1"}\n')
    open_tasks(config, tokenizer, tmp_path)


def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer, caplog):
    prompts = ["one", "two " * 99, "three", "four " * 50]
    file = tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", *prompts))
    with pytest.raises(ValueError, match="2 of 4 are too long.*overlong='drop'"):
        open_tasks(make_config(file), tokenizer, tmp_path)
    dropping = dataclasses.replace(file, overlong="drop")
    for max_prompt_tokens, kept in ((50, [0, 2]), (1000, [0, 1, 2, 3])):
        config = make_config(dropping, max_prompt_tokens=max_prompt_tokens)
        tasks = open_tasks(config, tokenizer, tmp_path)[0]["file"]
        assert [task.id for task in tasks] == [f"file/{index}" for index in kept]
        fingerprint = json.loads(json.dumps(tasks.fingerprint()))
        tasks.check_fingerprint(fingerprint)
        tasks.close()
    assert "left out 2 of 4, whose prompts have more than 50 tokens" in caplog.text
    again = open_tasks(make_config(dropping, max_prompt_tokens=50), tokenizer, tmp_path)[0]["file"]
    assert again.location(1).endswith("a.jsonl:3")
    saved = again.fingerprint()
    saved[-1] = ["kept", 3, "0"]
    with pytest.raises(records.DataError, match="got 2 that are short enough; wanted the 3"):
        again.check_fingerprint(saved)
    with pytest.raises(ValueError, match="4 of 4 are too long"):
        open_tasks(make_config(dropping, max_prompt_tokens=2), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="got overlong 'cut'"):
        dataclasses.replace(file, overlong="cut")


def test_tasks_are_checked_once(tmp_path, tokenizer, monkeypatch):
    file = tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", "one", "two"))
    checked = []
    check = catalog.TASK_CHECKS["exact"]
    monkeypatch.setitem(catalog.TASK_CHECKS, "exact", lambda task: checked.append(check(task)))
    for _ in range(2):
        open_tasks(make_config(file), tokenizer, tmp_path)
    assert len(checked) == 2
    write_prompts(tmp_path / "a.jsonl", "one", "two", "three")
    open_tasks(make_config(file), tokenizer, tmp_path)
    assert len(checked) == 5


def test_other_processes_read_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    missing = tasks_lib.TaskSource("file", str(tmp_path / "missing.jsonl"))
    made = tasks_lib.TaskSource("made", make="lookup", size=4)
    assert open_tasks(make_config(missing, made), tokenizer, tmp_path) == ({}, {})
    assert not list(tmp_path.iterdir())


def test_prompts_are_encoded_once(tmp_path, tokenizer, encoded):
    path = tmp_path / "a.jsonl"
    prompts = ["one", "three four five six", "two", "seven"]
    config = make_config(tasks_lib.TaskSource("file", write_prompts(path, *prompts)))
    open_tasks(config, tokenizer, tmp_path)
    assert set(encoded) == set(prompts)
    encoded.clear()
    open_tasks(config, tokenizer, tmp_path)
    assert set(encoded) == {prompts[1]}
    # The limit may have become lower since.
    with pytest.raises(ValueError, match="task file/1 of file: got a prompt of .* at most 5"):
        open_tasks(make_config(*config.sources, max_prompt_tokens=5), tokenizer, tmp_path)
    encoded.clear()
    write_prompts(path, "one")  # fewer tasks than the index of the longest
    open_tasks(config, tokenizer, tmp_path)
    assert set(encoded) == {"one"}


@pytest.mark.parametrize("record", ["", "[1]", '{"index": 9}', '{"identity": 1, "index": 9}'])
def test_a_damaged_record_of_prompts_is_written_anew(tmp_path, tokenizer, encoded, record):
    prompts = ["one", "three four five six"]
    config = make_config(
        tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", *prompts))
    )
    open_tasks(config, tokenizer, tmp_path)
    (record_path,) = (tmp_path / "tasks").glob("*.longest_prompt.json")
    text = record_path.read_text()
    record_path.write_text(record)
    encoded.clear()
    open_tasks(config, tokenizer, tmp_path)
    assert set(encoded) == set(prompts)
    assert record_path.read_text() == text


def test_another_tokenizer_or_template_encodes_all(tmp_path, tokenizer, encoded, monkeypatch):
    prompts = ["one", "three four five six"]
    config = make_config(
        tasks_lib.TaskSource("file", write_prompts(tmp_path / "a.jsonl", *prompts))
    )
    open_tasks(config, tokenizer, tmp_path)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        (folder / file.name).write_text(file.read_text())
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text())
    tokenizer_json["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json))
    encoded.clear()
    other = tokenizer_lib.Tokenizer.load(folder)
    assert other.fingerprint != tokenizer.fingerprint
    open_tasks(config, other, tmp_path)
    assert set(encoded) == set(prompts)
    # The template: the same tokenizer, and more tokens around each prompt.
    encode_prompt = rollout_setup.prompt.encode_prompt
    monkeypatch.setattr(
        rollout_setup.prompt, "encode_prompt", lambda *args: [1, *encode_prompt(*args)]
    )
    encoded.clear()
    open_tasks(config, other, tmp_path)
    assert set(encoded) == set(prompts)
