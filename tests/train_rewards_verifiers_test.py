"""Mathematics, logic tasks, code, and functions written for other trainers."""

import asyncio
import dataclasses
import json
import pathlib
import sys

import pytest

from train.rl import sample as sample_lib
from train.rl.rewards import (
    adapters,
    answer,
    catalog,
    coding,
    logic,
    mathematics,
    pool,
    runner,
)

_FOREIGN = """
import numpy

async def rm(args, sample):
    assert sample.prompt[0]["role"] == "user" and sample.response_length == 2
    return {"score": args.scale * float(sample.response == sample.label), "why": "text"}

def compute_score(data_source, solution_str, ground_truth, extra_info):
    assert data_source == "s" and extra_info == {"level": 1}
    return numpy.float32(solution_str == ground_truth)

async def rm_of_type(args, sample):
    return float(args.rm_type == sample.response)

def score_of_source(data_source, solution_str, ground_truth, extra_info):
    return float(data_source == solution_str)

def fn(prompts, completions, answer, level, **columns):
    assert prompts == ["user: q"] * 2 and columns == {"twice": True}
    return [float(c == a) + l for c, a, l in zip(completions, answer, level)]
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "foreign_functions.py").write_text(_FOREIGN)
    sys.path.append(str(folder))
    made = pool.WorkerPool(1, limit_secs=20)
    yield made
    made.close()
    sys.path.remove(str(folder))


def _sample(text, label=None, **metadata):
    messages = ({"role": "user", "content": "q"},)
    task = sample_lib.Task("t", messages, "s", label, metadata)
    return sample_lib.Sample(task, (1,), tokens=[2, 3], text=text)


def _score(reward, *arguments, **options):
    return asyncio.run(reward.reward(_sample(*arguments, **options)))


@pytest.mark.parametrize(
    ("text", "label", "right"),
    [
        (r"<think>7</think>\boxed{0.5}", r"\frac{1}{2}", 1),
        ("Answer: **1/2**.", 0.5, 1),
        (r"so $y + x$", "x+y", 1),
        (r"\boxed{x=3}", "3", 1),
        (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", 1),
        (r"\boxed{0.51}", r"\frac{1}{2}", 0),
        (r"<think>\boxed{5}</think> I do not know", "5", 0),
        (r"\boxed{\frac{1}{}", "5", 0),
        ("", "5", 0),
    ],
)
def test_mathematics(workers, text, label, right):
    assert _score(mathematics.MathematicsReward(workers), text, label) == right


def test_label_comes_first(workers):
    """An interval answers an inequality, but not the other way round."""
    reward = mathematics.MathematicsReward(workers)
    assert _score(reward, r"\boxed{(1,2)}", "1<x<2") == 1
    assert _score(reward, r"\boxed{1<x<2}", "(1,2)") == 0


@pytest.mark.parametrize("costly", [r"9^{9^{9^{9}}}", r"(x+y+z)^{400}"])
def test_an_answer_that_takes_too_long_is_wrong(workers, costly):
    """It is the model's doing. As a failure, a hang would be better than a wrong answer."""
    reward = mathematics.MathematicsReward(workers, limit_secs=0.5)
    assert _score(reward, rf"\boxed{{{costly}}}", "3") == 0
    assert _score(mathematics.MathematicsReward(workers), r"\boxed{3}", "3") == 1


def test_mathematics_needs_a_label(workers):
    reward = mathematics.MathematicsReward(workers)
    for label, message in (
        (None, "got no label"),
        ({"target": ["34"]}, r"got the label .*keys=\(\('label', 'KEY.target'\),\)"),
        ([], "got no label"),
        ([{"target": "34"}], "wanted text, a number, or a list"),
    ):
        with pytest.raises(ValueError, match=f"task 't': .*{message}"):
            _score(reward, "Answer: 5", label)
    with pytest.raises(pool.WorkerError, match="wanted a formula"):
        _score(reward, "Answer: 5", "")
    with pytest.raises(ValueError, match="limit_secs: got 0"):
        mathematics.MathematicsReward(workers, limit_secs=0)


def test_any_label_of_a_list_counts(workers):
    reward = mathematics.MathematicsReward(workers)
    scores = [_score(reward, rf"\boxed{{{text}}}", ["34", "33"]) for text in ("34", "33", "34, 33")]
    assert scores == [1, 1, 0]


