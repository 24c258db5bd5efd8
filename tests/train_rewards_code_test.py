"""Code: fences of programs, shapes of tests, and that neither empty tests nor cheats pass."""

import asyncio
import base64
import collections
import functools
import json
import os
import pickle
import time
import types
import zlib

import pytest

from train.rl import sample as sample_lib
from train.rl.rewards import answer, code_tests, coding, fences, packed_tests, runner
from train.rl.rewards.judge import assertions, comparison


def _open():
    """Whether programs must run with an open network: this system permits no namespaces."""
    try:
        runner.run_program({}, ["true"])
    except runner.RunnerUnavailable:
        return True
    return False


OPEN = _open()
F = "def f(x):\n    return x * x"


def _task(metadata, label=None):
    return sample_lib.Task("t", ({"role": "user", "content": "q"},), "s", label, metadata)


def _score(program, label=None, /, **metadata):
    text = f"```python\n{program}\n```"
    sample = sample_lib.Sample(_task(metadata, label), (1,), tokens=[2, 3], text=text)
    return asyncio.run(coding.CodeReward(allow_network=OPEN).reward(sample))


@pytest.mark.parametrize(
    "text",
    [
        "```python\n{}\n```\nOutput:\n```\n1\n```",
        "```\n1\n```\nThat is wrong.\n```python\n{}\n```",
        "```python\nprint(0)\n```\nBetter:\n```python\n{}\n```",
        "```python\n{}\n```\nRun it:\n```bash\npython a.py\n```",
        "```js\nlet x\n```\n```\n{}\n```",
        "```c++\nint x;\n```\n```Python3\n{}\n```",
        '```python title="a.py"\n{}\n```',
        "```{{.python}}\n{}\n```",
        "```py\n{}\n``` \nDone.",
        "~~~python\n{}\n~~~",
        "````python\n{}\n````",
        "```python\r\n{}\r\n```\r\n",
        "```python\n{}",
        "```\n{}",
        "Here: ```python\n{}```",
        "<answer>```python\n{}\n```</answer>",
        "```python\nx = 1\n```python\n{}\n```",
    ],
)
def test_fences(text):
    assert fences.extract_program(text.format(F)) == F + "\n"


def test_fences_in_lists_and_docstrings():
    indented = "\n".join(f"   {line}" for line in ["```python", *F.split("\n"), "```"])
    assert fences.extract_program(f"1. Do:\n\n{indented}\n") == F + "\n"
    for tag in ("", "python"):
        program = (
            f'def f(x):\n    """Square.\n\n    ```{tag}\n    f(2)\n    ```\n    """\n    return x'
        )
        text = f"```python\n{program}\n```\nOutput:\n```\n4\n```"
        assert fences.extract_program(text) == program + "\n"
    assert fences.extract_program("```python\ndef f(:\n```\nOutput:\n```\n4\n```") == "def f(:\n"
    assert fences.extract_program("```bash\nls\n```") is None
    assert fences.extract_program("no `program`") is None


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000 + "}" * 20_000,
        "\\boxed{1}, " * 20_000,
        "Answer: " + ". " * 100_000,
        "Answer:\n" * 30_000,
        "<answer>" * 30_000,
        "`" * 200_000 + "x",
        "```python\n" * 5_000,
        "```\n" * 20_001,
        "#" * 100_000 + " ",
        "the answer is " * 20_000,
    ],
)
def test_no_text_takes_long_to_read(text):
    """These functions run in the trainer's own process."""
    began = time.process_time()
    answer.extract_answer(text)
    fences.extract_program(text)
    assert time.process_time() - began < 5


