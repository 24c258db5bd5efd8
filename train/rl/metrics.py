"""What is measured of reinforcement learning: on the devices as sums, on the host over a batch.

Sums over tokens add up over microbatches, rows and hosts. `summarize_metrics` divides them once.
These functions document the metrics that they return: `summarize_metrics` those of an optimizer
step, `summarize_groups` those of rewards and lengths, `mismatch.measure_mismatch` those between
sampler and trainer. The symbols r, w, A, M and rho are those of `train/rl/objective.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from train.rl import advantages as advantages_lib
from train.rl import loss as loss_lib

# DAPO's bounds. Under any objective the log says which tokens PPO's clipping would have dropped,
# because M1 argues with them for CISPO (M1 3.1).
PPO_CLIP_LOW, PPO_CLIP_HIGH = 0.2, 0.28
# Log ratios above which tokens are counted, for the 99th percentile. They are 0.05 apart, so the
# percentile is 5% coarse. A percentile itself does not add up over microbatches, such counts do.
_LOG_RATIO_EDGES = np.linspace(-3, 3, 121)
# Powers of ten between which gradients are counted. Most of M1's gradients were below 1e-14
# (M1 3.2), where AdamW's usual eps of 1e-8 would hide them.
GRADIENT_DECADES = tuple(range(-20, 1))
# All tokens that the model wrote, or those with A > 0 or A < 0: what a mean or a share is over.
_Divisor = Literal["tokens", "positive", "negative"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSum:
    """A sum over the tokens that the model wrote.

    Attributes:
      total: the sum. It may be several sums, one an entry.
      divisor: name of the sum whose total divides this one in `summarize_metrics`.
    """

    total: Float[Array, "..."]
    divisor: _Divisor = dataclasses.field(metadata={"static": True})


class DropCounts(NamedTuple):
    """How often each token id was dropped.

    Attributes:
      ppo_dropped: result of `count_drops_by_token`.
      clipped: result of `count_clips_by_token`.
    """

    ppo_dropped: Int[Array, "2 V"]
    clipped: Int[Array, "2 V"]


class MetricSums(NamedTuple):
    """What a part of a step measured, see `add_metrics`. A whole step is a part, too.

    Attributes:
      drops: counts by token id, or None where they were not counted.
      maxima: maxima over tokens, by name.
      shares: shares of the step's losses, by name, see `loss.LossParts.shares`.
      sums: sums over tokens, by name.
    """

    drops: DropCounts | None
    maxima: dict[str, Float[Array, ""]]
    shares: dict[str, Float[Array, ""]]
    sums: dict[str, TokenSum]


def ppo_drop_mask(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"]
) -> Bool[Array, "B T"]:
    """Return which tokens PPO's clipping at 0.2 and 0.28 would take out of the gradient."""
    high, low = ratio > 1 + PPO_CLIP_HIGH, ratio < 1 - PPO_CLIP_LOW
    return ((advantages > 0) & high) | ((advantages < 0) & low)


