"""The unified policy loss on arrays: `train/rl/objective.py` has its equation and its choices.

Everything here is a pure function of an `Objective` and of arrays. The loss of an optimizer step is
a plain sum of shares: `token_coefficients` works out on the host, from the masks of the whole step,
what each token counts. So the shares of microbatches, rows and hosts add up to the same loss,
however the step is split.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from train.rl import objective as objective_lib
from train.rl import rollout_correction as rollout_correction_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTerms:
    """What the loss is made of, for B packed rows of T tokens.

    A gradient flows through logp and entropy alone. Where mask is 0, any value may stand, NaN too.
    All log-probabilities are at the sampler's temperature.

    Attributes:
      logp: log-probability of the token under the weights that are trained.
      logp_old: the same by the trainer's weights at the start of the batch.
      logp_rollout: the same by the sampler, when it drew the token.
      advantages: A of the token, see `advantages`.
      mask: 1 where the model wrote the token, else 0.
      coefficients: c of the token, see `token_coefficients`.
      segment_ids: which sample of its row a token belongs to, 0 to T. No sample spans two rows.
      logp_ref: log-probability by the reference model, or None without one.
      entropy: exact entropy of the token's distribution, nats. None if it was not computed.
      weight_mean: mean weight of the whole step's tokens, for a correction that normalises, see
        `rollout_correction.mean_correction_weight`. None for other corrections.
    """

    logp: Float[Array, "B T"]
    logp_old: Float[Array, "B T"]
    logp_rollout: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    mask: Real[Array, "B T"]
    coefficients: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    logp_ref: Float[Array, "B T"] | None = None
    entropy: Float[Array, "B T"] | None = None
    weight_mean: Float[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossParts:
    """What the loss was made of on the way, so that metrics measure it and compute nothing again.

    Attributes:
      shares: sums over these rows of c times a term, to be added up over a step.
        "loss" is L. "policy_loss" is l. "ppo_loss" is PPO's form of l, a minimum, whose value
        differs. "kl_loss" and "entropy_loss" are without their coefficients, and absent without
        their terms.
      terms: the loss's input, with 0 where mask is 0, and at least float32.
      ratio: r.
      weight: w.
      clip_mask: M, False where the clipping drops the token.
      rho: the correction's weight, 1 without a correction.
      keep_mask: False where the correction rejects the token, and where mask is 0.
    """

    shares: dict[str, Float[Array, ""]]
    terms: TokenTerms
    ratio: Float[Array, "B T"]
    weight: Float[Array, "B T"]
    clip_mask: Bool[Array, "B T"]
    rho: Float[Array, "B T"]
    keep_mask: Bool[Array, "B T"]


def token_coefficients(
    objective: objective_lib.Objective,
    lengths: np.ndarray,
    prompt_ids: np.ndarray,
    valid: np.ndarray,
) -> np.ndarray:
    """Return c of each sample's masked tokens in the loss of a whole step: [N] float64.

    With n_i the sample's masked tokens and N the number of valid samples:

      token-mean           1 / sum(n)
      prompt-mean          1 / (prompts * the prompt's tokens)         (M1 Eq. 4 as printed)
      seq-mean-token-mean  1 / (N n_i)
      seq-mean-token-sum   1 / N
      seq-sum-const        1 / (N length_max)
      mix                  mix_lambda of seq-mean-token-mean, the remainder of token-mean
                           (our reading of M1 section 5)

    No divisor is below 1. A valid sample without tokens counts in N. An invalid sample counts
    nowhere, and its tokens get 0.

    Args:
      lengths: n, [N].
      prompt_ids: [N], equal for the samples of one prompt.
      valid: [N] bool.

    Raises:
      ValueError: arrays of different lengths.
    """
    lengths, prompt_ids, valid = (np.asarray(x) for x in (lengths, prompt_ids, valid))
    if not lengths.shape == prompt_ids.shape == valid.shape or lengths.ndim != 1:
        raise ValueError(
            f"got lengths {lengths.shape}, prompts {prompt_ids.shape}, valid {valid.shape}; "
            "wanted one number of each for every sample"
        )
    valid = valid.astype(bool)
    lengths = np.where(valid, lengths, 0).astype(np.float64)
    _, prompt_index = np.unique(prompt_ids, return_inverse=True)
    num_samples = max(valid.sum(), 1)
    num_prompts = max(len(np.unique(prompt_index[valid])), 1)
    sample_tokens, step_tokens = np.maximum(lengths, 1), max(lengths.sum(), 1)
    prompt_tokens = sample_tokens
    if len(prompt_index):
        prompt_tokens = np.maximum(np.bincount(prompt_index, lengths), 1)[prompt_index]
    match objective.aggregation:
        case "token-mean":
            coefficients = np.full(lengths.shape, 1 / step_tokens)
        case "prompt-mean":
            coefficients = 1 / (num_prompts * prompt_tokens)
        case "seq-mean-token-mean":
            coefficients = 1 / (num_samples * sample_tokens)
        case "seq-mean-token-sum":
            coefficients = np.full(lengths.shape, 1 / num_samples)
        case "seq-sum-const":
            # `Objective` made sure that length_max is set here; `or 1` is for the type checker.
            coefficients = np.full(lengths.shape, 1 / (num_samples * (objective.length_max or 1)))
        case _:  # "mix"
            by_sample = objective.mix_lambda or 0.0
            coefficients = by_sample / (num_samples * sample_tokens) + (1 - by_sample) / step_tokens
    return np.where(valid, coefficients, 0.0)


def compute_loss(
    objective: objective_lib.Objective, terms: TokenTerms
) -> tuple[Float[Array, ""], LossParts]:
    """Return these rows' share of the step's loss, and what it was made of.

    The arithmetic is in float32, or in float64 if the terms are.

    Raises:
      ValueError: terms that the objective needs are None.
    """
    _check_terms(objective, terms)
    terms = _clean_terms(terms)
    ratio = _importance_ratios(objective, terms)
    # The gradient of l is that of logp alone, as r, w, M and rho are all stopped.
    weight = jnp.ones_like(ratio)
    if objective.weighted:
        weight = jnp.clip(ratio, objective.is_weight_min, objective.is_weight_max)
    clip_mask = _compute_clip_mask(objective, ratio, terms.advantages)
    rho, keep_mask = _rho_and_keep_mask(objective, terms)
    scale = jnp.where(clip_mask & keep_mask, rho, 0.0)
    # A rejected token gets 0 here, and still counts in the denominators of c.
    policy = -weight * terms.advantages * terms.logp * scale
    # Logged, not trained on. The minimum itself drops what M drops, so `scale` is not its factor.
    ppo = _ppo_minimum_loss(objective, ratio, terms.advantages) * jnp.where(keep_mask, rho, 0.0)
    total, losses = policy, {"policy_loss": policy, "ppo_loss": ppo}
    if terms.logp_ref is not None:
        losses["kl_loss"] = estimate_kl(objective, terms.logp_ref - terms.logp)
        # The estimate is logged without a coefficient too. 0 times an infinite one would be NaN.
        if objective.kl_coef:
            total += objective.kl_coef * losses["kl_loss"]
    if terms.entropy is not None:
        losses["entropy_loss"] = -terms.entropy
        if objective.entropy_coef:
            total -= objective.entropy_coef * terms.entropy
    losses = {"loss": total} | losses
    # c is 0 where mask is 0, and in samples that are not valid.
    shares = {name: jnp.sum(terms.coefficients * x) for name, x in losses.items()}
    return shares["loss"], LossParts(shares, terms, ratio, weight, clip_mask, rho, keep_mask)


def estimate_kl(
    objective: objective_lib.Objective, log_ratio: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """Return the estimate of the KL to the reference model from x = logp_ref - logp."""
    if objective.kl_clamp is not None:
        log_ratio = jnp.clip(log_ratio, -objective.kl_clamp, objective.kl_clamp)
    # Functions, so that the program has the chosen estimator alone.
    estimators = {
        "k1": lambda: -log_ratio,
        "k2": lambda: log_ratio * log_ratio / 2,
        "k3": lambda: jnp.expm1(log_ratio) - log_ratio,
    }
    kl = estimators[objective.kl_kind]()
    return kl if objective.kl_max is None else jnp.clip(kl, -objective.kl_max, objective.kl_max)


def _importance_ratios(
    objective: objective_lib.Objective, terms: TokenTerms
) -> Float[Array, "B T"]:
    """Return r of every token of clean terms, 1 where mask is 0. It has no gradient."""
    anchor = terms.logp_old if objective.anchor == "old" else terms.logp_rollout
    # Clipped before the exp, so that r is finite however far the policy has moved.
    limit = rollout_correction_lib.MAX_LOG_RATIO
    d = jnp.clip(terms.logp - anchor, -limit, limit)
    if objective.ratio == "sequence":
        # GSPO: exp of the mean over a sample's tokens, the geometric mean of their ratios.
        count = rollout_correction_lib.segment_totals(terms.mask, terms.segment_ids)
        d = rollout_correction_lib.segment_totals(d, terms.segment_ids) / jnp.maximum(count, 1.0)
        # A sample's mean reaches all its tokens, those of tools too. They get exp(0) back.
        d = d * terms.mask
    return jax.lax.stop_gradient(jnp.exp(d))


def _check_terms(objective: objective_lib.Objective, terms: TokenTerms) -> None:
    is_needed = {
        "logp_ref": objective.kl_coef != 0,
        "entropy": objective.entropy_coef != 0,
        "weight_mean": objective.correction is not None and objective.correction.normalise,
    }
    missing = [name for name in is_needed if is_needed[name] and getattr(terms, name) is None]
    if missing:
        raise ValueError(
            f"objective {objective.name}: got terms without {', '.join(missing)}; wanted them: "
            "the objective's coefficients use them"
        )


def _clean_terms(terms: TokenTerms) -> TokenTerms:
    """Return terms with 0 where mask is 0, before any exp sees what stands there.

    An exp of rubbish may be infinite, and the gradient of a `where` around it would be NaN.
    """
    real = terms.mask > 0

    def clean(name: str):
        value = getattr(terms, name)
        if value is None or name == "segment_ids":
            return value
        value = jnp.asarray(value)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        if name not in ("logp", "entropy"):
            value = jax.lax.stop_gradient(value)
        # Not a product with the mask: 0 times infinity is not 0.
        return value if value.ndim == 0 else jnp.where(real, value, 0.0)

    fields: dict[str, Any] = {f.name: clean(f.name) for f in dataclasses.fields(TokenTerms)}
    return TokenTerms(**fields)


def _compute_clip_mask(
    objective: objective_lib.Objective,
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
) -> Bool[Array, "B T"]:
    """Return M of Eq. 7 as booleans."""
    dropped = jnp.zeros(ratio.shape, bool)
    if objective.clip_high is not None:
        dropped |= (advantages > 0) & (ratio > 1 + objective.clip_high)
    if objective.clip_low is not None:
        dropped |= (advantages < 0) & (ratio < 1 - objective.clip_low)
    if objective.dual_clip is not None:
        dropped |= (advantages < 0) & (ratio > objective.dual_clip)
    return ~dropped


def ratio_upper_bound(objective: objective_lib.Objective) -> float | None:
    """Return the ratio above which M drops a token with A > 0 or w is capped, None for none."""
    clip_bound = None if objective.clip_high is None else 1 + objective.clip_high
    return min((x for x in (clip_bound, objective.is_weight_max) if x is not None), default=None)


def _rho_and_keep_mask(
    objective: objective_lib.Objective, terms: TokenTerms
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return rho, and whether the correction and the off-policy mask keep the token."""
    # Tokens that the model did not write are never kept.
    rho, keep_mask = jnp.ones_like(terms.logp_old), terms.mask > 0
    if objective.correction is not None:
        rho, not_rejected = rollout_correction_lib.correction_weights(
            objective.correction,
            terms.logp_old,
            terms.logp_rollout,
            terms.mask,
            terms.segment_ids,
        )
        keep_mask &= not_rejected
        if objective.correction.normalise:
            assert terms.weight_mean is not None, "`_check_terms` makes sure of it"
            rho = rho / terms.weight_mean
    if objective.off_policy_max is not None:
        keep_mask &= rollout_correction_lib.on_policy_mask(
            objective.off_policy_max,
            terms.advantages,
            terms.logp,
            terms.logp_rollout,
            terms.mask,
            terms.segment_ids,
        )
    return rho, keep_mask


def _ppo_minimum_loss(
    objective: objective_lib.Objective,
    ratio: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
) -> Float[Array, "B T"]:
    """Return max(-r A, -clip(r) A), for A < 0 at most -dual_clip A: PPO's loss as it is printed."""
    low = None if objective.clip_low is None else 1 - objective.clip_low
    high = None if objective.clip_high is None else 1 + objective.clip_high
    value = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, low, high) * advantages)
    if objective.dual_clip is None:
        return value
    return jnp.where(advantages < 0, jnp.minimum(value, -objective.dual_clip * advantages), value)
