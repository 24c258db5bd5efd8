"""Steps without a token to learn: they change no weight and no moment, in training and in RL."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params_support import tree_leaves

from m1_jax import ModelConfig
from m1_jax import params as params_lib
from train import optim, step
from train.data import batch as batch_lib
from train.data import records
from train.rl import loop as rl_loop
from train.rl import loss, objective
from train.rl import metrics as rl_metrics
from train.rl import step as rl_step
from train.rl.config import PRESETS

MODEL = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    hidden_size=32,
    intermediate_size=32,
    vocab_size=64,
)
SETTINGS = step.TrainStepSettings(optim.AdamW(1e-2, weight_decay=0.1), accumulate=2)


def _batch(weights):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 9)).astype(np.int32)
    ids = np.ones((2, 8), np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape)
    arrays = (tokens[:, :-1], ids, positions, tokens[:, 1:], np.asarray(weights, np.float32))
    return batch_lib.TrainBatch(*map(jnp.asarray, arrays))


def _leaves(state):
    return [*tree_leaves(state.model), *map(np.asarray, jax.tree.leaves(state.moments))]


def _changed(before, after):
    return not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.fixture(scope="module")
def state():
    """A state whose moments are not 0, with a copy of its leaves."""
    model = params_lib.random_model(MODEL, jax.random.key(0), jnp.float32)
    first = step.init_state(model, SETTINGS.optimizer)
    second, metrics = step.train_step(first, _batch(np.ones((2, 8))), settings=SETTINGS)
    assert float(metrics["no_signal"]) == 0.0
    return second


def _copy(state):
    return jax.tree.map(jnp.copy, state)


def test_a_batch_without_weights_changes_nothing_but_the_number_of_the_step(state):
    before = _leaves(state)
    after, metrics = step.train_step(_copy(state), _batch(np.zeros((2, 8))), settings=SETTINGS)
    assert not _changed(before, _leaves(after))
    assert int(after.step) == int(state.step) + 1
    assert (float(metrics["no_signal"]), float(metrics["skipped"])) == (1.0, 0.0)
    # The balance loss had a gradient, which AdamW would have made a full step.
    assert float(metrics["grad_norm"]) > 0


def test_one_token_is_a_signal(state):
    weights = np.zeros((2, 8))
    weights[1, 3] = 1e-3
    after, metrics = step.train_step(_copy(state), _batch(weights), settings=SETTINGS)
    assert _changed(_leaves(state), _leaves(after))
    assert float(metrics["no_signal"]) == 0.0


@pytest.mark.parametrize("num_tokens", [0.0, 1.0])
def test_an_rl_update_without_a_signal_changes_nothing(state, num_tokens):
    settings = rl_step.RlStepSettings(SETTINGS.optimizer, PRESETS["cispo"])
    grads = jax.tree.map(jnp.ones_like, state.model)
    after, metrics = rl_step.apply_update(_copy(state), grads, settings, jnp.float32(num_tokens))
    assert _changed(_leaves(state), _leaves(after)) == bool(num_tokens)
    assert float(metrics["no_signal"]) == 1.0 - num_tokens
    assert int(after.step) == int(state.step) + 1


_SIX = {name: np.zeros((1, 6), np.float32) for name in ("logp", "logp_old", "logp_rollout")}


def _count(chosen: objective.Objective, **fields):
    """Return the number of tokens with a signal. By default there are five."""
    terms = {
        "advantages": np.array([[1, -1, 1, -1, 1, 0]], np.float32),
        "mask": np.ones((1, 6)),
        "coefficients": np.full((1, 6), 0.2, np.float32),
        "segment_ids": np.ones((1, 6), np.int32),
    }
    terms = loss.TokenTerms(**{name: jnp.asarray(x) for name, x in (_SIX | terms | fields).items()})
    _, parts = loss.compute_loss(chosen, terms)
    return float(rl_step.count_signal_tokens(rl_metrics.loss_metrics(parts), chosen))


def test_which_tokens_of_rl_have_a_signal():
    cispo, ppo = PRESETS["cispo"], PRESETS["grpo"]
    zeros = np.zeros((1, 6), np.float32)
    assert _count(cispo) == 5
    assert _count(cispo, advantages=zeros) == 0
    assert _count(cispo, coefficients=zeros) == 0
    assert _count(cispo, mask=np.array([[1, 1, 0, 0, 0, 0]])) == 2
    # The ratio is 1 / e: tokens with A < 0 are clipped, and CISPO drops none.
    assert _count(ppo, logp=zeros - 1) == 3
    assert _count(cispo, logp=zeros - 1) == 5
    with_kl = dataclasses.replace(cispo, kl_coef=0.1)
    assert _count(with_kl, advantages=zeros, logp_ref=zeros) == 6


def _watch(*batches, max_skipped=2):
    """Let a run look at the metrics of some batches, and return its events."""
    events = []
    session = types.SimpleNamespace(
        batch_number=0,
        num_skipped_in_row=0,
        config=types.SimpleNamespace(max_skipped=max_skipped),
        writer=types.SimpleNamespace(write=lambda step, kind, values: events.append(values)),
    )
    for values in batches:
        session.batch_number += 1
        rl_loop.RlSession._watch_updates(session, values)
    return events


def test_batches_that_change_nothing_are_told_and_bounded():
    idle = {"updates": 2.0, "no_signal": 2.0, "skipped": 0.0}
    half = idle | {"no_signal": 1.0}
    nothing = {"updates": 0.0}
    events = _watch(idle, half, nothing, {"updates": 1.0, "no_signal": 0.0, "skipped": 0.0}, idle)
    # The batch without an update has an alarm, and no second event.
    assert [event["updates_skipped"] for event in events] == [2.0, 1.0, 2.0]
    with pytest.raises(records.DataError, match="batch 3: 2 batches in a row changed no weight"):
        _watch(half, nothing, idle)
