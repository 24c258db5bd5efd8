"""A small repository with a bug, to read, repair and test (M1 4.1, software engineering).

The model's code runs in `train.rl.rewards.runner` alone. The final reward does not come from the
tests that the model sees and may edit. Instead, the functions are called in a fresh folder, with
arguments that are partly hidden, and their values are compared outside of it. The right values are
therefore never present where the model's code runs. No edit of a test, of `unittest` or of the exit
code helps.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.rl import sample as sample_lib
from train.rl.environments import base, bugs
from train.rl.rewards import runner

TOOL_SCHEMAS = (
    base.make_tool_schema("read", "Return a file.", path="string"),
    base.make_tool_schema("write", "Replace a whole file.", path="string", text="string"),
    base.make_tool_schema(
        "replace",
        "Replace text that is in a file exactly once.",
        path="string",
        old="string",
        new="string",
    ),
    base.make_tool_schema("run_tests", "Run the tests."),
)
MAX_OUTPUT_CHARS, MAX_FILE_CHARS = 2_000, 20_000
# -S skips site-packages, which take time to find.
_PYTHON_COMMAND = (sys.executable, "-S", "-c")
# Prints neither paths nor times: these differ from run to run, and results must not.
_TEST_PROGRAM = """
import unittest
suite = unittest.defaultTestLoader.discover(".")
result = unittest.TestResult()
suite.run(result)
bad = result.failures + result.errors
for case, trace in bad:
    print(case.id() + ": " + trace.strip().splitlines()[-1])
print(f"{result.testsRun} tests, {len(bad)} failed")
"""
# Prints the outcomes in a line of their own, after whatever the model's code prints on import.
_CALL_PROGRAM = """
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

# Takes files, command and stdin.
RunCommand = Callable[[Mapping[str, str], Sequence[str], str], runner.RunResult]


def run_locally(files: Mapping[str, str], command: Sequence[str], stdin: str) -> runner.RunResult:
    """Run a command of a few seconds on this machine."""
    limits = runner.RunnerLimits(
        cpu_secs=5, wall_secs=15, memory_bytes=2**29, output_bytes=2**18, processes=4
    )
    return runner.run_program(files, command, limits, stdin=stdin)


class RepairEnvironment(base.Environment):
    """Final reward 1 if all functions of the repository return the right values, otherwise 0.

    The task's metadata is {"files": {path: text}, "cases": [[function, arguments, outcome]]}, with
    outcomes of `bugs.evaluate_call`.
    """

    def __init__(self, run_command: RunCommand = run_locally):
        """Choose how programs run.

        Args:
          run_command: runs a command. It raises where it cannot run programs at all, because that
            is no fault of the model.
        """
        self._run_command = run_command
        # Those of the task, from `start` on. The tools write into `_files` alone.
        self._original: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._cases: list[Any] = []

    def start(self, task: sample_lib.Task) -> None:
        """Take the cases and a copy of the files from the task."""
        files, cases = task.metadata.get("files"), task.metadata.get("cases")
        if not isinstance(files, dict) or not isinstance(cases, list) or not cases:
            raise ValueError(
                f"task {task.id!r}: got files {files!r:.80} and cases {cases!r:.80}; wanted an "
                "object and a list that is not empty. Make tasks with repair.make_tasks."
            )
        self._original, self._files, self._cases = files, dict(files), cases

    def step(self, calls: Sequence[base.EnvironmentCall]) -> base.EnvironmentStep:
        """Read, write and test."""
        tools = {
            "read": self._read_file,
            "write": self._write_file,
            "replace": self._replace_text,
            "run_tests": self._run_tests,
        }
        return base.EnvironmentStep(base.execute_calls(calls, TOOL_SCHEMAS, tools))

    def finish(self, text: str) -> float:
        """Grade the files. The model's answer does not matter."""
        del text
        # Only files that the repository had: a new or edited test file does not reach the graders.
        modules = {path for path in self._original if not path.startswith("test_")}
        files = {path: self._files[path] for path in modules}
        calls = json.dumps([[name, arguments] for name, arguments, _ in self._cases])
        result = self._run_command(files, [*_PYTHON_COMMAND, _CALL_PROGRAM], calls)
        lines = result.stdout.splitlines()
        if result.reason != "exit" or result.exit_code != 0 or not lines:
            return 0.0
        try:
            outcomes = json.loads(lines[-1])
        except (ValueError, RecursionError):  # the model's code printed a last line of its own
            return 0.0
        return float(outcomes == [outcome for _, _, outcome in self._cases])

    def _read_file(self, path: str) -> str:
        if path not in self._files:
            raise base.CallError(f"got the file {path!r}; wanted {', '.join(self._files)}")
        return self._files[path]

    def _write_file(self, path: str, text: str) -> str:
        self._read_file(path)  # raises for a file that does not exist
        if len(text) > MAX_FILE_CHARS:
            raise base.CallError(f"got {len(text)} characters; wanted at most {MAX_FILE_CHARS}")
        self._files[path] = text
        return "written"

    def _replace_text(self, path: str, old: str, new: str) -> str:
        text = self._read_file(path)
        count = text.count(old) if old else 0
        if count != 1:
            raise base.CallError(f"old: got text that is there {count} times; wanted once")
        return self._write_file(path, text.replace(old, new))

    def _run_tests(self) -> str:
        result = self._run_command(self._files, [*_PYTHON_COMMAND, _TEST_PROGRAM], "")
        output = (result.stdout + result.stderr).strip()[-MAX_OUTPUT_CHARS:]
        return output if result.reason == "exit" else f"{output}\nstopped: {result.reason} limit"


