"""The judge: reads a program and its tests, and writes the verdict.

Input, one JSON object:
  program: the text of the program.
  test_code: Python that asserts, or else
  call: {"function": name, "arguments": [...], "outputs": [...], "tolerance": float}: the call has
    to return one of the outputs.
  entry_point: name of the function that `check(candidate)` tests, or null.

Output, lines of JSON: {"started": true} once the tests are read, then {"passed": bool}, or
{"error": text} where the tests themselves failed. No second line means that the program killed the
judge or used its resources up.
"""

import ctypes
import importlib
import inspect
import json
import os
import random
import subprocess
import sys
import types
import typing
import unittest
from typing import Any, TextIO

from train.rl.rewards.judge import assertions, comparison, connection, pytest_shim, remote_objects

_PR_SET_DUMPABLE = 4  # from <sys/prctl.h>
_PROGRAM_COMMAND = (
    "import sys; sys.path.insert(0, '.'); from train.rl.rewards.judge import program; "
    "program.main()"
)
# Short names that tests use without an import, because the prompt has it.
_MODULE_ALIASES = {"np": "numpy", "pd": "pandas", "pytest": "pytest"}


class TestsFailed(Exception):
    """The tests cannot judge any program."""


class ProgramModule(types.ModuleType):
    """The module `solution` of the tests, whose names are those of the program."""

    def __init__(self, remote: Any, free_names: set[str]):
        super().__init__(assertions.PROGRAM_MODULE)
        vars(self).update({"_remote": remote, "__all__": sorted(free_names)})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._remote, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._remote, name, value)


class TestRun:
    """The tests of one program."""

    def __init__(self, tree: Any, entry_point: str | None):
        """Prepare the tests.

        Args:
          tree: from `assertions.parse_tests`.
          entry_point: the function to test, where the task names it.
        """
        self._imported, self._free_names = assertions.find_program_names(tree)
        self._entry_point = entry_point
        self._needs_candidate = assertions.needs_candidate(tree)
        self._code = compile(assertions.count_assertions(tree), "tests.py", "exec")
        self._num_begun = 0
        self._num_held = 0

    def run(self, client: remote_objects.ProgramClient, remote: Any, names: list[str]) -> bool:
        """Return whether the program passes.

        Raises:
          TestsFailed: the tests fail by themselves.
        """
        try:
            self._run_all(remote, set(names))
        except TestsFailed:
            raise
        except connection.UnsupportedValue as error:
            raise TestsFailed(str(error)) from None
        except connection.ConnectionLost:
            return False
        except BaseException as error:
            if self._is_own_fault(error, client, set(names)):
                raise TestsFailed(f"{type(error).__name__}: {error}") from None
            return False
        if not client.num_uses:
            count = "some assertions" if self._num_held else "no assertion"
            raise TestsFailed(f"the tests ran {count}, and never used the program")
        # An assertion that did not hold counts, whatever the tests catch.
        return 0 < self._num_held == self._num_begun

    def _is_own_fault(
        self, error: BaseException, client: remote_objects.ProgramClient, names: set[str]
    ) -> bool:
        """Tell whether the tests fail by themselves, whatever the program does."""
        if hasattr(error, "is_of_program"):
            return False
        # A name that the program does not define is its fault, unless the task says which function
        # it wants, and that one is there.
        if isinstance(error, NameError) and not self._free_names <= names:
            return self._entry_point in names
        if isinstance(error, ImportError) and not self._imported <= names:
            return False
        # After a use, what fails may be a value of the program.
        return not client.num_uses

    def _run_all(self, remote: Any, names: set[str]) -> None:
        namespace = self._make_namespace(remote, names)
        try:
            exec(self._code, namespace)
        except SystemExit as error:
            # Tests may end themselves. The program may not end them.
            if error.code or hasattr(error, "is_of_program"):
                raise
        own = {name: value for name, value in namespace.items() if not name.startswith("__")}
        _run_test_cases(own)
        _run_test_functions(own)
        if self._needs_candidate:
            own["check"](self._find_candidate(remote, names))

    def _make_namespace(self, remote: Any, names: set[str]) -> dict[str, Any]:
        module = ProgramModule(remote, self._free_names & names)
        sys.modules[assertions.PROGRAM_MODULE] = module
        namespace = {
            "__name__": "__main__",
            "__file__": "tests.py",
            assertions.BEGIN_FUNCTION: self._begin,
            assertions.HOLD_FUNCTION: self._hold,
        }
        for name in self._free_names:
            if name == "candidate" and name not in names and self._entry_point:
                namespace[name] = find_callable(remote, names, self._entry_point)
            elif name in typing.__all__:  # annotations without their import
                namespace[name] = getattr(typing, name)
            elif name in names:
                namespace[name] = getattr(remote, name)
            elif name in _MODULE_ALIASES or assertions.is_standard_module(name):
                namespace[name] = importlib.import_module(_MODULE_ALIASES.get(name, name))
        return namespace

    def _find_candidate(self, remote: Any, names: set[str]) -> Any:
        if self._entry_point is None and len(self._imported) != 1:
            raise TestsFailed("got check(candidate) without an entry_point")
        entry_point = self._entry_point or next(iter(self._imported))
        return find_callable(remote, names, entry_point)

    def _begin(self) -> None:
        self._num_begun += 1

    def _hold(self) -> None:
        self._num_held += 1


