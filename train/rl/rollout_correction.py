"""Rollout correction: importance weights between sampler and trainer.

Sampler and trainer run different programs, so their probabilities of the same token differ, even
under the same weights of the model. With d = logp_old - logp_rollout of each token, the importance
weight of what was sampled is exp(d). Weight and rejection are kept apart: a rejected token still
has its weight, and still counts in every denominator.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

WEIGHT_LEVELS = ("token", "sequence", "geometric")
CORRECTION_MODES = ("truncate", "mask")
MAX_LOG_RATIO = 20.0  # exp beyond it is useless as a weight, and soon infinite


@dataclasses.dataclass(frozen=True)
class RolloutCorrection:
    """How tokens are weighted by sampler and trainer. It is hashable, as a part of `Objective`.

    Attributes:
      level: what has one weight. "token": exp(d) of each token. "sequence": exp(sum of d) of a
        sample. "geometric": exp(mean of d) of a sample.
      how: "truncate" moves weights into [low, high]. "mask" rejects tokens whose weight is outside.
      low: lower bound of the weight, at least 0, or None.
      high: upper bound of the weight, at least 0, or None.
      veto: rejects a sample any of whose tokens has exp(d) below this value. At least 0, or None.
      normalise: divide by the mean weight of the whole step's tokens, see `mean_correction_weight`.

    Raises:
      ValueError: a name that does not exist, or bounds that no weight can meet.
    """

    level: str = "token"
    how: str = "truncate"
    low: float | None = None
    high: float | None = 2.0
    veto: float | None = None
    normalise: bool = False

    def __post_init__(self):
        for name, choices in (("level", WEIGHT_LEVELS), ("how", CORRECTION_MODES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"correction: {name}: got {getattr(self, name)!r}; "
                    f"wanted one of {', '.join(choices)}"
                )
        for name in ("low", "high", "veto"):
            value = getattr(self, name)
            # NaN fails this comparison too.
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"correction: {name}: got {value}; wanted a number of at least 0, or None"
                )
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"correction: got low {self.low} > high {self.high}; wanted low first")
        if self.how == "mask" and self.low is None and self.high is None:
            raise ValueError("correction: got how 'mask' without low and high; wanted one of them")


def correction_weights(
    correction: RolloutCorrection,
    logp_old: Float[Array, "B T"],
    logp_rollout: Float[Array, "B T"],
    mask: Real[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return each token's weight, not normalised, and whether it is kept. Neither has a gradient.

    Args:
      correction: which weight, and its bounds.
      logp_old: log-probability by the trainer, with the weights of the model that sampled. Any
        value where mask is 0, NaN too.
      logp_rollout: log-probability by the sampler. Any value where mask is 0.
      mask: 1 where the model wrote the token. The weight of other tokens is 1.
      segment_ids: which sample of its row a token belongs to, 0 to T.
    """
    real = mask > 0
    # A `where` before any arithmetic: padding may hold NaN, and totals would spread it.
    d = jax.lax.stop_gradient(_clip_log_ratio(jnp.where(real, logp_old - logp_rollout, 0.0)))
    level = d
    if correction.level != "token":
        level = segment_totals(d, segment_ids)
    if correction.level == "geometric":
        # The mean over the tokens that the model wrote: tools' tokens have d = 0, and do not count.
        level = level / jnp.maximum(segment_totals(real.astype(d.dtype), segment_ids), 1.0)
    # Clipped again, because a sample's sum may be far larger than its terms.
    weight = jnp.exp(_clip_log_ratio(level))
    keep = jnp.ones(weight.shape, bool)
    if correction.how == "truncate":
        weight = jnp.clip(weight, correction.low, correction.high)
    else:
        low = -math.inf if correction.low is None else correction.low
        high = math.inf if correction.high is None else correction.high
        keep = (weight >= low) & (weight <= high)
    if correction.veto is not None:
        bad = (jnp.exp(d) < correction.veto).astype(d.dtype)
        keep &= segment_totals(bad, segment_ids) == 0
    return jnp.where(real, weight, 1.0), keep


def mean_correction_weight(
    correction: RolloutCorrection, samples: Iterable[tuple[np.ndarray, np.ndarray]]
) -> float:
    """Return the mean of `correction_weights` over a step's tokens, rejected ones included.

    It is `TokenTerms.weight_mean`. It is known before the first microbatch of the step is
    computed, so the host computes it, sample by sample.

    Args:
      correction: which weight, and its bounds.
      samples: (logp_old, logp_rollout) of each sample of the step, [tokens] each. Only tokens that
        the model wrote.
    """
    total, count = 0.0, 0
    for logp_old, logp_rollout in samples:
        if not len(logp_old):
            continue
        gaps = np.asarray(logp_old, np.float64) - np.asarray(logp_rollout, np.float64)
        d = np.clip(gaps, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        # What a sample has one weight of: the weight of each of its tokens.
        level = {"token": d, "sequence": d.sum(), "geometric": d.mean()}[correction.level]
        weight = np.exp(np.clip(level, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        if correction.how == "truncate":
            low = -math.inf if correction.low is None else correction.low
            high = math.inf if correction.high is None else correction.high
            weight = np.clip(weight, low, high)
        total += float(np.sum(np.broadcast_to(weight, d.shape)))
        count += len(d)
    return total / max(count, 1)


def on_policy_mask(
    threshold: float,
    advantages: Float[Array, "B T"],
    logp: Float[Array, "B T"],
    logp_rollout: Float[Array, "B T"],
    mask: Real[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Bool[Array, "B T"]:
    """Return False for tokens of bad samples (A < 0) that the policy has already left.

    The policy has left a sample whose mean of logp_rollout - logp is above the threshold. This mean
    estimates the KL of sampler to policy (DeepSeek-V3.2's off-policy sequence mask).
    """
    real = mask > 0
    gap = jnp.where(real, logp_rollout - logp, 0.0)
    count = jnp.maximum(segment_totals(real.astype(gap.dtype), segment_ids), 1.0)
    return ~(real & (advantages < 0) & (segment_totals(gap, segment_ids) / count > threshold))


@jax.vmap
def segment_totals(values: Float[Array, "T"], segment_ids: Int[Array, "T"]) -> Float[Array, "T"]:
    """Return at each token the sum over its segment of the row. Ids are 0 to T."""
    # T + 1 segments: padding is segment 0, and a row of T samples of one token ends with id T.
    total = functools.partial(jax.ops.segment_sum, num_segments=values.shape[0] + 1)
    return total(values, segment_ids)[segment_ids]


def _clip_log_ratio(x):
    return jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)