def make_tasks(size: int, seed: int) -> list[sample_lib.Task]:
    """Return `size` tasks. A longer list begins with the tasks of a shorter one."""
    return [make_task(seed, index) for index in range(size)]


def make_task(seed: int, index: int) -> sample_lib.Task:
    """Return one task, which depends on seed and index alone."""
    # A text seeds by SHA-512, so equal seeds make equal tasks on every machine.
    return _make_task(random.Random(f"repair {seed} {index}"), f"repair-{seed}-{index}")


def _make_task(rng: random.Random, name: str, num_modules: int = 3) -> sample_lib.Task:
    """Return a repository of `num_modules` modules, one of which is broken and fails its tests."""
    functions = rng.sample(bugs.BUGGY_FUNCTIONS, num_modules)
    broken = rng.choice(functions)
    bug = rng.randrange(len(broken.mutations))
    files: dict[str, str] = {}
    cases: list[list[Any]] = []
    for function in sorted(functions, key=lambda function: function.name):
        source = function.source(bug if function is broken else None)
        shown, hidden = _make_cases(rng, function, source, function is broken)
        files[f"{function.name}.py"] = source
        files[f"test_{function.name}.py"] = _make_test_file(function.name, shown)
        cases += [*shown, *hidden]
    question = (
        f"A test of this repository fails. Find the bug and repair it. Files: {', '.join(files)}."
    )
    return sample_lib.Task(
        id=name,
        messages=({"role": "user", "content": question},),
        source="repair",
        metadata={"files": files, "cases": cases},
        tools=TOOL_SCHEMAS,
    )


def _make_cases(
    rng: random.Random, function: bugs.BuggyFunction, source: str, is_broken: bool
) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return cases for the repository's tests, and hidden cases. A bug fails some of both."""
    correct_source = function.source()
    # Random arguments need not show the bug, so draw until some of both kinds do.
    while True:
        drawn = [function.draw(rng) for _ in range(12)]
        cases = [
            [function.name, args, bugs.evaluate_call(correct_source, function.name, args)]
            for args in drawn
        ]
        wrong = [bugs.evaluate_call(source, name, args) != right for name, args, right in cases]
        # 4 cases go into the repository's tests, and 8 stay hidden.
        if not is_broken or (any(wrong[:4]) and any(wrong[4:])):
            return cases[:4], cases[4:]


def _make_test_file(name: str, cases: Sequence[Sequence[Any]]) -> str:
    tests = "".join(
        f"\n    def test_{i}(self):\n        self.assertEqual({name}({arguments}), {value!r})\n"
        for i, (_, args, (_, value)) in enumerate(cases)
        for arguments in [", ".join(map(repr, args))]
    )
    return (
        f"import unittest\n\nfrom {name} import {name}\n\n\nclass Test(unittest.TestCase):{tests}"
    )
