"""The training step: loss, gradients over microbatches and AdamW in one jitted function."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from m1_jax import compiler_options, logprobs, moe, quantize
from m1_jax import model as model_lib
from train import optim, trainable
from train.data import batch as batch_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: 12 bytes a parameter, if none is frozen."""

    step: Int[Array, ""]  # steps made so far, those that changed nothing included
    model: model_lib.MiniMaxM1  # float32 master weights, and frozen parameters in any dtype
    moments: optax.OptState  # moments of the parameters that are not frozen


@dataclasses.dataclass(frozen=True)
class TrainStepSettings:
    """What one compiled step is made for.

    Attributes:
      optimizer: AdamW with its schedule.
      accumulate: microbatches in a batch, a divisor of its rows.
      balance_coefficient: weight of `moe.balance_loss`, a number or a schedule by step. None takes
        the model's `router_aux_loss_coef`.
      z_coefficient: weight of the z-loss, the mean squared log of the softmax's sum. It keeps
        logits from drifting.
      skip_nonfinite: whether a step whose gradient is not finite leaves parameters and moments as
        they are.
    """

    optimizer: optim.AdamW
    accumulate: int = 1
    balance_coefficient: optim.Schedule | float | None = None
    z_coefficient: float = 0.0
    skip_nonfinite: bool = True

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate: got {self.accumulate}; wanted at least 1")
        if self.z_coefficient < 0:
            raise ValueError(f"z_coefficient: got {self.z_coefficient}; wanted at least 0")


class BatchTotals(NamedTuple):
    """Denominators of a whole batch's means. Both are above 0."""

    weight: Float[Array, ""]  # sum of the weights, 1 for a batch without weights
    num_tokens: Float[Array, ""]  # tokens that are not padding, at least 1


def init_state(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model whose parameters are float32. Frozen ones may have any dtype.

    Raises:
      ValueError: a trained parameter in another dtype, whose updates would be rounded away, or an
        int8 parameter.
    """
    quantize.refuse_int8_weights(model)
    trained, _ = trainable.partition(model)
    for leaf in jax.tree.leaves(trained):
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"master weights: got a parameter in {leaf.dtype}; wanted float32. "
                "Build the model with param_dtype=float32; dtype is that of the computation."
            )
    moments = constrain_shardings(optimizer.init(trained))
    return TrainState(jnp.zeros((), jnp.int32), model, moments)


@functools.partial(
    compiler_options.jit_for_device, static_argnames="settings", donate_argnames="state"
)
def train_step(
    state: TrainState, batch: batch_lib.TrainBatch, settings: TrainStepSettings
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Make one optimizer step. `state` is donated, so its arrays cannot be used afterwards.

    loss = sum(weights * (-logp(target) + z_coefficient * log(sum(exp(logits)))^2)) / sum(weights)
           + balance_coefficient * balance loss

    Both sums are those of the whole batch, so its number of microbatches does not change the first
    term. The balance loss is a product of means. It is therefore computed of each microbatch and
    averaged by tokens. Over the whole batch it would need every forward pass twice.

    A batch in which no token has a weight has no signal, see `apply_gradients`.

    Returns:
      The new state, and metrics:
        loss: the mean of -logp alone.
        balance_loss, z_loss: the losses without their coefficients.
        grad_norm: norm before clipping. grad_norm/PART: norm of each part of
          `group_modules_by_kind`.
        learning_rate: learning rate of this step.
        tokens: number of tokens that are not padding.
        weight: sum of the weights of the loss.
        dropped: share of the expert choices that `ModelConfig.expert_capacity` left out.
        skipped: 1 where the gradient was not finite.
        no_signal: 1 where the batch had no signal. `loss` and `z_loss` mean nothing then.
        expert_load: [L, E], the share of a layer's choices that went to each expert.
    """
    grads, metrics = compute_gradients(state.model, batch, settings, state.step)
    has_signal = jnp.any(batch.weights != 0)
    state, update_metrics = apply_gradients(
        state, grads, settings.optimizer, settings.skip_nonfinite, has_signal
    )
    return state, metrics | update_metrics


@jax.named_scope("optimizer")
def apply_gradients(
    state: TrainState,
    grads,
    optimizer: optim.AdamW,
    skip_nonfinite: bool = True,
    has_signal: Bool[Array, ""] | bool = True,
):
    """Return the state after one update, and the metrics of `train_step` that tell of gradients.

    A step without a signal changes no weight and no moment: not by the balance loss, whose gradient
    AdamW would scale up to a full step, nor by the moments of earlier steps. Its number counts, so
    that a step and its batch keep one number. So a learning rate by steps moves on.

    Args:
      state: the state before the step.
      grads: gradients of the trained parameters.
      optimizer: makes the step.
      skip_nonfinite: whether a gradient that is not finite changes nothing either.
      has_signal: whether any token of the batch is learnt from.
    """
    # Gradients are scattered to where the parameters lie before the optimizer reads them.
    grads = constrain_shardings(grads)
    trained, frozen = trainable.partition(state.model)
    updated, moments, metrics = optimizer.update(grads, state.moments, trained, state.step)
    metrics |= {f"grad_norm/{kind}": norm for kind, norm in _grad_norms(grads).items()}
    finite = jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite
    is_taken = jnp.asarray(has_signal)
    metrics["no_signal"] = 1.0 - is_taken
    if skip_nonfinite:
        is_taken &= finite
    updated, moments = jax.tree.map(
        lambda new_leaf, old_leaf: jnp.where(is_taken, new_leaf, old_leaf),
        (updated, moments),
        (trained, state.moments),
    )
    model = trainable.combine(updated, frozen)
    return constrain_shardings(TrainState(state.step + 1, model, moments)), metrics


def group_modules_by_kind(model: model_lib.MiniMaxM1) -> dict[str, list]:
    """Return the model's modules by kind: embed, head, experts, and each kind of attention."""
    parts: dict[str, list] = {"embed": [model.embed], "head": [model.head, model.norm]}
    for layer in model.layers:
        parts.setdefault(layer.kind, []).extend([layer.input_norm, layer.attention])
        parts.setdefault("experts", []).extend([layer.moe_norm, layer.moe])
    return parts


def _grad_norms(grads: model_lib.MiniMaxM1) -> dict[str, Float[Array, ""]]:
    leaves_by_kind = {
        kind: jax.tree.leaves(modules) for kind, modules in group_modules_by_kind(grads).items()
    }
    # A kind whose parameters are all frozen has no leaves, and no norm.
    return {
        kind: jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in leaves))
        for kind, leaves in leaves_by_kind.items()
        if leaves
    }


