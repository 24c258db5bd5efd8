"""Tests of train.rl.environments: tools, grading, and that cheating does not pay."""

import json
import pathlib
import random
import subprocess
import tempfile
import types

import hypothesis
import pytest
from hypothesis import strategies as st

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat
from train.rl import sample as sample_lib
from train.rl.environments import base, bugs, files, lookup, repair

DEMO = pathlib.Path(__file__).parents[1] / "demo" / "data"


def say(environment, name, /, **arguments):
    """Return the result of one call."""
    (result,) = environment.step([(name, arguments)]).results
    return result


@pytest.mark.parametrize("module", [lookup, files, repair])
def test_tasks_are_json_and_a_function_of_the_seed(module):
    tasks = module.make_tasks(6, 3)
    assert tasks == module.make_tasks(8, 3)[:6]
    assert len({task.id for task in [*tasks, *module.make_tasks(6, 4)]}) == 12
    assert [task.metadata for task in tasks] != [task.metadata for task in module.make_tasks(6, 4)]
    for task in tasks:
        fields = [list(task.messages), task.label, dict(task.metadata), list(task.tools)]
        assert json.loads(json.dumps(fields)) == fields


@pytest.mark.parametrize(
    "kind", [lookup.LookupEnvironment, files.FilesEnvironment, repair.RepairEnvironment]
)
def test_foreign_tasks_are_refused(kind):
    with pytest.raises(ValueError, match="task 'x': got .*; wanted .*Make tasks with"):
        kind().start(sample_lib.Task("x", (), "other"))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("put", {"n": 1, "s": "a"}, "got the tool 'put'; wanted two"),
        ("two", {}, "got the arguments []; wanted ['n', 's']"),
        ("two", {"n": 1, "s": "a", "t": 1}, "got the arguments ['n', 's', 't']"),
        ("two", {"n": True, "s": "a"}, "n: got True; wanted a integer"),
        ("two", {"n": 1.0, "s": "a"}, "n: got 1.0; wanted a integer"),
        ("two", {"n": 1, "s": None}, "s: got None; wanted a string"),
        ("two", {"n": 9, "s": "a"}, "too many"),
    ],
)
def test_a_wrong_call_is_told(name, arguments, said):
    def two(n, s):
        if n > 5:
            raise base.CallError("too many")
        return s * n

    schema = base.make_tool_schema("two", "Repeat.", n="integer", s="string")
    good, wrong = base.execute_calls(
        [("two", {"n": 2, "s": "ab"}), (name, arguments)], [schema], {"two": two}
    )
    assert good == "abab"
    assert wrong.startswith(f"error: {said}")


def test_lookup():
    task = lookup.make_tasks(1, 0)[0]
    environment = lookup.LookupEnvironment()
    environment.start(task)
    values = task.metadata["values"]
    assert len(set(values.values())) == len(lookup.VALUE_KEYS)
    assert {key: say(environment, "get", key=key) for key in lookup.VALUE_KEYS} == values
    assert say(environment, "get", key="z").startswith("error: got the key 'z'; wanted a, b")
    key = task.messages[0]["content"][4]
    assert environment.finish(f"{values[key]}\n") == 1.0
    assert [environment.finish(text) for text in ("", f"{values[key]}{values[key]}")] == [0.0] * 2
    assert sum(environment.finish(str(digit)) for digit in range(10)) == 1.0


def test_demonstrations_are_right_as_often_as_said():
    for careless in (0.0, 0.6, 1.0):
        tasks = lookup.make_tasks(400, 7)
        records = lookup.make_demonstrations(400, 7, careless)
        right = [
            record["messages"][-1]["content"] == task.label
            for task, record in zip(tasks, records, strict=True)
        ]
        assert sum(right) / 400 == pytest.approx(1 - careless, abs=0.07)
        for record, task in zip(records, tasks, strict=True):
            key = record["messages"][1]["tool_calls"][0]["arguments"]["key"]
            assert task.metadata["values"][key] == record["messages"][2]["content"]
    with pytest.raises(ValueError, match="careless: got 1.5; wanted a share"):
        lookup.make_demonstrations(1, 0, 1.5)


