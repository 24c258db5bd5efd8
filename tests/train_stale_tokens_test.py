"""Tokens that older weights sampled: what r compares with, what is measured, what is an alarm."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import ModelConfig
from train import optim
from train.rl import batch_metrics, loss, objective, update
from train.rl import config as rl_config
from train.rl import sample as sample_lib
from train.rl.rollout_correction import RolloutCorrection

TASK = sample_lib.Task("s/0", (), "s")
NOW = 7  # version of the weights


def make_config(chosen=objective.PRESETS["cispo"], **rollout_fields):
    return rl_config.RlConfig(
        checkpoint="c", batches=1, sources=(rl_config.TaskSource("s", "s.jsonl"),),
        objective=chosen,
        rollout=rl_config.RolloutConfig(
            4, rl_config.LengthSchedule((32,)), 5, **rollout_fields
        ),
        update=rl_config.UpdateConfig(1e-2, minibatches=1),
        rewards=rl_config.RewardsConfig(sources=(("s", (("exact", 1.0, ()),)),)),
    )  # fmt: skip


def make_sample(versions, logprobs):
    """Return a sample whose tokens of version -1 are those of a tool."""
    mask = np.asarray(versions) >= 0
    return sample_lib.Sample(TASK, (1,), np.arange(len(mask)), mask, logprobs, versions)


SAMPLE = make_sample([5, 6, -1, 6, 7, 7], [-1.0, -2.0, 0.0, -3.0, -1.5, -2.5])
LOGP_OLD = np.array([-3.0, -1.0, 0.0, -3.1, -1.6, -2.4], np.float32)


def anchors(chosen):
    updater = update.PolicyUpdater(
        make_config(chosen), ModelConfig.tiny(), None, optim.AdamW(1e-2), None
    )
    return updater._anchor_logprobs(SAMPLE, LOGP_OLD, NOW)


@pytest.mark.parametrize("name", objective.PRESETS)
def test_stale_tokens_are_compared_with_what_sampled_them(name):
    preset = objective.PRESETS[name]
    sampled = [-1.0, -2.0, 0.0, -3.0, -1.6, -2.4]
    np.testing.assert_allclose(anchors(preset), sampled, rtol=1e-6)
    # The whole weight is in r or in rho, and never in both.
    for changes in (
        {"stale_anchor": "old"},
        {"correction": RolloutCorrection()},
        {"anchor": "rollout"},  # r compares with the column logp_rollout anyway
    ):
        np.testing.assert_array_equal(
            anchors(dataclasses.replace(preset, **changes)), LOGP_OLD, err_msg=str(changes)
        )


def test_the_weight_of_a_stale_token_is_that_of_the_policy_over_its_sampler():
    """Before the first step r is 1 for new tokens, and exp(logp - logp_rollout) for others."""
    mask = jnp.asarray(SAMPLE.mask[None], jnp.float32)
    terms = loss.TokenTerms(
        logp=jnp.asarray(LOGP_OLD[None]),
        logp_old=jnp.asarray(anchors(objective.PRESETS["cispo"])[None]),
        logp_rollout=jnp.asarray(SAMPLE.logprobs[None]),
        advantages=mask,
        mask=mask,
        coefficients=mask,
        segment_ids=jnp.ones((1, 6), jnp.int32),
    )
    _, parts = loss.compute_loss(objective.PRESETS["cispo"], terms)
    wanted = np.exp([-2.0, 1.0, 0.0, -0.1, 0.0, 0.0])
    np.testing.assert_allclose(parts.ratio[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(parts.weight[0], wanted, rtol=1e-5)


@pytest.mark.parametrize("field", ["partial_tokens", "oversample"])
def test_an_objective_without_a_ratio_needs_a_correction(field):
    rloo = objective.PRESETS["rloo"]
    fields: dict[str, Any] = {field: 2}
    make_config(rloo)  # whose tokens are never stale
    with pytest.raises(ValueError, match=r"objective\.correction: got None; wanted one, as"):
        make_config(rloo, **fields)
    make_config(dataclasses.replace(rloo, correction=RolloutCorrection()), **fields)
    make_config(dataclasses.replace(rloo, stale_anchor="old"), **fields)
    make_config(**fields)
    with pytest.raises(ValueError, match="stale_anchor 'trainer'"):
        dataclasses.replace(rloo, stale_anchor="trainer")


# ---- what is measured


def test_mismatch_is_measured_apart_by_age():
    values = batch_metrics.measure_batch_mismatch([SAMPLE], [LOGP_OLD], NOW)
    assert values["stale_tokens"] == 3 / 5
    assert (values["age_1/tokens"], values["age_2/tokens"]) == (2, 1)
    assert values["logp_gap_max"] == pytest.approx(0.1)
    assert values["age_1/logp_gap_max"] == pytest.approx(1)
    assert values["age_1/k1"] == pytest.approx(-0.45)
    assert values["age_2/logp_gap_mean"] == values["age_2/k1"] == pytest.approx(2)
    assert "age_0/k1" not in values


def test_mismatch_of_stale_tokens_alone_and_of_none():
    stale = make_sample([3, 3, -1], [-1.0, -2.0, 0.0])
    logp = np.array([-1.5, -2.0, 0.0])
    values = batch_metrics.measure_batch_mismatch([stale], [logp], NOW)
    assert values["stale_tokens"] == 1
    assert values["age_4/k1"] == pytest.approx(0.25)
    assert "pearson" not in values
    values = batch_metrics.measure_batch_mismatch([stale], [logp], 3)
    assert values["stale_tokens"] == 0
    assert values["k1"] == pytest.approx(0.25)
    assert batch_metrics.measure_batch_mismatch([], [], NOW) == {"stale_tokens": 0.0}


@pytest.mark.parametrize(
    ("pearson", "metrics", "text"),
    [
        (0.995, {}, None),
        (0.99, {}, None),
        (0.98, {}, "sampler and trainer disagree"),
        (-1.0, {}, "sampler and trainer disagree"),
        (math.nan, {}, "sampler and trainer disagree"),
        (None, {}, "sampler and trainer were not compared"),
        (None, {"updates": 0.0}, "trained nothing"),
        (0.995, {"handover_share": 0.999}, None),
        (0.995, {"handover_share": 0.44}, "does not have what the adapters learnt"),
        (0.995, {"handover_share": math.nan}, "does not have what the adapters learnt"),
    ],
)
def test_no_number_and_nan_are_alarms(pearson, metrics, text):
    report = batch_metrics.BatchReport({"updates": 2.0} | metrics, 0.0, 0.0, pearson)
    alarms = batch_metrics.list_alarms(report, 0.99)
    assert [alarm["alarm"] for alarm in alarms] == ([] if text is None else [alarms[0]["alarm"]])
    if text is not None:
        assert text in alarms[0]["alarm"]