def test_forms_of_answers():
    """Each form has the verdict that a person would give."""
    path = pathlib.Path(__file__).parent / "data" / "answer_forms.jsonl"
    forms = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert len(forms) >= 300
    mathematics.prepare_worker()
    wrong = []
    for form in forms:
        sample = _sample(form["text"], form["label"])
        if form["reward"] == "exact":
            score = asyncio.run(answer.ExactReward().reward(sample))
        else:
            labels = tuple(answer.read_labels(sample.task))
            score = mathematics.grade_answer(answer.final_text(sample), labels)
        if score != form["right"]:
            wrong.append((form, score))
    assert not wrong


@pytest.mark.parametrize(
    ("status", "text"),
    [
        ("length", r"<think>a</think>\boxed{42} or"),
        ("repetition", r"\boxed{42}"),
        ("stop", r"<think>maybe \boxed{41}? or \boxed{42}"),
        ("stop", "<think>hm Answer: 42"),
        ("stop", r"<think>a</think>b<think>\boxed{42}"),
    ],
)
def test_what_was_cut_off_has_no_answer(workers, status, text):
    sample = _sample(text, "42")
    sample.status = status
    for reward in (answer.ExactReward(), mathematics.MathematicsReward(workers)):
        assert asyncio.run(reward.reward(sample)) == 0


@pytest.mark.parametrize("name", ["mathematics", "logic"])
def test_missing_library_names_the_remedy(workers, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(ImportError, match=r"pip install 'm1-jax\[rl\]'"):
        catalog.make_reward(name, workers, {})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<answer>a</answer> <answer>\nb </answer>", "b"),
        ("<think><answer>a</answer></think>\nfirst\nAnswer: c\n\n", "c"),
        ("", ""),
    ],
)
def test_logic_answer(text, found):
    assert logic.extract_answer(text) == found


def test_logic_tasks_and_verifier(workers):
    first, second = (list(logic.generate_tasks("chain_sum", 3, 1, max_terms=3)) for _ in range(2))
    assert first == second
    assert first != list(logic.generate_tasks("chain_sum", 3, 2, max_terms=3))
    assert len({task.id for task in first}) == 3
    reward = logic.LogicReward(workers)
    for task in first:
        right = sample_lib.Sample(task, (), text=f"so <answer>{task.label}</answer>")
        wrong = sample_lib.Sample(task, (), text="<answer>nonsense</answer>")
        assert asyncio.run(reward.reward(right)) == 1.0
        assert asyncio.run(reward.reward(wrong)) < 0.5


def test_logic_verifier_that_looks_at_the_entry(workers):
    """Any route counts, not only the one in the label."""
    task = next(logic.generate_tasks("countdown", 1, 7, min_numbers=2, max_numbers=2))
    numbers = task.metadata["entry"]["metadata"]["numbers"]
    assert len(numbers) == 2
    for text, wanted in ((task.label, True), ("+".join(map(str, numbers * 2)), False)):
        sample = sample_lib.Sample(task, (), text=text)
        assert (asyncio.run(logic.LogicReward(workers, strict=True).reward(sample)) == 1) is wanted


def test_partial_credit_may_be_refused(workers):
    task = next(logic.generate_tasks("chain_sum", 1, 1))
    partial = sample_lib.Sample(task, (), text=f"it is {task.label} or so")
    assert 0 < asyncio.run(logic.LogicReward(workers).reward(partial)) < 1
    assert asyncio.run(logic.LogicReward(workers, strict=True).reward(partial)) == 0


def test_logic_errors(workers):
    with pytest.raises(ValueError, match="got the generator 'no_such'"):
        next(logic.generate_tasks("no_such", 1, 1))
    with pytest.raises(ValueError, match="got the generator 'chain_sum' with {'no': 1}"):
        next(logic.generate_tasks("chain_sum", 1, 1, no=1))
    with pytest.raises(ValueError, match="wanted generator and entry"):
        _score(logic.LogicReward(workers), "x", generator="chain_sum")


def _open():
    """Whether programs must run with an open network: this system permits no namespaces."""
    try:
        runner.run_program({}, ["true"])
    except runner.RunnerUnavailable:
        return True
    return False


