"""Metrics of reinforcement learning, against numbers counted by hand or by numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_support import near

from train.rl import loss, mismatch, objective
from train.rl import metrics as rl_metrics

CISPO, DAPO = objective.PRESETS["cispo"], objective.PRESETS["dapo"]
RATIO = np.array([[1, 1.5, 0.5, 8], [2, 0.9, 0.7, 1.25]])
A = np.array([[1.0] * 4, [-1.0] * 4])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])


def measure(options, ratio=RATIO, a=A, mask=MASK, **fields):
    logp_old = np.full(ratio.shape, -1.0)
    terms = loss.TokenTerms(
        logp=logp_old + np.log(ratio),
        logp_old=logp_old,
        logp_rollout=logp_old,
        advantages=a,
        mask=mask,
        coefficients=mask / 8,
        segment_ids=np.ones(ratio.shape, np.int32),
        **fields,
    )
    with jax.enable_x64(True):
        _, parts = loss.compute_loss(options, jax.tree.map(jnp.asarray, terms))
        return rl_metrics.loss_metrics(parts)


def test_clips_are_counted_by_sign():
    values = rl_metrics.summarize_metrics(measure(CISPO))
    assert values["tokens"] == 7
    near(values["positive"], 4 / 7)
    near(values["weight_high/positive"], 1 / 4)
    assert values["weight_high/negative"] == values["clip_high"] == values["clip_low"] == 0
    near(values["ppo_drop"], 3 / 7)  # what PPO would have dropped, though nothing was
    near(values["ppo_drop/positive"], 2 / 4)
    near(values["ppo_drop/negative"], 1 / 3)
    values = rl_metrics.summarize_metrics(measure(DAPO))
    near(values["clip_high"], 2 / 4)
    near(values["clip_low"], 1 / 3)
    assert values["rejected"] == 0


def test_ratios_weights_and_divergences():
    real, weight = RATIO[MASK > 0], np.minimum(RATIO, 5)[MASK > 0]
    ref = np.full(RATIO.shape, -1.5)
    values = rl_metrics.summarize_metrics(
        measure(CISPO, logp_ref=ref, entropy=np.full(RATIO.shape, 0.7))
    )
    near(values["ratio"], real.mean())
    assert (values["ratio_max"], values["ratio_min"]) == pytest.approx((8, 0.5))
    assert 8 <= values["ratio_p99"] <= 8 * math.exp(0.05)
    near(values["weight_effective"], weight.sum() ** 2 / (weight**2).sum() / 7)
    near(values["rho_effective"], 1)
    x = -np.log(real)
    near(values["k1_old"], -x.mean())
    near(values["k3_old"], np.mean(np.exp(x) - 1 - x))
    x = -0.5 - np.log(real)
    near(values["k1_ref"], -x.mean())
    near(values["k3_ref"], np.mean(np.exp(x) - 1 - x))
    near(values["entropy"], 0.7)
    near(values["entropy_loss"], -0.7 * 7 / 8)


def test_parts_add_up():
    undivided = measure(DAPO)
    parts = [measure(DAPO, RATIO[i : i + 1], A[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    actual, expected = (
        rl_metrics.summarize_metrics(x) for x in (rl_metrics.add_metrics(*parts), undivided)
    )
    assert actual.keys() == expected.keys()
    for name in actual:
        near(actual[name], expected[name], 1e-12)


def test_a_batch_without_a_token_is_measured():
    values = rl_metrics.summarize_metrics(measure(CISPO, mask=0 * MASK))
    assert values["tokens"] == values["ratio"] == values["weight_effective"] == values["loss"] == 0


def test_most_dropped_tokens():
    tokens = np.array([[3, 5, 5, 5], [4, 3, 4, 4]])
    counts = rl_metrics.count_drops_by_token(*(jnp.asarray(x) for x in (tokens, RATIO, A, MASK)), 9)
    assert rl_metrics.rank_dropped_tokens(counts) == [(5, 2, 3), (4, 1, 2)]
    assert rl_metrics.rank_dropped_tokens(counts, 1) == [(5, 2, 3)]
    assert rl_metrics.rank_dropped_tokens(counts, min_dropped=0) == [
        (5, 2, 3),
        (4, 1, 2),
        (3, 0, 2),
    ]


@pytest.mark.parametrize(
    ("bound", "expected"),
    [(1.2, [(5, 2, 3), (3, 0, 1)]), (5.0, [(5, 1, 3), (3, 0, 1)]), (None, [])],
)
def test_clipped_tokens_are_those_of_good_samples_above_the_bound(bound, expected):
    tokens = np.array([[3, 5, 5, 5], [4, 3, 4, 4]])
    counts = rl_metrics.count_clips_by_token(
        *(jnp.asarray(x) for x in (tokens, RATIO, A, MASK)), bound, vocab_size=9
    )
    listed = [(5, 0, 3), (3, 0, 1)] if bound is None else expected
    assert rl_metrics.rank_dropped_tokens(counts, min_dropped=0) == listed
    assert rl_metrics.rank_dropped_tokens(counts) == [entry for entry in expected if entry[1]]


D = np.array([[0, 0.3, -0.9, 1.2], [0.1, -0.05, np.nan, 3]])


def test_t7_mismatch():
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    rollout = np.array([[-2, -3, -1, -4], [-2, -0.5, 0, 0]])
    samples = [(q[m > 0], (q + d)[m > 0]) for q, d, m in zip(rollout, D, mask, strict=True)]
    values = mismatch.measure_mismatch(samples)
    near(values["k1"], -0.10833333)
    near(values["k3"], 0.24715762)
    near(values["chi2_token"], 1.68947237)
    near(values["chi2_sequence"], (1.82211880**2 + 1.05127110**2) / 2 - 1)
    near(values["perplexity_ratio"], np.exp(-0.10833333))
    near(values["logp_gap_max"], 1.2)
    near(values["logp_gap_mean"], 2.55 / 6)
    p, q = (np.exp(x[mask > 0]) for x in (rollout + D, rollout))
    near(values["pearson"], np.corrcoef(p, q)[0, 1], 1e-12)
    near(values["probability_gap_mean"], np.abs(p - q).mean())
    near(values["probability_gap_max"], np.abs(p - q).max())
    # A sample without a token changes nothing, and neither does the order.
    empty = (np.zeros(0), np.zeros(0))
    assert mismatch.measure_mismatch([empty, *samples[::-1]]) == pytest.approx(values)


def test_mismatch_of_many_samples_is_that_of_their_tokens_together():
    rng = np.random.default_rng(0)
    rollout = -rng.gamma(1.0, 1e-4, 5000)  # nearly certain: sums of squares would cancel
    old = (rollout + 1e-5 * rng.standard_normal(5000)).astype(np.float32)
    values = mismatch.measure_mismatch(zip(np.split(rollout, 50), np.split(old, 50), strict=True))
    p, q, d = np.exp(old.astype(float)), np.exp(rollout), old - rollout
    near(values["pearson"], np.corrcoef(p, q)[0, 1], 1e-9)
    near(values["k3"], np.mean(np.expm1(d) - d), 1e-12)
    near(values["probability_gap_mean"], np.abs(p - q).mean(), 1e-12)
    near(values["chi2_sequence"], np.mean(np.exp(2 * d.reshape(50, 100).sum(1))) - 1, 1e-9)


def test_mismatch_of_equals_and_of_nothing():
    logp = np.log(np.array([0.1, 0.5, 0.9]))
    values = mismatch.measure_mismatch([(logp, logp)])
    near(values["pearson"], 1, 1e-12)
    assert values["k3"] == values["probability_gap_max"] == values["chi2_sequence"] == 0
    assert math.isnan(mismatch.measure_mismatch([(0 * logp, logp)])["pearson"])
    with pytest.raises(ValueError, match="no token that the model wrote"):
        mismatch.measure_mismatch([(logp[:0], logp[:0])])


def test_groups():
    values = rl_metrics.summarize_groups(
        rewards=[1, 0, 1, 1, 0, 0, np.nan, 0.5],
        group_ids=["a", "a", "b", "b", "c", "c", "c", "d"],
        valid=[True] * 6 + [False, True],
        lengths=[1, 2, 3, 4, 5, 6, 7, 100],
        statuses=["stop"] * 5 + ["length", "repetition", "length"],
    )
    near(values["reward_mean"], 3.5 / 7)
    near(values["pass_at_k"], 2 / 4)
    near(values["zero_variance"], 3 / 4)
    near(values["zero_variance_right"], 1 / 4)
    near(values["zero_variance_wrong"], 2 / 4)
    near(values["invalid"], 1 / 8)
    near(values["truncated"], 2 / 8)
    near(values["repetition"], 1 / 8)
    assert (values["length_p50"], values["length_max"]) == (4.5, 100)
    # Outcomes say what is right, whatever the sums are: b was wrong, and d was right.
    values = rl_metrics.summarize_groups(
        rewards=[1, 0, 1, 1, 0.5],
        group_ids=["a", "a", "b", "b", "d"],
        valid=[True] * 5,
        lengths=[1] * 5,
        statuses=["stop"] * 5,
        outcomes=[0, 0, 0.9, 0.9, 1],
    )
    near(values["pass_at_k"], 1 / 3)
    near(values["zero_variance_right"], 1 / 3)
    near(values["zero_variance_wrong"], 1 / 3)
    empty = rl_metrics.summarize_groups([np.nan], [0], [False], [3], ["error"])
    assert math.isnan(empty["reward_mean"])
    assert empty["zero_variance"] == 0
    assert rl_metrics.summarize_groups([], [], [], [], [])["invalid"] == 0


def test_gradient_magnitudes():
    tree = {"a": jnp.asarray([[0.0, 1e-21], [3e-15, -3e-15]]), "b": jnp.asarray(-2.0)}
    tree["c"] = jnp.asarray([0.5, 1e-5, 2e-5])
    shares = rl_metrics.gradient_shares(tree)
    near(shares["below_1e-14"], 4 / 8)
    near(shares["zero"], 1 / 8)
    histogram = rl_metrics.gradient_histogram(shares)
    filled = {"1e-20": 2 / 8, "1e-14": 2 / 8, "1e-4": 2 / 8, "1e0": 1 / 8, "above": 1 / 8}
    for name, value in histogram.items():
        near(value, filled.get(name, 0))


def test_share_of_zeros_counts_beyond_what_float32_can():
    moments = {"v": jnp.zeros((3, 2**23), jnp.float32).at[0].set(1.0)}
    near(rl_metrics.zero_share(moments), 2 / 3)
    assert rl_metrics.zero_share({"v": jnp.full(5, 1e-37)}) == 0


def test_a_model_with_more_entries_than_an_int32_counts():
    large = jax.ShapeDtypeStruct((80, 32, 6144, 9216), jnp.float32)
    assert jax.eval_shape(rl_metrics.zero_share, [large]).shape == ()
