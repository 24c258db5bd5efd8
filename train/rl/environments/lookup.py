"""The smallest task with a tool, for tiny models and tests: look a value up, and say it.

The prompt does not show the tool, whose schema would take most of a tiny model's context. The model
learns the form of a call from demonstrations. The demonstrations are careless on purpose: a model
that imitates them well is still often wrong, and reinforcement learning has something to teach.
"""

import random
from collections.abc import Sequence
from typing import Any

from train.rl import sample as sample_lib
from train.rl.environments import base

VALUE_KEYS = ("a", "b", "c", "d")
TOOL_SCHEMAS = (base.make_tool_schema("get", "Return the value of a key.", key="string"),)


class LookupEnvironment(base.Environment):
    """Final reward 1 for the value of the right key and nothing else, otherwise 0.

    The task's metadata is {"values": {key: value}}, and its label is the value that the prompt
    asks for.
    """

    reports_malformed_calls = False

    def __init__(self):
        # Those of the task, from `start` on.
        self._values: dict[str, str] = {}
        self._label: str | None = None

    def start(self, task: sample_lib.Task) -> None:
        """Take the values and the label from the task."""
        values = task.metadata.get("values")
        if not isinstance(values, dict) or not isinstance(task.label, str):
            raise ValueError(
                f"task {task.id!r}: got values {values!r:.80} and the label {task.label!r:.80}; "
                "wanted an object and a string. Make tasks with lookup.make_tasks."
            )
        self._values, self._label = values, task.label

    def step(self, calls: Sequence[base.EnvironmentCall]) -> base.EnvironmentStep:
        """Return the values of the requested keys."""
        return base.EnvironmentStep(
            base.execute_calls(calls, TOOL_SCHEMAS, {"get": self._get_value})
        )

    def finish(self, text: str) -> float:
        """Compare the answer with the label."""
        return float(text.strip() == self._label)

    def _get_value(self, key: str) -> str:
        if key not in self._values:
            raise base.CallError(f"got the key {key!r}; wanted {', '.join(self._values)}")
        return self._values[key]


def make_tasks(size: int, seed: int) -> list[sample_lib.Task]:
    """Return `size` tasks. A longer list begins with the tasks of a shorter one.

    There are 20,160 different tasks: 4 keys, and 5,040 ways to give them different digits.
    """
    return [make_task(seed, index) for index in range(size)]


def make_task(seed: int, index: int) -> sample_lib.Task:
    """Return one task, which depends on seed and index alone."""
    # A text seeds by SHA-512, so equal seeds make equal tasks on every machine.
    return _make_task(random.Random(f"lookup {seed} {index}"), f"lookup-{seed}-{index}")


def make_demonstrations(size: int, seed: int, careless_share: float = 0.5) -> list[dict[str, Any]]:
    """Return conversations for supervised training, in the form that `train.data.chat` reads.

    Args:
      size: number of conversations.
      seed: equal seeds make equal conversations, about the tasks of `make_tasks` of that seed.
      careless_share: share of the conversations, in [0, 1], that look up another key and say its
        value. A model that imitates them perfectly is right in 1 - careless_share of its answers.

    Raises:
      ValueError: `careless_share` is out of range.
    """
    if not 0 <= careless_share <= 1:
        raise ValueError(f"careless: got {careless_share}; wanted a share between 0 and 1")
    return [
        # A generator of its own, so that the share does not change which tasks are drawn.
        _make_demonstration(task, random.Random(f"demonstration {task.id}"), careless_share)
        for task in make_tasks(size, seed)
    ]


def _make_task(rng: random.Random, name: str) -> sample_lib.Task:
    values = dict(zip(VALUE_KEYS, rng.sample("0123456789", len(VALUE_KEYS)), strict=True))
    key = rng.choice(VALUE_KEYS)
    return sample_lib.Task(
        id=name,
        messages=({"role": "user", "content": f"Get {key}."},),
        source="lookup",
        label=values[key],
        metadata={"values": values},
    )


def _make_demonstration(
    task: sample_lib.Task, rng: random.Random, careless_share: float
) -> dict[str, Any]:
    values = task.metadata["values"]
    key = next(key for key in VALUE_KEYS if values[key] == task.label)
    if rng.random() < careless_share:
        key = rng.choice([wrong_key for wrong_key in VALUE_KEYS if wrong_key != key])
    call = {"name": "get", "arguments": {"key": key}}
    turns = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "name": "get", "content": values[key]},
        {"role": "assistant", "content": values[key]},
    ]
    return {"messages": [*task.messages, *turns]}
