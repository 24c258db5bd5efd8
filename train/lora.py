"""LoRA: frozen weights, and for some projections a trained change of low rank.

y = x W + (alpha / rank) x A B, with A [in, rank] and B [rank, out] (arXiv:2106.09685, 4.1). The
product A B exists only when the two are merged for good.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m1_jax import layers, quantize, sharding
from m1_jax import model as model_lib
from m1_jax import params as params_lib


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get adapters, and how large the adapters are.

    Attributes:
      rank: columns of A and rows of B, at least 1.
      alpha: the change is scaled by alpha / rank. It is above 0.
      modules: a regular expression that is searched for in the paths of projections. Paths are
        "layers.0.attention.qkv" (gate, out) in lightning layers, "layers.0.attention.query" (key,
        value, out) in softmax layers and, where there is a shared expert,
        "layers.0.moe.shared.gate" (up, down).
    """

    rank: int = 16
    alpha: float = 32.0
    modules: str = r"\.attention\."

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"got rank {self.rank}, alpha {self.alpha}; wanted rank at least 1, alpha above 0"
            )
        try:
            re.compile(self.modules)
        except re.error as error:
            raise ValueError(
                f"modules: {self.modules!r} is no regular expression: {error}"
            ) from None


def add_adapters(
    model: model_lib.MiniMaxM1, config: LoraConfig, key: jax.Array
) -> model_lib.MiniMaxM1:
    """Return the model with adapters and everything else frozen.

    The new model computes what the model did, because B is 0. A is drawn from
    normal(0, 1 / sqrt(in)). Both are float32 and are sharded like W's rows and columns. W may have
    any float dtype. The model's arrays are shared, not copied.

    Raises:
      ValueError: the model has adapters already or int8 weights, which have no gradient, or
        `modules` names no projection.
    """
    # A copy of the structure: metadata and adapters are set on it, not on the caller's model.
    model = jax.tree.map(lambda leaf: leaf, model)
    linears = _find_linears(model)
    if any(linear.adapter for linear in linears.values()):
        raise ValueError("the model has adapters already; merge them before adding others")
    quantize.refuse_int8_weights(model)
    chosen = {name: linear for name, linear in linears.items() if re.search(config.modules, name)}
    if not chosen:
        raise ValueError(
            f"modules: {config.modules!r} is found in none of {', '.join(sorted(linears))}"
        )
    for param in params_lib.params_by_path(model).values():
        param.set_metadata(frozen=True)

    def make_factors(key):
        keys = jax.random.split(key, len(chosen))
        return [
            _init_factors(linear, config.rank, key)
            for linear, key in zip(chosen.values(), keys, strict=True)
        ]

    # Under jit with shardings, so that each device makes its own part and none makes a whole A.
    shapes = jax.eval_shape(make_factors, key)
    shardings = sharding.map_params(functools.partial(_shard_factor, model.layout), shapes)
    pairs = jax.jit(make_factors, out_shardings=shardings)(key)
    for linear, (a, b) in zip(chosen.values(), pairs, strict=True):
        linear.adapter = layers.LoraAdapter(a, b, config.alpha / config.rank)
    return model


def merge_adapters(
    model: model_lib.MiniMaxM1, dtype: jax.typing.DTypeLike | None = None
) -> model_lib.MiniMaxM1:
    """Return the model without adapters: W + (alpha / rank) A B takes W's place, nothing is frozen.

    Precision: float32, then rounded once. All other arrays are shared, not copied.

    Args:
      model: a model with adapters.
      dtype: dtype of what takes W's place. None: W's own, which loses changes below half a step of
        it.

    Raises:
      ValueError: the model has int8 weights, whose steps are larger than the change.
    """
    quantize.refuse_int8_weights(model)
    # A copy of the structure, as in `add_adapters`.
    model = jax.tree.map(lambda leaf: leaf, model)
    for linear in _find_linears(model).values():
        if linear.adapter is not None:
            kernel, adapter = linear.kernel.get_value(), linear.adapter
            # One projection at a time: in float32, all of them at once would not fit.
            merge = jax.jit(_merge_kernel, static_argnames="dtype", out_shardings=kernel.sharding)
            merged = merge(
                kernel,
                adapter.a.get_value(),
                adapter.b.get_value(),
                adapter.scale,
                dtype=jnp.dtype(dtype or kernel.dtype),
            )
            linear.kernel.set_value(merged)  # the copy's kernel
            linear.adapter = None
    for param in params_lib.params_by_path(model).values():
        param.set_metadata(frozen=False)
    return model


