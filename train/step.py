"""The training step: loss, gradients over microbatches, AdamW; one jitted function."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import logprobs, moe
from m1_jax import model as model_lib
from train import frozen, optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B packed rows of T tokens.

    tokens, positions: of the input. segment_ids: 0 is padding, a change starts a new document.
    targets: the token that each place predicts; any valid id where its weight is 0.
    weights: of each place's loss, 0 where nothing is to be learnt (prompts, padding, last tokens).
    """

    tokens: Int[Array, "*A B T"]
    segment_ids: Int[Array, "*A B T"]
    positions: Int[Array, "*A B T"]
    targets: Int[Array, "*A B T"]
    weights: Float[Array, "*A B T"]


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
class Settings:
    """What one compiled step is made for.

    optimizer: see `optim.AdamW`. accumulate: microbatches in a batch, a divisor of its rows.
    balance_coefficient: of `moe.balance_loss`; None takes the model's `router_aux_loss_coef`.
    """

    optimizer: optim.AdamW
    accumulate: int = 1
    balance_coefficient: float | None = None

    def __post_init__(self):
        if self.accumulate < 1:
            raise ValueError(f"accumulate: got {self.accumulate}; wanted at least 1")


def init(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model that was made with param_dtype float32, but for frozen parts.

    Raises:
      ValueError: other parameters, whose updates would be rounded away.
    """
    trained, _ = frozen.split(model)
    for leaf in jax.tree.leaves(trained):
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"master weights: got a parameter in {leaf.dtype}; wanted float32. "
                "Build the model with param_dtype=float32; dtype is that of the computation."
            )
    return TrainState(jnp.zeros((), jnp.int32), model, pinned(optimizer.init(trained)))


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="state")
def update(
    state: TrainState, batch: Batch, settings: Settings
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Make one optimizer step; `state` is donated, so the old one is gone.

    loss = sum of weights * -logp(target) / sum of weights + coefficient * balance loss. Sums over
    microbatches are divided by the whole batch's, so that splitting a batch changes nothing in
    the first term. The balance loss is a product of means and therefore one of each microbatch,
    averaged by tokens; over the whole batch it would need every forward pass twice.

    Returns:
      The new state, and metrics: loss (of the tokens alone), balance_loss, grad_norm (before
      clipping), learning_rate, tokens (real ones), dropped (share of the tokens' expert choices
      that `ModelConfig.expert_capacity` left out).
    """
    grads, metrics = gradients(state.model, batch, settings)
    grads = pinned(grads)
    trained, rest = frozen.split(state.model)
    trained, moments, more = settings.optimizer.update(grads, state.moments, trained, state.step)
    model = frozen.join(trained, rest)
    return pinned(TrainState(state.step + 1, model, moments)), metrics | more


def gradients(model: model_lib.MiniMaxM1, batch: Batch, settings: Settings):
    """Return float32 gradients of the whole batch's loss, summed microbatch by microbatch.

    Frozen parameters have none.
    """
    weight = jnp.sum(batch.weights)
    totals = (jnp.where(weight > 0, weight, 1.0), jnp.maximum(_num_real(batch), 1.0))
    coefficient = settings.balance_coefficient
    if coefficient is None:
        coefficient = model.config.router_aux_loss_coef
    trained, rest = frozen.split(model)

    @functools.partial(jax.grad, has_aux=True)
    def function(trained, part, totals):
        return _loss(frozen.join(trained, rest), part, totals, coefficient)

    if settings.accumulate == 1:
        return function(trained, batch, totals)

    def micro(carry, part):
        return jax.tree.map(jnp.add, carry, function(trained, part, totals)), None

    parts = split(batch, settings.accumulate)
    shapes = jax.eval_shape(function, trained, jax.tree.map(lambda x: x[0], parts), totals)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(micro, start, parts)[0]


def split(batch: Batch, parts: int) -> Batch:
    """Split [B, T] into [parts, B / parts, T], each device's rows staying where they are.

    Raises:
      ValueError: rows that do not divide.
    """
    rows, length = batch.tokens.shape
    if rows % parts:
        raise ValueError(f"got {rows} rows in {parts} microbatches; wanted a divisor of the rows")
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(rows // parts, parts, length), 1, 0), batch
    )


def pinned(tree):
    """Hold every model in a pytree, and what is shaped like one, where its parameters lie.

    Left alone, XLA may return a state that lies otherwise than the one it took, which the next
    step would be compiled again for.
    """

    def pin(part):
        if not isinstance(part, model_lib.MiniMaxM1) or part.layout is None:
            return part
        layout = part.layout

        def one(param):
            where = layout.param(param.get_metadata()["logical_axes"])
            return param.replace(jax.lax.with_sharding_constraint(param.get_value(), where))

        return jax.tree.map(one, part, is_leaf=lambda node: isinstance(node, nnx.Param))

    return jax.tree.map(pin, tree, is_leaf=lambda part: isinstance(part, model_lib.MiniMaxM1))


def _loss(model, batch: Batch, totals, coefficient: float):
    """Return a microbatch's share of the loss, and its share of each metric."""
    weight, num_real = totals
    hidden, stats = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    logps = logprobs.token_logprobs(model, hidden, batch.targets)
    loss = -jnp.sum(jnp.where(batch.weights != 0, batch.weights * logps, 0.0)) / weight
    tokens = _num_real(batch)
    balance = moe.balance_loss(stats) * tokens / num_real
    dropped = moe.dropped_share(stats) * tokens / num_real
    metrics = {"loss": loss, "balance_loss": balance, "tokens": tokens, "dropped": dropped}
    return loss + coefficient * balance, metrics


def _num_real(batch: Batch) -> Float[Array, ""]:
    return jnp.sum((batch.segment_ids != 0).astype(jnp.float32))


def abstract(model: model_lib.MiniMaxM1, optimizer: optim.AdamW) -> TrainState:
    """Return the state of a model of sharded shapes, moments lying where their parameters do."""
    mesh = jax.tree.leaves(model)[0].sharding.mesh
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(shape, like):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=like.sharding)

    def moment(part) -> Any:
        if isinstance(part, model_lib.MiniMaxM1):
            return jax.tree.map(place, part, trained)
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=whole)

    def is_moment(part):
        return isinstance(part, model_lib.MiniMaxM1)

    trained, _ = frozen.split(model)
    state = jax.eval_shape(lambda m: init(m, optimizer), model)
    moments = jax.tree.map(moment, state.moments, is_leaf=is_moment)
    return TrainState(moment(state.step), model, moments)