HUMAN_EVAL = "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n"
UNITTEST = """
import unittest
from solution import f

class TestF(unittest.TestCase):
    def test_two(self):
        self.assertEqual(f(2), 4)

if __name__ == "__main__":
    unittest.main()
"""
PYTEST = """
import pytest
from solution import f

@pytest.fixture
def two():
    return 2

@pytest.mark.parametrize("x, wanted", [(2, 4), (3, 9)])
def test_values(x, wanted):
    assert f(x) == pytest.approx(wanted)

def test_two(two):
    assert f(two) == 4

class TestErrors:
    def test_text(self):
        with pytest.raises(TypeError, match="multiply"):
            f("a")
"""
APPS = json.dumps({"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], 9]})
LIVE = json.dumps([{"input": "2", "output": "4", "testtype": "functional"}])


@pytest.mark.parametrize(
    "metadata",
    [
        {"test": HUMAN_EVAL, "entry_point": "f"},
        {"test_code": "from solution import f\n" + HUMAN_EVAL},
        {"test_list": ["assert f(2) == 4", "assert f(3) == 9"]},
        {"test_code": "def check(g: Callable) -> List[int]:\n    assert g(2) == 4\ncheck(f)"},
        {"test_list": ["assert math.isclose(f(2), n)"], "test_setup_code": "n = 4"},
        {"test": UNITTEST},
        {"test": PYTEST},
        {"input_output": APPS},
        {"public_test_cases": LIVE, "metadata": '{"func_name": "f"}'},
        {"tests": [{"input": "2", "output": "4"}], "fn_name": "f"},
    ],
)
def test_shapes_of_functions(metadata):
    """A right program passes, and a wrong one does not."""
    assert _score(F, **metadata) == 1.0
    assert _score(F.replace("x * x", "x + 7"), **metadata) == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        "def check(f):\n    assert f(2) == 4\n\ncheck(f)",
        "import sys\nfrom solution import f\nif f(2) != 4:\n    sys.exit(1)",
        "import unittest\nimport solution\nclass T(unittest.TestCase):\n    def test(self):\n"
        "        if solution.f(2) != 4:\n            self.fail('wrong')\nunittest.main()",
        "import pytest\ndef test_f():\n    assert f(2) == 4\nif __name__ == '__main__':\n"
        "    pytest.main([__file__])",
        "async def test_f():\n    assert f(2) == 4",
        "import importlib\nassert importlib.import_module('solution').f(2) == 4",
    ],
)
def test_ways_to_write_tests(tests):
    assert _score(F, test_code=tests) == 1.0
    assert _score(F.replace("x * x", "x + 7"), test_code=tests) == 0.0


def test_coroutines_of_the_program():
    tests = (
        "import asyncio\nasync def test():\n    assert await asyncio.gather(f(1), f(2)) == [1, 4]"
    )
    assert _score("async " + F, test=tests) == 1.0


def test_methods_of_class_solution():
    program = "class Solution:\n    def f(self, x):\n        return x * x"
    assert _score(program, input_output=APPS) == 1.0
    assert _score(program, test=HUMAN_EVAL, entry_point="f") == 1.0


@pytest.mark.parametrize(
    "metadata",
    [
        {"tests": '[{"stdin": "1 2", "stdout": "3"}]'},
        {"tests": [{"input": "1 2", "output": "3", "type": "stdin_stdout"}], "fn_name": "f"},
        {"tests": {"inputs": ["1 2"], "outputs": ["3"]}},
        {"inputs": ["1 2\n"], "outputs": [3]},
        {"inputs": [["1 2"]], "outputs": [["3"]]},
        {"input_output": {"inputs": ["1 2"], "outputs": ["3\n"]}},
        {"public_test_cases": '[{"input": "1 2", "output": "3", "testtype": "stdin"}]'},
    ],
)
def test_shapes_of_input_and_output(metadata):
    (test,) = code_tests.read_tests(_task(metadata))
    assert isinstance(test, code_tests.StdinTest)
    assert (test.stdin.strip(), test.stdout.strip()) == ("1 2", "3")


