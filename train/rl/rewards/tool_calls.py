"""Compares the tool calls of an answer with the expected ones."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infer import tool_calls as parser
from train.rl import sample as sample_lib
from train.rl.rewards import answer


def call_f1_score(
    calls: Sequence[parser.ToolCall], expected: Sequence[Mapping[str, Any]], ordered: bool
) -> float:
    """Return the F1 score 2 * matched / (made + expected), in [0, 1].

    A call matches if its name and arguments are equal JSON values. Without calls on either side
    the score is 1.

    Args:
      ordered: matched calls must come in the expected order.
    """
    actual = [_canonical_call(call.name, call.arguments) for call in calls]
    expected_calls = [_canonical_call(call["name"], call["arguments"]) for call in expected]
    total = len(actual) + len(expected_calls)
    if not total:
        return 1.0
    count_matched = _longest_common_subsequence if ordered else _count_common
    return 2 * count_matched(actual, expected_calls) / total


def _canonical_call(name: str, arguments: Any) -> str:
    """Return a text that is equal for equal JSON values."""
    return json.dumps([name, _normalize_numbers(arguments)], sort_keys=True)


def _normalize_numbers(value: Any) -> Any:
    """Return `value` with whole floats as ints: 1 and 1.0 are the same JSON number."""
    # Python's == would not do instead: it also takes 1 and true for equal, which JSON does not.
    if isinstance(value, Mapping):
        return {key: _normalize_numbers(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_normalize_numbers(element) for element in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_common(actual: list[str], expected_calls: list[str]) -> int:
    """Return the size of the multisets' intersection."""
    return sum(min(actual.count(call), expected_calls.count(call)) for call in set(actual))


def _longest_common_subsequence(actual: list[str], expected_calls: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    # The textbook recurrence, one row at a time: row[j] is the length for the calls of `actual`
    # so far and the first j of `expected_calls`.
    row = [0] * (len(expected_calls) + 1)
    for call in actual:
        previous_row = row
        row = [0]
        for j, expected_call in enumerate(expected_calls):
            row.append(
                previous_row[j] + 1 if call == expected_call else max(row[j], previous_row[j + 1])
            )
    return row[-1]


class ToolCallReward:
    """`call_f1_score` against the expected calls, see `read_expected_calls`.

    Malformed calls are the model's fault and score 0.
    """

    def __init__(self, ordered: bool = True, partial: bool = True):
        """Choose how calls are compared.

        Args:
          ordered: see `call_f1_score`.
          partial: give the F1 score. Otherwise exactly the expected calls score 1, all else 0.
        """
        self._ordered, self._partial = ordered, partial

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task does not say which calls are expected.
        """
        try:
            expected = read_expected_calls(sample.task)
        except ValueError as error:
            raise ValueError(f"task {sample.task.id!r}: {error}") from None
        if sample.status != "stop":  # cut off: not even the right silence
            return 0.0
        try:
            calls = parser.parse_turn(answer.final_text(sample)).calls
        except ValueError:
            return 0.0
        score = call_f1_score(calls, expected, self._ordered)
        return score if self._partial else float(score == 1)


def read_expected_calls(task: sample_lib.Task) -> list[dict[str, Any]]:
    """Return the expected calls of a task, each an object of name and arguments.

    They are in the metadata under `tool_calls`, as a list or its JSON. Calls in OpenAI's form,
    {"id", "type", "function": {"name", "arguments"}}, and arguments that are JSON text are read, as
    in messages.

    Raises:
      ValueError: there are none, or they have another form.
    """
    expected = _parse_json(task.metadata.get("tool_calls"))
    if not isinstance(expected, list | tuple):
        raise ValueError(
            f"got tool_calls {expected!r:.80}; wanted a list of objects with name and arguments in "
            "the metadata"
        )
    return [_read_call(call, f"tool_calls[{number}]") for number, call in enumerate(expected)]


def _read_call(call: Any, name: str) -> dict[str, Any]:
    call = _parse_json(call)
    function = _parse_json(call.get("function", call)) if isinstance(call, Mapping) else None
    if (
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and "arguments" in function
    ):
        arguments = function["arguments"]
        # Clients send null or an empty text for no arguments.
        arguments = {} if arguments in (None, "") else _parse_json(arguments)
        if isinstance(arguments, Mapping):
            return {"name": function["name"], "arguments": dict(arguments)}
    raise ValueError(
        f"got {name} {call!r:.80}; wanted a list of objects with name and arguments, an object or "
        "its JSON"
    )


def _parse_json(value: Any) -> Any:
    """Return the value of JSON text, or the value itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