def compute_gradients(
    model: model_lib.MiniMaxM1,
    batch: batch_lib.TrainBatch,
    settings: TrainStepSettings,
    step: Any = 0,
):
    """Return (gradients, metrics) of the whole batch, summed microbatch by microbatch.

    Gradients are float32. Frozen parameters have none.
    """
    weight = jnp.sum(batch.weights)
    # A batch without weights or tokens must not divide by 0.
    totals = BatchTotals(
        weight=jnp.where(weight > 0, weight, 1.0),
        num_tokens=jnp.maximum(_num_tokens(batch), 1.0),
    )
    balance_coefficient = settings.balance_coefficient
    if balance_coefficient is None:
        balance_coefficient = model.config.router_aux_loss_coef
    elif callable(balance_coefficient):
        balance_coefficient = balance_coefficient(step)  # a schedule gives a traced number
    trained, frozen = trainable.partition(model)

    @functools.partial(jax.grad, has_aux=True)
    def microbatch_gradients(trained, microbatch, totals):
        return _microbatch_loss(
            trainable.combine(trained, frozen),
            microbatch,
            totals,
            balance_coefficient=balance_coefficient,
            z_coefficient=settings.z_coefficient,
        )

    if settings.accumulate == 1:
        return microbatch_gradients(trained, batch, totals)

    # The carry is (gradients, metrics): every metric is a share of the batch's, so that it adds up.
    def add_microbatch(carry, microbatch):
        sums = jax.tree.map(jnp.add, carry, microbatch_gradients(trained, microbatch, totals))
        return sums, None

    microbatches = split_microbatches(batch, settings.accumulate)
    first = jax.tree.map(lambda x: x[0], microbatches)
    shapes = jax.eval_shape(microbatch_gradients, trained, first, totals)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add_microbatch, zeros, microbatches)[0]


def split_microbatches(batch: batch_lib.TrainBatch, num_microbatches: int) -> batch_lib.TrainBatch:
    """Split [B, T] into [microbatches, B / microbatches, T]. No row changes its device.

    Raises:
      ValueError: `num_microbatches` does not divide the rows.
    """
    rows, length = batch.tokens.shape
    if rows % num_microbatches:
        raise ValueError(
            f"got {rows} rows in {num_microbatches} microbatches; wanted a divisor of the rows"
        )
    # A microbatch takes every `num_microbatches`-th row. A run of rows would lie on a few devices.
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(rows // num_microbatches, num_microbatches, length), 1, 0),
        batch,
    )


