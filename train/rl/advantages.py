"""Advantages: what a sample, or a token of it, is worth against its group. Numpy on the host.

Samples are in groups by id. Groups have any sizes, and samples any order. A sample that is not
valid has the advantage 0, and is in no mean.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.rl import objective as objective_lib

# A standard deviation at or below it counts as 0.
ZERO_VARIANCE_STD = 1e-6
_WHITEN_EPS = 1e-8  # added to the variance


def sample_advantages(
    objective: objective_lib.Objective, rewards: Any, group_ids: Any, valid: Any
) -> np.ndarray:
    """Return A of every sample, [N] float64 (M1 Eq. 2, `Objective.advantage` has the kinds).

    Standard deviations have N - 1 in the denominator. A group of one, or of equal rewards, has
    advantages of exactly 0. For "return" this is R, for "return-baseline" R less the group's mean.
    `token_advantages` whitens these two.

    Args:
      objective: which advantage.
      rewards: R of each sample, [N]. Any value where the sample is not valid.
      group_ids: group of each sample, [N].
      valid: whether the sample counts, [N].

    Raises:
      ValueError: arguments of different lengths, or a valid sample's reward that is not finite.
    """
    rewards, group_ids, valid = _validate_inputs(rewards, group_ids, valid)
    baseline = _reward_baseline(objective, rewards, group_ids, valid)
    centered = np.where(valid, rewards - baseline, 0.0)
    return centered / _advantage_scale(objective, centered * centered, group_ids, valid)


def token_advantages(
    objective: objective_lib.Objective,
    rewards: Any,
    group_ids: Any,
    valid: Any,
    masks: Sequence[np.ndarray],
    turn_rewards: Sequence[Sequence[tuple[int, float]]] | None = None,
    kls: Sequence[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Return A of every token, one float64 array a sample, 0 where the mask is.

    With G_t the discounted rewards from token t on (`token_returns`, the discount 1 but for
    returns): G_t - b. The baseline b of a token's turn is that of `sample_advantages`, of what the
    group's samples were yet to earn when that turn began: R less the rewards of earlier turns. So a
    turn is compared with the same turn of the others, and not with what all earned before it.
    "group" divides that by (s + advantage_eps), s^2 being the sum over the group's samples of their
    tokens' mean square, over N - 1: the standard deviation, where rewards come at the end alone.
    Returns are whitened: less the mean, over sqrt(variance + 1e-8), of all tokens of the batch.

    Args:
      objective: which advantage.
      rewards: the sum that a sample is trained on, turn rewards included.
      group_ids: group of each sample.
      valid: whether the sample counts.
      masks: [n] of each sample, 1 where the model wrote the token.
      turn_rewards: (position, reward) pairs of each sample, of what was rewarded before its end.
      kls: [n] of each sample, logp_old - logp_ref of each token, for `reward_kl_coef`.

    Raises:
      ValueError: what `sample_advantages` refuses, or a `reward_kl_coef` without kls, or a
        position outside of a sample.
    """
    rewards, group_ids, valid = _validate_inputs(rewards, group_ids, valid)
    _check_lengths(rewards, masks=masks, turn_rewards=turn_rewards, kls=kls)
    if objective.reward_kl_coef and kls is None:
        raise ValueError(
            f"reward_kl_coef {objective.reward_kl_coef}: got no kls; "
            "wanted logp_old - logp_ref of every token"
        )
    real = [np.asarray(mask) > 0 for mask in masks]
    centered = []
    turn_rewards = [()] * len(rewards) if turn_rewards is None else turn_rewards
    turn_indices = list(map(_turn_of_tokens, real, turn_rewards))
    base = _turn_baselines(objective, rewards, group_ids, valid, turn_rewards, turn_indices)
    for n, mask in enumerate(real):
        turns = turn_rewards[n]
        # What is left for the last token, once the turns have their parts.
        final = rewards[n] - sum(reward for _, reward in turns) if valid[n] else 0.0
        costs = np.zeros(len(mask))
        if objective.reward_kl_coef and kls is not None:
            costs = np.where(mask, objective.reward_kl_coef * np.asarray(kls[n], np.float64), 0.0)
        returns = token_returns(turns, final, len(mask), objective.discount, costs)
        centered.append(np.where(mask & valid[n], returns - base[n, turn_indices[n]], 0.0))
    if objective.advantage.startswith("return"):
        return _whiten_tokens(centered, [mask & ok for mask, ok in zip(real, valid, strict=True)])
    # A sample's mean square stands for the square of its one number in `sample_advantages`.
    squares = [(x * x).sum() / max(m.sum(), 1) for x, m in zip(centered, real, strict=True)]
    scale = _advantage_scale(objective, np.asarray(squares), group_ids, valid)
    return [x / s for x, s in zip(centered, scale, strict=True)]


