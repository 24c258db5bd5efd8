"""Tokens to a row for each of their experts, sorted by expert, and back: the other's gradient each.

M tokens of size D have A experts each, of E. R = M A rows.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class SortedChoices(NamedTuple):
    """A row for each of a token's A choices, sorted by expert."""

    rows: Float[Array, "R D"]
    scale: Float[Array, "R"]  # weights
    counts: Int[Array, "E"]  # rows of each expert
    order: Int[Array, "R"]  # choice order[i] is row i
    inverse: Int[Array, "M A"]  # row inverse[m, a] is token m's
    has_expert: Bool[Array, "M A"]

    def sum_over_choices(self, y):
        """Return each token's sum of its rows of `y` [R, D], float32 [M, D]."""
        return _sum_over_choices(y, self.order, self.inverse, self.has_expert)


def sort_choices(
    x: Float[Array, "M D"],
    weights: Float[Array, "M A"],
    expert_ids: Int[Array, "M A"],
    num_experts: int,
) -> SortedChoices:
    """Return the rows of tokens `x` for experts 0 to `num_experts` - 1.

    Args:
      weights: float32 weights of each token's experts.
      expert_ids: each token's experts. `num_experts` or more means no expert.
    """
    # A stable sort keeps the tokens of an expert in order, so that results do not depend on how the
    # sort breaks ties.
    order = jnp.argsort(expert_ids.reshape(-1), stable=True)
    inverse = jnp.argsort(order).reshape(expert_ids.shape)
    has_expert = expert_ids < num_experts
    rows = _repeat_by_choice(x, order, inverse, has_expert)
    scale = jnp.take(weights.reshape(-1), order, mode="clip")
    # Choices of no expert are past the end: they sort last, and no chunk counts them.
    counts = jnp.bincount(expert_ids.reshape(-1), length=num_experts).astype(jnp.int32)
    return SortedChoices(rows, scale, counts, order, inverse, has_expert)


@jax.custom_vjp
def _repeat_by_choice(
    x: Float[Array, "M D"],
    order: Int[Array, "R"],
    inverse: Int[Array, "M A"],
    has_expert: Bool[Array, "M A"],
) -> Float[Array, "R D"]:
    """Return a row for each choice. Choice order[i] is row i, and row inverse[m, a] is token m's.

    The gradient gathers through `inverse`. Autodiff would scatter, which is slow everywhere.
    """
    # All gathers here clip. By default they would compare every index and select every number.
    return jnp.take(x, order // inverse.shape[1], axis=0, mode="clip")


def _repeat_by_choice_fwd(x, order, inverse, has_expert):
    return _repeat_by_choice(x, order, inverse, has_expert), (inverse, has_expert)


def _repeat_by_choice_bwd(residuals, grad):
    return _add_choices(grad, *residuals).astype(grad.dtype), None, None, None


_repeat_by_choice.defvjp(_repeat_by_choice_fwd, _repeat_by_choice_bwd)


@jax.custom_vjp
def _sum_over_choices(
    rows: Float[Array, "R D"],
    order: Int[Array, "R"],
    inverse: Int[Array, "M A"],
    has_expert: Bool[Array, "M A"],
) -> Float[Array, "M D"]:
    """Return the sum of each token's rows, float32. Rows that went to no expert are not read."""
    return _add_choices(rows, inverse, has_expert)


def _sum_over_choices_fwd(rows, order, inverse, has_expert):
    # An empty array is a residual: it carries the dtype of the rows and no data.
    residuals = order // inverse.shape[1], jnp.zeros((0,), rows.dtype)
    return _sum_over_choices(rows, order, inverse, has_expert), residuals


def _sum_over_choices_bwd(residuals, grad):
    token, like = residuals
    return jnp.take(grad.astype(like.dtype), token, axis=0, mode="clip"), None, None, None


_sum_over_choices.defvjp(_sum_over_choices_fwd, _sum_over_choices_bwd)


def _add_choices(rows, inverse, has_expert):
    """Return the float32 sum over a of rows[inverse[:, a]], without those of no expert."""

    def add_gathered(rows, inverse, has_expert):
        gathered = jnp.take(rows, inverse, axis=0, mode="clip")
        # Rows of no expert are undefined: a select, not a product with 0.
        gathered = jnp.where(has_expert[..., None], gathered, 0)
        return jnp.sum(gathered.astype(jnp.float32), axis=1)

    def add_in_turn(rows, inverse, has_expert):
        choices = (
            add_gathered(rows, inverse[:, a : a + 1], has_expert[:, a : a + 1])
            for a in range(inverse.shape[1])
        )
        return functools.reduce(operator.add, choices)

    # On TPU the rows of all choices would be written to memory, relaid and read again. On CPU the
    # sum would be fused with what follows, which changes how that rounds.
    return jax.lax.platform_dependent(
        rows, inverse, has_expert, cpu=add_gathered, default=add_in_turn
    )
