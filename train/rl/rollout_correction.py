"""Weights between sampler and trainer, which never agree to the last bit (and sometimes less).

With d = logp_old - logp_rollout of each token, both of the same weights of the model, the true
importance weight of what was sampled is exp(d). Weight and rejection are kept apart: a rejected
token still has its weight, and still counts in every denominator.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

WEIGHT_LEVELS = ("token", "sequence", "geometric")
CORRECTION_MODES = ("truncate", "mask")
MAX_LOG_RATIO = 20.0  # exp beyond it is useless as a weight, and soon infinite


@dataclasses.dataclass(frozen=True)
class RolloutCorrection:
    """How tokens are weighted by sampler and trainer; hashable.

    Args:
      level: what a weight is of: "token", exp(d); "sequence", exp(sum of d); "geometric",
        exp(mean of d), the last two of a whole sample.
      how: "truncate" moves weights into [low, high]; "mask" rejects those outside.
      low, high: bounds of the weight, at least 0; None is none.
      veto: rejects a sample any of whose tokens has exp(d) below it; None for none.
      normalise: divides by the mean weight of the whole step's tokens, see `weight_sum_and_count`.

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
        for name, known in (("level", WEIGHT_LEVELS), ("how", CORRECTION_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"correction: {name}: got {getattr(self, name)!r}; "
                    f"wanted one of {', '.join(known)}"
                )
        for name in ("low", "high", "veto"):
            value = getattr(self, name)
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
    """Return each token's weight, not normalised, and whether it is kept; no gradient.

    mask: 1 where the model wrote the token; elsewhere the weight is 1, and anything may stand.
    segment_ids: which sample of its row a token belongs to, 0 to T.
    """
    real = mask > 0
    d = jax.lax.stop_gradient(_clip_log_ratio(jnp.where(real, logp_old - logp_rollout, 0.0)))
    level = d
    if correction.level != "token":
        level = segment_totals(d, segment_ids)
    if correction.level == "geometric":
        level = level / jnp.maximum(segment_totals(real.astype(d.dtype), segment_ids), 1.0)
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


def weight_sum_and_count(
    weight: Float[Array, "B T"], mask: Real[Array, "B T"]
) -> Float[Array, "2"]:
    """Return (sum of the tokens' weights, number of tokens), rejected ones included.

    These add up over rows and hosts; their quotient over the whole step is
    `TokenTerms.weight_mean`.
    """
    return jnp.stack([jnp.sum(jnp.where(mask > 0, weight, 0.0)), jnp.sum(mask > 0)])


def on_policy_mask(
    threshold: float,
    advantages: Float[Array, "B T"],
    logp: Float[Array, "B T"],
    logp_rollout: Float[Array, "B T"],
    mask: Real[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Bool[Array, "B T"]:
    """Return False for bad samples (A < 0) that the policy has already left.

    Those whose mean of logp_rollout - logp, an estimate of the KL of sampler to policy, is above
    the threshold (DeepSeek-V3.2's off-policy sequence mask).
    """
    real = mask > 0
    gap = jnp.where(real, logp_rollout - logp, 0.0)
    count = jnp.maximum(segment_totals(real.astype(gap.dtype), segment_ids), 1.0)
    return ~(real & (advantages < 0) & (segment_totals(gap, segment_ids) / count > threshold))


@jax.vmap
def segment_totals(values: Float[Array, "T"], segment_ids: Int[Array, "T"]) -> Float[Array, "T"]:
    """Return at each token the sum over its segment of the row; ids are 0 to T."""
    total = functools.partial(jax.ops.segment_sum, num_segments=values.shape[0] + 1)
    return total(values, segment_ids)[segment_ids]


def _clip_log_ratio(x):
    return jnp.clip(x, -MAX_LOG_RATIO, MAX_LOG_RATIO)
