"""The jitted parts of an RL update: the trainer's own probabilities, gradients, AdamW.

    sums = None
    for rows in microbatches:
        sums = accumulate_gradients(sums, state.model, rows, token_share, weight_mean, settings)
    state, metrics = apply_update(state, sums.gradients, settings)

Gradients are added up over any number of microbatches. These have few shapes, and each is compiled
once (`row_packing.py`). The coefficients in the rows have the whole step's denominators, so
nothing is divided here.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from m1_jax import compiler_options, logprobs, moe
from m1_jax import model as model_lib
from train import optim, trainable
from train import step as step_lib
from train.rl import batch as rl_batch
from train.rl import loss as loss_lib
from train.rl import metrics as rl_metrics
from train.rl import objective as objective_lib


@dataclasses.dataclass(frozen=True)
class RlStepSettings:
    """What the compiled functions are made for. It is hashable, and static in them.

    Attributes:
      optimizer: makes the step.
      objective: choices of the loss.
      temperature: temperature of the sampler, and so of the trainer's probabilities, above 0.
      balance_coefficient: coefficient of `moe.balance_loss`, at least 0.
    """

    optimizer: optim.AdamW
    objective: objective_lib.Objective
    temperature: float = 1.0
    balance_coefficient: float = 0.0


class MicrobatchSums(NamedTuple):
    """What the microbatches of a step have added up so far, on the devices.

    Attributes:
      gradients: gradient of the step's loss by each trained parameter.
      metrics: metrics of the loss, see `metrics.loss_metrics`, with counts by token id.
    """

    gradients: Any
    metrics: rl_metrics.MetricSums


@functools.partial(compiler_options.jit_for_device, static_argnames="temperature")
def score_logprobs(
    model: model_lib.MiniMaxM1, rows: rl_batch.PackedRows, temperature: float
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Return (log-probabilities of the targets, entropies), float32 [B, T]."""
    hidden, _ = model.hidden(
        rows.tokens, rows.segment_ids, rows.positions, expert_ids=rows.expert_ids
    )
    token_logprobs = logprobs.token_logprobs(
        model, hidden, rows.targets, with_entropy=True, temperature=temperature
    )
    return token_logprobs.logp, token_logprobs.entropy


@functools.partial(
    compiler_options.jit_for_device, static_argnames="settings", donate_argnames="sums"
)
def accumulate_gradients(
    sums: MicrobatchSums | None,
    model: model_lib.MiniMaxM1,
    rows: rl_batch.PackedRows,
    token_share: Float[Array, ""],
    weight_mean: Float[Array, ""] | None,
    settings: RlStepSettings,
) -> MicrobatchSums:
    """Return the sums of a step with one more microbatch.

    Args:
      sums: what this function returned for the microbatch before, or None for the first. Donated.
      model: the model, with the weights before the step.
      rows: the microbatch.
      token_share: share of the step's tokens that are in these rows, 0 to 1. It weighs the balance
        loss, which is a product of means and so no sum over tokens.
      weight_mean: mean correction weight, see `loss.TokenTerms`, or None.
      settings: settings of the run.
    """
    trained, frozen = trainable.partition(model)

    # Gradients of the trained part alone: with LoRA the frozen weights get none.
    @functools.partial(jax.grad, has_aux=True)
    def gradients(trained):
        return _microbatch_loss(
            trainable.combine(trained, frozen), rows, token_share, weight_mean, settings
        )

    grads, metrics = gradients(trained)
    # Without this XLA may keep whole gradients on each device.
    grads = step_lib.constrain_shardings(grads)
    # With and without `sums` are two compiled programs. Adding to zeros would need only one, but
    # also another copy of the gradients.
    if sums is None:
        return MicrobatchSums(grads, metrics)
    return MicrobatchSums(
        jax.tree.map(jnp.add, sums.gradients, grads),
        rl_metrics.add_metrics(sums.metrics, metrics),
    )


def _microbatch_loss(
    model: model_lib.MiniMaxM1,
    rows: rl_batch.PackedRows,
    token_share: Float[Array, ""],
    weight_mean: Float[Array, ""] | None,
    settings: RlStepSettings,
) -> tuple[Float[Array, ""], rl_metrics.MetricSums]:
    """Return the loss of a microbatch, its share of the step's loss, and its metrics."""
    hidden, stats = model.hidden(
        rows.tokens, rows.segment_ids, rows.positions, expert_ids=rows.expert_ids
    )
    return _loss_and_metrics(model, hidden, stats, rows, token_share, weight_mean, settings)


