"""LoRA: frozen weights, and for some projections a trained change of low rank.

y = x W + (alpha / rank) x A B, with A [in, rank] and B [rank, out] (arXiv:2106.09685, 4.1). The
product A B exists only when the two are merged for good.
"""

import dataclasses
import functools
import re

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


def merge_adapters(model: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
    """Return the model without adapters: W + (alpha / rank) A B takes W's place, nothing is frozen.

    Precision: float32, then rounded to W's dtype. All other arrays are shared, not copied.

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
            merged = jax.jit(_merge_kernel, out_shardings=kernel.sharding)(
                kernel, adapter.a.get_value(), adapter.b.get_value(), adapter.scale
            )
            linear.kernel.set_value(merged)  # the copy's kernel
            linear.adapter = None
    for param in params_lib.params_by_path(model).values():
        param.set_metadata(frozen=False)
    return model


def _merge_kernel(kernel, a, b, scale):
    # Highest precision: TPUs would otherwise round the factors to bfloat16 first.
    change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale
    return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


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


def _shard_factor(layout: sharding.MeshLayout | None, param):
    axes = param.get_metadata()["logical_axes"]
    return param.replace(sharding.make_param_sharding(layout, axes, param.shape))