def constrain_shardings(tree):
    """Constrain every model-shaped tree in a pytree to its parameters' shardings.

    Without a constraint, XLA may return a state with other shardings than it took. The next step
    would then be compiled again.
    """

    def constrain_model(subtree):
        # Gradients and moments are model-shaped too: a `MiniMaxM1` of other arrays.
        if not isinstance(subtree, model_lib.MiniMaxM1) or subtree.layout is None:
            return subtree
        layout = subtree.layout

        def constrain_param(param):
            param_sharding = layout.param_sharding(param.get_metadata()["logical_axes"])
            value = jax.lax.with_sharding_constraint(param.get_value(), param_sharding)
            return param.replace(value)

        return jax.tree.map(
            constrain_param, subtree, is_leaf=lambda node: isinstance(node, nnx.Param)
        )

    return jax.tree.map(
        constrain_model, tree, is_leaf=lambda node: isinstance(node, model_lib.MiniMaxM1)
    )


def _microbatch_loss(
    model: model_lib.MiniMaxM1,
    batch: batch_lib.TrainBatch,
    totals: BatchTotals,
    *,
    balance_coefficient: Float[Array, ""] | float,
    z_coefficient: float,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Return a microbatch's share of the loss, and its share of each metric."""
    hidden, stats = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    return _loss_and_metrics(
        model, hidden, stats, batch, totals, balance_coefficient, z_coefficient
    )


@jax.named_scope("loss")
def _loss_and_metrics(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    stats: moe.RouterStats,
    batch: batch_lib.TrainBatch,
    totals: BatchTotals,
    balance_coefficient: Float[Array, ""] | float,
    z_coefficient: float,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Return what `_microbatch_loss` does, from the model's output."""
    tokens = logprobs.token_logprobs(model, hidden, batch.targets)

    def weighted_mean(values):
        # A select, since the value of a token without a weight may be NaN or infinite.
        return jnp.sum(jnp.where(batch.weights != 0, batch.weights * values, 0.0)) / totals.weight

    share = _num_tokens(batch) / totals.num_tokens
    metrics = {
        "loss": -weighted_mean(tokens.logp),
        # Means of the microbatch, weighted by its share of the tokens, so that they add up.
        "balance_loss": moe.balance_loss(stats) * share,
        "z_loss": weighted_mean(jnp.square(tokens.log_normalizer)),
        "tokens": _num_tokens(batch),
        "weight": jnp.sum(batch.weights),
        "dropped": moe.dropped_share(stats) * share,
        # [L, A, E] counts, summed over the A choices of a token.
        "expert_load": jnp.sum(stats.choice_counts, 1)
        / (totals.num_tokens * stats.choice_counts.shape[1]),
    }
    loss = metrics["loss"] + balance_coefficient * metrics["balance_loss"]
    if z_coefficient:
        loss += z_coefficient * metrics["z_loss"]
    return loss, metrics


def _num_tokens(batch: batch_lib.TrainBatch) -> Float[Array, ""]:
    """Return how many tokens are not padding."""
    return jnp.sum((batch.segment_ids != 0).astype(jnp.float32))


def abstract_state(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model of sharded shapes. Moments lie where their parameters do."""
    replicated = jax.tree.leaves(model)[0].sharding
    if model.layout is not None:
        replicated = jax.sharding.NamedSharding(model.layout.mesh, jax.sharding.PartitionSpec())

    def shard_like(shape, param):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=param.sharding)

    # The optimizer's state is model-shaped trees of moments, and scalars such as its count.
    def add_sharding(node) -> Any:
        if isinstance(node, model_lib.MiniMaxM1):
            return jax.tree.map(shard_like, node, trained)
        return jax.ShapeDtypeStruct(node.shape, node.dtype, sharding=replicated)

    trained, _ = trainable.partition(model)
    state = jax.eval_shape(lambda m: init_state(m, optimizer), model)
    moments = jax.tree.map(
        add_sharding, state.moments, is_leaf=lambda node: isinstance(node, model_lib.MiniMaxM1)
    )
    return TrainState(add_sharding(state.step), model, moments)