def test_tests_in_the_label():
    label = json.dumps({"inputs": ["1"], "outputs": ["2"]})  # Eurus-2
    assert code_tests.read_tests(_task({}, label)) == [code_tests.StdinTest("1", "2")]
    # Tests in the metadata win: a label of a code task is most often a solution.
    assert len(code_tests.read_tests(_task({"test_list": ["assert f()"]}, label))) == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "got no tests in the metadata"),
        ({"level": 1, "tests": []}, "got no tests in the metadata"),
        ({"tests": [{"in": "1"}]}, r"tests\[0\]: got \['in'\]; wanted an object of stdin"),
        ({"tests": [3]}, r"tests\[0\]: got 3"),
        ({"tests": {"input": "1"}}, "wanted inputs and outputs"),
        ({"tests": "eJxrYJ"}, "wanted a list of tests.*packed form: it is no base64"),
        ({"tests": "tests"}, "wanted a list of tests.*packed form: it is no base64"),
        ({"inputs": ["1"], "outputs": []}, "two lists of one length"),
        ({"inputs": [{"a": 1}], "outputs": ["1"]}, "wanted text, a number, or a list of lines"),
        ({"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}, "wanted lines of JSON"),
        ({"tests": [{"input": "1", "output": "1", "testtype": "functional"}]}, "wanted fn_name"),
        ({"test": "def check(candidate):\n    assert candidate(1)"}, "wanted entry_point"),
        ({"test": "assert f(1"}, "got tests that are no Python"),
        ({"test": "from solution import f\nf(1)"}, "got tests without an assertion"),
        ({"test": "from solution import f\nassert (f(1) == 1, 'one')"}, "without an assertion"),
        ({"test": "from solution import f\nf(1)\nassert True"}, "without an assertion"),
        ({"test": ""}, "got no tests"),
        ({"test": 3}, "wanted the text of tests"),
        ({"test_list": [1]}, "wanted a list of texts"),
        ({"test": "def test_a(monkeypatch):\n    assert f()"}, "got the fixture monkeypatch"),
    ],
)
def test_tests_that_cannot_be_used(metadata, message):
    with pytest.raises(ValueError, match=message):
        code_tests.read_tests(_task(metadata))


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("from solution import f\n\ndef verify():\n    assert f(1) == 1\n", "ran no assertion"),
        ("import no_such_module\nassert f(2) == 4", "no_such_module"),
        ("n = int('a')\nassert f(2) == 4", "invalid literal"),
        ("from solution import f\nn = 1\nassert n == 1", "never used the program"),
        ("class Node: pass\nassert f(Node()) == 4", "the tests pass a Node"),
        (
            "def check(candidate):\n    n = 1\n    assert n == 1\nfrom solution import f",
            "never used",
        ),
        ("from solution import f\nassert int(1) == 2\nassert f(2) == 4", "AssertionError"),
        (
            UNITTEST.replace("f(2)", "undefined(f(2))").replace("self.assert", "no.assert"),
            "'no' is",
        ),
        ("def test_f(database):\n    assert f(2) == 4", "got the fixture 'database'"),
    ],
)
def test_tests_that_fail_by_themselves_are_an_error(tests, message):
    """Neither 0 nor 1: the same tests would say it of every program."""
    with pytest.raises(ValueError, match=f"task 't': .*{message}"):
        _score(F, test_code=tests)


SQUARES = "from solution import f\nassert f(2) == 4\nassert f(3) == 9"


@pytest.mark.parametrize(
    "program",
    [
        "class Equal:\n    __eq__ = lambda *_: True\ndef f(x): return Equal()",
        "class Number(int):\n    __eq__ = lambda *_: True\ndef f(x): return Number(7)",
        "import os\nos._exit(0)",
        "def f(x):\n    import os\n    os._exit(0)",
        "def f(x): raise SystemExit(0)",
        "import unittest\ndef f(x): raise unittest.SkipTest",
        "import os, signal\ndef f(x): os.kill(os.getppid(), signal.SIGKILL)",
        "import os\nfor fd in range(3, 30):\n    try: os.write(fd, b'{\"passed\": true}\\n')\n"
        "    except OSError: pass",
        "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 0",
        "def f(x):\n    while True: print('x' * 1000)",
        "g = 1",
        "def f(x:",
    ],
)
def test_programs_do_not_judge_themselves(program):
    reward = coding.CodeReward(allow_network=OPEN, cpu_secs=1, wall_secs=8.0)
    text = f"```python\n{program}\n```"
    sample = sample_lib.Sample(_task({"test_code": SQUARES}), (1,), tokens=[2], text=text)
    assert asyncio.run(reward.reward(sample)) == 0.0


def test_an_assertion_that_the_tests_catch_counts():
    tests = (
        "def test_f():\n    try:\n        assert f(2) == 4\n    except Exception:\n        pass\n"
    )
    tests += "    assert f(0) == 0"
    assert _score(F, test=tests) == 1.0
    assert _score("def f(x): return 0", test=tests) == 0.0