@pytest.mark.parametrize(
    ("name", "seed", "careless"), [("agent", 0, 0.5), ("agent_careful", 1, 0.0)]
)
def test_the_demo_files_are_what_the_script_writes(name, seed, careless):
    lines = (DEMO / f"{name}.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == lookup.make_demonstrations(len(lines), seed, careless)
    tokenizer = tokenizer_lib.Tokenizer.load(DEMO / "tokenizer")
    encoder = chat.RecordEncoder(tokenizer)
    assert max(len(encoder.encode(json.loads(line)).tokens) for line in lines[:50]) <= 100


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2*3", "7"),
        ("(1 + 2) * -3", "-9"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("7 // 2 + 7 % 4", "6"),
        ("2**10", "1024"),
        ("0.1 + 0.2", "0.3"),
        (" 5", "5"),
    ],
)
def test_calculate(expression, value):
    assert files.evaluate_expression(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1 +", "a", "__import__('os')", "1e5", "1/0", "9**99", "(-1)**.5", "1, 2", "(2)(3)"),
        *("2**64", "9**9**9**9", "0**-1", "[1]", "'a'*9", "1 if 1 else 2", "(" * 150, "1" * 201),
        "9" * 19,
    ],
)
def test_what_cannot_be_calculated(expression):
    with pytest.raises(base.CallError):
        files.evaluate_expression(expression)


@hypothesis.given(st.text("0123456789.+-*/%() ", max_size=30))
@hypothesis.settings(max_examples=300)
def test_calculate_answers_or_says_why(expression):
    try:
        value = files.evaluate_expression(expression)
    except base.CallError:
        return
    assert abs(float(value)) <= 10**18


def test_files_can_be_solved():
    for task in files.make_tasks(10, 0):
        environment = files.FilesEnvironment()
        environment.start(task)
        question = task.messages[0]["content"]
        goods = question.split()[2]
        numbers = []
        for town in (town for town in files._TOWNS if town in question):
            note = say(environment, "search", words=town.upper()).split(":")[0]
            lines = say(environment, "read", name=note).splitlines()
            numbers += [line.split()[1] for line in lines if line.startswith(goods)]
        total = say(environment, "calculate", expression=" + ".join(numbers))
        assert environment.finish(f"It is clear.\nAnswer: {total}\n") == 1.0
        for wrong in (f"Answer: {total}0", f"Answer: {total}.", total, f"Answer: {total}\nNo.", ""):
            assert environment.finish(wrong) == 0.0


def test_searching():
    environment = files.FilesEnvironment()
    environment.start(files.make_tasks(1, 0)[0])
    assert say(environment, "search", words="IN  elton there").endswith(": What there is in Elton.")
    assert len(say(environment, "search", words="apples").splitlines()) == files.MAX_SEARCH_LINES
    assert say(environment, "search", words=":").splitlines()[-1] == "and 32 more"
    assert say(environment, "search", words="nowhere") == "nothing found"
    assert say(environment, "search", words=" ").startswith("error: words: got none")
    assert say(environment, "read", name="note").startswith("error: got the file 'note'")


