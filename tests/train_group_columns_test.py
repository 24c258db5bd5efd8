"""Groups as flat columns: all comes back, and a checkpoint holds few bytes a token."""

import dataclasses
import json

import numpy as np
import pytest

from train.rl import group_columns, groups, saved_state
from train.rl import sample as sample_lib

TASKS = {
    "s": [sample_lib.Task(f"s/{i}", ({"role": "user", "content": str(i)},), "s") for i in range(4)]
}
TOKEN_COLUMNS = ("prompt", "tokens", "mask", "logprobs", "versions")


def make_sample(rng, task, answer, routes=(3, 2), **fields):
    prompt = int(rng.integers(1, 6))
    mask = rng.integers(0, 2, answer)
    return sample_lib.Sample(
        task,
        rng.integers(0, 99, prompt),
        rng.integers(0, 99, answer),
        mask,
        -rng.random(answer) * mask,
        np.where(mask, 3, -1),
        routes=routes and rng.integers(0, 8, (prompt + answer - 1, *routes)).astype(np.int8),
        **fields,
    )


def make_group(number, answers, seed=0, routes=(3, 2)):
    rng, task = np.random.default_rng((seed, number)), TASKS["s"][number]
    samples = []
    for i, answer in enumerate(answers):
        text = "né " * answer
        sample = make_sample(rng, task, answer, routes if i % 3 else None, text=text)
        sample.messages = [
            {"role": "assistant", "content": "other"},
            {"role": "tool", "name": "say", "content": "\u2028"},
            {"role": "assistant", "content": text},
        ]
        sample.status = ("stop", "length", "repetition", "error")[i % 4]
        sample.reward, sample.valid = (None, False) if i == 1 else (0.1 * i, True)
        sample.parts = {"exact": 0.1 * i} if i else {}
        sample.turn_rewards = [(0, 0.5)] if i == 2 else []
        samples.append(sample)
    rewards = [s.reward for s in samples if s.valid]
    return groups.SampleGroup(
        number, "s", number, 77, task, samples, [None] * len(samples), rewards
    )


def make_partial(rng, size):
    return sample_lib.Generation(
        rng.integers(0, 99, size), -rng.random(size), np.full(size, 2), "length",
        raw=-rng.random(size),
    )  # fmt: skip