def test_the_tests_are_out_of_reach():
    """Neither in the folder, nor in the memory, the files or the arguments of the judge."""
    program = """
import os, pathlib
SECRET = "f(3) ==" + " 9"
def find():
    seen = [path.read_bytes() for path in pathlib.Path(".").rglob("*") if path.is_file()]
    parent = pathlib.Path("/proc", str(os.getppid()))
    for name in ("mem", "environ", "cmdline", "fd/0", "fd/3", "fd/4"):
        try:
            with open(parent / name, "rb") as file:
                seen.append(b"mem" if name == "mem" else file.read())
                if name == "mem":
                    return True
        except OSError:
            pass
    return any(SECRET.encode() in text for text in seen)
FOUND = find()
def f(x):
    return x * x if FOUND else -1
"""
    assert _score(program, test_code=SQUARES) == 0.0


def test_a_folder_of_the_test_s_own():
    program = """
def count(path): return len(open(path).read().split())
def write(folder): (folder / "b.txt").write_text("x"); return folder / "b.txt"
"""
    tests = """
import pytest
from solution import count, write
@pytest.fixture
def words(tmp_path):
    (tmp_path / "a.txt").write_text("one two")
    return tmp_path / "a.txt"
def test_count(tmp_path, words):
    assert words == tmp_path / "a.txt"
    assert count(words) == 2 == count(str(words))
def test_write(tmp_path):
    assert list(tmp_path.iterdir()) == []
    assert write(tmp_path) == tmp_path / "b.txt"
    assert (tmp_path / "b.txt").read_text() == "x"
"""
    assert _score(program, test=tests) == 1.0
    assert _score(program.replace('"x"', '"y"'), test=tests) == 0.0


# ---- LiveCodeBench's packed tests


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


class _Runs:
    """An object whose pickle runs code when it is read."""

    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_packed_tests_are_read(protocol):
    text = json.dumps([{"input": "1 2\n", "output": "3 \u20ac", "testtype": "stdin"}] * 3)
    packed = _pack(pickle.dumps(text, protocol))
    tests = code_tests.read_tests(_task({"private_test_cases": packed}))
    assert tests == [code_tests.StdinTest("1 2\n", "3 \u20ac")] * 3


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (_pack(pickle.dumps(_Runs())), "opcode .*; wanted one text alone"),
        (_pack(pickle.dumps(["[]"])), "opcode EMPTY_LIST; wanted one text alone"),
        (_pack(pickle.dumps(b"[]")), "opcode SHORT_BINBYTES; wanted one text alone"),
        (_pack(pickle.dumps("a")[:-2]), "pickle exhausted"),
        (_pack(pickle.dumps("[")), "Expecting value"),
        (_pack(pickle.dumps("[" * 100_000)), "nested too deeply|recursion"),
        (_pack(b"(I1\n."), "opcode MARK"),
        (_pack(b""), "pickle exhausted"),
        (_pack(b"no pickle"), "opcode"),
        (_pack(pickle.dumps("[]"))[:16], "is cut off"),
        (base64.b64encode(b"abc").decode(), "it is no base64 of zlib"),
        (_pack(pickle.dumps('"text"')), "got 'text'; wanted a list of tests"),
    ],
)
def test_other_packed_values_are_refused_and_never_run(packed, message):
    with pytest.raises(ValueError, match=message) as refusal:
        code_tests.read_tests(_task({"private_test_cases": packed}))
    assert len(str(refusal.value)) < 400