@jax.named_scope("loss")
def _loss_and_metrics(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    stats: moe.RouterStats,
    rows: rl_batch.PackedRows,
    token_share: Float[Array, ""],
    weight_mean: Float[Array, ""] | None,
    settings: RlStepSettings,
) -> tuple[Float[Array, ""], rl_metrics.MetricSums]:
    """Return what `_microbatch_loss` does, from the model's output."""
    token_logprobs = logprobs.token_logprobs(
        model,
        hidden,
        rows.targets,
        with_entropy=True,
        temperature=settings.temperature,
    )
    terms = loss_lib.TokenTerms(
        logp=token_logprobs.logp,
        logp_old=rows.logp_old,
        logp_rollout=rows.logp_rollout,
        advantages=rows.advantages,
        mask=rows.mask,
        coefficients=rows.coefficients,
        segment_ids=rows.segment_ids,
        # Zeros without a reference model: its metrics would mean nothing.
        logp_ref=rows.logp_ref if settings.objective.kl_coef else None,
        entropy=token_logprobs.entropy,
        weight_mean=weight_mean,
    )
    loss, parts = loss_lib.compute_loss(settings.objective, terms)
    metrics = rl_metrics.loss_metrics(parts)
    # All tokens of the rows count here, prompts too: the routers see them all.
    balance = moe.balance_loss(stats) * token_share
    # Counted by token id, because M1 argues that PPO drops rare tokens such as "However".
    drops = rl_metrics.count_drops_by_token(
        rows.targets, parts.ratio, rows.advantages, rows.mask, model.config.vocab_size
    )
    clips = rl_metrics.count_clips_by_token(
        rows.targets,
        parts.ratio,
        rows.advantages,
        rows.mask,
        loss_lib.ratio_upper_bound(settings.objective),
        model.config.vocab_size,
    )
    metrics = metrics._replace(
        drops=rl_metrics.DropCounts(drops, clips),
        shares=metrics.shares | {"balance_loss": balance},
    )
    return loss + settings.balance_coefficient * balance, metrics


@functools.partial(
    compiler_options.jit_for_device, static_argnames="settings", donate_argnames="state"
)
def apply_update(
    state: step_lib.TrainState,
    grads: Any,
    settings: RlStepSettings,
    num_signal_tokens: Float[Array, ""] | None = None,
) -> tuple[step_lib.TrainState, dict[str, Any]]:
    """Make one optimizer step with `MicrobatchSums.gradients`.

    Args:
      state: the state before the step. It is donated.
      grads: gradients of the whole step.
      settings: settings of the run.
      num_signal_tokens: see `count_signal_tokens`. With 0 the step has no signal, see
        `step.apply_gradients`. None stands for any other number.

    Returns:
      The new state, and the metrics of `step.apply_gradients` with
        gradient/NAME: see `metrics.gradient_shares`.
        second_moment/zero: share of AdamW's second moments that are 0.
      M1 3.2 looks at these two.
    """
    # Measured here, because the optimizer clips the gradients by their norm.
    shares = {f"gradient/{name}": x for name, x in rl_metrics.gradient_shares(grads).items()}
    has_signal = True if num_signal_tokens is None else num_signal_tokens > 0
    state, metrics = step_lib.apply_gradients(
        state, grads, settings.optimizer, has_signal=has_signal
    )
    # optax nests the states of its transformations. AdamW's is found by its class.
    second_moments = [
        leaf.nu
        for leaf in jax.tree.leaves(state.moments, is_leaf=_is_adam_state)
        if _is_adam_state(leaf)
    ]
    return state, metrics | shares | {"second_moment/zero": rl_metrics.zero_share(second_moments)}


def count_signal_tokens(
    metrics: rl_metrics.MetricSums, objective: objective_lib.Objective
) -> Float[Array, ""]:
    """Return the number of tokens that a step learns from, of the step's whole metrics.

    Terms of KL and entropy have a gradient at every token. Without them a token needs an advantage
    and a coefficient that are not 0, and neither clipping nor a correction may drop it.
    """
    every_token = objective.kl_coef or objective.entropy_coef
    return metrics.sums["tokens" if every_token else "learnt"].total


def _is_adam_state(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)
