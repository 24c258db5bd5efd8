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
REWARD_FACTORIES: dict[str, Callable[..., Any]] = {
    "exact": lambda workers, **options: answer.ExactReward(**options),
    "mathematics": lambda workers, **options: mathematics.MathematicsReward(workers, **options),
    "logic": lambda workers, **options: logic.LogicReward(workers, **options),
    "code": lambda workers, **options: coding.CodeReward(**options),
    "format": lambda workers, **options: format.FormatReward(**options),
    "repetition": lambda workers, **options: format.RepetitionReward(**options),
    "tool_calls": lambda workers, **options: tool_calls.ToolCalls(**options),
    "graded": lambda workers, **options: generative.GradedReward(**options),
    "pairwise": lambda workers, **options: generative.PairwiseReward(**options),
    "function": lambda workers, **options: adapters.FunctionReward(workers, **options),
    "slime": lambda workers, **options: adapters.SlimeReward(workers, **options),
    "verl": lambda workers, **options: adapters.VerlReward(workers, **options),
    "tunix": lambda workers, **options: adapters.TunixReward(workers, **options),
}


def make_reward(name: str, workers: pool.WorkerPool, options: dict[str, Any]) -> Any:
    """Return the reward of a name.

    Raises:
      ValueError: no such name, or options it does not take.
      ImportError: its library is not installed.
    """
    if name not in REWARD_FACTORIES:
        raise ValueError(f"reward: got {name!r}; wanted one of {', '.join(REWARD_FACTORIES)}")
    try:
        return REWARD_FACTORIES[name](workers, **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: got the options {options}: {error}") from error
