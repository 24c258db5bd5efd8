"""The training step: loss, gradients over microbatches, AdamW; one jitted function."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import logprobs, moe, quantize
from m1_jax import model as model_lib
from train import optim, trainable
from train.data import batch as batch_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: 12 bytes a parameter, if none is frozen.

    step: how many updates were made. moments: of the parameters that are not frozen.
    """

    step: Int[Array, ""]
    model: model_lib.MiniMaxM1
    moments: optax.OptState


@dataclasses.dataclass(frozen=True)
class TrainStepSettings:
    """What one compiled step is made for.

    optimizer: see `optim.AdamW`. accumulate: microbatches in a batch, a divisor of its rows.
    balance_coefficient: of `moe.balance_loss`, a number or a schedule by step; None takes the
      model's `router_aux_loss_coef`.
    z_coefficient: of the mean squared log of the softmax's sum, which keeps logits from drifting.
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


def init_state(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model that was made with param_dtype float32, but for frozen parts.

    Raises:
      ValueError: other parameters, whose updates would be rounded away, or int8 ones at all.
    """
    quantize.refuse_int8_weights(model)
    trained, _ = trainable.partition(model)
    for leaf in jax.tree.leaves(trained):
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"master weights: got a parameter in {leaf.dtype}; wanted float32. "
                "Build the model with param_dtype=float32; dtype is that of the computation."
            )
    return TrainState(jnp.zeros((), jnp.int32), model, constrain_shardings(optimizer.init(trained)))


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def train_step(
    state: TrainState, batch: batch_lib.TrainBatch, settings: TrainStepSettings
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Make one optimizer step; `state` is donated, so the old one is gone.

    loss = sum of weights * (-logp(target) + z_coefficient * log(sum of exp(logits))^2) / sum of
    weights + balance_coefficient * balance loss. Sums over microbatches are divided by the whole
    batch's, so that splitting a batch changes nothing in the first term. The balance loss is a
    product of means and therefore one of each microbatch, averaged by tokens; over the whole batch
    it would need every forward pass twice.

    Returns:
      The new state, and metrics: loss (of -logp alone), balance_loss, z_loss (without their
      coefficients), grad_norm (before clipping) and grad_norm/PART for the parts of
      `group_modules_by_kind`, learning_rate, tokens (real ones), weight (sum of the loss's),
      dropped (share of the tokens' expert choices that `ModelConfig.expert_capacity` left out),
      skipped (1 where the gradient was not finite and the step therefore changed nothing),
      expert_load [L, E] (the share of a layer's choices that went to each expert).
    """
    grads, metrics = compute_gradients(state.model, batch, settings, state.step)
    state, more = apply_gradients(state, grads, settings.optimizer, settings.skip_nonfinite)
    return state, metrics | more


@jax.named_scope("optimizer")
def apply_gradients(state: TrainState, grads, optimizer: optim.AdamW, skip_nonfinite: bool = True):
    """Return the state after one update, and the metrics of `train_step` that are about gradients."""
    grads = constrain_shardings(grads)
    trained, rest = trainable.partition(state.model)
    new, moments, metrics = optimizer.update(grads, state.moments, trained, state.step)
    metrics |= {f"grad_norm/{kind}": norm for kind, norm in _grad_norms(grads).items()}
    finite = jnp.isfinite(metrics["grad_norm"])
    metrics["skipped"] = 1.0 - finite
    if skip_nonfinite:
        new, moments = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (new, moments), (trained, state.moments)
        )
    return constrain_shardings(
        TrainState(state.step + 1, trainable.combine(new, rest), moments)
    ), metrics


def group_modules_by_kind(model: model_lib.MiniMaxM1) -> dict[str, list]:
    """Return the model's modules by what they are: embed, head, attention of each kind, experts."""
    parts: dict[str, list] = {"embed": [model.embed], "head": [model.head, model.norm]}
    for layer in model.layers:
        parts.setdefault(layer.kind, []).extend([layer.input_norm, layer.attention])
        parts.setdefault("experts", []).extend([layer.moe_norm, layer.moe])
    return parts


def _grad_norms(grads: model_lib.MiniMaxM1) -> dict[str, Float[Array, ""]]:
    leaves = {
        kind: jax.tree.leaves(modules) for kind, modules in group_modules_by_kind(grads).items()
    }
    return {
        kind: jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in of)) for kind, of in leaves.items() if of
    }


def compute_gradients(
    model: model_lib.MiniMaxM1,
    batch: batch_lib.TrainBatch,
    settings: TrainStepSettings,
    step: Any = 0,
):
    """Return float32 gradients of the whole batch's loss, summed microbatch by microbatch.

    Frozen parameters have none.
    """
    weight = jnp.sum(batch.weights)
    totals = (jnp.where(weight > 0, weight, 1.0), jnp.maximum(_num_tokens(batch), 1.0))
    coefficient = settings.balance_coefficient
    if coefficient is None:
        coefficient = model.config.router_aux_loss_coef
    elif callable(coefficient):
        coefficient = coefficient(step)
    loss = functools.partial(
        _microbatch_loss, coefficient=coefficient, z_coefficient=settings.z_coefficient
    )
    trained, rest = trainable.partition(model)

    @functools.partial(jax.grad, has_aux=True)
    def function(trained, part, totals):
        return loss(trainable.combine(trained, rest), part, totals)

    if settings.accumulate == 1:
        return function(trained, batch, totals)

    def micro(carry, part):
        return jax.tree.map(jnp.add, carry, function(trained, part, totals)), None

    parts = split_microbatches(batch, settings.accumulate)
    shapes = jax.eval_shape(function, trained, jax.tree.map(lambda x: x[0], parts), totals)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(micro, start, parts)[0]


def split_microbatches(batch: batch_lib.TrainBatch, num_microbatches: int) -> batch_lib.TrainBatch:
    """Split [B, T] into [parts, B / parts, T], each device's rows staying where they are.

    Raises:
      ValueError: rows that do not divide.
    """
    rows, length = batch.tokens.shape
    if rows % num_microbatches:
        raise ValueError(
            f"got {rows} rows in {num_microbatches} microbatches; wanted a divisor of the rows"
        )
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(rows // num_microbatches, num_microbatches, length), 1, 0),
        batch,
    )


def constrain_shardings(tree):
    """Hold every model in a pytree, and what is shaped like one, where its parameters lie.

    Left alone, XLA may return a state that lies otherwise than the one it took, which the next
    step would be compiled again for.
    """

    def pin(part):
        if not isinstance(part, model_lib.MiniMaxM1) or part.layout is None:
            return part
        layout = part.layout

        def one(param):
            where = layout.param_sharding(param.get_metadata()["logical_axes"])
            return param.replace(jax.lax.with_sharding_constraint(param.get_value(), where))

        return jax.tree.map(one, part, is_leaf=lambda node: isinstance(node, nnx.Param))

    return jax.tree.map(pin, tree, is_leaf=lambda part: isinstance(part, model_lib.MiniMaxM1))


def _microbatch_loss(
    model, batch: batch_lib.TrainBatch, totals, *, coefficient, z_coefficient: float
):
    """Return a microbatch's share of the loss, and its share of each metric."""
    hidden, stats = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    return _loss_and_metrics(model, hidden, stats, batch, totals, coefficient, z_coefficient)


@jax.named_scope("loss")
def _loss_and_metrics(
    model: model_lib.MiniMaxM1,
    hidden: Float[Array, "B T D"],
    stats: moe.RouterStats,
    batch: batch_lib.TrainBatch,
    totals: tuple[Any, Any],
    coefficient: Any,
    z_coefficient: float,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Return what `_microbatch_loss` does, from the model's output."""
    weight, num_real = totals
    tokens = logprobs.token_logprobs(model, hidden, batch.targets, with_log_normalizer=True)

    def mean(values):
        return jnp.sum(jnp.where(batch.weights != 0, batch.weights * values, 0.0)) / weight

    share = _num_tokens(batch) / num_real
    metrics = {
        "loss": -mean(tokens.logp),
        "balance_loss": moe.balance_loss(stats) * share,
        "z_loss": mean(jnp.square(tokens.log_normalizer)),
        "tokens": _num_tokens(batch),
        "weight": jnp.sum(batch.weights),
        "dropped": moe.dropped_share(stats) * share,
        "expert_load": jnp.sum(stats.choice_counts, 1) / (num_real * stats.choice_counts.shape[1]),
    }
    loss = metrics["loss"] + coefficient * metrics["balance_loss"]
    if z_coefficient:
        loss += z_coefficient * metrics["z_loss"]
    return loss, metrics


def _num_tokens(batch: batch_lib.TrainBatch) -> Float[Array, ""]:
    return jnp.sum((batch.segment_ids != 0).astype(jnp.float32))


def abstract_state(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model of sharded shapes, moments lying where their parameters do."""
    whole = jax.tree.leaves(model)[0].sharding
    if model.layout is not None:
        whole = jax.sharding.NamedSharding(model.layout.mesh, jax.sharding.PartitionSpec())

    def place(shape, like):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=like.sharding)

    def moment(part) -> Any:
        if isinstance(part, model_lib.MiniMaxM1):
            return jax.tree.map(place, part, trained)
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=whole)

    def is_moment(part):
        return isinstance(part, model_lib.MiniMaxM1)

    trained, _ = trainable.partition(model)
    state = jax.eval_shape(lambda m: init_state(m, optimizer), model)
    moments = jax.tree.map(moment, state.moments, is_leaf=is_moment)
    return TrainState(moment(state.step), model, moments)