OPEN = _open()
ADD = (
    "<think>```python\nno\n```</think>Here:\n```python\nprint(sum(map(int, input().split())))\n```"
)
TESTS = [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 5", "stdout": "10\n\n"}]


def _code(source):
    return f"```python\n{source}\n```"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        (ADD, 1.0),
        (_code("print(3)"), 0.5),
        (_code("print(3); exit(1)"), 0.0),
        (_code("raise ValueError"), 0.0),
        (_code("print('3 10')"), 0.0),
        ("no program", 0.0),
        ("```python\nprint(3)", 0.5),
    ],
)
def test_programs_that_print(text, share):
    assert _score(coding.CodeReward(allow_network=OPEN), text, tests=TESTS) == share
    assert _score(coding.CodeReward(partial=False, allow_network=OPEN), text, tests=TESTS) == float(
        share == 1
    )


@pytest.mark.parametrize(
    ("source", "passes"),
    [
        ("def f(x): return x + 1", 1),
        ("def f(x): return x", 0),
        ("import os\nos._exit(0)", 0),
        ("exit(0)", 0),
        ("def f(x:", 0),
    ],
)
def test_programs_with_asserts(source, passes):
    tests = "from solution import f\nassert f(1) == 2\n"
    assert _score(coding.CodeReward(allow_network=OPEN), _code(source), test_code=tests) == passes


def test_programs_over_their_limits_fail_and_stall_nothing():
    reward = coding.CodeReward(cpu_secs=1, wall_secs=1.0, processes=4, allow_network=OPEN)
    for source in ("while True: pass", "import os\nwhile True: os.fork()", "x = 'x' * 2**33"):
        assert _score(reward, _code(source), tests=TESTS[:1]) == 0.0


def test_wall_time_is_tried_again(monkeypatch):
    calls = []

    def run(files, command, limits, *, stdin, allow_network):
        calls.append(stdin)
        slow = len(calls) == 1
        return runner.RunResult("3", "", None if slow else 0, "wall" if slow else "exit")

    monkeypatch.setattr(runner, "run_program", run)
    assert _score(coding.CodeReward(allow_network=OPEN), ADD, tests=TESTS[:1]) == 1.0
    assert calls == ["1 2\n"] * 2


def test_code_that_cannot_be_run_is_a_failure():
    with pytest.raises(runner.RunnerUnavailable):
        _score(coding.CodeReward(python="no-such-python", allow_network=OPEN), ADD, tests=TESTS)
    with pytest.raises(ValueError, match="got no tests"):
        _score(coding.CodeReward(allow_network=OPEN), ADD)


def test_functions_of_other_trainers(workers):
    path = "foreign_functions:"
    slime = adapters.SlimeReward(workers, path + "rm", scale=2)
    assert _score(slime, "x", "x") == {"score": 2.0}
    sample = _sample("x", "x")
    sample.routes = lambda: "what does not pickle stays here"
    assert asyncio.run(slime.reward(sample)) == {"score": 2.0}
    verl = adapters.VerlReward(workers, path + "compute_score")
    assert [_score(verl, text, "x", level=1) for text in "xy"] == [1.0, 0.0]
    tunix = adapters.TunixReward(workers, path + "fn", twice=True)
    group = [_sample(text, "x", level=10) for text in "xy"]
    assert asyncio.run(tunix.reward_group(group)) == [11.0, 10.0]
    with pytest.raises(pool.WorkerError, match="ModuleNotFoundError"):
        _score(adapters.FunctionReward(workers, "no_such_module:f"), "x")


def test_each_record_is_scored_by_its_own_rule(workers):
    """verl's files name the rule in data_source, slime's in the metadata's rm_type."""
    verl = adapters.VerlReward(workers, "foreign_functions:score_of_source")
    for data_source, wanted in (("openai/gsm8k", "openai/gsm8k"), ("taco", "taco"), (None, "s")):
        sample = _sample(wanted)
        sample.task = dataclasses.replace(sample.task, data_source=data_source)
        assert asyncio.run(verl.reward(sample)) == 1.0
    slime = adapters.SlimeReward(workers, "foreign_functions:rm_of_type", rm_type="math")
    assert _score(slime, "math") == _score(slime, "f1", rm_type="f1") == 1.0
    assert _score(adapters.SlimeReward(workers, "foreign_functions:rm_of_type"), "math") == 0.0