def loss_metrics(parts: loss_lib.LossParts) -> MetricSums:
    """Return the metrics of a loss, without counts by token id.

    `summarize_metrics` makes metrics of the same names from them, and explains these.
    """
    terms, ratio, weight = parts.terms, parts.ratio, parts.weight
    real, a = terms.mask > 0, terms.advantages
    positive, negative = real & (a > 0), real & (a < 0)
    # Schulman's estimators of KL(policy || other): k1 = -x and k3 = exp(x) - 1 - x, where x is the
    # log-probability by the other less that by the policy. k3 is never negative.
    x = terms.logp_old - terms.logp
    dropped = real & ppo_drop_mask(ratio, a)
    # By name: what is summed over tokens, and the divisor of the sum.
    summed: dict[str, tuple[Array, _Divisor]] = {
        "tokens": (real, "tokens"),
        "positive": (positive, "tokens"),
        "negative": (negative, "tokens"),
        "clip_high": (positive & ~parts.clip_mask, "positive"),
        "clip_low": (negative & ~parts.clip_mask, "negative"),
        # Where the weight is not the ratio, a bound has moved it: w < r at the upper bound.
        "weight_high/positive": (positive & (weight < ratio), "positive"),
        "weight_high/negative": (negative & (weight < ratio), "negative"),
        "weight_low/positive": (positive & (weight > ratio), "positive"),
        "weight_low/negative": (negative & (weight > ratio), "negative"),
        "ppo_drop": (dropped, "tokens"),
        "ppo_drop/positive": (dropped & positive, "positive"),
        "ppo_drop/negative": (dropped & negative, "negative"),
        "rejected": (real & ~parts.keep_mask, "tokens"),
        "learnt": (_is_learnt(parts), "tokens"),
        "ratio": (ratio, "tokens"),
        "weight": (weight, "tokens"),
        "weight_squared": (weight * weight, "tokens"),
        "rho": (parts.rho, "tokens"),
        "rho_squared": (parts.rho * parts.rho, "tokens"),
        "k1_old": (-x, "tokens"),
        "k3_old": (jnp.expm1(x) - x, "tokens"),
        "advantage": (a, "tokens"),
    }
    if terms.logp_ref is not None:
        x = terms.logp_ref - terms.logp
        summed |= {"k1_ref": (-x, "tokens"), "k3_ref": (jnp.expm1(x) - x, "tokens")}
    if terms.entropy is not None:
        summed["entropy"] = (terms.entropy, "tokens")
    sums = {
        name: TokenSum(_masked_sum(values, real, ratio.dtype), divisor)
        for name, (values, divisor) in summed.items()
    }
    edges = jnp.asarray(_LOG_RATIO_EDGES, ratio.dtype)[None, None, :]
    # [B, T, edges], a comparison that XLA fuses into the sum.
    above = real[..., None] & (jnp.log(ratio)[..., None] > edges)
    sums["ratio_above"] = TokenSum(jnp.sum(above, axis=(0, 1), dtype=ratio.dtype), "tokens")
    maxima = {
        "ratio_max": jnp.max(jnp.where(real, ratio, -jnp.inf)),
        "ratio_min": jnp.max(jnp.where(real, -ratio, -jnp.inf)),  # negative, to be a maximum
    }
    return MetricSums(drops=None, maxima=maxima, shares=dict(parts.shares), sums=sums)


def _is_learnt(parts: loss_lib.LossParts) -> Bool[Array, "B T"]:
    """Return which tokens have a policy term with a gradient."""
    terms = parts.terms
    factors = (terms.coefficients, terms.advantages, parts.weight, parts.rho)
    learnt = (terms.mask > 0) & parts.clip_mask & parts.keep_mask
    return functools.reduce(lambda chosen, factor: chosen & (factor != 0), factors, learnt)


def add_metrics(first: MetricSums, second: MetricSums) -> MetricSums:
    """Return the metrics of two parts of a step together: sums are added, maxima compared."""
    total = jax.tree.map(jnp.add, first, second)
    return total._replace(maxima=jax.tree.map(jnp.maximum, first.maxima, second.maxima))


