"""The rewards by name.

A reward is an object with `async def reward(sample) -> float | Mapping[str, float]`, or with
`async def reward_group(samples)` that returns such a value for each. It raises where it has no
score, or returns None; 0 is a score. Two attributes are optional: `limit_secs`, its own limit
(None: it keeps the time itself), and `parallel`, how many samples it scores at once.
"""

from collections.abc import Callable
from typing import Any

from train.rl.rewards import (
    adapters,
    answer,
    coding,
    format,
    generative,
    logic,
    mathematics,
    pool,
    tool_calls,
)

# Each takes the pool of workers and the reward's options. Heavy libraries are imported in workers.
FACTORIES: dict[str, Callable[..., Any]] = {
    "exact": lambda workers, **options: answer.Exact(**options),
    "mathematics": lambda workers, **options: mathematics.Mathematics(workers, **options),
    "logic": lambda workers, **options: logic.Logic(workers, **options),
    "code": lambda workers, **options: coding.Code(**options),
    "format": lambda workers, **options: format.Format(**options),
    "repetition": lambda workers, **options: format.Repetition(**options),
    "tool_calls": lambda workers, **options: tool_calls.ToolCalls(**options),
    "graded": lambda workers, **options: generative.Graded(**options),
    "pairwise": lambda workers, **options: generative.Pairwise(**options),
    "function": lambda workers, **options: adapters.Function(workers, **options),
    "slime": lambda workers, **options: adapters.Slime(workers, **options),
    "verl": lambda workers, **options: adapters.Verl(workers, **options),
    "tunix": lambda workers, **options: adapters.Tunix(workers, **options),
}


def make(name: str, workers: pool.Pool, options: dict[str, Any]) -> Any:
    """Return the reward of a name.

    Raises:
      ValueError: no such name, or options it does not take.
      ImportError: its library is not installed.
    """
    if name not in FACTORIES:
        raise ValueError(f"reward: got {name!r}; wanted one of {', '.join(FACTORIES)}")
    try:
        return FACTORIES[name](workers, **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: got the options {options}: {error}") from error
