"""The small parts of a run of reinforcement learning: windows, tasks, configs, flags, processes."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from train import objective, processes, rl_config, rl_flags, sources, tasks, windows
from train.environments import catalog, lookup

# ---- windows


def test_the_window_grows_when_answers_fill_it_and_their_perplexity_stays():
    stage = windows.Stage(windows.Windows((100, 200), near=0.9, tolerance=0.1, patience=3))
    assert [stage.push(90, nll) for nll in (1.0, 1.05)] == [False, False]  # too few batches
    assert stage.tokens == 100
    assert not stage.push(89, 1.0)  # answers are too short
    assert stage.push(90, 1.0)
    assert (stage.index, stage.tokens) == (1, 200)
    assert [stage.push(200, 1.0) for _ in range(9)] == [False] * 9  # there is no other window


def test_the_window_waits_for_a_perplexity_that_still_falls():
    stage = windows.Stage(windows.Windows((8, 16, 32), tolerance=0.1, patience=2))
    assert not any(stage.push(8, nll) for nll in (2.0, 1.5, 1.2, 1.0))
    assert stage.push(8, 0.95)
    assert not stage.push(16, 0.95)  # what was before this window does not count
    assert stage.push(16, 0.95)


def test_a_window_goes_on_from_its_state():
    config = windows.Windows((8, 16, 32), tolerance=0.1, patience=3)
    one, other = windows.Stage(config), windows.Stage(config)
    for nll in (1.0, 1.0, 1.0, 1.1, 1.1):
        one.push(16, nll)
    assert one.index == 1
    other.restore(json.loads(json.dumps(one.state())))
    assert [one.push(16, 1.1), one.tokens] == [other.push(16, 1.1), other.tokens] == [True, 32]


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": ()}, {"tokens": (8, 8)}, {"tokens": (9, 8)}, {"tokens": (0, 8)}, {"patience": 0},
     {"tolerance": 0}, {"near": 0}, {"near": 1.1}],
)  # fmt: skip
def test_windows_of_no_use_are_refused(wrong):
    with pytest.raises(ValueError, match="windows.*wanted"):
        windows.Windows(**{"tokens": (8, 16)} | wrong)


# ---- tasks

TURN = {"role": "user", "content": "2 + 2?"}
TOOL = {"name": "get", "parameters": {}}


@pytest.fixture(name="read")
def fixture_read():
    """Opens sources that are closed after the test."""
    opened = []

    def read(source):
        opened.append(tasks.open_source(source))
        return opened[-1]

    yield read
    for one in opened:
        one.close()


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
    some = read(tasks.Source("s", write(tmp_path / "a.jsonl", record), keys))
    task = some[0]
    assert (len(some), task.id, task.source, task.messages) == (1, "s/0", "s", (TURN,))
    assert (task.label, task.metadata, task.tools) == (label, metadata, ())


def test_tools_are_lists_or_their_json(tmp_path, read):
    records = [{"prompt": "p", "tools": value} for value in (None, [TOOL], json.dumps([TOOL]))]
    some = read(tasks.Source("s", write(tmp_path / "a.jsonl", *records)))
    # Nothing is in the first record's, and yet the key is found.
    assert [some[i].tools for i in range(3)] == [(), (TOOL,), (TOOL,)]
    for wrong in ("get", {"name": "get"}, ["get"], 3):
        path = write(tmp_path / "b.jsonl", {"prompt": "p", "tools": wrong})
        with pytest.raises(sources.DataError, match=r"b\.jsonl.*got the tools.*wanted a list"):
            read(tasks.Source("s", path))[0]


def test_tasks_of_a_table(tmp_path, read):
    rows = [{"prompt": [TURN], "reward_model": {"ground_truth": str(i)}} for i in range(3)]
    rows[0]["extra_info"], rows[1]["extra_info"] = None, {"index": 1}
    rows[2]["extra_info"] = {"split": "test"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    some = read(tasks.Source("s", str(tmp_path / "a.parquet")))
    assert some.keys == {
        "prompt": "prompt",
        "label": "reward_model.ground_truth",
        "metadata": "extra_info",
    }
    # A column has every key that any record has; what is null was not there.
    assert [some[i].metadata for i in range(3)] == [{}, {"index": 1}, {"split": "test"}]
    assert [some[i].label for i in range(len(some))] == ["0", "1", "2"]
    assert some[2].messages == (TURN,)


@pytest.mark.parametrize(
    ("record", "keys", "message"),
    [
        ({"text": "p"}, (), r"got the keys \['text'\]; wanted a prompt in one of prompt, messages"),
        ({"prompt": "p"}, (("label", "lable"),), "wanted lable, as keys= says of the label"),
        ({"prompt": ""}, (), r"a\.jsonl.*got the prompt ''; wanted a string or a list"),
        ({"prompt": ["p"]}, (), r"a\.jsonl.*got the prompt \['p'\]"),
        ({"prompt": []}, (), "got the prompt"),
    ],
)
def test_tasks_that_cannot_be_read(tmp_path, read, record, keys, message):
    with pytest.raises(sources.DataError, match=message):
        read(tasks.Source("s", write(tmp_path / "a.jsonl", record), keys))[0]


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
        tasks.Source("s", **fields)


def test_made_tasks_are_the_same_again():
    source = tasks.Source("mine", make="lookup", size=5, seed=3)
    one, other = tasks.open_source(source), tasks.open_source(source)
    assert [one[i] for i in range(5)] == [other[i] for i in range(len(other))]
    assert [one[i].label for i in range(5)] == [t.label for t in lookup.tasks(5, 3)]
    assert {one[i].source for i in range(5)} == {"mine"}
    prints = json.loads(json.dumps(one.fingerprint()))
    other.check(prints)
    changed = tasks.open_source(dataclasses.replace(source, seed=4))
    with pytest.raises(sources.DataError, match="as the run began with"):
        changed.check(prints)


def test_files_are_told_from_others(tmp_path, read):
    source = tasks.Source("s", write(tmp_path / "a.jsonl", {"prompt": "p"}))
    prints = json.loads(json.dumps(read(source).fingerprint()))
    read(source).check(prints)
    write(tmp_path / "a.jsonl", {"prompt": "q"})
    with pytest.raises(sources.DataError, match=r"a\.jsonl changed since the checkpoint"):
        read(source).check(prints)


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra 'rl'")
def test_generated_logic():
    source = tasks.Source("sums", make="logic:chain_sum", size=3, options=(("max_terms", 2),))
    some = tasks.open_source(source)
    assert len(some) == 3
    assert {some[i].metadata["generator"] for i in range(3)} == {"chain_sum"}
    assert [some[i].source for i in range(3)] == ["sums"] * 3
    some.check(tasks.open_source(source).fingerprint())
    with pytest.raises(ValueError, match="no_such_task"):
        tasks.open_source(dataclasses.replace(source, make="logic:no_such_task"))


def test_environments_by_name():
    for name, kind in catalog.ENVIRONMENTS.items():
        world = catalog.make(name)
        assert type(world) is kind
        assert catalog.make(name) is not world
        (task,) = catalog.tasks(name, 1, 0)
        world.start(task)  # each has tasks of its own kind
        world.close()
    for function in (catalog.make, lambda name: catalog.tasks(name, 1, 0)):
        with pytest.raises(ValueError, match="got 'maze'; wanted one of files, lookup, repair"):
            function("maze")


# ---- processes


@pytest.mark.parametrize("size", [0, 1, 60, 200, 4096])
def test_all_processes_hear_what_the_first_says(monkeypatch, size):
    sent, value = [], {"text": "x" * size, "routes": np.arange(size, dtype=np.int8)}

    def tell(array, is_source):
        if is_source:
            sent.append(np.array(array))
            return array
        heard = sent.pop(0)
        assert (heard.shape, heard.dtype) == (array.shape, array.dtype)  # one program for all
        assert not array.any()
        return heard

    assert processes.broadcast(value) is value  # alone
    monkeypatch.setattr(processes, "_PIECE_BYTES", 128)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "broadcast_one_to_all", tell)
    said = [processes.broadcast(value)]
    assert max(array.size for array in sent) <= 128
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    said.append(processes.broadcast(None))
    assert not sent
    for one in said:
        assert one["text"] == value["text"]
        np.testing.assert_array_equal(one["routes"], value["routes"])


# ---- the config


def config(**changes):
    fields = {
        "checkpoint": "c",
        "batches": 3,
        "sources": (tasks.Source("a", "a.jsonl"), tasks.Source("b", "b.jsonl")),
        "rollout": rl_config.Rollout(4, windows.Windows((64, 96)), 32, group_size=2),
        "update": rl_config.Update(1e-6, minibatches=2),
        "rewards": rl_config.Rewards(
            sources=(("a", (("exact", 1.0, ()),)), ("b", (("format", 1.0, ()),)))
        ),
    }
    return rl_config.Run(**fields | changes)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("rollout", {"groups": 0}),
        ("rollout", {"group_size": 1}),
        ("rollout", {"max_prompt_tokens": 0}),
        ("rollout", {"max_rounds": 0}),
        ("rollout", {"partial_tokens": -1}),
        ("rollout", {"max_staleness": -1}),
        ("rollout", {"oversample": 0.9}),
        ("rollout", {"overlong_buffer_tokens": 65}),
        ("rollout", {"temperature": 0.0}),
        ("update", {"rows": 0}),
        ("update", {"learning_rate": -1.0}),
        ("update", {"warmup_steps": -1}),
        ("evaluation", {"every_batches": 1}),
        ("evaluation", {"every_batches": -1}),
        ("evaluation", {"samples": 0}),
        ("evaluation", {"temperature": -1.0}),
    ],
)
def test_parts_out_of_range(part, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got .*; wanted|a source, as"):
        dataclasses.replace(getattr(config(), part), **wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": 0}, "batches: got 0"),
        ({"sources": ()}, "sources: .*at least one"),
        ({"sources": (tasks.Source("a", "x"), tasks.Source("a", "y"))}, "different names"),
        ({"rewards": None}, "rewards: got None; wanted some, as there is no agent"),
        ({"checkpoint": ""}, "checkpoint"),
        ({"dtype": "float16"}, "dtype: got 'float16'"),
        ({"remat": "some"}, "remat: got 'some'"),
        ({"update": rl_config.Update(1e-6, minibatches=3)}, r"a divisor of rollout\.groups = 4"),
        ({"curriculum": rl_config.Curriculum(((0, (("c", 1.0),)),))}, r"curriculum: got \['c'\]"),
        (
            {
                "agent": rl_config.Agent("lookup"),
                "rollout": rl_config.Rollout(2, windows.Windows((9,)), 9, partial_tokens=5),
            },
            "0 with an agent",
        ),
    ],
)
def test_runs_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_without_a_curriculum_sources_weigh_the_same():
    assert config(seed=7).schedule().weights_at(5) == {"a": 0.5, "b": 0.5}
    assert config(seed=7).schedule().seed == 7
    given = rl_config.Curriculum(((0, (("b", 1.0),)),))
    assert config(curriculum=given).schedule() is given
    assert config().rollout.max_tokens == 32 + 96


# ---- slime's flags


def change(command, **changes):
    return rl_flags.change(config(**changes), command.split())


def test_no_flag_changes_nothing():
    assert change("") == (config(), "")


@pytest.mark.parametrize(
    ("command", "part", "wanted"),
    [
        ("--n-samples-per-prompt 6", "rollout", {"group_size": 6}),
        ("--rollout-batch-size 8", "rollout", {"groups": 8, "oversample": 1.0}),
        ("--over-sampling-batch-size 6", "rollout", {"oversample": 1.5}),
        ("--rollout-batch-size 2 --over-sampling-batch-size 6", "rollout", {"oversample": 3.0}),
        ("--rollout-max-prompt-len 50", "rollout", {"max_prompt_tokens": 50}),
        ("--rollout-temperature .7", "rollout", {"temperature": 0.7}),
        ("--rollout-top-p .9", "rollout", {"top_p": 0.9}),
        ("--rollout-top-k 40", "rollout", {"top_k": 40}),
        ("--rollout-top-k -1", "rollout", {"top_k": 0}),
        ("--global-batch-size 2", "update", {"minibatches": 4}),
        ("--num-steps-per-rollout 1", "update", {"minibatches": 1}),
        ("--num-steps-per-rollout 4 --global-batch-size 2", "update", {"minibatches": 4}),
        ("--lr 1e-5", "update", {"learning_rate": 1e-5, "minibatches": 2}),
        ("--clip-grad .5", "optimizer", {"clip_norm": 0.5}),
    ],
)
def test_a_flag_changes_its_field_and_no_other(command, part, wanted):
    changed, _ = change(command)
    expected = {part: dataclasses.replace(getattr(config(), part), **wanted)}
    if "groups" in wanted:
        expected = {part: dataclasses.replace(config().rollout, groups=wanted["groups"])}
    if wanted == {"oversample": 3.0}:
        expected = {part: dataclasses.replace(config().rollout, groups=2, oversample=3.0)}
    assert changed == dataclasses.replace(config(), **expected)


@pytest.mark.parametrize(
    ("command", "tokens"),
    [
        ("--rollout-max-response-len 40", (40,)),
        ("--rollout-max-context-len 72", (40,)),
        ("--rollout-max-context-len 72 --rollout-max-prompt-len 20", (52,)),
        ("--rollout-max-context-len 72 --rollout-max-response-len 30", (30,)),
        ("--rollout-max-context-len 72 --rollout-max-response-len 50", (40,)),  # both hold
        ("--lr 1", (64, 96)),
    ],
)
def test_flags_of_length(command, tokens):
    assert change(command)[0].rollout.windows.tokens == tokens


def test_flags_of_the_whole_run():
    changed, _ = change("--num-rollout 9 --rollout-seed 5 --apply-chat-template")
    assert changed == config(batches=9, seed=5)


def test_flags_of_tasks_change_the_first_source():
    changed, _ = change(
        "--prompt-data new.parquet --input-key q --label-key l --metadata-key m --tool-key t "
        "--rm-type math"
    )
    keys = (("prompt", "q"), ("label", "l"), ("metadata", "m"), ("tools", "t"))
    assert changed.sources == (tasks.Source("a", "new.parquet", keys), config().sources[1])
    assert dict(changed.rewards.sources) == {
        "a": (("mathematics", 1.0, ()),),
        "b": (("format", 1.0, ()),),
    }
    made = (tasks.Source("a", make="logic:chain_sum", size=3, options=(("max_terms", 2),)),)
    changed, _ = change("--prompt-data new.jsonl", sources=made)
    assert changed.sources == (tasks.Source("a", "new.jsonl"),)
    changed, _ = change("--rm-type exact", rewards=None, agent=rl_config.Agent("lookup"))
    assert changed.rewards.sources == (("a", (("exact", 1.0, ()),)),)


def test_flags_of_the_objective():
    changed, text = change("--advantage-estimator grpo --eps-clip-high .28")
    assert changed == config(
        objective=dataclasses.replace(objective.PRESETS["grpo"], clip_high=0.28)
    )
    assert text.startswith("objective grpo")
    # Without an estimator it is the config's own that is changed, and told.
    changed, text = change("--eps-clip .1", objective=objective.PRESETS["dapo"])
    wanted = dataclasses.replace(objective.PRESETS["dapo"], clip_low=0.1)
    assert changed.objective == wanted
    assert text.startswith("objective dapo")
    mine = dataclasses.replace(objective.PRESETS["dapo"], clip_high=0.3)
    changed, text = change("--lr 1e-5", objective=mine)
    assert changed.objective == mine
    assert text.startswith("objective dapo")
    assert "1.3" in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--no-such-flag 1", "--no-such-flag: got an unknown flag"),
        ("--ref-load x", "got --ref-load, which nothing here follows"),
        ("--reward-key score", "got --reward-key, which nothing here follows"),
        ("--apply-chat-template=false", "got false; wanted true"),
        ("--global-batch-size 3", "got 3 of the 8 samples of a batch"),
        ("--global-batch-size 0", "got 0 of the 8 samples of a batch"),
        ("--global-batch-size 4 --num-steps-per-rollout 4", "as many steps as it leaves"),
        ("--num-steps-per-rollout 0", "minibatches: got 0"),
        ("--num-steps-per-rollout 3", "a divisor of rollout.groups = 4"),
        ("--rollout-batch-size 0 --over-sampling-batch-size 4", "groups: got 0"),
        ("--over-sampling-batch-size 2", "oversample: got 0.5"),
        ("--rollout-max-context-len 32", "wanted rising numbers above 0"),
        ("--rollout-temperature 0", "temperature: got 0.0"),
        ("--lr 1 --lr 2", "--lr: got 1.0 and 2.0"),
    ],
)
def test_flags_that_cannot_be_followed(command, message):
    with pytest.raises(ValueError, match=message):
        change(command)
