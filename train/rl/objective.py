"""The unified policy objective (M1 3.1, Eq. 4-7): CISPO, the PPO family, REINFORCE and RLOO.

Per token, with sg the stop of the gradient, m the mask of what the model wrote, A the advantage:

  r   = sg(exp(logp - logp_anchor)), or one ratio for a whole sample (GSPO)
  w   = sg(clip(r, is_weight_min, is_weight_max))
  M   = 0 if (A > 0 and r > 1 + clip_high) or (A < 0 and r < 1 - clip_low)
          or (A < 0 and r > dual_clip), else 1
  rho = sg(correction(logp_old - logp_rollout))
  l   = -w A logp M rho
  L   = sum over the step of c (l + kl_coef kl - entropy_coef H)

CISPO clips the weight w and drops no token. PPO's clipping is M, which drops tokens. The gradient
under M is that of PPO's usual form, a minimum. The coefficients c alone decide how tokens are
averaged. `Objective` chooses among all these, and `train/rl/loss.py` computes them.
"""

import dataclasses
import math
from typing import Any

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
# Fields that are names, and the names that they may be.
_FIELD_CHOICES = {
    "advantage": ADVANTAGE_KINDS,
    "aggregation": AGGREGATIONS,
    "ratio": ("token", "sequence"),
    "anchor": ("old", "rollout"),
    "stale_anchor": ("old", "rollout"),
    "kl_kind": ("k1", "k2", "k3"),
}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximised. It is hashable, so that a jitted step takes it as a constant.

    Attributes:
      name: name of the preset, for the log, or a name of your own. It chooses nothing.
      advantage: A of a sample, see `advantages`. "group": (R - mean) / (std + advantage_eps) of the
        sample's group. "mean": R - mean. "leave-one-out": R - the mean of the group's other
        samples. "return": the discounted rewards that follow a token, whitened over the tokens of
        the batch. "return-baseline": the same, with the group's mean taken off before.
      advantage_eps: added to the standard deviation of "group", at least 0.
      discount: gamma of the returns, 0 to 1. Other advantages have no returns and take 1.
      reward_kl_coef: factor of a token's KL to the reference model, which is taken off the token's
        reward, at least 0. It is for returns alone.
      ratio: what has one r: each "token", or a whole "sequence".
      anchor: whose log-probabilities r compares with. "old": the trainer's own, from before the
        batch's updates. "rollout": the sampler's.
      stale_anchor: the same for tokens that older weights sampled. With "rollout" their r is the
        whole weight of the policy against the one that sampled. "old" would take such tokens for
        new ones. With a correction, rho has that part of the weight, and this field no effect.
      is_weight_max: upper bound of w itself, not of its distance from 1, or None.
      is_weight_min: lower bound of w itself, or None.
      weighted: whether w is the clipped ratio. False sets w = 1, which is plain REINFORCE.
      clip_low: M drops A < 0 below 1 - clip_low, at least 0. None for never.
      clip_high: M drops A > 0 above 1 + clip_high, at least 0. None for never.
      dual_clip: M drops A < 0 above it, more than 1. None for never.
      aggregation: how tokens are averaged, see `loss.token_coefficients`.
      mix_lambda: share of the mean over samples in aggregation "mix", 0 to 1. None for others.
      length_max: divisor of aggregation "seq-sum-const", tokens. None for others.
      kl_coef: weight of the KL to the reference model in the loss, at least 0.
      kl_kind: estimator of that KL from x = logp_ref - logp. "k1": -x. "k2": x^2 / 2. "k3":
        exp(x) - 1 - x.
      kl_clamp: bound of |x| in the estimator, more than 0, or None.
      kl_max: bound of the estimate's absolute value, more than 0, or None.
      entropy_coef: reward for the exact entropy of a token's distribution.
      correction: weights of sampler against trainer, see `rollout_correction`. None sets rho = 1.
      off_policy_max: threshold of `rollout_correction.on_policy_mask`, nats, or None.

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
    stale_anchor: str = "rollout"
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
        for name, choices in _FIELD_CHOICES.items():
            if getattr(self, name) not in choices:
                _reject_value(f"{name} {getattr(self, name)!r}", f"one of {', '.join(choices)}")
        # NaN would pass every comparison below, as would an infinite clip_high.
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

    @property
    def anchors_stale_tokens(self) -> bool:
        """Return whether r of stale tokens compares with other log-probabilities than r of new."""
        return self.anchor == "old" and self.stale_anchor == "rollout" and self.correction is None

    def _refuse_conflicts(self) -> None:
        # A preset's name is printed and logged, so it may not stand for another algorithm.
        _check_name(self)
        if self.name == "cispo" and self.dual_clip is not None:
            _reject_value("cispo with dual_clip", "none: it drops no token. Take grpo or dapo")
        if self.name == "cispo" and self.ratio == "sequence":
            _reject_value("cispo with ratio 'sequence'", "'token'. Take gspo")
        # r against the sampler is the whole importance weight; rho would count the mismatch twice.
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