def find_callable(remote: Any, names: set[str] | list[str], name: str) -> Any:
    """Return a function of the program, or a method of that name of its class `Solution`.

    Raises:
      AttributeError: there is neither.
    """
    if name not in names and "Solution" in names:
        return getattr(remote.Solution(), name)
    return getattr(remote, name)


def _run_test_cases(own: dict[str, Any]) -> None:
    """Run unittest's test cases."""
    cases = [
        value
        for value in own.values()
        if isinstance(value, type) and issubclass(value, unittest.TestCase)
    ]
    result = unittest.TestResult()
    for case in cases:
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    if result.failures or result.errors:
        lines = (result.failures + result.errors)[0][1].strip().splitlines()
        raise AssertionError(lines[-1])


def _run_test_functions(own: dict[str, Any]) -> None:
    """Run pytest's test functions, and the methods of its test classes."""
    functions = {name: f for name, f in own.items() if isinstance(f, types.FunctionType)}
    fixtures = {name: f for name, f in functions.items() if hasattr(f, "is_fixture")}
    tests = [f for name, f in functions.items() if name.startswith("test")]
    for name, kind in own.items():
        if not isinstance(kind, type) or not name.startswith("Test"):
            continue
        if issubclass(kind, unittest.TestCase):
            continue
        for method, _ in inspect.getmembers(kind, inspect.isfunction):
            instance = kind()
            if hasattr(getattr(instance, method), "is_fixture"):
                fixtures[method] = getattr(instance, method)
        for method, _ in inspect.getmembers(kind, inspect.isfunction):
            if method.startswith("test"):
                tests.append(getattr(_set_up(kind()), method))
    for test in tests:
        pytest_shim.run_test(test, fixtures)


def _set_up(instance: Any) -> Any:
    if hasattr(instance, "setup_method"):
        set_up = instance.setup_method
        set_up(*[None] * len(inspect.signature(set_up).parameters))
    return instance


def _judge_call(client: Any, remote: Any, names: list[str], call: dict[str, Any]) -> bool:
    """Return whether one call returns the right value."""
    try:
        function = find_callable(remote, names, call["function"])
        value = function(*call["arguments"])
    except BaseException:  # of the program
        return False
    return any(
        comparison.is_same_value(value, wanted, call["tolerance"]) for wanted in call["outputs"]
    )


def _start_program() -> remote_objects.ProgramClient:
    """Start the program's process."""
    program_read, judge_write = os.pipe()
    judge_read, program_write = os.pipe()
    subprocess.Popen(
        # The same isolation as that of this process.
        [sys.executable, "-I", "-c", _PROGRAM_COMMAND, str(program_read), str(program_write)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(program_read, program_write),
    )
    os.close(program_read)
    os.close(program_write)
    return remote_objects.ProgramClient(os.fdopen(judge_read, "rb"), os.fdopen(judge_write, "wb"))


def judge_request(request: dict[str, Any], output: TextIO) -> bool:
    """Return whether the program of a request passes.

    Raises:
      TestsFailed: the tests cannot judge any program.
    """
    call = request.get("call")
    tests = None
    if call is None:
        try:
            tests = TestRun(assertions.parse_tests(request["test_code"]), request["entry_point"])
        except ValueError as error:
            raise TestsFailed(str(error)) from None
    print(json.dumps({"started": True}), file=output, flush=True)
    client = _start_program()
    try:
        remote, names = client.request("load", request["program"])
    except BaseException:  # of the program
        return False
    if tests is not None:
        return tests.run(client, remote, names)
    return _judge_call(client, remote, names, request["call"])


def main() -> None:
    """Judge the request on stdin."""
    # The program is of the same user. This keeps it from reading the memory and the open files of
    # this process, which hold the tests.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    # What is imported from here on must not come from the folder, into which the program writes.
    sys.path.remove(".")
    request = json.load(sys.stdin)
    output = os.fdopen(os.dup(1), "w")
    # Tests print, too.
    sys.stdout = sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.modules["pytest"] = pytest_shim.make_module()
    unittest.main = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    random.seed(0)
    try:
        verdict = {"passed": judge_request(request, output)}
    except TestsFailed as error:
        verdict = {"error": str(error)}
    print(json.dumps(verdict), file=output, flush=True)
    os._exit(0)
