"""The objective against vectors worked by hand, and the options that it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import loss_support
import numpy as np
import pytest
from loss_support import CISPO, bound_weights, make_terms, near, value_and_grad

from train.rl import loss, objective, rollout_correction

# Fixtures.
double = loss_support.double

OFF = dataclasses.replace(CISPO, is_weight_max=None)
PAIR = ("positive", "negative")


def masked(**clip):
    return dataclasses.replace(OFF, name="masked", **clip)


@pytest.mark.parametrize(
    ("low", "high", "value", "grad", "clipped"),
    [
        (0.8, 1.28, [0.7, -0.684, 1.024, -1.68], [-1, 0.57, -2.56, 0.8], [0, 0, 1, 1]),
        (None, 5.0, [0.7, -1.8, 4, -0.84], [-1, 1.5, -10, 0.4], [0, 0, 1, 0]),
    ],
)
def test_t1_nothing_flows_through_the_weight(low, high, value, grad, clipped):
    logp, a = np.array([-0.7, -1.2, -0.4, -2.1]), np.array([1, -0.5, 2, -1])
    ratio = np.array([1, 1.14, 1.56, 0.4]) if low else np.array([1, 3, 9, 0.4])
    terms = make_terms(logp[:, None], a[:, None], old=(logp - np.log(ratio))[:, None])
    total, slope, metrics = value_and_grad(bound_weights(low, high), terms)
    near(total, sum(value))
    near(slope[:, 0], grad)
    for n in range(4):
        row = jax.tree.map(lambda x, n=n: x[n : n + 1], terms)
        near(value_and_grad(bound_weights(low, high), row)[0], value[n])
    names = [f"weight_{side}/{sign}" for side in ("high", "low") for sign in PAIR]
    assert sum(float(metrics.sums[name].total) for name in names) == sum(clipped)


def test_t3_with_and_without_the_samplers_weight():
    logp, old = np.array([[-1.69315, -1, -0.59453]]), -np.ones((1, 3))
    a, gen = np.array([[1.0, -1, 2]]), np.array([[-0.5, -1.5, -0.8]])
    third = np.full((1, 3), 1 / 3)
    terms = make_terms(logp, a, old=old, coefficients=third, logp_rollout=gen)
    near(value_and_grad(bound_weights(0.8, 1.2), terms)[0], 0.59379733)
    options = dataclasses.replace(
        bound_weights(0.8, 1.2), correction=rollout_correction.RolloutCorrection(high=None)
    )
    near(value_and_grad(options, terms)[0], 0.11368688)


def test_t4_against_the_sampler():
    options = dataclasses.replace(bound_weights(0.8, 1.2), anchor="rollout")
    terms = make_terms([[0.0, 5, -5]], [[1.0, 2, 3]], [[1, 1, 0]], np.full((1, 3), -7.0))
    terms = dataclasses.replace(terms, logp_rollout=jnp.zeros((1, 3)))
    value, grad, _ = value_and_grad(options, terms)
    near(value, -12)
    near(grad, [[-1, -2.4, 0]])


def test_t5_dual_clip():
    options = masked(clip_low=0.2, clip_high=0.2, dual_clip=1.5)
    for ratio, a, expected in [(2, 2, -2.4), (2, -2, 3), (0.5, 2, -1)]:
        terms = make_terms([[np.log(ratio)]], [[a]], old=np.zeros((1, 1)))
        near(value_and_grad(options, terms)[2].shares["ppo_loss"], expected)
    terms = make_terms([[np.log(8)]], [[-1.0]], old=np.zeros((1, 1)))
    _, grad, metrics = value_and_grad(masked(dual_clip=3.0), terms)
    near(metrics.shares["ppo_loss"], 3)
    near(grad, [[0]])
    near(value_and_grad(OFF, terms)[1], [[8]])


@pytest.mark.parametrize(
    ("clamps", "wanted"),
    [
        ({}, ([-1, 14, 29], [0.5, 98, 420.5], [0.71828183, 13.00000083, 28])),
        ({"kl_clamp": 20.0}, ([-1, 14, 20], [0.5, 98, 200], [0.71828183, 13.00000083, 19])),
        (
            {"kl_clamp": 20.0, "kl_max": 10.0},
            ([-1, 10, 10], [0.5, 10, 10], [0.71828183, 10, 10]),
        ),
    ],
)
def test_t9_kl(clamps, wanted):
    x = np.array([0, -15, -30.0]) - -1.0
    for kind, values in zip(("k1", "k2", "k3"), wanted, strict=True):
        options = dataclasses.replace(CISPO, kl_kind=kind, **clamps)
        near(loss.estimate_kl(options, jnp.asarray(x)), values)


@pytest.mark.parametrize(
    ("name", "of_two", "of_three"),
    [
        ("token-mean", 6.66666667, 6.57142857),
        ("seq-mean-token-mean", 8.75, 7.83333333),
        ("seq-mean-token-sum", 20, 15.33333333),
        ("seq-sum-const", 2.5, 1.91666667),
        ("mix", 7.70833333, 7.20238095),
        ("prompt-mean", 8.75, 6.33333333),
    ],
)
def test_t12_aggregations(name, of_two, of_three):
    options = dataclasses.replace(
        CISPO,
        aggregation=name,
        mix_lambda=0.5 if name == "mix" else None,
        length_max=8 if name == "seq-sum-const" else None,
    )
    sums, lengths = np.array([10, 30, 6]), np.array([4, 2, 1])

    def total(n, prompts, valid):
        each = loss.token_coefficients(options, lengths[:n], np.array(prompts), np.array(valid))
        return (each * sums[:n]).sum()

    near(total(2, [0, 1], [True] * 2), of_two, 1e-8)
    near(total(3, [0, 0, 1], [True] * 3), of_three, 1e-8)
    # An invalid sample counts nowhere.
    near(total(3, [0, 1, 1], [True, True, False]), of_two, 1e-8)
    near(total(3, [0, 1, 2], [True, True, False]), of_two, 1e-8)


def test_an_empty_sample_counts_and_no_divisor_is_below_one():
    def coefficients(name, lengths, valid):
        options = dataclasses.replace(CISPO, aggregation=name)
        return loss.token_coefficients(options, np.array(lengths), np.arange(2), np.array(valid))

    near(coefficients("seq-mean-token-mean", [4, 0], [True, True]), [1 / 8, 1 / 2])
    near(coefficients("prompt-mean", [4, 0], [True, True])[0], 1 / 8)
    near(coefficients("token-mean", [0, 0], [True, True]), [1, 1])
    for name in ("token-mean", "prompt-mean", "seq-mean-token-mean"):
        assert not coefficients(name, [3, 3], [False, False]).any()
    with pytest.raises(ValueError, match="wanted one number of each for every sample"):
        loss.token_coefficients(CISPO, np.ones(2), np.ones(3), np.ones(2, bool))


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 3.0}, "cispo with dual_clip"),
        ({"ratio": "sequence"}, "cispo with ratio 'sequence'"),
        (
            {"anchor": "rollout", "correction": rollout_correction.RolloutCorrection()},
            "mismatch of sampler",
        ),
        ({"aggregation": "seq-sum-const"}, "with length_max None"),
        ({"length_max": 8}, "with length_max 8"),
        ({"aggregation": "mix"}, "with mix_lambda None"),
        ({"aggregation": "mix", "mix_lambda": 1.5}, r"wanted 0 \(tokens\) to 1"),
        ({"weighted": False}, "weighted False with is_weight bounds"),
        ({"is_weight_min": 6.0}, "is_weight_min 6.0 above is_weight_max"),
        ({"is_weight_max": 0.0}, "is_weight_max 0.0; wanted more than 0"),
        ({"is_weight_max": float("nan")}, "is_weight_max nan; wanted a finite number"),
        ({"discount": 0.9}, "for 'return' and 'return-baseline'"),
        ({"advantage": "gae"}, "advantage 'gae'; wanted one of group, mean"),
        ({"clip_low": -0.2}, "clip_low -0.2; wanted at least 0"),
        ({"name": "ppo", "dual_clip": 0.5}, "dual_clip 0.5; wanted more than 1"),
    ],
)
def test_conflicts_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objective.Objective(**options)
