"""Weights between sampler and trainer: vectors, what a sample is, and what is masked."""

import math
import pathlib
import types

import jax
import jax.numpy as jnp
import loss_support
import numpy as np
import pytest
from loss_support import near

from train.rl import rollout_correction

# Fixtures.
double = loss_support.double

D = np.array([[0, 0.3, -0.9, 1.2], [0.1, -0.05, np.nan, np.inf]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
EXP = [[1, 1.34985881, 0.40656966, 3.32011692], [1.10517092, 0.95122942, 1, 1]]
ONES = np.ones((2, 4), np.int32)


def weigh(old=D, rollout=None, mask=MASK, ids=ONES, module=rollout_correction, **options):
    """Return (weights, kept) of d = old - rollout."""
    rollout = np.zeros(old.shape) if rollout is None else rollout
    arrays = (jnp.asarray(x) for x in (old, rollout, mask, ids))
    return module.correction_weights(module.RolloutCorrection(**options), *arrays)


def test_t7_tokens_are_truncated_or_rejected():
    weight, keep = weigh(high=None)
    near(weight, EXP)
    assert np.asarray(keep).all()
    wanted = np.array(EXP)
    wanted[0, 3] = 2
    weight, keep = weigh()
    near(weight, wanted)
    assert np.asarray(keep).all()
    # What is rejected keeps its weight.
    weight, keep = weigh(how="mask", low=0.5, high=2.0)
    near(weight, EXP)
    np.testing.assert_array_equal(keep, [[1, 1, 0, 0], [1, 1, 1, 1]])


def test_t7_sequences():
    check_sequences()


def check_sequences(module=rollout_correction):
    a, b = 1.82211880, 1.05127110
    weight, keep = weigh(module=module, level="sequence", how="mask", high=3.0)
    near(weight, [[a] * 4, [b, b, 1, 1]])
    assert np.asarray(keep).all()
    _, keep = weigh(module=module, level="sequence", how="mask", high=1.5)
    np.testing.assert_array_equal(keep, [[0] * 4, [1] * 4])
    weight, _ = weigh(module=module, level="sequence", how="truncate", high=1.5)
    near(weight, [[1.5] * 4, [b, b, 1, 1]])
    a, b = 1.16183424, 1.02531512
    near(weigh(module=module, level="geometric", high=None)[0], [[a] * 4, [b, b, 1, 1]])


def test_t8_a_rejected_sequence_keeps_its_weight():
    old, rollout = np.full((2, 1), -2.0), np.array([[-1], [-2.5]])
    ones = np.ones((2, 1), np.int32)
    weight, keep = weigh(old, rollout, ones, ones, level="sequence", how="mask", low=0.5, high=2.0)
    near(weight, [[0.36787944], [1.64872127]])
    np.testing.assert_array_equal(keep, [[0], [1]])
    assert 1 - np.mean(keep) == 0.5


def test_t10_bad_samples_that_the_policy_has_left_are_masked():
    check_on_policy()


def check_on_policy(module=rollout_correction):
    kl, dirt = np.array([2, 0.5, 2]), np.array([1e4, -1e4, np.nan])
    logp, rollout = np.zeros((3, 3)), np.stack([kl, kl, dirt], 1)
    mask, ids = np.array([[1, 1, 0]] * 3), np.ones((3, 3), np.int32)
    a = np.broadcast_to(np.array([[1.0], [-1], [-1]]), (3, 3))
    keep = module.on_policy_mask(1.0, *(jnp.asarray(x) for x in (a, logp, rollout, mask, ids)))
    np.testing.assert_array_equal(keep[:, :2], [[1, 1], [1, 1], [0, 0]])


def test_samples_in_one_row_are_weighed_apart():
    check_packed()


def check_packed(module=rollout_correction):
    d = np.concatenate([D[0], D[1], [5.0]])[None]
    mask = np.concatenate([MASK[0], MASK[1], [0]])[None]
    ids = np.array([[1] * 4 + [2] * 4 + [0]], np.int32)
    for options in (
        {"level": "sequence", "how": "mask", "high": 1.5},
        {"level": "geometric", "high": 1.1},
        {"how": "truncate", "low": 1.5, "high": 2.0, "veto": 0.5},
    ):
        for packed, apart in zip(
            weigh(d, None, mask, ids, module, **options),
            weigh(module=module, **options),
            strict=True,
        ):
            np.testing.assert_array_equal(packed[:, :8], np.asarray(apart).reshape(1, 8))
            assert np.asarray(packed)[0, [6, 7, 8]].tolist() == [1, 1, 1]  # masked


def test_veto_drops_the_whole_sample():
    _, keep = weigh(high=None, veto=0.5)
    np.testing.assert_array_equal(keep, [[0] * 4, [1] * 4])
    _, keep = weigh(high=None, veto=0.4)
    assert np.asarray(keep).all()


def test_no_gradient_and_no_overflow():
    check_gradient()


def check_gradient(module=rollout_correction):
    def total(old):
        options = module.RolloutCorrection("sequence", high=None)
        zeros = jnp.zeros((1, 3))
        weight, _ = module.correction_weights(
            options, old, zeros, jnp.ones((1, 3)), jnp.ones((1, 3), jnp.int32)
        )
        return jnp.sum(weight)

    old = jnp.asarray([[15.0, 15.0, 15.0]])
    near(total(old) / 3, math.exp(20), 1.0)
    assert not np.asarray(jax.grad(total)(old / 100)).any()


def test_mean_weight_counts_what_was_rejected_but_not_what_is_masked():
    options = rollout_correction.RolloutCorrection(how="mask", high=1.0)
    samples = [(d[m > 0], 0 * d[m > 0]) for d, m in zip(D, MASK, strict=True)]
    mean = rollout_correction.mean_correction_weight(options, samples)
    near(mean, np.sum(np.array(EXP) * MASK) / 6)
    assert rollout_correction.mean_correction_weight(options, []) == 0


@pytest.mark.parametrize("level", rollout_correction.WEIGHT_LEVELS)
@pytest.mark.parametrize(
    "bounds", [{"high": 1.2}, {"low": 0.9, "high": None}, {"how": "mask", "high": 1.2}]
)
def test_the_hosts_mean_weight_is_that_of_the_devices(level, bounds):
    old = np.where(MASK, D, 0.0)
    old[0, 3] = 30.0  # beyond what is clipped
    weight, _ = weigh(old, level=level, **bounds)
    samples = [(d[m > 0], 0 * d[m > 0]) for d, m in zip(old, MASK, strict=True)]
    options = rollout_correction.RolloutCorrection(level, **bounds)
    mean = rollout_correction.mean_correction_weight(options, [*samples, (old[0, :0],) * 2])
    np.testing.assert_allclose(mean, np.asarray(weight)[MASK > 0].mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "row"}, "level: got 'row'; wanted one of token, sequence"),
        ({"how": "clip"}, "how: got 'clip'"),
        ({"low": 3.0}, "low 3.0 > high 2.0"),
        ({"how": "mask", "high": None}, "'mask' without low and high"),
        ({"veto": -1.0}, "veto: got -1.0; wanted a number of at least 0"),
        ({"high": math.nan}, "high: got nan"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        rollout_correction.RolloutCorrection(**options)


def check_all(module):
    for check in (check_sequences, check_on_policy, check_packed, check_gradient):
        check(module)


GUARDS = [
    ("jax.lax.stop_gradient(_clip_log_ratio(", "(_clip_log_ratio("),
    ("jnp.where(real, logp_old - logp_rollout, 0.0)", "logp_old - logp_rollout"),
    ("jnp.where(real, weight, 1.0)", "weight"),
    ("jnp.where(real, logp_rollout - logp, 0.0)", "logp_rollout - logp"),
    ("jnp.exp(_clip_log_ratio(level))", "jnp.exp(level)"),
    ("(advantages < 0) & ", ""),
    ("segment_totals(d, segment_ids)\n", "jnp.sum(d, axis=1, keepdims=True) + 0 * d\n"),
]


@pytest.mark.parametrize(("guard", "without"), GUARDS)
def test_removing_a_guard_is_noticed(guard, without):
    source = pathlib.Path(rollout_correction.__file__).read_text()
    assert source.count(guard) == 1
    module = types.ModuleType("mutant")
    module.__dict__["__name__"] = (
        rollout_correction.__name__
    )  # where dataclasses look annotations up
    exec(compile(source.replace(guard, without), "mutant", "exec"), module.__dict__)
    with pytest.raises(AssertionError):
        check_all(module)