def token_returns(
    turn_rewards: Sequence[tuple[int, float]],
    final_reward: float,
    length: int,
    gamma: float = 1.0,
    costs: np.ndarray | None = None,
) -> np.ndarray:
    """Return G_t = sum over k >= t of gamma^(k - t) (reward of token k - costs[k]), [length].

    Args:
      turn_rewards: (position, reward) pairs.
      final_reward: reward of the last token, besides what `turn_rewards` gives it.
      length: number of tokens.
      gamma: discount, 0 to 1.
      costs: taken off the rewards, [length], or None.

    Raises:
      ValueError: a position outside of the tokens.
    """
    rewards = np.zeros(length) if costs is None else -np.asarray(costs, np.float64)
    for position, reward in turn_rewards:
        if not 0 <= position < length:
            raise ValueError(f"turn reward: got position {position}; wanted 0 to {length - 1}")
        rewards[position] += reward
    if length:
        rewards[-1] += final_reward
    # Without a loop over tokens, which may be 80K.
    if gamma == 1:
        return np.cumsum(rewards[::-1])[::-1]
    reach = 1  # every entry is the discounted sum of so many rewards, and then of twice as many
    while reach < length:
        rewards[:-reach] += gamma**reach * rewards[reach:]
        reach *= 2
    return rewards


def has_zero_variance(rewards: Any) -> bool:
    """Return whether a group's rewards teach nothing: their standard deviation is at most 1e-6."""
    rewards = np.asarray(rewards, np.float64)
    return len(rewards) < 2 or bool(rewards.std(ddof=1) <= ZERO_VARIANCE_STD)


