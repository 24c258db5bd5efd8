"""Schedules at the length of real runs: numbers of tokens far beyond int32, evaluated under jit."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import configlib
from train import config as train_config
from train import optim, run_setup
from train.rl import config as rl_config
from train.rl import loop as rl_loop

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def stage_rate(shape, start, end, warmup_tokens, tokens, tokens_per_step, step) -> float:
    """Return the learning rate of a step of a stage, in Python's own numbers."""
    share = min(step * tokens_per_step / tokens, 1.0)
    if shape == "cosine":
        share = (1 - np.cos(np.pi * share)) / 2
    rate = end if shape == "constant" else start + (end - start) * share
    return rate * min(1.0, (step + 1) * tokens_per_step / max(warmup_tokens, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_rates_of_every_config(name):
    """At the first, the middle and the last step of each stage."""
    config = configlib.load_config(str(ROOT / f"configs/{name}.py"))
    if isinstance(config, rl_config.RlConfig):
        rate = jax.jit(rl_loop.make_optimizer(config).learning_rate)
        wanted = config.update.learning_rate
        assert float(rate(jnp.int32(2**31 - 2))) == pytest.approx(wanted, rel=1e-6)
        return
    assert isinstance(config, train_config.TrainConfig)
    setup = run_setup.TrainSetup(config, None, ())  # pyright: ignore[reportArgumentType]
    last_rate, tokens_before = 0.0, 0
    for index, stage in enumerate(config.stages):
        settings, first_step = setup.step_settings(index), setup.first_step(index)
        tokens_per_step = stage.rows * stage.seq_len
        for step in (0, stage.num_steps // 2, stage.num_steps - 1):
            got = float(jax.jit(settings.optimizer.learning_rate)(jnp.int32(first_step + step)))
            wanted = stage_rate(
                stage.shape,
                last_rate,
                stage.learning_rate,
                stage.warmup_tokens,
                stage.tokens,
                tokens_per_step,
                step,
            )
            assert got == pytest.approx(wanted, rel=1e-5, abs=1e-12)
            if settings.balance_coefficient is not None:
                points = np.asarray(config.loss.balance, np.float64).T
                wanted = np.interp(tokens_before + step * tokens_per_step, *points)
                balance = jax.jit(settings.balance_coefficient)(jnp.int32(first_step + step))
                assert float(balance) == pytest.approx(wanted, rel=1e-5)
        last_rate = stage.learning_rate
        tokens_before += stage.num_steps * tokens_per_step


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(
    ("warmup_tokens", "tokens", "tokens_per_step"),
    [(0, 2**31, 2**21), (2**33, 2**42, 2**24), (2**31 + 1, 2**32 + 1, 2**31), (7, 10**13, 3)],
)
def test_rates_of_long_stages(shape, warmup_tokens, tokens, tokens_per_step):
    arguments = (shape, 3e-4, 1e-5, warmup_tokens, tokens, tokens_per_step)
    rate = jax.jit(optim.make_stage_schedule(*arguments))
    for step in (0, 1, 1000, min(tokens // tokens_per_step, 2**31 - 1)):
        assert float(rate(jnp.int32(step))) == pytest.approx(stage_rate(*arguments, step), rel=1e-5)


def test_values_between_points_beyond_int32():
    points = ((0, 0.01), (5 * 10**12, 0.001))
    value = jax.jit(optim.make_piecewise_schedule(points, 5 * 10**12 // 2, 2**21, 1_192_093))
    for step in (1_192_093, 1_500_000, 3_000_000):
        token = 5 * 10**12 // 2 + (step - 1_192_093) * 2**21
        wanted = np.interp(token, *np.asarray(points, np.float64).T)
        assert float(value(jnp.int32(step))) == pytest.approx(wanted, rel=1e-5)
