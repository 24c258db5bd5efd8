"""A model's parameters by path, and models without weights or with random ones.

Paths are the dotted ones of `checkpoints.params_map`, such as `layers.0.attention.qkv.kernel`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import quantize, sharding


def params_by_path(model: model_lib.MiniMaxM1) -> dict[str, nnx.Param]:
    """Return the model's own `nnx.Param` objects, so that setting a value changes the model."""
    # The graph also has the modules, and attributes that are no parameters.
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param)
    }


def abstract_model(
    config: config_lib.ModelConfig,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    param_dtype: jax.typing.DTypeLike | None = None,
    layout: sharding.MeshLayout | None = None,
    weights: str | None = None,
) -> model_lib.MiniMaxM1:
    """Return a model whose parameters are shapes, dtypes and shardings only. It costs no memory.

    Args:
      config: the model's configuration.
      dtype: dtype of activations.
      param_dtype: dtype of parameters. None: as `dtype`. Routers are float32 in any case.
      layout: gives each parameter its sharding. None: one device.
      weights: an int8 recipe of `quantize.INT8_RECIPES`, or None for float parameters.
    """
    # The key of the generator is a constant: eval_shape runs no initializer.
    model = nnx.eval_shape(
        lambda: model_lib.MiniMaxM1(
            config,
            nnx.Rngs(0),
            dtype=dtype,
            param_dtype=param_dtype,
            layout=layout,
        )
    )
    # Before the shardings are set, because the recipe adds parameters that need one, too.
    quantize.declare_int8_params(model, weights)
    for param in params_by_path(model).values():
        param_sharding = sharding.make_param_sharding(
            layout, param.get_metadata()["logical_axes"], param.shape
        )
        param.set_value(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=param_sharding))
    return model


def random_model(
    config: config_lib.ModelConfig,
    key: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    param_dtype: jax.typing.DTypeLike | None = None,
    layout: sharding.MeshLayout | None = None,
) -> model_lib.MiniMaxM1:
    """Return a model with fresh parameters, each created on the devices that hold it.

    The arguments are those of `abstract_model`, and the key of the random numbers.
    """
    model = abstract_model(config, dtype, param_dtype, layout)

    def init_params(key):
        # No layout here: `out_shardings` below splits the values, so no device holds all of them.
        initialised_model = model_lib.MiniMaxM1(
            config, nnx.Rngs(key), dtype=dtype, param_dtype=param_dtype
        )
        return {name: param[...] for name, param in params_by_path(initialised_model).items()}

    params = params_by_path(model)
    shardings = {name: param.get_value().sharding for name, param in params.items()}
    for name, value in jax.jit(init_params, out_shardings=shardings)(key).items():
        params[name].set_value(value)
    return model
