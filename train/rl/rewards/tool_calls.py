"""Are the tool calls of an answer the expected ones?"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infer import tool_calls as parser
from train.rl import sample as sample_lib
from train.rl.rewards import answer


def call_f1_score(
    calls: Sequence[parser.Call], expected: Sequence[Mapping[str, Any]], ordered: bool
) -> float:
    """Return 2 * matched / (made + expected), in [0, 1]; 1 where none is expected and made.

    A call matches if its name and arguments are the same JSON values. ordered: matched calls must
    come in the expected order.
    """
    ours = [_canonical_call(call.name, call.arguments) for call in calls]
    wanted = [_canonical_call(call["name"], call["arguments"]) for call in expected]
    total = len(ours) + len(wanted)
    if not total:
        return 1.0
    return (
        2
        * (_longest_common_subsequence(ours, wanted) if ordered else _count_common(ours, wanted))
        / total
    )


def _canonical_call(name: str, arguments: Any) -> str:
    """Return a text that is equal for equal JSON values; 1 and 1.0 are, 1 and true are not."""
    return json.dumps([name, _normalize_numbers(arguments)], sort_keys=True)


def _normalize_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _normalize_numbers(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_normalize_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_common(ours: list[str], wanted: list[str]) -> int:
    return sum(min(ours.count(key), wanted.count(key)) for key in set(ours))


def _longest_common_subsequence(ours: list[str], wanted: list[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(wanted) + 1)
    for key in ours:
        above = row
        row = [0]
        for j, other in enumerate(wanted):
            row.append(above[j] + 1 if key == other else max(row[j], above[j + 1]))
    return row[-1]


class ToolCalls:
    """The share of right calls against metadata {"tool_calls": [{"name", "arguments"}, ...]}.

    Malformed calls are the model's fault: 0.
    """

    def __init__(self, ordered: bool = True, partial: bool = True):
        """ordered: see `call_f1_score`. partial: otherwise 1 for all and no others, else 0."""
        self._ordered, self._partial = ordered, partial

    async def reward(self, sample: sample_lib.Sample) -> float:
        """Score one sample.

        Raises:
          ValueError: the task does not say what it expects.
        """
        expected = sample.task.metadata.get("tool_calls")
        if not isinstance(expected, list | tuple) or not all(map(_is_call, expected)):
            raise ValueError(
                f"task {sample.task.id!r}: got tool_calls {expected!r:.80}; wanted a list of "
                "objects with name and arguments in the metadata"
            )
        try:
            made = parser.parse(answer.strip_thinking(sample.text)).calls
        except ValueError:
            return 0.0
        score = call_f1_score(made, expected, self._ordered)
        return score if self._partial else float(score == 1)


def _is_call(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("arguments"), Mapping)
    )