def _reject_value(got: str, wanted: str) -> None:
    raise ValueError(f"objective: got {got}; wanted {wanted}")


# PPO's family weighs a token by r itself: M is what bounds it.
_UNBOUNDED_WEIGHT: dict[str, Any] = {"is_weight_max": None}
_PPO_CLIP: dict[str, Any] = _UNBOUNDED_WEIGHT | {"clip_low": 0.2, "clip_high": 0.2}
_SAMPLE_MEAN: dict[str, Any] = {"aggregation": "seq-mean-token-mean"}
# The constant only scales the loss. It is M1's first window (40K), until a run sets its own.
_CONSTANT_LENGTH: dict[str, Any] = {"aggregation": "seq-sum-const", "length_max": 40_960}
# By the preset's name. The fields that a preset leaves out are CISPO's.
_PRESET_FIELDS: dict[str, dict[str, Any]] = {
    "cispo": {},
    # A sample counts as much as any other, however long it is.
    "grpo": _PPO_CLIP | _SAMPLE_MEAN,
    # A wider upper bound, so that unlikely tokens may grow, and tokens that all count alike.
    "dapo": _PPO_CLIP | {"clip_high": 0.28},
    # Divides by neither the standard deviation nor the length, which both bias the gradient.
    "dr_grpo": {"advantage": "mean"} | _PPO_CLIP | _CONSTANT_LENGTH,
    # A sequence's ratio is a geometric mean over its tokens, so its bounds are far closer to 1.
    "gspo": _UNBOUNDED_WEIGHT
    | {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
    | _SAMPLE_MEAN,
    # REINFORCE++ needs no groups: the whole batch is its baseline.
    "reinforce_pp": {"advantage": "return"} | _PPO_CLIP,
    "reinforce_pp_baseline": {"advantage": "return-baseline"} | _PPO_CLIP,
    # Plain REINFORCE: no ratio at all, and a sample's sum rather than its mean.
    "rloo": _UNBOUNDED_WEIGHT
    | {
        "advantage": "leave-one-out",
        "weighted": False,
        "aggregation": "seq-mean-token-sum",
    },
}


def _check_name(objective: Objective) -> None:
    """Raise ValueError where a preset's name stands for another algorithm.

    A preset may be changed and keep its name, but not in what makes it the algorithm that the name
    says, and not into another preset.
    """
    preset = _PRESET_FIELDS.get(objective.name)
    if preset is None:
        return  # a name of the user's own
    wrong = [name for name in ("ratio", "weighted") if _differs(objective, preset, name)]
    if preset.get("advantage", "").startswith("return"):
        wrong += [name for name in ("advantage",) if _differs(objective, preset, name)]
    if "clip_low" in preset and (objective.clip_low, objective.clip_high) == (None, None):
        wrong += ["clip_low", "clip_high"]
    defaults = {field.name: field.default for field in dataclasses.fields(Objective)}
    fields = vars(objective) | {"name": defaults["name"]}
    twins = [name for name, other in _PRESET_FIELDS.items() if fields == defaults | other]
    if not wrong and objective.name not in twins:
        wrong = [name for twin in twins for name in _PRESET_FIELDS[twin] | preset]
    if wrong:
        got = ", ".join(f"{name} {getattr(objective, name)!r}" for name in dict.fromkeys(wrong))
        _reject_value(
            f"the name {objective.name!r} with {got}",
            f"the fields of the preset, or another name. A name alone chooses no algorithm: take "
            f"PRESETS[{objective.name!r}] in the config file, or --advantage-estimator="
            f"{objective.name} on the command line",
        )


def _differs(objective: Objective, preset: dict[str, Any], name: str) -> bool:
    return name in preset and getattr(objective, name) != preset[name]


PRESETS: dict[str, Objective] = {
    name: Objective(name, **fields) for name, fields in _PRESET_FIELDS.items()
}
