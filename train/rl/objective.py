"""The unified policy objective (M1 3.1, Eq. 4-7): CISPO, the PPO family, REINFORCE and RLOO.

Per token, with sg the stop of the gradient and m the mask of what the model wrote:

  r   = sg(exp(logp - logp_anchor)), or one ratio for a whole sample (GSPO)
  w   = sg(clip(r, is_weight_min, is_weight_max))
  M   = 0 if (A > 0 and r > 1 + clip_high) or (A < 0 and r < 1 - clip_low)
          or (A < 0 and r > dual_clip), else 1
  rho = sg(correction(logp_old - logp_rollout))
  l   = -w A logp M rho
  L   = sum over the step of c (l + kl_coef kl - entropy_coef H)

CISPO clips the weight w and drops no token; PPO's clipping is M, which drops tokens, and it has
the same gradient as its usual form of a minimum. Every aggregation is a choice of the coefficients
c alone, which the masks of a whole optimiser step fix. So they are worked out once on the host,
and the shares of micro-batches, rows and hosts add up to the same loss however it is split.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.rl import metrics as rl_metrics
from train.rl import rollout_correction as rollout_correction_lib

ADVANTAGE_KINDS = ("group", "mean", "leave-one-out", "return", "return-baseline")
AGGREGATIONS = (
    "token-mean",
    "prompt-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-sum-const",
    "mix",
)
_FIELD_CHOICES = {
    "advantage": ADVANTAGE_KINDS,
    "aggregation": AGGREGATIONS,
    "ratio": ("token", "sequence"),
    "anchor": ("old", "rollout"),
    "kl_kind": ("k1", "k2", "k3"),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximised; hashable, so that a jitted step takes it as a constant.

    Args:
      name: the preset's.
      advantage: A of a sample (see `advantages`): "group", (R - mean) / (std + advantage_eps) of
        its group; "mean", R - mean; "leave-one-out", R - mean of the others; "return", the
        discounted rewards that follow a token, whitened over the batch's tokens;
        "return-baseline", the same with the group's mean taken off before.
      discount, reward_kl_coef: of returns: gamma, and what a token's KL to the reference model
        costs of its reward.
      ratio: "token" or "sequence". anchor: what r is against: "old", the trainer's own
        log-probabilities at the start of the batch, or "rollout", the sampler's.
      is_weight_max, is_weight_min: absolute bounds of w; None is none. weighted: False for w = 1.
      clip_low, clip_high, dual_clip: of M; None is off.
      aggregation: how tokens are averaged, see `token_coefficients`. mix_lambda: for "mix" alone,
        in [0, 1]. length_max: for "seq-sum-const" alone, tokens.
      kl_coef, kl_kind: of the KL to the reference model, x = logp_ref - logp: k1 = -x,
        k2 = x^2 / 2, k3 = exp(x) - 1 - x. kl_clamp: x stays within +-that; kl_max: so does the
        result.
      entropy_coef: rewards the distribution's exact entropy.
      correction: between sampler and trainer, see `correction`.
      off_policy_max: see `correction.on_policy_mask`.

    Raises:
      ValueError: a value out of range, or options that contradict each other.
    """

    name: str = "cispo"
    advantage: str = "group"
    advantage_eps: float = 1e-6
    discount: float = 1.0
    reward_kl_coef: float = 0.0
    ratio: str = "token"
    anchor: str = "old"
    is_weight_max: float | None = 5.0
    is_weight_min: float | None = None
    weighted: bool = True
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: str = "token-mean"
    mix_lambda: float | None = None
    length_max: int | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    kl_clamp: float | None = None
    kl_max: float | None = None
    entropy_coef: float = 0.0
    correction: rollout_correction_lib.RolloutCorrection | None = None
    off_policy_max: float | None = None

    def __post_init__(self):
        for name, known in _FIELD_CHOICES.items():
            if getattr(self, name) not in known:
                _reject_value(f"{name} {getattr(self, name)!r}", f"one of {', '.join(known)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                _reject_value(f"{field.name} {value}", "a finite number, or None for no bound")
        for name in ("advantage_eps", "reward_kl_coef", "clip_low", "clip_high", "kl_coef"):
            if (getattr(self, name) or 0.0) < 0:
                _reject_value(f"{name} {getattr(self, name)}", "at least 0")
        for name in ("is_weight_max", "kl_clamp", "kl_max"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                _reject_value(f"{name} {value}", "more than 0, or None for no bound")
        if not 0 <= self.discount <= 1:
            _reject_value(f"discount {self.discount}", "0 to 1")
        if self.dual_clip is not None and self.dual_clip <= 1:
            _reject_value(f"dual_clip {self.dual_clip}", "more than 1")
        low = -math.inf if self.is_weight_min is None else self.is_weight_min
        if self.is_weight_max is not None and low > self.is_weight_max:
            _reject_value(f"is_weight_min {low} above is_weight_max", "the lower one first")
        self._refuse_conflicts()

    def _refuse_conflicts(self):
        if self.name == "cispo" and self.dual_clip is not None:
            _reject_value("cispo with dual_clip", "none: it drops no token. Take grpo or dapo")
        if self.name == "cispo" and self.ratio == "sequence":
            _reject_value("cispo with ratio 'sequence'", "'token'. Take gspo")
        if self.anchor == "rollout" and self.correction is not None:
            _reject_value(
                "anchor 'rollout' with a correction",
                "one of them: this ratio has the mismatch of sampler and trainer in it already",
            )
        if not self.weighted and (self.is_weight_max, self.is_weight_min) != (None, None):
            _reject_value("weighted False with is_weight bounds", "no bounds: the weight is 1")
        for name, owner in (("mix_lambda", "mix"), ("length_max", "seq-sum-const")):
            if (getattr(self, name) is not None) != (self.aggregation == owner):
                _reject_value(
                    f"aggregation {self.aggregation!r} with {name} {getattr(self, name)}",
                    f"{name} with {owner!r}, and with no other",
                )
        if self.mix_lambda is not None and not 0 <= self.mix_lambda <= 1:
            _reject_value(f"mix_lambda {self.mix_lambda}", "0 (tokens) to 1 (samples)")
        if self.length_max is not None and self.length_max < 1:
            _reject_value(f"length_max {self.length_max}", "at least 1")
        returns = self.advantage.startswith("return")
        if not returns and (self.discount != 1 or self.reward_kl_coef):
            _reject_value(
                f"discount {self.discount}, reward_kl_coef {self.reward_kl_coef} with advantage "
                f"{self.advantage!r}",
                "1 and 0: these are for 'return' and 'return-baseline'. kl_coef is the loss's",
            )


def _reject_value(got: str, wanted: str):
    raise ValueError(f"objective: got {got}; wanted {wanted}")


_UNBOUNDED_WEIGHT: dict[str, Any] = {"is_weight_max": None}
_PPO_CLIP: dict[str, Any] = _UNBOUNDED_WEIGHT | {"clip_low": 0.2, "clip_high": 0.2}
_SAMPLE_MEAN: dict[str, Any] = {"aggregation": "seq-mean-token-mean"}
# The constant only scales the loss; M1's first window, until a run sets its own.
_CONSTANT_LENGTH: dict[str, Any] = {"aggregation": "seq-sum-const", "length_max": 40_960}
PRESETS: dict[str, Objective] = {
    "cispo": Objective(),
    "grpo": Objective("grpo", **_PPO_CLIP, **_SAMPLE_MEAN),
    "dapo": Objective("dapo", clip_low=0.2, clip_high=0.28, **_UNBOUNDED_WEIGHT),
    "dr_grpo": Objective("dr_grpo", "mean", **_PPO_CLIP, **_CONSTANT_LENGTH),
    "gspo": Objective(
        "gspo", ratio="sequence", clip_low=3e-4, clip_high=4e-4, **_UNBOUNDED_WEIGHT, **_SAMPLE_MEAN
    ),
    "reinforce_pp": Objective("reinforce_pp", "return", **_PPO_CLIP),
    "reinforce_pp_baseline": Objective("reinforce_pp_baseline", "return-baseline", **_PPO_CLIP),
    "rloo": Objective(
        "rloo",
        "leave-one-out",
        weighted=False,
        aggregation="seq-mean-token-sum",
        **_UNBOUNDED_WEIGHT,
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenTerms:
    """What the loss is made of, for B packed rows of T tokens; [B, T], but for the last one.

    A gradient flows through logp and entropy alone. Where mask is 0, anything may stand.

    logp: of the token, now. logp_old: by the trainer, at the start of the batch. logp_rollout: by
      the sampler. logp_ref: by the reference model, or None. All at one temperature.
    entropy: of the token's distribution, or None.
    advantages: see `advantages`. mask: 1 where the model wrote the token.
    coefficients: of the token's loss, see `token_coefficients`.
    segment_ids: which sample of its row a token belongs to, 0 to T; samples do not span rows.
    weight_mean: of the whole step, for a correction that normalises, see
      `correction.weight_sum_and_count`.
    """

    logp: Any
    logp_old: Any
    logp_rollout: Any
    advantages: Any
    mask: Any
    coefficients: Any
    segment_ids: Any
    logp_ref: Any = None
    entropy: Any = None
    weight_mean: Any = None


def token_coefficients(
    objective: Objective, lengths: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """Return what each of a sample's masked tokens counts in the loss of a whole step: [N].

    With n_i the sample's masked tokens and N the number of valid samples: "token-mean",
    1 / sum(n); "prompt-mean" (Eq. 4 as printed), 1 / (prompts * the prompt's tokens);
    "seq-mean-token-mean", 1 / (N n_i); "seq-mean-token-sum", 1 / N; "seq-sum-const",
    1 / (N length_max); "mix" (our reading of M1 section 5), mix_lambda parts
    "seq-mean-token-mean" and the rest "token-mean". No divisor is below 1. A valid sample without
    tokens counts in N; an invalid one counts nowhere, and its tokens get 0.

    Args:
      lengths: n, [N]. prompts: of each sample, any equal id for one group. valid: bool.
    """
    lengths, prompt_ids, valid = (np.asarray(x) for x in (lengths, prompt_ids, valid))
    if not lengths.shape == prompt_ids.shape == valid.shape or lengths.ndim != 1:
        raise ValueError(
            f"got lengths {lengths.shape}, prompts {prompt_ids.shape}, valid {valid.shape}; "
            "wanted one number of each for every sample"
        )
    valid = valid.astype(bool)
    lengths = np.where(valid, lengths, 0).astype(np.float64)
    _, group = np.unique(prompt_ids, return_inverse=True)
    num_samples = max(valid.sum(), 1)
    num_prompts = max(len(np.unique(group[valid])), 1)
    own, whole = np.maximum(lengths, 1), max(lengths.sum(), 1)
    of_prompt = np.maximum(np.bincount(group, lengths), 1)[group] if len(group) else own
    match objective.aggregation:
        case "token-mean":
            each = np.full(lengths.shape, 1 / whole)
        case "prompt-mean":
            each = 1 / (num_prompts * of_prompt)
        case "seq-mean-token-mean":
            each = 1 / (num_samples * own)
        case "seq-mean-token-sum":
            each = np.full(lengths.shape, 1 / num_samples)
        case "seq-sum-const":
            each = np.full(lengths.shape, 1 / (num_samples * (objective.length_max or 1)))
        case _:
            share = objective.mix_lambda or 0.0
            each = share / (num_samples * own) + (1 - share) / whole
    return np.where(valid, each, 0.0)


def compute_loss(objective: Objective, terms: TokenTerms) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Return these rows' share of the step's loss, and their part of its metrics.

    Precision: float32, or float64 for such terms.

    Returns:
      The share, a plain sum; and metrics in three dicts. "shares": loss, policy_loss, ppo_loss (in
      PPO's form of a minimum, whose value differs), kl_loss and entropy_loss (without their
      coefficients), to be added up. "sums": see `rl_metrics.token_sums`, to be added up and
      divided. "maxima": the largest is taken. `rl_metrics.add_metrics` and
      `rl_metrics.summarize_metrics` do so.

    Raises:
      ValueError: terms that the objective needs are None.
    """
    _check_terms(objective, terms)
    terms = _clean_terms(terms)
    ratio = importance_ratios(objective, terms)
    weight = jnp.ones_like(ratio)
    if objective.weighted:
        weight = jnp.clip(ratio, objective.is_weight_min, objective.is_weight_max)
    trusted = _compute_clip_mask(objective, ratio, terms.advantages)
    rho, keep = _rho_and_keep_mask(objective, terms)
    scale = jnp.where(trusted & keep, rho, 0.0)
    policy = -weight * terms.advantages * terms.logp * scale
    ppo = _minimum_form(objective, ratio, terms.advantages) * jnp.where(keep, rho, 0.0)
    total, shares = policy, {"policy_loss": policy, "ppo_loss": ppo}
    if terms.logp_ref is not None:
        shares["kl_loss"] = estimate_kl(objective, terms.logp_ref - terms.logp)
        if objective.kl_coef:  # 0 times an infinite estimate is not 0
            total += objective.kl_coef * shares["kl_loss"]
    if terms.entropy is not None:
        shares["entropy_loss"] = -terms.entropy
        if objective.entropy_coef:
            total -= objective.entropy_coef * terms.entropy
    shares = {"loss": total} | shares
    shares = {name: jnp.sum(terms.coefficients * x) for name, x in shares.items()}
    sums, maxima = rl_metrics.token_sums(terms, ratio, weight, trusted, rho, keep)
    return shares["loss"], {"shares": shares, "sums": sums, "maxima": maxima}


def importance_ratios(objective: Objective, terms: TokenTerms) -> Any:
    """Return r of every token, 1 where mask is 0: [B, T]; no gradient."""
    terms = _clean_terms(terms)
    anchor = terms.logp_old if objective.anchor == "old" else terms.logp_rollout
    limit = rollout_correction_lib.MAX_LOG_RATIO
    d = jnp.clip(terms.logp - anchor, -limit, limit)
    if objective.ratio == "sequence":
        count = rollout_correction_lib.segment_totals(terms.mask, terms.segment_ids)
        d = rollout_correction_lib.segment_totals(d, terms.segment_ids) / jnp.maximum(count, 1.0)
        d = d * terms.mask
    return jax.lax.stop_gradient(jnp.exp(d))


def estimate_kl(objective: Objective, log_ratio: Any) -> Any:
    """Return the estimate of the KL to the reference model from x = logp_ref - logp."""
    if objective.kl_clamp is not None:
        log_ratio = jnp.clip(log_ratio, -objective.kl_clamp, objective.kl_clamp)
    kl = {
        "k1": lambda: -log_ratio,
        "k2": lambda: log_ratio * log_ratio / 2,
        "k3": lambda: jnp.expm1(log_ratio) - log_ratio,
    }
    value = kl[objective.kl_kind]()
    return (
        value if objective.kl_max is None else jnp.clip(value, -objective.kl_max, objective.kl_max)
    )


def _check_terms(objective: Objective, terms: TokenTerms) -> None:
    wanted = {
        "logp_ref": objective.kl_coef != 0,
        "entropy": objective.entropy_coef != 0,
        "weight_mean": objective.correction is not None and objective.correction.normalise,
    }
    missing = [name for name, needed in wanted.items() if needed and getattr(terms, name) is None]
    if missing:
        raise ValueError(
            f"objective {objective.name}: got terms without {', '.join(missing)}; wanted them: "
            "the objective's coefficients use them"
        )


def _clean_terms(terms: TokenTerms) -> TokenTerms:
    """Return terms with 0 where mask is 0, before any exp sees what stands there."""
    real = terms.mask > 0

    def clean(name):
        value = getattr(terms, name)
        if value is None or name == "segment_ids":
            return value
        value = jnp.asarray(value)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        if name not in ("logp", "entropy"):
            value = jax.lax.stop_gradient(value)
        # Not a product with the mask: 0 times infinity is not 0.
        return value if value.ndim == 0 else jnp.where(real, value, 0.0)

    return TokenTerms(**{field.name: clean(field.name) for field in dataclasses.fields(TokenTerms)})


def _compute_clip_mask(objective: Objective, ratio, advantages):
    """Return M of Eq. 7 as booleans."""
    dropped = jnp.zeros(ratio.shape, bool)
    if objective.clip_high is not None:
        dropped |= (advantages > 0) & (ratio > 1 + objective.clip_high)
    if objective.clip_low is not None:
        dropped |= (advantages < 0) & (ratio < 1 - objective.clip_low)
    if objective.dual_clip is not None:
        dropped |= (advantages < 0) & (ratio > objective.dual_clip)
    return ~dropped


def _rho_and_keep_mask(objective: Objective, terms: TokenTerms):
    """Return (rho, whether the token is kept)."""
    rho, keep = jnp.ones_like(terms.logp_old), terms.mask > 0
    if objective.correction is not None:
        rho, kept = rollout_correction_lib.correction_weights(
            objective.correction,
            terms.logp_old,
            terms.logp_rollout,
            terms.mask,
            terms.segment_ids,
        )
        keep &= kept
        if objective.correction.normalise:
            rho = rho / terms.weight_mean
    if objective.off_policy_max is not None:
        keep &= rollout_correction_lib.on_policy_mask(
            objective.off_policy_max,
            terms.advantages,
            terms.logp,
            terms.logp_rollout,
            terms.mask,
            terms.segment_ids,
        )
    return rho, keep


def _minimum_form(objective: Objective, ratio, advantages):
    """Return max(-r A, -clip(r) A), for A < 0 at most -dual_clip A."""
    low = None if objective.clip_low is None else 1 - objective.clip_low
    high = None if objective.clip_high is None else 1 + objective.clip_high
    value = jnp.maximum(-ratio * advantages, -jnp.clip(ratio, low, high) * advantages)
    if objective.dual_clip is None:
        return value
    return jnp.where(advantages < 0, jnp.minimum(value, -objective.dual_clip * advantages), value)
