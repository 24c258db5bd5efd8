"""AdamW with float32 moments over float32 master weights, and the schedules that drive it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

Schedule = Callable[[Int[Array, ""]], Any]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW: theta <- theta - lr (m / (sqrt(v) + eps) + decay theta).

    m and v are the moments, corrected for their start at 0. The gradient is first scaled to a
    global norm of at most `clip_norm`. The class is hashable, so a jitted step takes it as a
    constant.

    Attributes:
      schedule: function of the step (0 is the first) to the learning rate, or a constant rate.
      b1: decay of the first moment, from 0 to less than 1.
      b2: decay of the second moment, from 0 to less than 1. M1's 0.95 is low, because gradients of
        neighbouring steps correlate little there (M1 3.2).
      eps: above 0. M1's 1e-15 suits gradients that span 1e-18 to 1e-5 (M1 3.2).
      weight_decay: decay of matrices, at least 0. Vectors (norms) are never decayed.
      clip_norm: above 0. None leaves the gradient as it is.

    Raises:
      ValueError: a value is out of range.
    """

    schedule: Schedule | float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: got {value}; wanted at least 0 and less than 1")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"got eps {self.eps}, weight_decay {self.weight_decay}; "
                "wanted eps more than 0 and weight_decay at least 0"
            )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm: got {self.clip_norm}; wanted more than 0, or None")

    def init(self, model: Any) -> optax.OptState:
        """Return zero moments, float32 and sharded like the parameters."""
        return self._moment_transform().init(model)

    def update(self, grads, state: optax.OptState, model, step: Int[Array, ""]):
        """Return (new model, new state, {"grad_norm", "learning_rate"}).

        The norm is that before clipping. The clip, the moments and the update of a parameter are
        one fusion, which writes the new values alone. So gradients exist once in memory.
        """
        # Over all devices: under jit the gradients are global arrays.
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        if self.clip_norm is not None:
            # 1e-30 keeps a gradient of zeros from 0 / 0.
            scale = jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, 1e-30))
            grads = jax.tree.map(lambda g: g * scale, grads)
        directions, state = self._moment_transform().update(grads, state, model)
        rate = self.learning_rate(step)
        # The rate is float32. Without the cast a parameter of another dtype would change its own.
        model = jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), model, directions)
        return model, state, {"grad_norm": norm, "learning_rate": rate}

    def learning_rate(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Return the learning rate of a step, float32."""
        rate = self.schedule(step) if callable(self.schedule) else self.schedule
        return jnp.asarray(rate, jnp.float32)

    def _moment_transform(self) -> optax.GradientTransformation:
        # Without the learning rate. `update` multiplies by it, at the run's step.
        adam = optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.float32)
        if not self.weight_decay:
            return adam
        return optax.chain(adam, optax.add_decayed_weights(self.weight_decay, mask=matrix_mask))


def matrix_mask(model: nnx.Module):
    """Return the model with True at each parameter that has two axes or more besides `layers`."""

    def mark_param(param):
        # Stacking gives a norm's vector a second axis, which does not make it a matrix.
        axes = [name for name in param.get_metadata()["logical_axes"] if name != "layers"]
        return jax.tree.map(lambda _: len(axes) > 1, param)

    return jax.tree.map(mark_param, model, is_leaf=lambda x: isinstance(x, nnx.Param))


# Cached here and below: equal arguments give the same function, and jit compares functions by
# identity.
@functools.cache
def make_stage_schedule(
    shape: str,
    start: float,
    end: float,
    warmup_tokens: int,
    tokens: int,
    tokens_per_step: int,
    first_step: int = 0,
) -> Schedule:
    """Return the learning rate of one stage of a run, as a function of the run's step.

    Args:
      shape: "linear" and "cosine" go from `start` to `end`. "constant" is `end` throughout.
      start: rate at the end of the stage before.
      end: rate at the end of the stage.
      warmup_tokens: tokens over which the rate is also multiplied by a linear rise from 0 to 1.
      tokens: length of the stage.
      tokens_per_step: tokens in a step of the stage.
      first_step: number of the run's steps before the stage.
    """

    # Floats: JAX takes a Python int for an int32, and a stage may have more than 2^31 tokens. What
    # float32 rounds off is less than a ten-millionth of the stage.
    stage_tokens, step_tokens = float(tokens), float(tokens_per_step)
    rise_tokens = float(max(warmup_tokens, 1))

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        tokens_before = jnp.asarray(step - first_step, jnp.float32) * step_tokens
        share = jnp.clip(tokens_before / stage_tokens, 0.0, 1.0)
        if shape == "cosine":
            share = (1 - jnp.cos(jnp.pi * share)) / 2
        rate = end if shape == "constant" else start + (end - start) * share
        # The first step's own tokens count, so that it is not wasted on a rate of 0.
        return rate * jnp.minimum(1.0, (tokens_before + step_tokens) / rise_tokens)

    return schedule


@functools.cache
def make_piecewise_schedule(
    points: tuple[tuple[int, float], ...], first_token: int, tokens_per_step: int, first_step: int
) -> Schedule:
    """Return lines between (token, value) points, as a function of the run's step.

    Before the first point and after the last one the value is that of the point.

    Args:
      points: points in rising order. Tokens count from the beginning of the run.
      first_token: number of the run's tokens before `first_step`.
      tokens_per_step: tokens in a step, from `first_step` on.
      first_step: number of the run's steps before the stage.
    """
    # float64 on the host, where numbers of tokens are exact. Python ints would be int32 to JAX.
    tokens, values = np.asarray(points, np.float64).T
    tokens, values = jnp.asarray(tokens, jnp.float32), jnp.asarray(values, jnp.float32)
    tokens_before, step_tokens = float(first_token), float(tokens_per_step)

    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        token = tokens_before + jnp.asarray(step - first_step, jnp.float32) * step_tokens
        return jnp.interp(token, tokens, values)

    return schedule
