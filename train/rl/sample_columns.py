"""Samples and generations as a few flat arrays and a small JSON-able table.

The numbers of all tokens of all samples lie one after another in one array for each column, with
offsets. So a thousand samples are a dozen arrays, which a checkpoint writes and a process sends as
they are. Names of arrays begin with a prefix, because one file has several kinds of records.

    PREFIX.tokens           tokens of all samples, one sample after another
    PREFIX.token_offsets    sample i has the tokens from entry i to entry i + 1, int64
    PREFIX.prompt, PREFIX.prompt_offsets, PREFIX.routes, PREFIX.route_offsets, ...
    PREFIX.routes.0, PREFIX.routes.1, ...    instead, where routes are not joined

Arrays that come back are views of the flat ones.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.rl import sample as sample_lib

Columns = dict[str, np.ndarray]
_TOKEN_COLUMNS = ("tokens", "mask", "logprobs", "versions")
_PARTIAL_COLUMNS = ("tokens", "logprobs", "raw", "versions")


def samples_to_columns(
    samples: Sequence[sample_lib.Sample], prefix: str, with_text: bool, join_routes: bool = True
) -> tuple[list[dict[str, Any]], Columns]:
    """Return (one JSON-able record a sample, flat columns).

    Args:
      samples: the samples. Their tasks are left out: the groups that they belong to name them.
      prefix: what the names of the columns begin with.
      with_text: keep `text` and `messages`, which rewards read and the trainer does not.
      join_routes: copy the routes of all samples into one array. Else each sample's are an array of
        their own, without a copy: those of 512 answers of 80K tokens are 6.7 GB.
    """
    columns = _join_columns(samples, prefix, _TOKEN_COLUMNS, "token_offsets")
    columns |= _join_columns(samples, prefix, ("prompt",), "prompt_offsets")
    columns |= (_join_routes if join_routes else _name_routes)(samples, prefix)
    if with_text:
        texts = [np.frombuffer(_text_to_bytes(sample), np.uint8) for sample in samples]
        columns[f"{prefix}.texts"] = _join(texts, np.uint8)
        columns[f"{prefix}.text_offsets"] = _offsets(texts)
    records = [
        {
            "status": sample.status,
            "turn_rewards": [[index, reward] for index, reward in sample.turn_rewards],
            "reward": sample.reward,
            "parts": dict(sample.parts),
            "outcome": sample.outcome,
            "error": sample.error,
            "valid": bool(sample.valid),
            "has_routes": sample.routes is not None,
        }
        for sample in samples
    ]
    return records, columns


def samples_from_columns(
    records: Sequence[Mapping[str, Any]],
    columns: Mapping[str, np.ndarray],
    prefix: str,
    tasks: Sequence[sample_lib.Task],
) -> list[sample_lib.Sample]:
    """Return the samples that `samples_to_columns` wrote, each with its task."""
    parts = _split_columns(columns, prefix, _TOKEN_COLUMNS, "token_offsets")
    parts |= _split_columns(columns, prefix, ("prompt",), "prompt_offsets")
    routes: Any = [columns.get(f"{prefix}.routes.{i}") for i in range(len(records))]
    if f"{prefix}.routes" in columns:
        routes = _split_columns(columns, prefix, ("routes",), "route_offsets")["routes"]
    texts: list[np.ndarray] | None = None
    if f"{prefix}.texts" in columns:
        texts = _split_columns(columns, prefix, ("texts",), "text_offsets")["texts"]
    samples = []
    for i, (record, task) in enumerate(zip(records, tasks, strict=True)):
        text, messages = ("", []) if texts is None else _text_from_bytes(texts[i].tobytes())
        samples.append(
            sample_lib.Sample(
                task,
                **{name: part[i] for name, part in parts.items()},
                routes=routes[i] if record["has_routes"] else None,
                status=record["status"],
                text=text,
                messages=messages,
                turn_rewards=[(index, reward) for index, reward in record["turn_rewards"]],
                reward=record["reward"],
                parts=dict(record["parts"]),
                # Checkpoints of earlier versions have neither.
                outcome=record.get("outcome"),
                error=record.get("error", ""),
                valid=record["valid"],
            )
        )
    return samples


def partials_to_columns(partials: Sequence[sample_lib.Generation], prefix: str) -> Columns:
    """Return generations that were paused as flat columns. They have no text."""
    columns = _join_columns(partials, prefix, _PARTIAL_COLUMNS, "token_offsets")
    return columns | _join_routes(partials, prefix)


def partials_from_columns(
    columns: Mapping[str, np.ndarray], prefix: str
) -> list[sample_lib.Generation]:
    """Return the generations that `partials_to_columns` wrote."""
    parts = _split_columns(columns, prefix, _PARTIAL_COLUMNS, "token_offsets")
    routes: list[np.ndarray | None] = [None] * len(parts["tokens"])
    if f"{prefix}.routes" in columns:  # checkpoints of earlier versions have none
        found = _split_columns(columns, prefix, ("routes",), "route_offsets")["routes"]
        # An engine that records routes records at least the prompt's.
        routes = [part if len(part) else None for part in found]
    return [
        # A generation that was paused was cut off, by its slice.
        sample_lib.Generation(status="length", routes=part, **dict(zip(parts, values, strict=True)))
        for part, values in zip(routes, zip(*parts.values(), strict=True), strict=True)
    ]


def _join_columns(
    records: Sequence[Any], prefix: str, names: Sequence[str], offsets_name: str
) -> Columns:
    """Return columns of one length a record, and their offsets."""
    columns = {
        f"{prefix}.{name}": _join(
            [getattr(record, name) for record in records], sample_lib.COLUMN_DTYPES[name]
        )
        for name in names
    }
    columns[f"{prefix}.{offsets_name}"] = _offsets([getattr(r, names[0]) for r in records])
    return columns


def _split_columns(
    columns: Mapping[str, np.ndarray], prefix: str, names: Sequence[str], offsets_name: str
) -> dict[str, list[np.ndarray]]:
    """Return each column's part of every record."""
    offsets = columns[f"{prefix}.{offsets_name}"]
    # Not `np.split`, which takes seconds for thousands of parts.
    spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    return {
        name: [columns[f"{prefix}.{name}"][first:end] for first, end in spans] for name in names
    }


