"""The interface of an environment, and the way from a model's tool calls to Python functions."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.rl import sample as sample_lib

# A tool's name and its arguments, as in `infer.tool_calls.ToolCall`.
EnvironmentCall = tuple[str, dict[str, Any]]
ToolFunction = Callable[..., str]
# The types that an argument may have in Python, by its JSON type.
_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
}


class CallError(Exception):
    """The model made a wrong call. The model gets the message as the result, and may go on."""


@dataclasses.dataclass(frozen=True)
class EnvironmentStep:
    """The outcome of one turn's calls."""

    results: tuple[str, ...]  # the text of each call's result, in the order of the calls
    reward: float = 0.0  # for this turn alone
    done: bool = False  # the episode is over, and the model does not see the results


class Environment(abc.ABC):
    """The world of one episode, not shared with any other episode.

    Results must depend on the task and the calls alone, so that an episode can be repeated. The
    caller calls `start` once, then `step` any number of times, then `finish` at most once. It
    calls `close` last, also after an error. The calls may come from different threads, one at a
    time. A model's mistake is a result that says so. An exception means that the environment itself
    failed, and the episode has no reward.
    """

    # True: a model that writes a malformed call is told so, and may try again. False: a malformed
    # call ends the episode.
    reports_malformed_calls = True

    @abc.abstractmethod
    def start(self, task: sample_lib.Task) -> None:
        """Set the world of this task up.

        Raises:
          ValueError: the task does not belong to this environment.
        """

    @abc.abstractmethod
    def step(self, calls: Sequence[EnvironmentCall]) -> EnvironmentStep:
        """Carry out the calls of one turn, at least one."""

    @abc.abstractmethod
    def finish(self, text: str) -> float:
        """Return the final reward.

        Args:
          text: the answer without thinking. It is empty if the model was cut off before an answer.
        """

    def close(self) -> None:  # noqa: B027 - most environments hold no resources
        """Release the episode's resources. `start` may not have been called."""


def make_tool_schema(name: str, description: str, /, **parameters: str) -> dict[str, Any]:
    """Return a tool's function schema, in which every parameter is required.

    Args:
      name: the tool's name. Positional, so that a parameter may be called `name` as well.
      description: what the tool does, for the model.
      parameters: the JSON type of each parameter: "string", "integer" or "number".
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
    """Return each call's result, which for a wrong call says what was wrong.

    Args:
      schemas: from `make_tool_schema`. Arguments are checked against them.
      tools: the functions by the tools' names. They raise `CallError` for mistakes of the model.
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
        # A bool is an int in Python, but not an integer in JSON.
        if isinstance(value, bool) or not isinstance(value, _PYTHON_TYPES[kind]):
            raise CallError(f"{key}: got {value!r:.80}; wanted a {kind}")
