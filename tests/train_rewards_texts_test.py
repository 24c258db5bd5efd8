"""Rewards that only read the text: answers, form, repetition, tool calls; the schedule of tasks."""

import asyncio
import json

import pytest

from train.rl import curriculum
from train.rl import sample as sample_lib
from train.rl.rewards import answer, format, tool_calls


def _sample(text, label="5", status="stop", **metadata):
    task = sample_lib.Task("t", (), "s", label, metadata)
    return sample_lib.Sample(task, (), text=text, status=status)


def _reward(reward, *arguments, **options):
    return asyncio.run(reward.reward(_sample(*arguments, **options)))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Answer: 5", "5"),
        ("<think>Answer: 6</think>so\nanswer:  5 \n", "5"),
        ("Answer: 4\nAnswer: 5", "5"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed {2}", "2"),
        (r"Answer: 3, that is \boxed{4}", "4"),
        (r"\boxed{4}. Answer: 3", "3"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"<think>\boxed{1}</think> none", None),
        ("Answer:", ""),
        ("5", None),
    ],
)
def test_answer(text, found):
    assert answer.extract_answer(text) == found


def test_exact():
    assert _reward(answer.ExactReward(), "x Answer: 5") == 1.0
    assert _reward(answer.ExactReward(), "x Answer: 5.0") == 0.0
    assert _reward(answer.ExactReward(), "x Answer: 5", label=5) == 1.0
    with pytest.raises(ValueError, match="got no label"):
        _reward(answer.ExactReward(), "Answer: 5", label=None)


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("<think>a</think>b", True),
        ("\n<think>\na\n</think>\n\nb", True),
        ("a</think>b", True),
        ("<think></think>b", False),
        ("</think>b", False),
        ("<think>a</think> \n", False),
        ("<think>a", False),
        ("b", False),
        ("<think>a</think>b</think>c", False),
        ("<think>a<think></think>b", False),
        ("<think>a</think>b<think>", False),
        ("x<think>a</think>b", False),
    ],
)
def test_format(text, well):
    assert _reward(format.FormatReward(), text) == float(well)


def test_format_wants_an_end():
    assert _reward(format.FormatReward(), "<think>a</think>b", status="length") == 0.0


def test_repetition():
    assert format.repeated_ngram_share("a b a b a b", 2) == pytest.approx(3 / 5)
    assert format.repeated_ngram_share("a b c", 2) == format.repeated_ngram_share("a", 2) == 0.0
    assert _reward(format.RepetitionReward(n=2), "a b a b a b") == pytest.approx(-0.6)
    assert _reward(format.RepetitionReward(n=2, free=0.5), "a b a b a b") == pytest.approx(-0.1)
    assert _reward(format.RepetitionReward(n=2, free=0.7), "a b a b a b") == 0.0
    with pytest.raises(ValueError, match="wanted n >= 1"):
        format.RepetitionReward(n=0)


def _calls(*calls):
    return "<tool_calls>\n" + "\n".join(json.dumps(call) for call in calls) + "\n</tool_calls>"


A, B = ({"name": name, "arguments": {"x": 1, "y": {"k": [1.5, None]}}} for name in "ab")
A_SAME = {"name": "a", "arguments": {"y": {"k": [1.5, None]}, "x": 1.0}}
A_OTHER = {"name": "a", "arguments": {"x": True, "y": {"k": [1.5, None]}}}


