"""Groups of samples as flat columns: those that a collector keeps, and those of a batch.

    table, columns = batch_to_columns(batch)    # on process 0
    batch = batch_from_columns(table, columns)  # on processes that have no tasks

A table is JSON-able and has some 200 bytes a sample. Columns are those of `sample_columns`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.rl import sample as sample_lib
from train.rl import sample_columns, sample_groups

_BATCH_PREFIX = "batch"


def groups_to_columns(
    groups: Sequence[sample_groups.SampleGroup], name: str, with_text: bool
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return groups as (a JSON-able table, flat columns whose names begin with `name`)."""
    samples = [sample for group in groups for sample in sample_groups.finished_samples(group)]
    records, columns = sample_columns.samples_to_columns(samples, f"{name}.samples", with_text)
    partials = [partial for group in groups for partial in group.partial if partial is not None]
    columns |= sample_columns.partials_to_columns(partials, f"{name}.partial")
    table = {
        "groups": [
            {
                "number": group.group_id,
                "source": group.source,
                "index": group.task_index,
                "window": group.window_tokens,
                "rewards": list(group.rewards),
                "size": len(group.samples),
                "finished": [i for i, x in enumerate(group.samples) if x is not None],
                "begun": [i for i, x in enumerate(group.partial) if x is not None],
            }
            for group in groups
        ],
        "samples": records,
    }
    return table, columns


def groups_from_columns(
    table: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    name: str,
    tasks: Mapping[str, Any],
) -> list[sample_groups.SampleGroup]:
    """Return the groups that `groups_to_columns` wrote.

    Args:
      table, columns, name: what it returned, and its name.
      tasks: tasks by the name of their source and their index.
    """
    records = table["groups"]
    groups = [
        sample_groups.SampleGroup(
            record["number"],
            record["source"],
            record["index"],
            record["window"],
            tasks[record["source"]][record["index"]],
            [None] * record["size"],
            [None] * record["size"],
            list(record["rewards"]),
        )
        for record in records
    ]
    # Places in the groups, in the order of the columns.
    finished, begun = (
        [(group, i) for group, record in zip(groups, records, strict=True) for i in record[kind]]
        for kind in ("finished", "begun")
    )
    samples = sample_columns.samples_from_columns(
        table["samples"], columns, f"{name}.samples", [group.task for group, _ in finished]
    )
    for (group, i), sample in zip(finished, samples, strict=True):
        group.samples[i] = sample
    partials = sample_columns.partials_from_columns(columns, f"{name}.partial")
    for (group, i), partial in zip(begun, partials, strict=True):
        group.partial[i] = partial
    return groups


def batch_to_columns(
    batch: sample_groups.GenerationBatch,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (a JSON-able table, flat columns) of a batch whose samples are all finished.

    The table has some 200 bytes a sample. NaN in it is Python's JSON "NaN".
    """
    samples = [s for group in batch.groups for s in sample_groups.finished_samples(group)]
    records, columns = sample_columns.samples_to_columns(
        samples, _BATCH_PREFIX, with_text=False, join_routes=False
    )
    table = {
        "groups": [
            {
                "group_id": group.group_id,
                "source": group.source,
                "task_index": group.task_index,
                "task_id": group.task.id,
                "window_tokens": group.window_tokens,
                "num_samples": len(sample_groups.finished_samples(group)),
                "rewards": list(group.rewards),
            }
            for group in batch.groups
        ],
        "samples": records,
        "metrics": dict(batch.metrics),
        "mean_reward": batch.mean_reward,
    }
    return table, columns


def batch_from_columns(
    table: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> sample_groups.GenerationBatch:
    """Return the batch that `batch_to_columns` wrote, with views of the columns."""
    tasks = [sample_lib.Task(g["task_id"], (), g["source"]) for g in table["groups"]]
    num_samples = [group["num_samples"] for group in table["groups"]]
    samples = iter(
        sample_columns.samples_from_columns(
            table["samples"],
            columns,
            _BATCH_PREFIX,
            [task for task, num in zip(tasks, num_samples, strict=True) for _ in range(num)],
        )
    )
    batch_groups = [
        sample_groups.SampleGroup(
            group["group_id"],
            group["source"],
            group["task_index"],
            group["window_tokens"],
            task,
            list(itertools.islice(samples, num)),
            [None] * num,
            list(group["rewards"]),
        )
        for group, task, num in zip(table["groups"], tasks, num_samples, strict=True)
    ]
    return sample_groups.GenerationBatch(batch_groups, dict(table["metrics"]), table["mean_reward"])
