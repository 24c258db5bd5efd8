"""Shapes with shardings: the model, rows and states that a job's programs are traced from."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import sharding
from m1_jax import state as state_lib
from m1_jax.plan import estimate


def abstract_job_model(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    layout: sharding.MeshLayout | None = None,
    weights: str | None = None,
) -> model_lib.MiniMaxM1:
    """Return a bfloat16 model of sharded shapes. A trainer's parameters are float32."""
    # Master weights are float32. The forward pass casts them.
    param_dtype = jnp.float32 if job.mode == sharding.TRAIN else jnp.bfloat16
    return params_lib.abstract_model(config, jnp.bfloat16, param_dtype, layout, weights)


def abstract_rows(
    layout: sharding.MeshLayout, num_rows: int, length: int, dtype: jax.typing.DTypeLike = jnp.int32
) -> Any:
    """Return the shape of an array [rows, length] that lies as tokens do."""
    # `Any`: a shape is passed where batches are annotated as arrays.
    # Rows of one token have no length to split.
    row_sharding = layout.activation_sharding("batch", "length" if length > 1 else None)
    return jax.ShapeDtypeStruct((num_rows, length), dtype, sharding=row_sharding)


def abstract_decode_state(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, job: estimate.PlanJob
) -> state_lib.DecodeState:
    """Return the decode state of all rows, with room for `job.seq` tokens in each."""
    state = jax.eval_shape(lambda: state_lib.init_decode_state(config, job.batch, job.seq))

    def add_sharding(shape, spec):
        return jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=NamedSharding(layout.mesh, spec)
        )

    return jax.tree.map(add_sharding, state, state_lib.decode_state_specs(state, layout))


def shard_like_model(shapes: Any, model: model_lib.MiniMaxM1) -> Any:
    """Return a tree of shapes with the shardings of a model of the same structure.

    Args:
      shapes: a tree of the model's structure, like its gradients.
      model: the model, of sharded shapes.
    """

    def copy_sharding(shape, param):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=param.sharding)

    return jax.tree.map(copy_sharding, shapes, model)


def replicate_shapes(shapes: Any, layout: sharding.MeshLayout) -> Any:
    """Return a tree of shapes that every device has in full."""
    replicated = layout.activation_sharding()
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes
    )


def local_bytes(tree: Any) -> int:
    """Return the bytes of a pytree of sharded shapes on one chip, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
