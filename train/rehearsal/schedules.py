"""Learning rates and balance coefficients under jit, at the first, middle and last step of a stage.

They run as in the step's program. There a Python number beyond 32 bits would be an error, and a
step beyond float32's 2^24 would be rounded.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from train import optim, run_setup
from train.rehearsal import findings as findings_lib


def evaluate_schedule(schedule: Any, step: int) -> float:
    """Return a schedule's value at a step of the run, or a constant's value.

    Raises:
      OverflowError: a Python number of the schedule exceeds int32.
    """
    if not callable(schedule):
        return float(schedule)
    # A lambda: jit caches by function, and a schedule may be one that was traced before.
    return float(jax.jit(lambda x: jnp.asarray(schedule(x), jnp.float32))(jnp.int32(step)))


def check_stage_rates(
    setup: run_setup.TrainSetup, stage_index: int, findings: findings_lib.FindingList
) -> None:
    """Evaluate a stage's schedules, and add a line with their values.

    Raises:
      ValueError: a value that is not finite, or a rate that misses the stage's own at its end.
      OverflowError: a number that the step's program cannot take.
    """
    stage, first_step = setup.config.stages[stage_index], setup.first_step(stage_index)
    settings = setup.step_settings(stage_index)
    last_step = first_step + stage.num_steps - 1
    steps = (first_step, (first_step + last_step) // 2, last_step)
    rates = [evaluate_schedule(settings.optimizer.schedule, step) for step in steps]
    _check_finite("learning rate", steps, rates)
    # The last step lies one step before the end.
    previous = setup.config.stages[stage_index - 1].learning_rate if stage_index else 0.0
    slack = 2 * abs(stage.learning_rate - previous) / stage.num_steps + 1e-4 * stage.learning_rate
    if stage.num_steps > 2 and stage.warmup_tokens < stage.tokens / 2:
        slack *= math.pi  # a cosine is steeper than a line
        if abs(rates[-1] - stage.learning_rate) > slack:
            raise ValueError(
                f"learning rate: got {rates[-1]:.3g} at step {last_step}; wanted "
                f"{stage.learning_rate:.3g}, the stage's own"
            )
    text = f"stage {stage_index}: rates {', '.join(f'{rate:.3g}' for rate in rates)}"
    values: dict[str, Any] = {"steps": steps, "rates": rates}
    if settings.balance_coefficient is not None:
        balances = [evaluate_schedule(settings.balance_coefficient, step) for step in steps]
        _check_finite("loss.balance", steps, balances)
        text += f", balance {', '.join(f'{value:.3g}' for value in balances)}"
        values["balances"] = balances
    text += f" at steps {steps[0]:,}, {steps[1]:,} and {steps[2]:,}"
    findings.add("fits", "schedules", text, **values)


def check_rl_rates(
    optimizer: optim.AdamW, num_steps: int, findings: findings_lib.FindingList
) -> None:
    """Evaluate the learning rate of an RL run, and add a line with its values.

    Raises:
      ValueError: a value that is not finite.
    """
    steps = (0, num_steps // 2, num_steps - 1)
    rates = [evaluate_schedule(optimizer.schedule, step) for step in steps]
    _check_finite("learning rate", steps, rates)
    text = f"rates {', '.join(f'{rate:.3g}' for rate in rates)} at updates "
    text += f"{steps[0]:,}, {steps[1]:,} and {steps[2]:,}"
    findings.add("fits", "schedules", text, steps=steps, rates=rates)


def _check_finite(name: str, steps: tuple[int, ...], values: list[float]) -> None:
    for step, value in zip(steps, values, strict=True):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}: got {value} at step {step}; wanted a number of at least 0")
    # The run's counter of steps is an int32.
    if steps[-1] >= 2**31 - 1:
        raise ValueError(f"steps: got {steps[-1] + 1}; wanted fewer than {2**31 - 1}")
