"""Tasks as lines of JSON, without a loss: what a verifier reads back is what a generator made.

JSON has no tuples, and its objects have keys of text alone. Generators make both: `(0, 1)` and
`{0: "red"}` would come back as `[0, 1]` and `{"0": "red"}`, and a verifier that compares with them
would refuse right answers. Such values become an object with one key that tells their kind.
"""

import json
from typing import Any

import numpy as np

from train.rl import sample as sample_lib

_TUPLE_KEY, _PAIRS_KEY = "__tuple__", "__pairs__"


def encode_value(value: Any) -> Any:
    """Return a value as JSON has it. Scalars of numpy become those of Python.

    Raises:
      ValueError: a value that `decode_value` could not give back.
    """
    if type(value) in (type(None), bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return encode_value(value.item())
    if isinstance(value, list):
        return [encode_value(item) for item in value]
    if type(value) is tuple:
        return {_TUPLE_KEY: [encode_value(item) for item in value]}
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and not value.keys() & {_TUPLE_KEY, _PAIRS_KEY}:
            return {key: encode_value(item) for key, item in value.items()}
        return {_PAIRS_KEY: [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    raise ValueError(
        f"got a {type(value).__module__}.{type(value).__qualname__}: {value!r:.80}; wanted text, "
        "numbers, and lists, tuples or dicts of them"
    )


def decode_value(value: Any) -> Any:
    """Return the value that `encode_value` wrote."""
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE_KEY}:
        return tuple(decode_value(item) for item in value[_TUPLE_KEY])
    if value.keys() == {_PAIRS_KEY}:
        return {decode_value(key): decode_value(item) for key, item in value[_PAIRS_KEY]}
    return {key: decode_value(item) for key, item in value.items()}


def task_to_line(task: sample_lib.Task) -> str:
    """Return a task as a line of ASCII, without its source and without the newline.

    Raises:
      ValueError: a value that has no JSON, see `encode_value`.
    """
    try:
        return json.dumps(
            {
                "id": task.id,
                "messages": encode_value(list(task.messages)),
                "label": encode_value(task.label),
                "metadata": encode_value(dict(task.metadata)),
                "tools": encode_value(list(task.tools)),
            }
        )
    except ValueError as error:
        raise ValueError(f"task {task.id}: {error}") from None


def task_from_line(line: str, source: str) -> sample_lib.Task:
    """Return the task of a line, as one of `source`."""
    value = {name: decode_value(item) for name, item in json.loads(line).items()}
    return sample_lib.Task(
        id=value["id"],
        messages=tuple(value["messages"]),
        source=source,
        label=value["label"],
        metadata=value["metadata"],
        tools=tuple(value["tools"]),
    )
