"""The tests of a code task, read from the shapes that public data sets have.

metadata                                    data sets
{"tests": [{"stdin", "stdout"}, ...]}       this project
{"tests": [{"input", "output"}, ...]}       DeepCoder, LiveCodeBench
{"inputs": [...], "outputs": [...]}         APPS, TACO, Eurus-2; in "tests", "input_output" or alone
{"public_test_cases", "private_test_cases"} LiveCodeBench
{"test_list": [...]}                        MBPP, with "test_setup_code" and "test_imports"
{"test_code": text} or {"test": text}       HumanEval (check(candidate)), KodCode (pytest), unittest

Each value may be JSON text, and a list may be in LiveCodeBench's packed form (`packed_tests`). With
`fn_name` (or `func_name`, `entry_point`) beside them, inputs are arguments of a function or of a
method of `class Solution`. Without it they are what the program reads. A task whose metadata has no
tests may have them as its label.
"""

import ast
import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import packed_tests
from train.rl.rewards.judge import assertions

_PAIR_KEYS = (("stdin", "stdout"), ("input", "output"))
_LIST_KEYS = ("tests", "input_output", "public_test_cases", "private_test_cases")
_CODE_KEYS = ("test_code", "test")
_FUNCTION_KEYS = ("fn_name", "func_name")
TEST_KEYS = (
    *_LIST_KEYS,
    *_CODE_KEYS,
    *("inputs", "outputs", "test_list", "test_setup_code", "test_imports", "entry_point"),
    *_FUNCTION_KEYS,
)
# Fixtures of pytest that reach into the interpreter or the folder of the program.
_REFUSED_FIXTURES = ("monkeypatch", "mocker", "tmpdir", "tmp_path_factory", "caplog", "capfd")


@dataclasses.dataclass(frozen=True)
class StdinTest:
    """The program reads its input and prints."""

    stdin: str
    stdout: str


@dataclasses.dataclass(frozen=True)
class CallTest:
    """A function returns one of these values."""

    function: str
    arguments: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class AssertTest:
    """Python that asserts."""

    source: str
    entry_point: str | None


CodeTest = StdinTest | CallTest | AssertTest


def read_tests(task: sample_lib.Task) -> list[CodeTest]:
    """Return a task's tests, at least one.

    Raises:
      ValueError: there are none, or they have another shape.
    """
    metadata = {name: _parse_json(value) for name, value in task.metadata.items()}
    tests = list(_read_metadata(metadata))
    label = _parse_json(task.label)
    if not tests and isinstance(label, Mapping | list):
        entries = label if isinstance(label, Mapping) else {"tests": label}
        tests = list(
            _read_metadata({**metadata, **{k: _parse_json(v) for k, v in entries.items()}})
        )
    if not tests:
        raise ValueError(
            f"got no tests in the metadata {sorted(metadata)}; wanted one of tests, input_output, "
            "inputs and outputs, test_list, test_code or test"
        )
    return tests


