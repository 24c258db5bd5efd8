"""What is measured of reinforcement learning: on the device as sums, on the host over a batch.

Sums over tokens add up over micro-batches, rows and hosts. `summarize_metrics` divides them, once.
Names of PPO's clipping: "high" is A > 0 with a ratio above its bound, "low" is A < 0 with a ratio
below its bound.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from train.rl import advantages as advantages_lib
from train.rl import loss as loss_lib

# DAPO's bounds: what PPO's clipping would have dropped under any objective (M1 3.1's argument).
PPO_CLIP_LOW, PPO_CLIP_HIGH = 0.2, 0.28
# Log ratios above which tokens are counted, for the 99th percentile: 5% apart. A percentile itself
# does not add up over micro-batches, but such counts do.
_LOG_RATIO_EDGES = np.linspace(-3, 3, 121)
# Most of M1's gradients were below 1e-14 (M1 3.2), where AdamW's usual eps would hide them.
GRADIENT_DECADES = tuple(range(-20, 1))

# Metrics of a part of a step. "shares", "sums" and "drops" are added up over the parts of a step;
# of "maxima" the largest is taken.
MetricSums = dict[str, dict[str, Any]]


def ppo_drop_mask(
    ratio: Float[Array, "B T"], advantages: Float[Array, "B T"]
) -> Bool[Array, "B T"]:
    """Return which tokens PPO's clipping at 0.2 and 0.28 would take out of the gradient."""
    high, low = ratio > 1 + PPO_CLIP_HIGH, ratio < 1 - PPO_CLIP_LOW
    return ((advantages > 0) & high) | ((advantages < 0) & low)


def loss_metrics(parts: loss_lib.LossParts) -> MetricSums:
    """Return the metrics of a loss: its shares, and what `token_sums` measures."""
    sums, maxima = token_sums(parts)
    return {"shares": dict(parts.shares), "sums": sums, "maxima": maxima}