def test_packed_tests_have_a_largest_size(monkeypatch):
    monkeypatch.setattr(packed_tests, "_MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="has more than 1000 bytes"):
        packed_tests.unpack_tests(_pack(pickle.dumps(" " * 2000)))


def test_objects_of_the_program():
    program = """
import collections
Point = collections.namedtuple("Point", "x y")
class Full(Exception): pass
class Stack:
    limit = 2
    def __init__(self): self.items = []
    def push(self, item):
        if len(self.items) == self.limit: raise Full("no room", item)
        self.items.append(item)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
def sort(items): items.sort()
def count(n): yield from range(n)
def apply(function, items): return [function(item) for item in items]
def twice(function): return lambda *items, **named: [function(*items, **named)] * 2
def show(): print("shown")
"""
    tests = """
import pytest
from solution import *
from solution import Full, Stack
def test_all(capsys):
    stack, other = Stack(), Stack()
    stack.push(1); stack.push((2, {3: {4}}))
    assert stack.items == [1, (2, {3: {4}})] and list(stack) == stack.items and len(stack) == 2
    with pytest.raises(Full, match="no room") as info:
        stack.push(5)
    assert info.value.args == ("no room", 5)
    assert isinstance(stack, Stack) and not isinstance(5, Stack) and stack != other != 5
    other.items = list(stack.items)
    assert stack == other and stack is not other and stack == stack
    numbers = [3, 1, 2]
    sort(numbers)
    assert numbers == [1, 2, 3] == list(count(4))[1:]
    assert Point(1, 2) == (1, 2) and Point(1, 2).y == 2
    assert apply(lambda item: item + 1, numbers) == [2, 3, 4] and apply(str, [1]) == ["1"]
    assert twice(lambda x, y=0: x + y)(1, y=2) == [3, 3]
    show()
    assert capsys.readouterr().out == "shown\\n"
"""
    assert _score(program, test=tests) == 1.0
    assert _score(program.replace("items.sort()", "sorted(items)"), test=tests) == 0.0


@pytest.mark.parametrize(
    ("text", "begun", "held"),
    [
        ("assert 1", 1, 1),
        ("try:\n    assert 0\nexcept AssertionError:\n    pass", 1, 0),
        ("if 0:\n    raise ValueError", 1, 1),
        ("try:\n    int('a')\n    assert False\nexcept ValueError:\n    pass", 1, 1),
        ("np.testing.assert_allclose(0, 0)", 1, 1),
        ("for i in range(3):\n    assert i < 3", 3, 3),
        ("def f():\n    assert 1", 0, 0),
    ],
)
def test_assertions_are_counted(text, begun, held):
    counts = collections.Counter()
    names = {
        name: functools.partial(counts.update, [name])
        for name in (assertions.BEGIN_FUNCTION, assertions.HOLD_FUNCTION)
    }
    numpy = types.SimpleNamespace(testing=types.SimpleNamespace(assert_allclose=lambda *_: None))
    text = text.replace("assert 1", "assert int(1)").replace("assert 0", "assert int(0)")
    tree = assertions.count_assertions(assertions.parse_tests(text))
    exec(compile(tree, "", "exec"), {**names, "np": numpy})
    assert [counts[name] for name in names] == [begun, held]


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("0.3333333333333333\n", "0.333333", True),
        ("2.0", "2.00", True),
        ("2", "2.0", True),
        ("1.5 2.25\nyes", "1.50 2.250\nyes", True),
        ("1e-7", "0.0", True),
        ("0.34", "0.333333", False),
        ("2.0", "2", False),
        ("1  2", "1 2", False),
        ("100000000000000001", "100000000000000000", False),
        ("1.5\n2", "1.5", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("a", "1.0", False),
    ],
)
def test_outputs_that_are_floats(printed, wanted, same):
    assert comparison.is_same_output(printed, wanted, 1e-6) is same
    assert comparison.is_same_output(wanted, wanted, 0) is True


@pytest.mark.parametrize(
    ("value", "wanted", "same"),
    [
        (0.1 + 0.2, 0.3, True),
        (2, 2.0, True),
        ((1, 2), [1, 2], True),
        ({1: [0.5]}, {"1": [0.5000000001]}, True),
        (10**17 + 1, 10**17, False),
        (True, 1, True),
        ("1", 1, False),
        (None, 0, False),
        ([1], [1, 2], False),
        (10**400, 1.0, False),
    ],
)
def test_values_of_calls(value, wanted, same):
    assert comparison.is_same_value(value, wanted, 1e-6) is same


def test_the_judge_is_no_process_of_the_program():
    text = f"```python\n{F}\n```"
    task = _task({"test_list": ["assert f(2) == 4"]})
    sample = sample_lib.Sample(task, (1,), tokens=[2], text=text)
    reward = coding.CodeReward(allow_network=OPEN, processes=1)
    assert asyncio.run(reward.reward(sample)) == 1.0


def test_tolerance_is_an_option():
    text = "```python\nprint(1 / 3)\n```"
    task = _task({"tests": [{"stdin": "", "stdout": "0.333333"}]})
    sample = sample_lib.Sample(task, (1,), tokens=[2], text=text)
    for tolerance, score in ((1e-6, 1.0), (0.0, 0.0)):
        reward = coding.CodeReward(allow_network=OPEN, tolerance=tolerance)
        assert asyncio.run(reward.reward(sample)) == score
    with pytest.raises(ValueError, match="tolerance: got -1"):
        coding.CodeReward(tolerance=-1)
