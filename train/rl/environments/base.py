"""What an environment is, and how the model's calls reach Python functions."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.rl import sample as sample_lib

EnvironmentCall = tuple[
    str, dict[str, Any]
]  # a tool's name and arguments, see `infer.tool_calls.Call`
ToolFunction = Callable[..., str]
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
}


class CallError(Exception):
    """A call that the model got wrong; it is told so and may go on."""


@dataclasses.dataclass(frozen=True)
class EnvironmentStep:
    """What a turn's calls brought.

    results: the text of each call's result, in order. reward: for this turn. done: the episode is
    over, and nobody reads the results.
    """

    results: tuple[str, ...]
    reward: float = 0.0
    done: bool = False


class Environment(abc.ABC):
    """The world of one episode, not shared with any other.

    What happens is a function of the task and the calls. `start` comes first, then any number of
    `step`, then at most one `finish`, and `close` last whatever happened. They may run in
    different threads, one at a time. A model's mistakes are results that say so; an exception
    means that the environment itself failed, and the episode has no reward.
    """

    # Whether a model that writes a malformed call is told and may try again; else it is the end.
    reports_malformed_calls = True

    @abc.abstractmethod
    def start(self, task: sample_lib.Task) -> None:
        """Make the world of this task.

        Raises:
          ValueError: a task that is not one of this environment.
        """

    @abc.abstractmethod
    def step(self, calls: Sequence[EnvironmentCall]) -> EnvironmentStep:
        """Carry out the calls of one turn, of which there is at least one."""

    @abc.abstractmethod
    def finish(self, text: str) -> float:
        """Return the final reward.

        text: the answer without thinking; empty where the model was cut off before it ended one.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what the episode holds; it may never have been started."""


def make_tool_schema(name: str, description: str, /, **parameters: str) -> dict[str, Any]:
    """Return a function schema; every parameter is required.

    parameters: the JSON type of each, one of string, integer, number.
    """
    return {
        "name": name,
        "description": description,
        "parameters": {
            "type": "object",
            "properties": {key: {"type": kind} for key, kind in parameters.items()},
            "required": list(parameters),
        },
    }


def execute_calls(
    calls: Sequence[EnvironmentCall],
    schemas: Sequence[Mapping[str, Any]],
    tools: Mapping[str, ToolFunction],
) -> tuple[str, ...]:
    """Return each call's result; of a wrong one, what was wrong with it.

    tools: the functions by name; they raise `CallError` for what the model got wrong.
    """
    by_name = {schema["name"]: schema for schema in schemas}
    return tuple(_execute_call(call, by_name, tools) for call in calls)


def _execute_call(
    call: EnvironmentCall,
    schemas: Mapping[str, Mapping[str, Any]],
    tools: Mapping[str, ToolFunction],
) -> str:
    name, arguments = call
    try:
        if name not in schemas:
            raise CallError(f"got the tool {name!r}; wanted {', '.join(schemas)}")
        _check_arguments(arguments, schemas[name]["parameters"]["properties"])
        return tools[name](**arguments)
    except CallError as error:
        return f"error: {error}"


def _check_arguments(
    arguments: Mapping[str, Any], properties: Mapping[str, Mapping[str, str]]
) -> None:
    if arguments.keys() != properties.keys():
        raise CallError(f"got the arguments {sorted(arguments)}; wanted {sorted(properties)}")
    for key, value in arguments.items():
        kind = properties[key]["type"]
        if isinstance(value, bool) or not isinstance(value, _PYTHON_TYPES[kind]):
            raise CallError(f"{key}: got {value!r:.80}; wanted a {kind}")
