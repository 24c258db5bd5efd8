"""The rewards by name.

A reward is an object with `async def reward(sample) -> float | Mapping[str, float]`, or with
`async def reward_group(samples)`, which returns one such value a sample. A reward without a score
for a sample raises or returns None, because 0 is a score. Two attributes are optional:

  * limit_secs: the reward's own time limit, None where the reward keeps the time itself.
  * parallel: how many samples the reward scores at once.
"""

from collections.abc import Callable
from typing import Any

from train.rl import sample as sample_lib
from train.rl.rewards import (
    adapters,
    answer,
    code_tests,
    coding,
    format,
    generative,
    logic,
    mathematics,
    pool,
    tool_calls,
)

# A factory takes the pool of workers and the reward's options. Heavy libraries (math-verify,
# reasoning-gym) are imported in the workers, so the trainer starts without them.
REWARD_FACTORIES: dict[str, Callable[..., Any]] = {
    "exact": lambda workers, **options: answer.ExactReward(**options),
    "mathematics": lambda workers, **options: mathematics.MathematicsReward(workers, **options),
    "logic": lambda workers, **options: logic.LogicReward(workers, **options),
    "code": lambda workers, **options: coding.CodeReward(**options),
    "format": lambda workers, **options: format.FormatReward(**options),
    "repetition": lambda workers, **options: format.RepetitionReward(**options),
    "tool_calls": lambda workers, **options: tool_calls.ToolCallReward(**options),
    "graded": lambda workers, **options: generative.GradedReward(**options),
    "pairwise": lambda workers, **options: generative.PairwiseReward(**options),
    "function": lambda workers, **options: adapters.FunctionReward(workers, **options),
    "slime": lambda workers, **options: adapters.SlimeReward(workers, **options),
    "verl": lambda workers, **options: adapters.VerlReward(workers, **options),
    "tunix": lambda workers, **options: adapters.TunixReward(workers, **options),
}

# What a reward needs of a task, as a function that raises ValueError where the task lacks it. A
# reward that is not here takes any task.
TASK_CHECKS: dict[str, Callable[[sample_lib.Task], object]] = {
    "exact": answer.check_labels,
    "mathematics": mathematics.check_labels,
    "logic": logic.check_task,
    "code": code_tests.read_tests,
    "tool_calls": tool_calls.read_expected_calls,
    "graded": generative.check_label,
    "pairwise": generative.check_reference,
}


def make_reward(name: str, workers: pool.WorkerPool, options: dict[str, Any]) -> Any:
    """Return the reward called `name`, made with `options`.

    Raises:
      ValueError: there is no such reward, or it does not take these options.
      ImportError: the reward's library is not installed.
    """
    if name not in REWARD_FACTORIES:
        raise ValueError(f"reward: got {name!r}; wanted one of {', '.join(REWARD_FACTORIES)}")
    try:
        return REWARD_FACTORIES[name](workers, **options)
    except TypeError as error:
        raise ValueError(f"reward {name!r}: got the options {options}: {error}") from error
