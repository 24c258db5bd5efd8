"""Samples and generations as JSON, for the state that a checkpoint keeps of a run.

A column, which is a list with one number a token, is written as base64 of its bytes. Decimal
numbers would take several times the space, and float32 values come back bit-exact. None, the
place of a sample that does not exist yet, stays None.
"""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.rl import sample as sample_lib

# The columns of `Sample` and of `Generation`. A record has some of them.
_COLUMN_DTYPES = {
    "tokens": np.int32,
    "mask": np.int8,
    "logprobs": np.float32,
    "raw": np.float32,
    "versions": np.int32,
}


def sample_to_json(sample: sample_lib.Sample | None) -> dict[str, Any] | None:
    """Return a sample without its task, which the group that it belongs to names."""
    return None if sample is None else _fields_to_json(sample, leave_out=("task",))


def sample_from_json(
    value: Mapping[str, Any] | None, task: sample_lib.Task
) -> sample_lib.Sample | None:
    """Return the sample that `sample_to_json` wrote."""
    if value is None:
        return None
    fields = _fields_from_json(value)
    # JSON has no tuples: both came back as lists.
    fields["prompt"] = tuple(fields["prompt"])
    fields["turn_rewards"] = [(index, reward) for index, reward in fields["turn_rewards"]]
    return sample_lib.Sample(task=task, **fields)


def generation_to_json(generation: sample_lib.Generation | None) -> dict[str, Any] | None:
    """Return a generation as JSON."""
    return None if generation is None else _fields_to_json(generation)


def generation_from_json(value: Mapping[str, Any] | None) -> sample_lib.Generation | None:
    """Return the generation that `generation_to_json` wrote."""
    if value is None:
        return None
    # A generation is immutable: its columns are tuples.
    fields: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in _fields_from_json(value).items()
    }
    return sample_lib.Generation(**fields)


def _fields_to_json(record: Any, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    value = {
        f.name: getattr(record, f.name)
        for f in dataclasses.fields(record)
        if f.name not in leave_out
    }
    for name, dtype in _COLUMN_DTYPES.items():
        if name in value:
            value[name] = base64.b64encode(np.asarray(value[name], dtype).tobytes()).decode()
    if value["routes"] is not None:
        routes = np.asarray(value["routes"], np.int8)
        # Bytes alone have no shape, so routes are a pair: shape, base64.
        value["routes"] = [list(routes.shape), base64.b64encode(routes.tobytes()).decode()]
    return value


def _fields_from_json(value: Mapping[str, Any]) -> dict[str, Any]:
    value = dict(value)
    for name, dtype in _COLUMN_DTYPES.items():
        if name in value:
            value[name] = np.frombuffer(base64.b64decode(value[name]), dtype).tolist()
    if value["routes"] is not None:
        shape, text = value["routes"]
        value["routes"] = np.frombuffer(base64.b64decode(text), np.int8).reshape(shape)
    return value
