"""Which forms of serving attention an engine runs: its outputs' bits depend on it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import config as config_lib
from m1_jax import lightning, measured_choices, sharding
from m1_jax import model as model_lib
from pallas_kernels.lightning_serving import tpu as tpu_lightning
from pallas_kernels.paged_attention import tpu as tpu_softmax

# What every engine ran before there were kernels.
XLA_ONLY = {"lightning": "xla", "softmax": "xla"}


def resolve_for_model(
    model: model_lib.MiniMaxM1, attention_tile: int, chunk_tokens: int
) -> tuple[config_lib.ModelConfig, dict[str, str]]:
    """Return the model's config with the implementation that runs, and the forms of serving."""
    runs = lightning.resolve_implementation(model.config, model.dtype, model.layout)
    config = dataclasses.replace(model.config, lightning_implementation=runs)
    return config, resolve_implementations(
        model.config, model.dtype, model.layout, attention_tile, chunk_tokens
    )


def resolve_implementations(
    config: config_lib.ModelConfig,
    dtype: jax.typing.DTypeLike,
    layout: sharding.MeshLayout | None,
    attention_tile: int,
    chunk_tokens: int,
) -> dict[str, str]:
    """Return "tpu" (the kernel) or "xla" for each kind of layer.

    Args:
      config: the model's config.
      dtype: dtype of its activations.
      layout: where the model lies. None: on this process's first device.
      attention_tile: rows of a tile.
      chunk_tokens: tokens of a page and of a chunk.
    """
    device = jax.local_devices()[0] if layout is None else layout.mesh.devices.flat[0]
    target = sharding.TargetDevice(device.platform, device.device_kind)
    head_dim = config.head_dim
    with lightning.choose_for(target):
        takes_lightning = (
            lightning.kernel_platform(target) == "tpu"
            and config.lightning_implementation in (None, "tpu")
            and (config.lightning_implementation == "tpu" or not _prefers_xla("lightning", target))
            and tpu_lightning.supports_sizes(attention_tile, chunk_tokens, head_dim, dtype)
        )
    query_rows = config.num_attention_heads // config.num_key_value_heads * attention_tile
    # The checker is made for arrays, of which it reads shapes and dtypes.
    make_shape: Any = jax.ShapeDtypeStruct
    takes_softmax = (
        device.platform == "tpu"
        and not _prefers_xla("softmax", target)
        and tpu_softmax.supports_shapes(
            make_shape((1, 1, query_rows, head_dim), jnp.dtype(dtype)),
            make_shape((1, 1, 1, 1, chunk_tokens, head_dim), jnp.dtype(dtype)),
        )
    )
    return {
        "lightning": "tpu" if takes_lightning else "xla",
        "softmax": "tpu" if takes_softmax else "xla",
    }


def _prefers_xla(kind: str, target: sharding.TargetDevice) -> bool:
    """Return whether m1-selfcheck measured that XLA is to serve this kind of layer there."""
    return measured_choices.find_choice(f"serving_{kind}", target) == "xla"