def overlong_penalty(num_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """Return DAPO's soft penalty of length, 0 to -1.

    It is 0 up to `max_tokens - buffer_tokens` tokens. From there it falls in a straight line to -1.

    Raises:
      ValueError: a buffer of nothing, or of more than `max_tokens`.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(
            f"overlong penalty: got buffer_tokens {buffer_tokens}, max_tokens {max_tokens}; "
            "wanted 0 < buffer_tokens <= max_tokens"
        )
    return float(np.clip((max_tokens - buffer_tokens - num_tokens) / buffer_tokens, -1.0, 0.0))


def _validate_inputs(rewards, groups, valid):
    """Return (rewards with 0 where not valid, groups as indices from 0, valid), all [N]."""
    rewards, valid = np.asarray(rewards, np.float64), np.asarray(valid, bool)
    groups = np.unique(np.asarray(groups), return_inverse=True)[1].reshape(-1)
    if rewards.ndim != 1 or not len(rewards) == len(groups) == len(valid):
        raise ValueError(
            f"got rewards {rewards.shape}, groups {groups.shape}, valid {valid.shape}; "
            "wanted one of each for every sample"
        )
    wrong = np.flatnonzero(valid & ~np.isfinite(rewards))
    if wrong.size:
        raise ValueError(
            f"sample {wrong[0]}: got the reward {rewards[wrong[0]]}; wanted a finite number. "
            "A sample without a reward is not valid."
        )
    return np.where(valid, rewards, 0.0), groups, valid


def _check_lengths(rewards, **values_by_name):
    for name, values in values_by_name.items():
        if values is not None and len(values) != len(rewards):
            raise ValueError(
                f"{name}: got {len(values)} for {len(rewards)} samples; wanted one for each"
            )


def _reward_baseline(objective, rewards, groups, valid):
    """Return b, what is taken off each sample's reward, [N]."""
    if objective.advantage == "return":
        return np.zeros(len(rewards))
    count = _group_totals(valid, groups)
    mean = _group_totals(rewards, groups) / np.maximum(count, 1)
    # The mean of equal numbers may differ from them in the last bit, and a division by a tiny
    # deviation would make an advantage of that. Clipped into its numbers' range, it does not.
    low, high = np.full(len(rewards), np.inf), np.full(len(rewards), -np.inf)
    np.minimum.at(low, groups, np.where(valid, rewards, np.inf))
    np.maximum.at(high, groups, np.where(valid, rewards, -np.inf))
    mean = np.where(count > 0, np.clip(mean, low[groups], high[groups]), 0.0)
    if objective.advantage != "leave-one-out":
        return mean
    # The mean of the others: (n mean - R) / (n - 1) = mean - (R - mean) / (n - 1).
    return mean - (rewards - mean) / np.maximum(count - 1, 1)


def _turn_of_tokens(mask, turns):
    """Return the turn that each token belongs to, from 0, [n].

    A turn begins where the model goes on after an observation, or after a rewarded token.
    """
    begins = mask & ~np.concatenate([[False], mask[:-1]])
    for position, _ in turns:
        if 0 <= position < len(mask) - 1:
            begins[position + 1] |= mask[position + 1]
    return np.maximum(np.cumsum(begins) - 1, 0)


def _turn_baselines(objective, rewards, groups, valid, turn_rewards, turn_indices):
    """Return b of each sample's turns, [N, turns], see `token_advantages`."""
    num_turns = max((int(index[-1]) + 1 for index in turn_indices if len(index)), default=1)
    yet_to_earn = np.repeat(rewards[:, None], num_turns, axis=1)
    for n, (turns, index) in enumerate(zip(turn_rewards, turn_indices, strict=True)):
        for position, reward in turns if valid[n] else ():
            if 0 <= position < len(index):  # `token_returns` refuses the others
                yet_to_earn[n, index[position] + 1 :] -= reward
    return np.stack(
        [_reward_baseline(objective, values, groups, valid) for values in yet_to_earn.T], axis=1
    )


def _advantage_scale(objective, squares, groups, valid):
    """Return what each sample's distance from its baseline is divided by, [N]."""
    if objective.advantage != "group":
        return np.ones(len(squares))
    count = _group_totals(valid, groups)
    squares = np.where(valid, squares, 0.0)
    std = np.sqrt(_group_totals(squares, groups) / np.maximum(count - 1, 1))
    # With an eps of 0, equal rewards would give 0 / 0.
    scale = std + objective.advantage_eps
    return np.where(scale > 0, scale, 1.0)


def _group_totals(values, groups):
    """Return at each sample the sum over its group, [N]."""
    return np.bincount(groups, values)[groups] if len(groups) else np.zeros(0)


def _whiten_tokens(values, masks):
    """Return values of mean 0 and variance 1 over the masked tokens of the batch, 0 elsewhere."""
    if not any(mask.any() for mask in masks):
        return values
    tokens = np.concatenate([x[mask] for x, mask in zip(values, masks, strict=True)])
    variance = tokens.var(ddof=1) if len(tokens) > 1 else 0.0
    scale = np.sqrt(variance + _WHITEN_EPS)
    return [
        np.where(mask, (x - tokens.mean()) / scale, 0.0)
        for x, mask in zip(values, masks, strict=True)
    ]
