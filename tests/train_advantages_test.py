"""Advantages: vectors, groups of any size, turns, returns, and the penalty of length."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from train.rl import advantages, objective

PRESETS = objective.PRESETS
ONE = [1.0, 0, 0, 0]


def options(name="grpo", **changes):
    return dataclasses.replace(PRESETS[name], **changes)


def per_sample(rewards, groups=None, valid=None, chosen=None):
    groups = [0] * len(rewards) if groups is None else groups
    valid = [True] * len(rewards) if valid is None else valid
    return advantages.sample_advantages(chosen or options(), rewards, groups, valid)


def per_token(chosen, rewards, lengths, groups=None, **arguments):
    groups = [0] * len(rewards) if groups is None else groups
    masks = arguments.pop("masks", [np.ones(n) for n in lengths])
    valid = arguments.pop("valid", [True] * len(rewards))
    return advantages.token_advantages(chosen, rewards, groups, valid, masks, **arguments)


def near(actual, expected, tolerance=1e-8):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (options(advantage_eps=0.0), [1.5, -0.5, -0.5, -0.5]),
        (options(), [1.499997, -0.499999, -0.499999, -0.499999]),
        (options(advantage_eps=1e-4), [1.49970006] + [-0.49990002] * 3),
        (options("dr_grpo"), [0.75, -0.25, -0.25, -0.25]),
        (options("rloo"), [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_t11_estimators(chosen, wanted):
    near(per_sample(ONE, chosen=chosen), wanted, 1e-8 if chosen.advantage_eps != 1e-6 else 1e-6)


def test_t11_returns_are_whitened_over_the_tokens():
    out = per_token(options("reinforce_pp_baseline"), ONE, [4, 2, 3, 1])
    near(out[0], [1.16189498] * 4)
    for sample, length in zip(out[1:], [2, 3, 1], strict=True):
        near(sample, [-0.77459665] * length)


def test_t11b_groups_of_different_sizes_in_any_order():
    near(
        per_sample([1.0, 0, 0, 0, 1, 0, 1], ["a", "b", "a", "b", "a", "b", "a"]),
        [0.499999, 0, -1.499997, 0, 0.499999, 0, 0.499999],
        1e-6,
    )


def test_samples_without_a_reward_are_in_nobodys_mean():
    actual = per_sample([1.0, np.nan, 0, 0, 0, 7], [0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 0])
    near(actual, [1.499997, 0, -0.499999, -0.499999, -0.499999, 0], 1e-6)
    for name in PRESETS:
        chosen = PRESETS[name]
        out = per_token(chosen, [1.0, np.nan, 0], [2, 3, 1], valid=[True, False, True])
        assert not out[1].any()
        assert all(np.isfinite(x).all() for x in out)


@hypothesis.given(st.floats(-10, 10), st.integers(1, 9), st.sampled_from(["grpo", "dr_grpo"]))
def test_equal_rewards_teach_nothing_at_all(reward, num, name):
    chosen = options(name, advantage_eps=0.0)
    assert not per_sample([reward] * num, chosen=chosen).any()
    assert advantages.has_zero_variance([reward] * num)


def test_leave_one_out_of_one_is_nothing():
    assert per_sample([3.0, 1, 2], [0, 1, 1], chosen=options("rloo")).tolist() == [0, -1, 1]


@pytest.mark.parametrize("name", ["cispo", "dr_grpo", "rloo"])
@hypothesis.given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.randoms())
@hypothesis.settings(max_examples=30)
def test_tokens_have_their_samples_advantage(name, rewards, random):
    lengths = [random.randint(1, 5) for _ in rewards]
    groups = [random.randint(0, 2) for _ in rewards]
    masks = [np.array([random.random() < 0.7 for _ in range(n)] + [True]) for n in lengths]
    expected = per_sample(rewards, groups, chosen=PRESETS[name])
    actual = per_token(PRESETS[name], rewards, lengths, groups, masks=masks)
    scale = np.abs(expected).max() + 1
    for sample, mask, advantage in zip(actual, masks, expected, strict=True):
        near(sample / scale, np.where(mask, advantage, 0) / scale, 1e-6)


def test_a_turns_reward_goes_to_the_turn_and_what_came_before():
    near(advantages.token_returns([(1, 0.5)], 1.0, 4), [1.5, 1.5, 1, 1])
    near(advantages.token_returns([(1, 0.5)], 1.0, 4, 0.5), [0.375, 0.75, 0.5, 1])
    assert advantages.token_returns([], 1.0, 0).size == 0
    for length in (1, 2, 1000):  # against the sum token by token
        costs, total = np.random.default_rng(0).standard_normal(length), 0.0
        returns = advantages.token_returns([(0, 2.0)], 1.0, length, 0.99, costs)
        for t in reversed(range(length)):
            total = -costs[t] + 2.0 * (t == 0) + 1.0 * (t == length - 1) + 0.99 * total
            np.testing.assert_allclose(returns[t], total, rtol=1e-12, atol=1e-12)
    out = per_token(
        PRESETS["dr_grpo"], [1.5, 0.5], [4, 2], turn_rewards=[[(1, 0.5)], []], masks=MASKS
    )
    # After the first turn the two are yet to earn 1 and 0.5: the last token is compared with that.
    near(out[0], [0.5, 0.5, 0, 0.25])
    near(out[1], [-0.5, -0.5])
    with pytest.raises(ValueError, match="got position 4; wanted 0 to 3"):
        advantages.token_returns([(4, 1.0)], 0.0, 4)


MASKS = [np.array([1, 1, 0, 1]), np.array([1, 1])]


def test_turns_do_not_blow_up_where_totals_are_equal():
    turns = [[(0, 1.0)], [(1, 1.0)]]
    out = per_token(PRESETS["grpo"], [1.0, 1.0], [2, 2], turn_rewards=turns)
    # What follows the reward deserves none of it, and is compared with what earns no more either.
    near(out[0], [0, 0], 1e-5)
    near(out[1], [0, 0])


TWO_TURNS = np.array([1, 1, 0, 1, 1])


@pytest.mark.parametrize("name", ["cispo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@pytest.mark.parametrize("in_turns", [False, True])
def test_the_right_turn_is_raised_and_the_wrong_ones_lowered(name, in_turns):
    """All four earn 1 in the first turn. One is right in the second."""
    turns = [[(1, 1.0)] for _ in range(4)]
    if in_turns:
        turns[3].append((4, 1.0))
    out = per_token(PRESETS[name], [1, 1, 1, 2], [5] * 4, masks=[TWO_TURNS] * 4, turn_rewards=turns)
    for sample in out[:3]:
        assert (sample[[0, 1, 3, 4]] < 0).all()
    assert (out[3][[0, 1, 3, 4]] > 0).all()
    if name == "dr_grpo":
        near(out[3], [0.75, 0.75, 0, 0.75, 0.75])
        near(out[0], [-0.25, -0.25, 0, -0.25, -0.25])
    if name == "rloo":
        near(out[3], [1, 1, 0, 1, 1])


def test_turns_that_only_some_came_to():
    # The second sample ended in its first turn, the third earned nothing there.
    masks = [TWO_TURNS, np.array([1, 1]), TWO_TURNS]
    turns = [[(1, 1.0), (4, 2.0)], [(1, 1.0)], []]
    out = per_token(PRESETS["dr_grpo"], [3, 1, 0], [5, 2, 5], masks=masks, turn_rewards=turns)
    near(out[0], [3 - 4 / 3, 3 - 4 / 3, 0, 2 - 2 / 3, 2 - 2 / 3])
    near(out[1], [1 - 4 / 3, 1 - 4 / 3])
    near(out[2], [-4 / 3, -4 / 3, 0, -2 / 3, -2 / 3])


def test_rewards_at_the_end_have_one_baseline_for_all_turns():
    masks = [TWO_TURNS, np.array([1, 1]), np.array([1, 0, 1, 0, 1])]
    out = per_token(PRESETS["dr_grpo"], [1, 1, 0], [5, 2, 5], masks=masks, turn_rewards=[[]] * 3)
    for sample, mask, reward in zip(out, masks, [1, 1, 0], strict=True):
        near(sample, np.where(mask, reward - 2 / 3, 0))


def test_discounted_returns_pay_for_their_distance_to_the_reference():
    chosen = options("reinforce_pp", discount=0.5, reward_kl_coef=0.1)
    kls, mask = [np.array([1.0, np.nan, 2.0])], [np.array([1, 0, 1])]
    (actual,) = per_token(chosen, [1.0], [3], masks=mask, kls=kls)
    returns = np.array([-0.1 + 0.25 * (1 - 0.2), 1 - 0.2])
    expected = (returns - returns.mean()) / np.sqrt(returns.var(ddof=1) + 1e-8)
    near(actual, [expected[0], 0, expected[1]])
    with pytest.raises(ValueError, match="got no kls"):
        per_token(chosen, [1.0], [3])


def test_flat_groups():
    assert advantages.has_zero_variance([1.0])
    assert advantages.has_zero_variance([1.0, 1.0 + 1e-6])
    assert not advantages.has_zero_variance([1.0, 1.0 + 1e-5])


@pytest.mark.parametrize(
    ("num", "wanted"), [(16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (20481, -1)]
)
def test_t13_overlong_penalty(num, wanted):
    assert advantages.overlong_penalty(num, 20480, 4096) == wanted


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="sample 1: got the reward nan"):
        per_sample([1.0, np.nan])
    with pytest.raises(ValueError, match="wanted one of each for every sample"):
        per_sample([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="masks: got 1 for 2 samples"):
        per_token(PRESETS["grpo"], [1.0, 2.0], [3])
    with pytest.raises(ValueError, match="buffer_tokens 0"):
        advantages.overlong_penalty(3, 10, 0)
