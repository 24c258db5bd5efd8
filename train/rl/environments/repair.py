"""A small repository with a bug: read it, repair it, run its tests (M1 4.1, software engineering).

What the model wrote runs in `train.rl.rewards.runner` alone. The final reward does not come from the
tests that the model sees and may edit: in a fresh folder the functions are called with arguments,
some of them hidden, and what they return is compared outside of it. So the right values are never
where the model's code runs, and no edit of a test, of `unittest` or of the exit code helps.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.rl import sample as sample_lib
from train.rl.environments import base, bugs

TOOLS = (
    base.tool("read", "Return a file.", path="string"),
    base.tool("write", "Replace a whole file.", path="string", text="string"),
    base.tool(
        "replace",
        "Replace text that is in a file exactly once.",
        path="string",
        old="string",
        new="string",
    ),
    base.tool("run_tests", "Run the tests."),
)
MAX_OUTPUT, MAX_FILE = 2_000, 20_000  # characters
_PYTHON = (sys.executable, "-S", "-c")  # without what is installed, which is slow to find
# Neither paths nor times, which differ from run to run.
_TESTS = """
import unittest
suite = unittest.defaultTestLoader.discover(".")
result = unittest.TestResult()
suite.run(result)
bad = result.failures + result.errors
for case, trace in bad:
    print(case.id() + ": " + trace.strip().splitlines()[-1])
print(f"{result.testsRun} tests, {len(bad)} failed")
"""
_CALLS = """
import importlib, json, sys
outcomes = []
for name, arguments in json.load(sys.stdin):
    try:
        value = getattr(importlib.import_module(name), name)(*arguments)
        outcomes.append(["value", value])
    except Exception as error:
        outcomes.append(["error", type(error).__name__])
print("\\n" + json.dumps(outcomes))
"""

# Files, command and stdin to a `runner.Result`.
Run = Callable[[Mapping[str, str], Sequence[str], str], Any]


def run_locally(files: Mapping[str, str], command: Sequence[str], stdin: str) -> Any:
    """Return the `runner.Result` of a command of a few seconds."""
    from train.rl.rewards import runner

    limits = runner.Limits(
        cpu_secs=5, wall_secs=15, memory_bytes=2**29, output_bytes=2**18, processes=4
    )
    return runner.run(files, command, limits, stdin=stdin)


class Repair(base.Environment):
    """Final reward 1 if all functions of the repository return what they should, otherwise 0.

    Task.metadata: {"files": {path: text}, "cases": [[function, arguments, outcome]]}; the
    outcomes are those of `bugs.outcome`.
    """

    def __init__(self, run: Run = run_locally):
        """Make one. run: what runs programs; it raises where it cannot, which is no fault of the
        program.
        """
        self._run = run

    def start(self, task: sample_lib.Task) -> None:
        """Take a copy of the files; see the class."""
        files, cases = task.metadata.get("files"), task.metadata.get("cases")
        if not isinstance(files, dict) or not isinstance(cases, list) or not cases:
            raise ValueError(
                f"task {task.id!r}: got files {files!r:.80} and cases {cases!r:.80}; wanted an "
                "object and a list that is not empty. Make tasks with repair.tasks."
            )
        self._original, self._files, self._cases = files, dict(files), cases

    def step(self, calls: Sequence[base.Call]) -> base.Step:
        """Read, write and test."""
        tools = {
            "read": self._read,
            "write": self._write,
            "replace": self._replace,
            "run_tests": self._run_tests,
        }
        return base.Step(base.carry_out(calls, TOOLS, tools))

    def finish(self, text: str) -> float:
        """Grade the files; what the model says about them counts for nothing."""
        del text
        modules = {path for path in self._original if not path.startswith("test_")}
        files = {path: self._files[path] for path in modules}
        calls = json.dumps([[name, arguments] for name, arguments, _ in self._cases])
        result = self._run(files, [*_PYTHON, _CALLS], calls)
        lines = result.stdout.splitlines()
        if result.reason != "exit" or result.exit_code != 0 or not lines:
            return 0.0
        try:
            outcomes = json.loads(lines[-1])
        except (ValueError, RecursionError):  # the program wrote a last line of its own
            return 0.0
        return float(outcomes == [outcome for _, _, outcome in self._cases])

    def _read(self, path: str) -> str:
        if path not in self._files:
            raise base.CallError(f"got the file {path!r}; wanted {', '.join(self._files)}")
        return self._files[path]

    def _write(self, path: str, text: str) -> str:
        self._read(path)
        if len(text) > MAX_FILE:
            raise base.CallError(f"got {len(text)} characters; wanted at most {MAX_FILE}")
        self._files[path] = text
        return "written"

    def _replace(self, path: str, old: str, new: str) -> str:
        text = self._read(path)
        count = text.count(old) if old else 0
        if count != 1:
            raise base.CallError(f"old: got text that is there {count} times; wanted once")
        return self._write(path, text.replace(old, new))

    def _run_tests(self) -> str:
        result = self._run(self._files, [*_PYTHON, _TESTS], "")
        said = (result.stdout + result.stderr).strip()[-MAX_OUTPUT:]
        return said if result.reason == "exit" else f"{said}\nstopped: {result.reason} limit"


def tasks(size: int, seed: int) -> list[sample_lib.Task]:
    """Return so many tasks; the first of a longer list are those of a shorter one."""
    return [_task(random.Random(f"repair {seed} {i}"), f"repair-{seed}-{i}") for i in range(size)]


def _task(rng: random.Random, name: str, modules: int = 3) -> sample_lib.Task:
    """Return a repository of so many modules, one of which is broken, and shows it in its tests."""
    functions = rng.sample(bugs.FUNCTIONS, modules)
    broken = rng.choice(functions)
    bug = rng.randrange(len(broken.breaks))
    files: dict[str, str] = {}
    cases: list[list[Any]] = []
    for function in sorted(functions, key=lambda function: function.name):
        source = function.source(bug if function is broken else None)
        shown, hidden = _cases(rng, function, source, function is broken)
        files[f"{function.name}.py"] = source
        files[f"test_{function.name}.py"] = _test_file(function.name, shown)
        cases += [*shown, *hidden]
    question = (
        f"A test of this repository fails. Find the bug and repair it. Files: {', '.join(files)}."
    )
    return sample_lib.Task(
        id=name,
        messages=({"role": "user", "content": question},),
        source="repair",
        metadata={"files": files, "cases": cases},
        tools=TOOLS,
    )


def _cases(
    rng: random.Random, function: bugs.Function, source: str, fails: bool
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return cases for the tests and hidden ones; a bug fails some of either."""
    good = function.source()
    while True:
        drawn = [function.draw(rng) for _ in range(12)]
        cases = [[function.name, args, bugs.outcome(good, function.name, args)] for args in drawn]
        wrong = [bugs.outcome(source, name, args) != right for name, args, right in cases]
        if not fails or (any(wrong[:4]) and any(wrong[4:])):
            return cases[:4], cases[4:]


def _test_file(name: str, cases: Sequence[Sequence[Any]]) -> str:
    tests = "".join(
        f"\n    def test_{i}(self):\n        self.assertEqual({name}({arguments}), {value!r})\n"
        for i, (_, args, (_, value)) in enumerate(cases)
        for arguments in [", ".join(map(repr, args))]
    )
    return (
        f"import unittest\n\nfrom {name} import {name}\n\n\nclass Test(unittest.TestCase):{tests}"
    )
