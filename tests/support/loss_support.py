"""Terms of the policy loss for tests of it: one sample a row, in float64.

A test module takes the fixture by assignment: `double = loss_support.double`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.rl import loss, objective
from train.rl import metrics as rl_metrics

CISPO = objective.PRESETS["cispo"]


@pytest.fixture(autouse=True)
def double():
    """Compute in float64."""
    with jax.enable_x64(True):
        yield


def near(got, wanted, tolerance=1e-6):
    """Assert that arrays are equal to an absolute tolerance."""
    np.testing.assert_allclose(np.asarray(got), wanted, rtol=0, atol=tolerance)


def make_terms(logp, advantages, mask=None, old=None, **fields):
    """Return terms of one sample a row, with coefficients of 1."""
    logp = np.asarray(logp, np.float64)
    mask = np.ones(logp.shape) if mask is None else np.asarray(mask)
    old = logp if old is None else old
    defaults = {
        "logp": logp,
        "logp_old": old,
        "logp_rollout": old,
        "advantages": np.broadcast_to(np.asarray(advantages, np.float64), logp.shape),
        "mask": mask,
        "coefficients": mask,
        "segment_ids": np.ones(logp.shape, np.int32),
    }
    return loss.TokenTerms(**jax.tree.map(jnp.asarray, defaults | fields))


def value_and_grad(options, terms, module=loss):
    """Return the loss, its gradient by logp, and its metrics; `module` is a mutant of `loss`."""

    def loss_of(logp):
        value, parts = module.compute_loss(options, dataclasses.replace(terms, logp=logp))
        return value, rl_metrics.loss_metrics(parts)

    (value, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(terms.logp)
    return value, grad, metrics


def bound_weights(low, high):
    """Return CISPO with these bounds of its weight."""
    return dataclasses.replace(CISPO, is_weight_min=low, is_weight_max=high)