def summarize_metrics(metrics: MetricSums) -> dict[str, float]:
    """Return a whole step's metrics as numbers.

    A share is a fraction of tokens, 0 to 1. "Positive" are the tokens with A > 0, "negative" those
    with A < 0. Every mean is over the tokens that the model wrote.

    Returns:
      loss, policy_loss, ppo_loss, kl_loss, entropy_loss: see `loss.LossParts.shares`.
      balance_loss: balance loss of the routers, without its coefficient.
      tokens: number of tokens that the model wrote.
      positive, negative: share of such tokens.
      clip_high, clip_low: share of the positive, or the negative, tokens that M drops.
      weight_high/SIGN, weight_low/SIGN: share of the tokens of that sign whose weight a bound has
        made smaller, or larger, than r.
      ppo_drop: share of tokens that PPO's clipping would drop. ppo_drop/SIGN: of that sign.
      rejected: share of tokens that the correction or the off-policy mask rejects.
      learnt: share of tokens whose policy term has a gradient.
      ratio, weight, rho, advantage: mean of r, w, rho and A.
      ratio_max, ratio_min: extremes of r.
      ratio_p99: 99th percentile of r, rounded up by at most 5%, infinite above e^3.
      weight_effective, rho_effective: effective sample size (sum w)^2 / sum w^2 as a share of the
        tokens. 1 means equal weights.
      k1_old, k3_old: estimates of KL(policy || old), old being the weights before the batch, nats.
        Of tokens that r compares with the sampler (`Objective.stale_anchor`) it is the sampler.
      k1_ref, k3_ref: the same of the reference model, if the loss has its KL.
      entropy: mean exact entropy, nats.
    """
    sums = {name: np.asarray(x.total, np.float64) for name, x in metrics.sums.items()}
    out = {name: float(value) for name, value in metrics.shares.items()}
    above = sums.pop("ratio_above")
    for name, total in sums.items():
        # At least 1, so that a step without such tokens has shares of 0.
        out[name] = float(total) / max(float(sums[metrics.sums[name].divisor]), 1.0)
    # A number, not a share.
    tokens = out["tokens"] = float(sums["tokens"])
    for name in ("weight", "rho"):
        square = out.pop(f"{name}_squared")
        out[f"{name}_effective"] = out[name] ** 2 / square if square else 0.0
    out["ratio_max"] = float(metrics.maxima["ratio_max"])
    out["ratio_min"] = -float(metrics.maxima["ratio_min"])
    # The first edge that at most 1% of the tokens are above.
    few = above <= 0.01 * tokens
    out["ratio_p99"] = float(np.exp(_LOG_RATIO_EDGES[few.argmax()])) if few.any() else math.inf
    return out


def count_drops_by_token(
    tokens: Int[Array, "B T"],
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Real[Array, "B T"],
    vocab_size: int,
) -> Int[Array, "2 V"]:
    """Return how often `ppo_drop_mask` dropped each token id, and how often the model wrote it."""
    real = mask > 0
    return _count_by_token(tokens, (real & ppo_drop_mask(ratio, advantages), real), vocab_size)


def count_clips_by_token(
    tokens: Int[Array, "B T"],
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Real[Array, "B T"],
    bound: float | None,
    vocab_size: int,
) -> Int[Array, "2 V"]:
    """Return how often each id with A > 0 had a ratio above `bound`, and how often it had A > 0.

    Args:
      tokens: ids.
      ratio: r.
      advantages: A.
      mask: 1 where the model wrote the token.
      bound: ratio above which the objective drops such a token or caps its weight. None for no
        bound, and counts of 0.
      vocab_size: V.
    """
    good = (mask > 0) & (advantages > 0)
    above = jnp.zeros_like(good) if bound is None else good & (ratio > bound)
    return _count_by_token(tokens, (above, good), vocab_size)


def _count_by_token(tokens, flags, vocab_size: int):
    """Return for each array of flags [B, T] how often it is true, by token id, [flags, V]."""
    ids = tokens.reshape(-1)
    counts = [x.reshape(-1).astype(jnp.int32) for x in flags]
    return jnp.stack([jax.ops.segment_sum(x, ids, vocab_size) for x in counts])


def rank_dropped_tokens(
    counts: Any, num: int = 10, min_dropped: int = 1
) -> list[tuple[int, int, int]]:
    """Return (token id, times dropped, times seen) of the ids that were dropped most often.

    Args:
      counts: [2, V], of `count_drops_by_token` or `count_clips_by_token`.
      num: ids at most.
      min_dropped: times that an id was dropped at least. 0 lists ids that were never dropped too.
    """
    dropped, total = np.asarray(counts)
    listed = np.flatnonzero((dropped >= min_dropped) & (total > 0))
    # `lexsort` sorts by its last key first: most often dropped, then most often seen.
    order = listed[np.lexsort((-total[listed], -dropped[listed]))][:num]
    return [(int(i), int(dropped[i]), int(total[i])) for i in order]