def run(sources, command, stdin):
    """Stand in for the runner: no limits but time."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in sources.items():
            (pathlib.Path(folder) / name).write_text(text)
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=20,
            check=False,
        )
    return types.SimpleNamespace(
        stdout=done.stdout, stderr=done.stderr, exit_code=done.returncode, reason="exit"
    )


@pytest.fixture
def broken():
    """Return an environment, the name of its broken function, and how to repair it."""
    task = repair.make_tasks(1, 0)[0]
    environment = repair.RepairEnvironment(run)
    environment.start(task)
    sources = {f.name: f.source() for f in bugs.BUGGY_FUNCTIONS}
    paths = [path for path in task.metadata["files"] if not path.startswith("test_")]
    (name,) = (p[:-3] for p in paths if task.metadata["files"][p] != sources[p[:-3]])
    return environment, name, sources[name]


def test_repair(broken):
    environment, name, source = broken
    shown = say(environment, "run_tests")
    assert f"test_{name}.Test.test_" in shown
    assert " 0 failed" not in shown
    assert shown == say(environment, "run_tests")  # neither paths nor times
    assert environment.finish("All is well, all tests pass.") == 0.0
    bad = say(environment, "read", path=f"{name}.py")
    assert say(environment, "replace", path=f"{name}.py", old=bad, new=source) == "written"
    assert say(environment, "run_tests") == "12 tests, 0 failed"
    assert environment.finish("") == 1.0


def test_edited_tests_count_for_nothing(broken):
    environment, name, _ = broken
    assert say(environment, "write", path=f"test_{name}.py", text="") == "written"
    assert say(environment, "run_tests") == "8 tests, 0 failed"
    assert environment.finish("") == 0.0


@pytest.mark.parametrize(
    "hack",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import unittest; unittest.TestCase.assertEqual = lambda *_: None",
        "import atexit; atexit.register(lambda: print('[]'))",
        "import json; json.dumps = lambda *_: '[]'",
        "import atexit; atexit.register(print, '[')",
        "syntax error",
        "",
    ],
)
def test_hacks_do_not_pay(broken, hack):
    environment, name, _ = broken
    bad = say(environment, "read", path=f"{name}.py")
    say(environment, "write", path=f"{name}.py", text=f"{hack}\n{bad}" if hack else "")
    assert environment.finish("") == 0.0


def test_only_the_sources_are_graded(broken):
    environment, name, source = broken
    say(environment, "write", path=f"test_{name}.py", text=source)
    say(environment, "write", path=f"{name}.py", text=f"from test_{name} import {name}\n")
    assert environment.finish("") == 0.0


def test_breaking_another_function_does_not_pay(broken):
    environment, name, source = broken
    say(environment, "write", path=f"{name}.py", text=source)
    other = next(
        path for path in environment._files if path[:5] != "test_" and path != f"{name}.py"
    )
    say(environment, "write", path=other, text=f"def {other[:-3]}(*_): return 0\n")
    assert environment.finish("") == 0.0


def test_the_files_are_the_episodes_own(broken):
    environment, name, source = broken
    task = repair.make_tasks(1, 0)[0]
    before = json.dumps(task.metadata)
    environment.start(task)
    say(environment, "write", path=f"{name}.py", text=source)
    assert json.dumps(task.metadata) == before
    assert repair.make_tasks(1, 0)[0].metadata == task.metadata


def test_editing(broken):
    environment, name, _ = broken
    path = f"{name}.py"
    assert say(environment, "write", path="new.py", text="").startswith("error: got the file")
    assert say(environment, "read", path="../x").startswith("error: got the file '../x'; wanted")
    assert "there 0 times" in say(environment, "replace", path=path, old="", new="x")
    assert "there 0 times" in say(environment, "replace", path=path, old="absent", new="x")
    assert "wanted once" in say(environment, "replace", path=path, old="n", new="x")
    assert "wanted at most" in say(environment, "write", path=path, text="x" * 20_001)
    assert say(environment, "run_tests", path=path).startswith("error: got the arguments")


def test_limits_and_failures_of_the_runner():
    task = repair.make_tasks(1, 0)[0]
    slow = types.SimpleNamespace(stdout="[]\n", stderr="x" * 9999, exit_code=None, reason="wall")
    environment = repair.RepairEnvironment(lambda *_: slow)
    environment.start(task)
    said = say(environment, "run_tests")
    assert said.endswith("x\nstopped: wall limit")
    assert len(said) < repair.MAX_OUTPUT_CHARS + 50
    assert environment.finish("") == 0.0
    right = json.dumps([outcome for _, _, outcome in task.metadata["cases"]])
    for reason, reward in (("exit", 1.0), ("output", 0.0)):
        done = types.SimpleNamespace(stdout=right, stderr="", exit_code=0, reason=reason)
        environment = repair.RepairEnvironment(lambda *_, done=done: done)
        environment.start(task)
        assert environment.finish("") == reward

    def fail(*_):
        raise OSError("no runner")

    environment = repair.RepairEnvironment(fail)
    environment.start(task)
    with pytest.raises(OSError, match="no runner"):  # not the model's fault, so not its 0
        environment.finish("")
    with pytest.raises(OSError, match="no runner"):
        say(environment, "run_tests")


@pytest.mark.parametrize(
    ("function", "bug"),
    [
        (function, bug)
        for function in bugs.BUGGY_FUNCTIONS
        for bug in range(len(function.mutations))
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_bug_shows_in_either_kind_of_case(function, bug):
    assert function.source().count(function.mutations[bug][0]) == 1
    shown, hidden = repair._make_cases(
        random.Random(0), function, function.source(bug), is_broken=True
    )
    for cases in (shown, hidden):
        assert any(bugs.evaluate_call(function.source(bug), n, a) != right for n, a, right in cases)
        assert all(bugs.evaluate_call(function.source(), n, a) == right for n, a, right in cases)
        assert all(right[0] == "value" for _, _, right in cases)


def test_with_the_runner_itself():
    task = repair.make_tasks(1, 0)[0]
    environment = repair.RepairEnvironment()
    environment.start(task)
    assert "12 tests, " in say(environment, "run_tests")
    assert environment.finish("") == 0.0
    for function in bugs.BUGGY_FUNCTIONS:
        if f"{function.name}.py" in task.metadata["files"]:
            say(environment, "write", path=f"{function.name}.py", text=function.source())
    assert say(environment, "run_tests") == "12 tests, 0 failed"
    assert environment.finish("") == 1.0