def _parse_json(value: Any) -> Any:
    """Return the value of a text that is a JSON object or list, and any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_metadata(metadata: Mapping[str, Any]) -> Iterable[CodeTest]:
    function = _find_function_name(metadata)
    entry_point = metadata.get("entry_point")
    for key in _LIST_KEYS:
        if metadata.get(key) not in (None, "", []):
            yield from _read_list(metadata[key], function, entry_point, key)
    if "inputs" in metadata and "outputs" in metadata:
        yield from _read_columns(metadata, function, "metadata")
    yield from _read_test_list(metadata, entry_point)
    for key in _CODE_KEYS:
        if metadata.get(key):
            yield _make_assert_test(metadata[key], entry_point, key)


def _find_function_name(metadata: Mapping[str, Any]) -> str | None:
    # LiveCodeBench has it in a column "metadata", which may lie within ours.
    inner = metadata.get("metadata")
    for entries in (metadata, inner if isinstance(inner, Mapping) else {}):
        for key in _FUNCTION_KEYS:
            if isinstance(entries.get(key), str) and entries[key]:
                return entries[key]
    return None


def _read_list(
    tests: Any, function: str | None, entry_point: str | None, key: str
) -> Iterable[CodeTest]:
    if isinstance(tests, str):
        try:
            tests = packed_tests.unpack_tests(tests)
        except ValueError as error:
            raise ValueError(
                f"{key}: got {tests!r:.80}; wanted a list of tests, an object of inputs and "
                f"outputs, the JSON of one, or LiveCodeBench's packed form: {error}"
            ) from None
    if isinstance(tests, Mapping):
        if not {"inputs", "outputs"} <= tests.keys():
            raise ValueError(f"{key}: got the keys {sorted(tests)}; wanted inputs and outputs")
        yield from _read_columns(tests, tests.get("fn_name") or function, key)
        return
    if not isinstance(tests, list):
        raise ValueError(
            f"{key}: got {tests!r:.80}; wanted a list of tests, an object of inputs and outputs, "
            "or the JSON of one"
        )
    for number, test in enumerate(tests):
        name = f"{key}[{number}]"
        if isinstance(test, str):
            yield _make_assert_test(test, entry_point, name)
            continue
        pair = next(
            (p for p in _PAIR_KEYS if isinstance(test, Mapping) and set(p) <= test.keys()), None
        )
        if pair is None:
            shape = sorted(test) if isinstance(test, Mapping) else test
            raise ValueError(
                f"{name}: got {shape!r:.80}; wanted an object of stdin and stdout, or of input and "
                "output"
            )
        # LiveCodeBench and DeepCoder say of each test what it is.
        kind = test.get("testtype", test.get("type"))
        called = test.get("fn_name") or function
        if kind == "functional" and called is None:
            raise ValueError(f"{name}: got a functional test; wanted fn_name in the metadata")
        called = None if kind in ("stdin", "stdin_stdout") else called
        yield _make_io_test(test[pair[0]], test[pair[1]], called, name)


def _read_columns(
    tests: Mapping[str, Any], function: str | None, key: str
) -> Iterable[StdinTest | CallTest]:
    inputs, outputs = (_parse_json(tests[name]) for name in ("inputs", "outputs"))
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise ValueError(
            f"{key}: got inputs {inputs!r:.60} and outputs {outputs!r:.60}; wanted two lists of "
            "one length"
        )
    for number, (given, wanted) in enumerate(zip(inputs, outputs, strict=True)):
        yield _make_io_test(given, wanted, function, f"{key}[{number}]")


def _make_io_test(given: Any, wanted: Any, function: str | None, name: str) -> StdinTest | CallTest:
    if function is None:
        return StdinTest(_to_text(given, name), _to_text(wanted, name))
    if isinstance(given, str):
        # LiveCodeBench: one line of JSON for each argument, and the value as JSON.
        try:
            arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
        except ValueError as error:
            raise ValueError(f"{name}: got {given!r:.80}: {error}; wanted lines of JSON") from None
        return CallTest(function, tuple(arguments), (wanted,))
    if not isinstance(given, list):
        raise ValueError(f"{name}: got the input {given!r:.80}; wanted a list of arguments")
    # APPS wraps most values into a list, and its own judge takes either.
    is_wrapped = isinstance(wanted, list) and len(wanted) == 1
    return CallTest(function, tuple(given), (wanted, wanted[0]) if is_wrapped else (wanted,))


def _to_text(value: Any, name: str) -> str:
    if isinstance(value, list):
        return "\n".join(_to_text(line, name) for line in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: got {value!r:.80}; wanted text, a number, or a list of lines")
    return str(value)


def _read_test_list(metadata: Mapping[str, Any], entry_point: str | None) -> Iterable[AssertTest]:
    tests = metadata.get("test_list") or []
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"test_list: got {tests!r:.80}; wanted a list of texts that assert")
    imports = metadata.get("test_imports") or []
    lines = [imports] if isinstance(imports, str) else list(imports)
    lines.append(metadata.get("test_setup_code") or "")
    for number, test in enumerate(tests):
        yield _make_assert_test("\n".join([*lines, test]), entry_point, f"test_list[{number}]")


def _make_assert_test(source: Any, entry_point: str | None, name: str) -> AssertTest:
    if not isinstance(source, str):
        raise ValueError(f"{name}: got {source!r:.80}; wanted the text of tests")
    try:
        tree = assertions.parse_tests(source)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    imported, _ = assertions.find_program_names(tree)
    if entry_point is None and len(imported) != 1 and assertions.needs_candidate(tree):
        raise ValueError(f"{name}: got check(candidate), which nothing calls; wanted entry_point")
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg in _REFUSED_FIXTURES:
            raise ValueError(
                f"{name}: got the fixture {node.arg}, which reaches into the program's process; "
                "wanted tests that call the program and compare what it returns"
            )
    return AssertTest(source, entry_point)