def assert_same_sample(got, wanted, with_text=True):
    for name in (*TOKEN_COLUMNS, "routes"):
        a, b = getattr(got, name), getattr(wanted, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    names = ["status", "turn_rewards", "reward", "parts", "valid"]
    for name in names + ["text", "messages", "task"] * with_text:
        assert getattr(got, name) == getattr(wanted, name), name


def through_json(value):
    return json.loads(json.dumps(value))


def test_open_groups_come_back_with_what_was_begun():
    rng = np.random.default_rng(1)
    first, second = make_group(0, (4, 1, 0, 7)), make_group(2, (5, 3))
    first.samples[1], first.partial[1] = None, make_partial(rng, 9)
    second.samples[0] = second.samples[1] = None
    second.partial[1] = make_partial(rng, 2)
    table, columns = group_columns.groups_to_columns([first, second], "open", with_text=True)
    back = group_columns.groups_from_columns(through_json(table), columns, "open", TASKS)
    for got, wanted in zip(back, (first, second), strict=True):
        for name in ("group_id", "source", "task_index", "window_tokens", "task", "rewards"):
            assert getattr(got, name) == getattr(wanted, name)
        assert got.oldest_version == wanted.oldest_version == 2
        for a, b in zip(got.samples, wanted.samples, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                assert_same_sample(a, b)
        for a, b in zip(got.partial, wanted.partial, strict=True):
            assert (a is None) == (b is None)
            if b is not None:
                for name in ("tokens", "logprobs", "raw", "versions"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
                assert (a.status, a.routes) == ("length", None)
    # Nothing at all comes back too.
    table, columns = group_columns.groups_to_columns([], "open", with_text=True)
    assert group_columns.groups_from_columns(through_json(table), columns, "open", TASKS) == []


def make_batch(routes=(3, 2)):
    made = [make_group(0, (4, 1, 3, 7), routes=routes), make_group(3, (5, 3, 0, 2), routes=routes)]
    return groups.GenerationBatch(made, {"rounds": 2.0, "reward_sampled": float("nan")}, 0.25)


@pytest.mark.parametrize("routes", [None, (3, 2)])
def test_a_batch_comes_back_where_there_are_no_tasks(routes):
    batch = make_batch(routes)
    table, columns = group_columns.batch_to_columns(batch)
    # As a process gets them: JSON, and the bytes of arrays with their shapes and dtypes.
    columns = {
        name: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for name, x in columns.items()
    }
    back = group_columns.batch_from_columns(through_json(table), columns)
    assert back.mean_reward == batch.mean_reward
    assert str(back.metrics) == str(batch.metrics)
    for got, wanted in zip(back.groups, batch.groups, strict=True):
        for name in ("group_id", "source", "task_index", "window_tokens", "rewards", "partial"):
            assert getattr(got, name) == getattr(wanted, name)
        assert (got.task.id, got.task.source) == (wanted.task.id, wanted.task.source)
        for a, b in zip(got.samples, wanted.samples, strict=True):
            assert_same_sample(a, b, with_text=False)
            assert a.task is got.task
    empty = group_columns.batch_to_columns(groups.GenerationBatch([], {}, 0.0))
    assert group_columns.batch_from_columns(*empty).groups == []


def test_columns_are_few_and_small():
    """The number of arrays does not grow with the samples, and a token has 13 bytes."""
    names = None
    for answers in ((5,), (1000,) * 40):
        batch = groups.GenerationBatch([make_group(0, answers, routes=None)], {}, 0.0)
        table, columns = group_columns.batch_to_columns(batch)
        assert names in (None, columns.keys())
        names = columns.keys()
    tokens = sum(len(s.tokens) for s in batch.groups[0].samples)
    assert 13 * tokens <= sum(x.nbytes for x in columns.values()) <= 13.2 * tokens
    assert len(json.dumps(table)) < 300 * len(answers)
    # What a collector keeps has the texts too, once, though messages repeat them.
    _, columns = group_columns.groups_to_columns(batch.groups, "open", with_text=True)
    text_bytes = sum(len(s.text.encode()) for s in batch.groups[0].samples)
    assert text_bytes <= columns["open.samples.texts"].nbytes <= 1.1 * text_bytes
    assert not any(x.dtype == object for x in columns.values())


def test_saved_state_has_columns_beside_its_json():
    table, columns = group_columns.groups_to_columns([make_group(1, (3, 2))], "ready", True)
    state = saved_state.RlSavedState({"ready": table}, 2, {"index": 1}, {"s": []}, columns)
    back = saved_state.RlSavedState.from_parts(through_json(state.to_json()), dict(columns))
    for field in dataclasses.fields(state):
        if field.name != "columns":
            assert getattr(back, field.name) == through_json(getattr(state, field.name))
    assert back.columns.keys() == columns.keys()
    for name, column in columns.items():
        assert (back.columns[name].dtype, back.columns[name].shape) == (column.dtype, column.shape)
        np.testing.assert_array_equal(back.columns[name], column)
    with pytest.raises(ValueError, match="without columns, which an earlier version wrote"):
        saved_state.RlSavedState.from_parts(state.to_json(), {})
    first = saved_state.RlSavedState()
    assert saved_state.RlSavedState.from_parts(first.to_json(), {}) == first


def test_a_sample_takes_any_numbers_and_keeps_columns():
    sample = sample_lib.Sample(TASKS["s"][0], (1, 2), [3], [1], [-0.5], [0])
    sample.append_observation([7, 8])
    sample.append_generated(sample_lib.Generation((4,), (-1.0,), (2,), "length"))
    wanted = {
        "prompt": [1, 2],
        "tokens": [3, 7, 8, 4],
        "mask": [1, 0, 0, 1],
        "logprobs": [-0.5, 0.0, 0.0, -1.0],
        "versions": [0, -1, -1, 2],
    }
    for name, values in wanted.items():
        column = getattr(sample, name)
        assert (column.dtype, column.tolist()) == (sample_lib.COLUMN_DTYPES[name], values)
    assert (sample.num_tokens, sample.num_generated, sample.status) == (6, 2, "length")