def token_sums(parts: loss_lib.LossParts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return sums over the tokens that the model wrote, and maxima over them."""
    terms, ratio, weight = parts.terms, parts.ratio, parts.weight
    real, a = terms.mask > 0, terms.advantages
    positive, negative = real & (a > 0), real & (a < 0)
    x = terms.logp_old - terms.logp
    dropped = real & ppo_drop_mask(ratio, a)
    sums = {
        "tokens": real,
        "positive": positive,
        "negative": negative,
        "clip_high": positive & ~parts.clip_mask,
        "clip_low": negative & ~parts.clip_mask,
        # Where the weight is not the ratio, a bound has moved it: w < r at the upper bound.
        "weight_high/positive": positive & (weight < ratio),
        "weight_high/negative": negative & (weight < ratio),
        "weight_low/positive": positive & (weight > ratio),
        "weight_low/negative": negative & (weight > ratio),
        "ppo_drop": dropped,
        "ppo_drop/positive": dropped & positive,
        "ppo_drop/negative": dropped & negative,
        "rejected": real & ~parts.keep_mask,
        "ratio": ratio,
        "weight": weight,
        "weight_squared": weight * weight,
        "rho": parts.rho,
        "rho_squared": parts.rho * parts.rho,
        "k1_old": -x,
        "k3_old": jnp.expm1(x) - x,
        "advantage": a,
    }
    if terms.logp_ref is not None:
        x = terms.logp_ref - terms.logp
        sums |= {"k1_ref": -x, "k3_ref": jnp.expm1(x) - x}
    if terms.entropy is not None:
        sums["entropy"] = terms.entropy
    sums = {name: _masked_sum(value, real, ratio.dtype) for name, value in sums.items()}
    edges = jnp.asarray(_LOG_RATIO_EDGES, ratio.dtype)[None, None, :]
    # [B, T, edges].
    above = real[..., None] & (jnp.log(ratio)[..., None] > edges)
    sums["ratio_above"] = jnp.sum(above, axis=(0, 1), dtype=ratio.dtype)
    maxima = {
        "ratio_max": jnp.max(jnp.where(real, ratio, -jnp.inf)),
        "ratio_min": jnp.max(jnp.where(real, -ratio, -jnp.inf)),  # negative, to be a maximum
    }
    return sums, maxima


def add_metrics(first: MetricSums, second: MetricSums) -> MetricSums:
    """Return the metrics of two parts of a step together."""
    total: MetricSums = {name: jax.tree.map(jnp.add, first[name], second[name]) for name in first}
    total["maxima"] = jax.tree.map(jnp.maximum, first["maxima"], second["maxima"])
    return total


def summarize_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return a whole step's metrics as numbers.

    The shares as they are; then means over tokens, and over the tokens of that sign for what is
    counted by the sign of A; ratio_p99, rounded up by at most 5% (infinite above e^3);
    weight_effective, the effective sample size (sum w)^2 / sum w^2 as a share of the tokens.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in metrics["sums"].items()}
    out = {name: float(value) for name, value in metrics["shares"].items()}
    above = sums.pop("ratio_above")
    tokens = float(sums["tokens"])
    of_sign = {name: max(float(sums[name]), 1.0) for name in ("positive", "negative")}
    of_sign |= {"high": of_sign["positive"], "low": of_sign["negative"]}
    for name, value in sums.items():
        part = name.removeprefix("clip_") if name.startswith("clip_") else name.split("/")[-1]
        total = max(tokens, 1.0)
        if name not in ("positive", "negative"):
            total = of_sign.get(part, total)
        out[name] = tokens if name == "tokens" else float(value) / total
    for name in ("weight", "rho"):
        square = out.pop(f"{name}_squared")
        out[f"{name}_effective"] = out[name] ** 2 / square if square else 0.0
    out["ratio_max"] = float(metrics["maxima"]["ratio_max"])
    out["ratio_min"] = -float(metrics["maxima"]["ratio_min"])
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
    """Return how often each token id was dropped by `ppo_drop_mask`, and how often it was there."""
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
    """Return how often each id with A > 0 had a ratio above `bound`, and how often it was there.

    bound: the objective's own, above which it drops such a token or caps its weight; None: none.
    """
    good = (mask > 0) & (advantages > 0)
    above = jnp.zeros_like(good) if bound is None else good & (ratio > bound)
    return _count_by_token(tokens, (above, good), vocab_size)


def _count_by_token(tokens, flags, vocab_size: int):
    ids = tokens.reshape(-1)
    counts = [x.reshape(-1).astype(jnp.int32) for x in flags]
    return jnp.stack([jax.ops.segment_sum(x, ids, vocab_size) for x in counts])


def rank_dropped_tokens(
    counts: Any, num: int = 10, min_dropped: int = 1
) -> list[tuple[int, int, int]]:
    """Return (token id, times dropped, times there) of the ids that were dropped most often.

    counts: of `count_drops_by_token` or `count_clips_by_token`. least: times dropped; 0 lists
      others that were there.
    """
    dropped, there = np.asarray(counts)
    listed = np.flatnonzero((dropped >= min_dropped) & (there > 0))
    order = listed[np.lexsort((-there[listed], -dropped[listed]))][:num]
    return [(int(i), int(dropped[i]), int(there[i])) for i in order]


def measure_mismatch(
    logp_rollout: np.ndarray,
    logp_old: np.ndarray,
    mask: np.ndarray,
    segment_ids: np.ndarray | None = None,
) -> dict[str, float]:
    """Return how far sampler and trainer are apart on the same tokens and weights (M1 3.2).

    With d = logp_old - logp_rollout and p = exp(logp): pearson of both p (Figure 3), means and
    maxima of |d| and of the difference of p, k1 = -mean d and k3 = mean(exp d - 1 - d), both of
    KL(sampler || trainer), chi2 = mean(exp 2d) - 1 by token and of exp(sum of d) by sequence,
    perplexity_ratio = exp(-mean d). Pearson of constant probabilities is NaN.

    Args:
      mask: [B, T], 1 where the model wrote the token. segment_ids: samples within a row; None
        for one sample a row.

    Raises:
      ValueError: no token at all.
    """
    real = np.asarray(mask) > 0
    if not real.any():
        raise ValueError("mismatch: got no token that the model wrote; wanted at least one")
    roll, old = (np.asarray(x)[real].astype(np.float64) for x in (logp_rollout, logp_old))
    d, p, q = old - roll, np.exp(old), np.exp(roll)
    rows = np.broadcast_to(np.arange(real.shape[0])[:, None], real.shape)
    segments = np.zeros_like(rows) if segment_ids is None else np.asarray(segment_ids)
    samples = np.stack([rows[real], segments[real]])
    _, sample = np.unique(samples, axis=1, return_inverse=True)
    sequence = np.clip(np.bincount(sample.reshape(-1), d), -20, 20)
    spread = p.std() * q.std()
    pearson = np.mean((p - p.mean()) * (q - q.mean())) / spread if spread else math.nan
    values = {
        "pearson": pearson,
        "probability_gap_mean": np.abs(p - q).mean(),
        "probability_gap_max": np.abs(p - q).max(),
        "logp_gap_mean": np.abs(d).mean(),
        "logp_gap_max": np.abs(d).max(),
        "k1": -d.mean(),
        "k3": np.mean(np.expm1(d) - d),
        "chi2_token": np.mean(np.exp(2 * d)) - 1,
        "chi2_sequence": np.mean(np.exp(2 * sequence)) - 1,
        "perplexity_ratio": np.exp(-d.mean()),
    }
    return {name: float(value) for name, value in values.items()}


def summarize_groups(
    rewards: Sequence[float],
    group_ids: Sequence[Any],
    valid: Sequence[bool],
    lengths: Sequence[int],
    statuses: Sequence[str],
    pass_reward: float = 1.0,
) -> dict[str, float]:
    """Return a batch's rewards by sample and group, and its lengths and ends.

    reward_mean, reward_std; pass_at_k, the share of groups with a sample of reward `right` or
    more; zero_variance, the share of groups without variance, split into zero_variance_right and
    zero_variance_wrong; length_p50, _p99, _max in tokens; truncated and repetition, shares of
    samples; invalid, the share without a reward, which nothing else but lengths and ends counts.
    """
    ok = np.asarray(valid, bool)
    reward, length = np.asarray(rewards, np.float64), np.asarray(lengths, np.float64)
    ids = np.unique(np.asarray(group_ids), return_inverse=True)[1].reshape(-1)
    parts = [reward[ok & (ids == g)] for g in np.unique(ids[ok])]
    flat = [part for part in parts if advantages_lib.has_zero_variance(part)]
    status = np.asarray(statuses)
    out = {
        "reward_mean": reward[ok].mean() if ok.any() else math.nan,
        "reward_std": reward[ok].std() if ok.any() else math.nan,
        "pass_at_k": _mean_flag([part.max() >= pass_reward for part in parts]),
        "zero_variance": len(flat) / max(len(parts), 1),
        "zero_variance_right": sum(part[0] >= pass_reward for part in flat) / max(len(parts), 1),
        "zero_variance_wrong": sum(part[0] < pass_reward for part in flat) / max(len(parts), 1),
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

    "below_1e-14" of them is M1's remark. Exact zeros are "zero". Sharded gradients stay so.
    """
    leaves = [jnp.abs(x) for x in jax.tree.leaves(grads)]
    out = {f"below_1e{e}": _true_fraction([x < 10.0**e for x in leaves]) for e in GRADIENT_DECADES}
    return {"zero": _true_fraction([x == 0 for x in leaves])} | out


def gradient_histogram(shares: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of each decade, by its upper end; "above" is 1 and more."""
    below = [float(shares[f"below_1e{e}"]) for e in GRADIENT_DECADES]
    steps = np.diff([0.0, *below, 1.0])
    return dict(
        zip([*(f"1e{e}" for e in GRADIENT_DECADES), "above"], map(float, steps), strict=True)
    )


def zero_share(tree: Any) -> Float[Array, ""]:
    """Return which share of a tree's entries is 0: of second moments, what float32 lost."""
    return _true_fraction([x == 0 for x in jax.tree.leaves(tree)])


def _true_fraction(leaves):
    size = float(sum(x.size for x in leaves))  # of a large model no int32
    # Integers along the last axis: float32 would stop counting ones at 2^24.
    rows = [jnp.sum(jnp.atleast_1d(x), axis=-1, dtype=jnp.int32) for x in leaves]
    return jnp.sum(jnp.stack([jnp.sum(x.astype(jnp.float32)) / size for x in rows]))


def _masked_sum(value, real, dtype):
    return jnp.sum(jnp.where(real, value.astype(dtype), 0))


def _mean_flag(flags) -> float:
    return float(np.mean(flags)) if len(flags) else 0.0