def summarize_groups(
    rewards: Sequence[float],
    group_ids: Sequence[Any],
    valid: Sequence[bool],
    lengths: Sequence[int],
    statuses: Sequence[str],
    outcomes: Sequence[float | None] | None = None,
    pass_outcome: float = 1.0,
) -> dict[str, float]:
    """Return a batch's rewards by sample and group, and its lengths and ends.

    Args:
      rewards: reward of each sample. Any value where the sample is not valid.
      group_ids: group of each sample.
      valid: whether the sample counts.
      lengths: length of each answer, tokens.
      statuses: how each answer ended, see `sample.Sample`.
      outcomes: says whether each answer is right. The reward stands for one that is None.
      pass_outcome: the least outcome of a right answer.

    Returns:
      reward_mean, reward_std: over valid samples, NaN without one.
      pass_at_k: share of groups with a right answer.
      zero_variance: share of groups whose rewards are all the same, so that they teach nothing.
      zero_variance_right, zero_variance_wrong: its two parts: all answers right, or not.
      invalid: share of samples that do not count.
      truncated, repetition: share of samples that filled the window, or ended in a loop.
      length_p50, length_p99, length_mean, length_max: tokens, of all samples, valid or not.
    """
    ok = np.asarray(valid, bool)
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    ids = np.unique(np.asarray(group_ids), return_inverse=True)[1].reshape(-1)
    outcome = reward
    if outcomes is not None:
        pairs = zip(outcomes, reward, strict=True)
        outcome = np.asarray([r if value is None else value for value, r in pairs], np.float64)
    # Groups without a valid sample are no groups here.
    members = [ok & (ids == g) for g in np.unique(ids[ok])]
    passed = [outcome[m] >= pass_outcome for m in members]
    flat = [
        part.all()
        for part, m in zip(passed, members, strict=True)
        if advantages_lib.has_zero_variance(reward[m])
    ]
    status = np.asarray(statuses)
    out = {
        "reward_mean": reward[ok].mean() if ok.any() else math.nan,
        "reward_std": reward[ok].std() if ok.any() else math.nan,
        "pass_at_k": _mean_flag([part.any() for part in passed]),
        "zero_variance": len(flat) / max(len(members), 1),
        "zero_variance_right": sum(flat) / max(len(members), 1),
        "zero_variance_wrong": sum(not right for right in flat) / max(len(members), 1),
        "invalid": _mean_flag(~ok),
        "truncated": _mean_flag(status == "length"),
        "repetition": _mean_flag(status == "repetition"),
    }
    if length.size:
        out |= {"length_p50": np.percentile(length, 50), "length_p99": np.percentile(length, 99)}
        out |= {"length_mean": length.mean(), "length_max": length.max()}
    return {name: float(value) for name, value in out.items()}


def gradient_shares(grads: Any) -> dict[str, Float[Array, ""]]:
    """Return which share of a gradient's entries has an absolute value below 1e-20, ..., 1e0.

    M1's remark is about "below_1e-14". "zero" is the share of exact zeros.
    """
    leaves = [jnp.abs(x) for x in jax.tree.leaves(grads)]
    out = {f"below_1e{e}": _true_fraction([x < 10.0**e for x in leaves]) for e in GRADIENT_DECADES}
    return {"zero": _true_fraction([x == 0 for x in leaves])} | out


def gradient_histogram(shares: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of each decade by its upper end. "above" is the share of 1 and more."""
    below = [float(shares[f"below_1e{e}"]) for e in GRADIENT_DECADES]
    # Shares below a bound are cumulative, so their differences are the decades.
    steps = np.diff([0.0, *below, 1.0])
    return dict(
        zip([*(f"1e{e}" for e in GRADIENT_DECADES), "above"], map(float, steps), strict=True)
    )


def zero_share(tree: Any) -> Float[Array, ""]:
    """Return which share of a tree's entries is 0. A second moment of 0 is lost to float32."""
    return _true_fraction([x == 0 for x in jax.tree.leaves(tree)])


def _true_fraction(leaves):
    # A float, because a large model has more entries than an int32 counts.
    size = float(sum(x.size for x in leaves))
    # Integers along the last axis: float32 would stop counting ones at 2^24.
    rows = [jnp.sum(jnp.atleast_1d(x), axis=-1, dtype=jnp.int32) for x in leaves]
    return jnp.sum(jnp.stack([jnp.sum(x.astype(jnp.float32)) / size for x in rows]))


def _masked_sum(value, real, dtype):
    return jnp.sum(jnp.where(real, value.astype(dtype), 0))


def _mean_flag(flags) -> float:
    return float(np.mean(flags)) if len(flags) else 0.0