def declare_adapters(
    model: model_lib.MiniMaxM1, like: model_lib.MiniMaxM1, dtype: jax.typing.DTypeLike
) -> model_lib.MiniMaxM1:
    """Return an abstract model with adapters of the shapes of another model's.

    Args:
      model: a model of shapes, see `params.abstract_model`. It is not changed.
      like: a model of the same config with adapters.
      dtype: dtype of the declared factors. An adapter rounds its factors to the dtype of its
        input, so factors in the dtype of the computation change nothing.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    linears = _find_linears(model)
    for name, linear in _find_linears(like).items():
        if linear.adapter is not None:
            a, b = (
                _declare_factor(model.layout, param, dtype)
                for param in (linear.adapter.a, linear.adapter.b)
            )
            linears[name].adapter = layers.LoraAdapter(a, b, linear.adapter.scale)
    return model


def has_adapters(model: model_lib.MiniMaxM1) -> bool:
    """Return whether some projection has an adapter."""
    return any(linear.adapter is not None for linear in _find_linears(model).values())


def measure_served_share(model: model_lib.MiniMaxM1, served_model: model_lib.MiniMaxM1) -> float:
    """Return which share of what the adapters learnt is in the adapters of another model.

    With D = scale A B of all projections together, and D' that of the other model, it is
    <D', D> / <D, D>: 1 where all arrives, 0 where nothing does. It is 1 where D is 0.

    Args:
      model: the model that is trained.
      served_model: the same model in another dtype, on the same devices.
    """
    served = _find_linears(served_model)
    factors, scales = [], []
    for name, linear in _find_linears(model).items():
        if linear.adapter is not None:
            own, other = linear.adapter, served[name].adapter
            assert other is not None, "the two models have the same adapters"
            params = (own.a, own.b, other.a, other.b)
            factors.append(tuple(param.get_value() for param in params))
            scales.append((own.scale, other.scale))
    arrived, learnt = _change_products(factors, scales)
    return float(arrived) / float(learnt) if learnt else 1.0


@jax.jit
def _change_products(factors, scales):
    """Return (<D', D>, <D, D>), float32, from (A, B, A', B') of each projection."""
    arrived = learnt = jnp.float32(0)
    for (a, b, a_served, b_served), (scale, scale_served) in zip(factors, scales, strict=True):
        # <A' B', A B> = sum of (A'^T A) * (B' B^T): no product is larger than rank by rank.
        arrived += scale_served * scale * _inner_product(a_served, b_served, a, b)
        learnt += scale**2 * _inner_product(a, b, a, b)
    return arrived, learnt


def _inner_product(a, b, other_a, other_b):
    a, b, other_a, other_b = (x.astype(jnp.float32) for x in (a, b, other_a, other_b))
    highest = jax.lax.Precision.HIGHEST
    rows = jnp.einsum("...ir,...is->...rs", a, other_a, precision=highest)
    columns = jnp.einsum("...ro,...so->...rs", b, other_b, precision=highest)
    return jnp.sum(rows * columns)


def _merge_kernel(kernel, a, b, scale, dtype):
    # Highest precision: TPUs would otherwise round the factors to bfloat16 first.
    change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale
    return (kernel.astype(jnp.float32) + change).astype(dtype)


def _find_linears(model: model_lib.MiniMaxM1) -> dict[str, layers.Linear]:
    """Return the projections by path. One of stacked layers stands for all of its layers."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, layers.Linear)
    }


def _init_factors(linear: layers.Linear, rank: int, key: jax.Array) -> tuple[nnx.Param, nnx.Param]:
    """Return A and B, stacked as the kernel is."""
    *stack, rows, columns = linear.kernel.shape
    *names, row_axis, column_axis = linear.kernel.get_metadata()["logical_axes"]
    rngs, std = nnx.Rngs(key), rows**-0.5
    # A keeps the kernel's row axis and B its column axis. The rank is too small to be sharded.
    a = layers.make_param(rngs, (*stack, rows, rank), (*names, row_axis, None), jnp.float32, std)
    b = layers.make_param(
        rngs, (*stack, rank, columns), (*names, None, column_axis), jnp.float32, 0.0
    )
    return a, b


def _declare_factor(layout, param: nnx.Param, dtype) -> Any:
    """Return a factor as its shape, with the sharding of a model's layout."""
    axes = param.get_metadata()["logical_axes"]
    factor_sharding = sharding.make_param_sharding(layout, axes, param.shape)
    return param.replace(jax.ShapeDtypeStruct(param.shape, dtype, sharding=factor_sharding))


def _shard_factor(layout: sharding.MeshLayout | None, param):
    axes = param.get_metadata()["logical_axes"]
    return param.replace(sharding.make_param_sharding(layout, axes, param.shape))