@pytest.mark.parametrize(
    ("text", "ordered", "free"),
    [
        (_calls(A, B), 1.0, 1.0),
        (_calls(A_SAME, B), 1.0, 1.0),
        (_calls(A) + " and\n" + _calls(B), 1.0, 1.0),
        ("<think>" + _calls(B) + "</think>\n" + _calls(A, B), 1.0, 1.0),
        (_calls(B, A), 0.5, 1.0),
        (_calls(A), 2 / 3, 2 / 3),
        (_calls(A, A, B), 0.8, 0.8),
        (_calls(A_OTHER, B), 0.5, 0.5),
        ("no calls", 0.0, 0.0),
        ("<tool_calls>\n{oops\n</tool_calls>", 0.0, 0.0),
        ('<tool_calls>\n{"name": "a"}\n</tool_calls>', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        ("<tool_calls>\n" + "[" * 100_000 + "</tool_calls>", 0.0, 0.0),
        (_calls(A, B) + "<tool_calls>\n", 0.0, 0.0),
        (f"<think>{_calls(A, B)}</think>", 0.0, 0.0),
    ],
)
def test_tool_calls(text, ordered, free):
    for reward, wanted in (
        (tool_calls.ToolCallReward(), ordered),
        (tool_calls.ToolCallReward(ordered=False), free),
        (tool_calls.ToolCallReward(partial=False), float(ordered == 1)),
    ):
        assert _reward(reward, text, tool_calls=[A, B]) == pytest.approx(wanted)


def test_no_tool_call_where_none_is_expected():
    assert _reward(tool_calls.ToolCallReward(), "text", tool_calls=[]) == 1.0
    assert _reward(tool_calls.ToolCallReward(), _calls(A), tool_calls=[]) == 0.0


OPENAI_A = {
    "id": "1",
    "type": "function",
    "function": {**A, "arguments": json.dumps(A["arguments"])},
}


@pytest.mark.parametrize(
    "expected",
    [
        [OPENAI_A],
        [{"function": A}],
        [{**A, "arguments": json.dumps(A["arguments"])}],
        json.dumps([A]),
        json.dumps([OPENAI_A]),
        [json.dumps(A)],
        [{"name": "a", "arguments": A["arguments"], "id": "call_1"}],
    ],
)
def test_forms_of_expected_tool_calls(expected):
    """What messages may hold is right as an expected call, too."""
    assert _reward(tool_calls.ToolCallReward(), _calls(A), tool_calls=expected) == 1.0
    assert _reward(tool_calls.ToolCallReward(), _calls(B), tool_calls=expected) == 0.0


def test_expected_calls_without_arguments():
    for arguments in ({}, "", None, "{}"):
        call = [{"name": "a", "arguments": arguments}]
        made = _calls({"name": "a", "arguments": {}})
        assert _reward(tool_calls.ToolCallReward(), made, tool_calls=call) == 1.0


def test_a_turn_that_was_cut_off_made_no_calls():
    for text, expected in ((_calls(A), [A]), ("text", [])):
        sample = _sample(text, tool_calls=expected, status="length")
        assert asyncio.run(tool_calls.ToolCallReward().reward(sample)) == 0.0


@pytest.mark.parametrize(
    "expected", [None, "a", [{"name": "a", "arguments": "[1]"}], [{"name": "a"}], [1]]
)
def test_expected_tool_calls_are_checked(expected):
    with pytest.raises(ValueError, match="wanted a list of objects"):
        _reward(tool_calls.ToolCallReward(), "text", tool_calls=expected)


SCHEDULE = curriculum.CurriculumConfig(
    weights=((0, (("math", 2.0),)), (10, (("math", 1.0),)), (20, (("math", 1.0), ("chat", 3.0))))
)


def test_weights_go_in_straight_lines():
    chat = [SCHEDULE.weights_at(step)["chat"] for step in (0, 10, 12, 15, 20, 1000)]
    assert chat == pytest.approx([0, 0, 0.15, 0.375, 0.75, 0.75])
    for step in (0, 5, 13, 50):
        assert sum(SCHEDULE.weights_at(step).values()) == pytest.approx(1.0)


def test_draws_follow_the_weights_and_pass_over_each_task_once_per_epoch():
    draws = curriculum.TaskDraws(SCHEDULE, {"math": 40, "chat": 30, "unused": 1})
    assert [draws.draw_task(0)[0] for _ in range(50)] == ["math"] * 50
    drawn = [draws.draw_task(20) for _ in range(1000)]
    assert 700 < sum(name == "chat" for name, _ in drawn) < 800
    chat = [index for name, index in drawn if name == "chat"]
    epochs = [chat[i : i + 30] for i in range(0, 690, 30)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)


def test_draws_go_on_from_their_state():
    sizes = {"math": 7, "chat": 5}
    draws = curriculum.TaskDraws(SCHEDULE, sizes)
    for step in range(33):
        draws.draw_task(step)
    state = json.loads(json.dumps(draws.state()))
    again = curriculum.TaskDraws(SCHEDULE, sizes, state)
    assert [draws.draw_task(s) for s in range(50)] == [again.draw_task(s) for s in range(50)]
    other = curriculum.TaskDraws(
        curriculum.CurriculumConfig(SCHEDULE.weights, seed=1), sizes, state
    )
    assert [draws.draw_task(s) for s in range(50)] != [other.draw_task(s) for s in range(50)]


@pytest.mark.parametrize(
    "weights",
    [
        (),
        ((1, (("a", 1.0),)),),
        ((0, (("a", 1.0),)), (0, (("a", 1.0),))),
        ((0, (("a", -1.0), ("b", 2.0))),),
        ((0, (("a", 0.0),)),),
        ((0, (("a", float("nan")),)),),
        ((0, (("a", 1.0), ("a", 1.0))),),
    ],
)
def test_schedule_is_checked(weights):
    with pytest.raises(ValueError, match="weights"):
        curriculum.CurriculumConfig(weights=weights)


def test_source_without_tasks_is_refused():
    with pytest.raises(ValueError, match="source 'chat': got None tasks"):
        curriculum.TaskDraws(SCHEDULE, {"math": 3})


def test_pass_rates_drop_what_is_always_or_never_solved():
    rates = curriculum.PassRateTracker(curriculum.PassRateConfig(low=0.0, high=0.9, least=10))
    for task, passed in (("never", 0), ("some", 1), ("most", 8), ("nearly", 9), ("all", 10)):
        rates.push(task, passed // 2, 5)
        assert rates.should_draw(task)  # not enough yet
        rates.push(task, passed - passed // 2, 5)
    kept = [
        task
        for task in ("never", "some", "most", "nearly", "all", "new")
        if rates.should_draw(task)
    ]
    assert kept == ["some", "most", "new"]
    assert rates.metrics() == {"curriculum/tasks_seen": 5.0, "curriculum/tasks_dropped": 3.0}
    again = curriculum.PassRateTracker(
        curriculum.PassRateConfig(), json.loads(json.dumps(rates.state()))
    )
    assert again.state() == rates.state()
    assert not again.should_draw("nearly")
    with pytest.raises(ValueError, match="got 3 of 2 passed"):
        rates.push("x", 3, 2)


def test_pass_rate_config_is_checked():
    with pytest.raises(ValueError, match="wanted low below high"):
        curriculum.PassRateConfig(low=0.9, high=0.9)
