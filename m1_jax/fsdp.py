"""ZeRO-3: parameters are stored split over devices, and each layer gathers them before it computes.

`sharding.FSDP_AXES` are the mesh axes that split a parameter for storage alone. The forward pass
gathers in the dtype of the computation. The backward pass gathers again (`layer_stack.apply_remat`)
and scatters each gradient back to where its parameter lies.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

from m1_jax import sharding

GATHERED_NAME = "gathered"  # the name of gathered parameters, for rematerialisation


def is_gathered(layout: sharding.MeshLayout | None, logical_axes: Sequence[str | None]) -> bool:
    """Say whether a parameter is split for storage, so that each layer gathers it."""
    return layout is not None and bool(layout.fsdp_dim_and_axes(logical_axes)[1])


def gather_params(module, layout: sharding.MeshLayout | None, dtype):
    """Return a module whose parameters are ready to compute with: gathered, and in `dtype`.

    Parameters marked `float32` (routers) stay float32, and int8 experts stay int8. Gathering moves
    `dtype`, and its transpose reduces gradients in float32.
    """

    def gather_param(param):
        target_dtype = jnp.float32 if param.get_metadata().get("float32") else dtype
        # The matrix product widens int8 itself, and applies the scale to its sums.
        target_dtype = jnp.int8 if param.dtype == jnp.int8 else target_dtype
        value = param[...]
        logical_axes = sharding.param_logical_axes(param)
        dim, axes = (0, ()) if layout is None else layout.fsdp_dim_and_axes(logical_axes)
        if not axes:
            return param.replace(value.astype(target_dtype))
        value = all_gather_fsdp(value, dim, axes, target_dtype)
        return param.replace(ad_checkpoint.checkpoint_name(value, GATHERED_NAME))

    return sharding.map_params(gather_param, module)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather_fsdp(value, dim: int, axes: tuple[str, ...], dtype):
    """Return all of a dimension that is split over mesh axes for storage alone, as `dtype`.

    The gradient is reduced in float32 and scattered back.
    """
    # The cast comes first: bfloat16 is half the bytes to move.
    value = value.astype(dtype)
    # One axis at a time, the small pieces first. Over several axes at once, XLA makes each an
    # all-reduce of the full array, which moves twice the bytes.
    for axis in reversed(axes):
        value = jax.lax.all_gather(value, axis, axis=dim, tiled=True)
    return value


def _all_gather_fsdp_fwd(value, dim, axes, dtype):
    # An empty array is the residual: it carries the parameter's dtype and no data.
    return all_gather_fsdp(value, dim, axes, dtype), jnp.zeros((0,), value.dtype)


def _all_gather_fsdp_bwd(dim, axes, dtype, like, grad):
    grad = grad.astype(jnp.float32)
    # The reverse of the order above, so that the last axis moves the smallest pieces.
    for axis in axes:
        grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    return (grad.astype(like.dtype),)


all_gather_fsdp.defvjp(_all_gather_fsdp_fwd, _all_gather_fsdp_bwd)
