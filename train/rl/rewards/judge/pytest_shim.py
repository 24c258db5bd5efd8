"""The part of pytest that tests of data sets use, for sandboxes that do not have pytest."""

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import math
import pathlib
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class SkippedTest(Exception):
    """A test that does not want to run."""


class FailedTest(AssertionError):
    """A test that called `pytest.fail`, or in which nothing was raised."""


class RaisedInfo:
    """What `pytest.raises` gives: the exception, once it was raised."""

    value: Any = None
    type: Any = None

    def match(self, pattern: str) -> bool:
        """Assert that the exception's message has the pattern."""
        if not re.search(pattern, str(self.value)):
            raise FailedTest(f"got {str(self.value)!r:.80}; wanted {pattern!r}")
        return True


@contextlib.contextmanager
def _expect_exception(expected: Any, match: str | None = None) -> Iterator[RaisedInfo]:
    info = RaisedInfo()
    try:
        yield info
    except expected as error:
        info.value, info.type = error, type(error)
        if match is not None:
            info.match(match)
        return
    raise FailedTest(f"nothing was raised; wanted {expected}")


def _raises(expected: Any, *call: Any, match: str | None = None, **named: Any) -> Any:
    if not call:
        return _expect_exception(expected, match)
    with _expect_exception(expected) as info:
        call[0](*call[1:], **named)
    return info


class ApproximateValue:
    """Equal to numbers nearby, and to lists, tuples and dicts of them."""

    def __init__(self, wanted: Any, rel: float | None = None, abs: float | None = None):
        self._wanted, self._rel, self._abs = wanted, rel, abs

    def __eq__(self, value: object) -> bool:
        return self._is_near(value, self._wanted)

    def _is_near(self, value: Any, wanted: Any) -> bool:
        if isinstance(wanted, Mapping):
            return isinstance(value, Mapping) and (
                value.keys() == wanted.keys()
                and all(self._is_near(value[key], item) for key, item in wanted.items())
            )
        if isinstance(wanted, list | tuple):
            return isinstance(value, list | tuple) and (
                len(value) == len(wanted) and all(map(self._is_near, value, wanted))
            )
        if not isinstance(wanted, int | float) or not isinstance(value, int | float):
            return bool(value == wanted)
        # pytest's own defaults: an absolute tolerance alone replaces the relative one.
        rel = (0.0 if self._abs is not None else 1e-6) if self._rel is None else self._rel
        near = 1e-12 if self._abs is None else self._abs
        return math.isclose(value, wanted, rel_tol=0, abs_tol=max(rel * abs(wanted), near))


def _mark_parametrize(names: Any, values: Any, **_: Any) -> Callable[..., Any]:
    values = list(values)
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [row.values if isinstance(row, ParameterSet) else row for row in values]
    if len(keys) == 1:  # each value is the parameter itself, which may be a tuple
        rows = [
            row if isinstance(original, ParameterSet) else (row,)
            for original, row in zip(values, rows, strict=True)
        ]
    cases = [dict(zip(keys, row, strict=True)) for row in rows]

    def mark(function: Any) -> Any:
        function.test_cases = [*getattr(function, "test_cases", []), cases]
        return function

    return mark


class ParameterSet:
    """The values of one `pytest.param`."""

    def __init__(self, *values: Any, **_: Any):
        self.values = values


class _Marks:
    """`pytest.mark`: all marks but these change nothing."""

    parametrize = staticmethod(_mark_parametrize)

    def __getattr__(self, name: str) -> Any:
        return _Mark(is_skip=name == "skip")


class _Mark:
    """A mark, with or without arguments."""

    def __init__(self, is_skip: bool):
        self._is_skip = is_skip

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        if arguments and callable(arguments[0]):
            arguments[0].is_skipped = self._is_skip
            return arguments[0]
        return self


def _mark_fixture(function: Any = None, **_: Any) -> Any:
    if function is None:
        return _mark_fixture
    function.is_fixture = True
    return function


class CapturedOutput:
    """The fixture `capsys`."""

    def __init__(self):
        sys.stdout = io.StringIO()

    def readouterr(self) -> Any:
        """Return what was printed since the last call."""
        text = sys.stdout.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        sys.stdout = io.StringIO()
        return types.SimpleNamespace(out=text, err="")


def _raise(kind: type[Exception], reason: str = "", **_: Any) -> None:
    raise kind(reason)


def make_module() -> types.ModuleType:
    """Return a module to import as `pytest`."""
    module = types.ModuleType("pytest")
    vars(module).update(
        raises=_raises,
        approx=ApproximateValue,
        mark=_Marks(),
        param=ParameterSet,
        fixture=_mark_fixture,
        skip=functools.partial(_raise, SkippedTest),
        fail=functools.partial(_raise, FailedTest),
        main=lambda *_, **__: 0,  # the judge runs the tests itself
    )
    return module


def run_test(function: Any, fixtures: Mapping[str, Any]) -> None:
    """Run a test function, once for each of its cases.

    Raises:
      TypeError: a fixture that there is not.
      BaseException: what the test raised.
    """
    if getattr(function, "is_skipped", False):
        return
    for combination in itertools.product(*getattr(function, "test_cases", [])):
        values = {name: value for case in combination for name, value in case.items()}
        with contextlib.ExitStack() as stack, contextlib.suppress(SkippedTest):
            _call_with_fixtures(function, values, fixtures, stack)


def _call_with_fixtures(
    function: Any, values: dict[str, Any], fixtures: Mapping[str, Any], stack: Any
) -> Any:
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in values:
            arguments[name] = values[name]
        elif name in fixtures:
            arguments[name] = _make_fixture(name, values, fixtures, stack)
        elif name == "capsys":
            stack.callback(setattr, sys, "stdout", sys.stdout)
            arguments[name] = CapturedOutput()
        elif name == "tmp_path":
            if name not in values:  # one for a test and its fixtures
                values[name] = pathlib.Path(tempfile.mkdtemp())
                stack.callback(shutil.rmtree, values[name], ignore_errors=True)
            arguments[name] = values[name]
        elif parameter.default is inspect.Parameter.empty:
            raise TypeError(
                f"got the fixture {name!r}; wanted capsys, tmp_path, or one of the tests' own"
            )
    result = function(**arguments)
    if inspect.iscoroutine(result):
        result = importlib.import_module("asyncio").run(result)
    return result


def _make_fixture(
    name: str, values: dict[str, Any], fixtures: Mapping[str, Any], stack: Any
) -> Any:
    if name not in values:  # made once for a test, and shared by fixtures
        value = _call_with_fixtures(fixtures[name], values, fixtures, stack)
        if inspect.isgenerator(value):
            generator, value = value, next(value)
            stack.callback(next, generator, None)
        values[name] = value
    return values[name]