def _join_routes(
    samples: Sequence[sample_lib.Sample | sample_lib.Generation], prefix: str
) -> Columns:
    """Return the routes of all samples, [tokens, layers, experts], and their offsets."""
    known = [sample.routes for sample in samples if sample.routes is not None]
    shape = known[0].shape[1:] if known else (0, 0)
    routes = [
        np.zeros((0, *shape), np.int8) if sample.routes is None else sample.routes
        for sample in samples
    ]
    return {
        f"{prefix}.routes": np.concatenate([np.zeros((0, *shape), np.int8), *routes]),
        f"{prefix}.route_offsets": _offsets(routes),
    }


def _name_routes(samples: Sequence[sample_lib.Sample], prefix: str) -> Columns:
    """Return the routes of each sample that has some, by its number."""
    return {
        f"{prefix}.routes.{i}": sample.routes
        for i, sample in enumerate(samples)
        if sample.routes is not None
    }


def _join(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _offsets(arrays: Sequence[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(array) for array in arrays], np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _text_to_bytes(sample: sample_lib.Sample) -> bytes:
    """Return text and messages as JSON, with the text once."""
    # The last message most often has the very text, which may be 300 KB long.
    messages = [
        message | {"content": None} if message.get("content") == sample.text else message
        for message in sample.messages
    ]
    return json.dumps([sample.text, messages], ensure_ascii=False).encode()


def _text_from_bytes(data: bytes) -> tuple[str, list[dict[str, Any]]]:
    text, messages = json.loads(data)
    return text, [
        message | {"content": text} if message["content"] is None else message
        for message in messages
    ]
