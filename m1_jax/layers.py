"""Small parts that every layer uses: parameters, RMSNorm, partial RoPE, embedding, head."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import collectives, quantize, sharding


def make_param(
    rngs: nnx.Rngs, shape, logical_axes, dtype, std: float | None = None, float32: bool = False
) -> nnx.Param:
    """Make a parameter of random numbers from normal(0, std), or of ones where std is None.

    Args:
      logical_axes: name of each dimension for `sharding.py`. It is metadata under our own key,
        because Flax acts on its own key when a parameter is made, and demands a mesh.
      float32: the parameter is stored and computed with in float32, whatever `dtype` is.

    The metadata `frozen` starts as False. A trainer leaves parameters alone where it is True.
    """
    dtype = jnp.float32 if float32 else dtype
    if std is None:
        value = jnp.ones(shape, dtype)
    else:
        # Drawn in float32 and rounded: every dtype starts from the same numbers.
        value = (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
    return nnx.Param(value, logical_axes=tuple(logical_axes), float32=float32, frozen=False)


class Linear(nnx.Module):
    """y = x W without bias, where W is [in, out], the transpose of the release's layout.

    Where the rows of W are split over devices, their products are added up in x's dtype. With an
    adapter, y = x W + adapter(x). An int8 kernel comes with its scale (`quantize.py`).
    """

    def __init__(self, rngs, in_size, out_size, logical_axes, *, std, param_dtype):
        self.kernel = make_param(rngs, (in_size, out_size), logical_axes, param_dtype, std)
        self.row_axis = logical_axes[0]
        # `nnx.data` says that the attribute may hold a parameter later. `quantize.py` and `lora.py`
        # set them.
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.adapter: LoraAdapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        if self.kernel_scale is None:
            y = _linear_matmul(x, self.kernel[...].astype(x.dtype))
        else:
            y = quantize.scaled_matmul(x, self.kernel[...], self.kernel_scale[...])
        if self.adapter is not None:
            y = y + self.adapter(x)
        return collectives.psum(y, self.row_axis)


class LoraAdapter(nnx.Module):
    """x A B scale, a change of low rank to a `Linear` (LoRA, arXiv:2106.09685, 4.1).

    A is split as the rows of W and B as its columns. The `Linear` therefore adds up the adapter's
    products in the same sum over devices as its own.
    """

    def __init__(self, a: nnx.Param, b: nnx.Param, scale: float):
        self.a, self.b, self.scale = a, b, scale

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        inner = _linear_matmul(x, self.a[...].astype(x.dtype)) * self.scale
        return _linear_matmul(inner, self.b[...].astype(x.dtype))


@jax.custom_vjp
def _linear_matmul(x, kernel):
    return x @ kernel


def _linear_matmul_fwd(x, kernel):
    return x @ kernel, (x, kernel)


def _linear_matmul_bwd(residuals, grad):
    # Autodiff would compute the transposed gradient of the kernel. XLA:CPU transposes `grad` for
    # that, which doubles the time of the projection's backward pass.
    x, kernel = residuals
    batch = tuple(range(x.ndim - 1))
    return grad @ kernel.T, jnp.tensordot(x, grad, axes=(batch, batch))


_linear_matmul.defvjp(_linear_matmul_fwd, _linear_matmul_bwd)


class RMSNorm(nnx.Module):
    """w * cast(x32 / sqrt(mean(x32^2) + eps)), with float32 statistics (model code, RMSNorm).

    The mean goes over all devices that hold a part of x.
    """

    def __init__(self, size: int, logical_axis: str, *, eps: float, param_dtype):
        # Ones need no random numbers: the `Rngs` are never drawn from.
        self.scale = make_param(nnx.Rngs(0), (size,), (logical_axis,), param_dtype)
        self.size, self.logical_axis, self.eps = size, logical_axis, eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x32 = x.astype(jnp.float32)
        squares = collectives.psum(
            jnp.sum(jnp.square(x32), axis=-1, keepdims=True), self.logical_axis
        )
        x32 = x32 * jax.lax.rsqrt(squares / self.size + self.eps)
        # The cast comes before the multiplication, as in the release.
        scale = self.scale[...].astype(x.dtype)
        return x32.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class Embedding(nnx.Module):
    """Token ids to vectors.

    Devices that split the table's columns for storage look up the tokens of all of them, and swap
    results. That moves one activation, where gathering would move the table.
    """

    def __init__(self, rngs, vocab_size, hidden_size, *, std, param_dtype):
        self.table = make_param(
            rngs, (vocab_size, hidden_size), ("vocab", "embed"), param_dtype, std
        )

    @jax.named_scope("embedding")
    def __call__(
        self, tokens: Int[Array, "B T"], dtype, layout: sharding.MeshLayout | None = None
    ) -> Float[Array, "B T D"]:
        table = self.table[...]
        axes = () if layout is None else layout.fsdp_dim_and_axes(("vocab", "embed"))[1]
        ids = tokens.reshape(-1)
        ids = jax.lax.all_gather(ids, axes, tiled=True) if axes else ids
        # The table's rows are split over the vocabulary: one device has a token's row, and the
        # others add zeros.
        if collectives.axis_size("vocab") == 1:
            x = jnp.take(table, ids, axis=0).astype(dtype)
        else:
            ids = ids - collectives.axis_index("vocab") * table.shape[0]
            is_local = (ids >= 0) & (ids < table.shape[0])
            x = jnp.take(table, jnp.where(is_local, ids, 0), axis=0)
            x = collectives.psum(jnp.where(is_local[:, None], x, 0).astype(dtype), "vocab")
        return collectives.all_to_all(x, axes, 0, 1).reshape(*tokens.shape, -1)


class Head(nnx.Module):
    """Logits with float32 products and sums (the repair of M1 section 3.2).

    Precision: operands have x's dtype, since float32 holds a product of two bfloat16 numbers
    exactly. The sum is never rounded below float32. Gradients of logits are rounded to x's dtype.
    """

    def __init__(self, rngs, hidden_size, vocab_size, *, std, param_dtype):
        self.kernel = make_param(
            rngs, (hidden_size, vocab_size), ("embed", "vocab"), param_dtype, std
        )

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        return _float32_logits(x, self.kernel[...].astype(x.dtype))


@jax.custom_vjp
def _float32_logits(x, kernel):
    return _contract_float32(x, kernel, (x.ndim - 1,), (0,))


def _contract_float32(a, b, contract_a, contract_b):
    """Contract axes of two arrays, with products and sums in float32."""
    # HIGHEST, since TPUs would otherwise round float32 operands to bfloat16.
    return jnp.tensordot(
        a,
        b,
        axes=(contract_a, contract_b),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _float32_logits_fwd(x, kernel):
    return _float32_logits(x, kernel), (x, kernel)


def _float32_logits_bwd(residuals, grad):
    # Autodiff would multiply float32 gradients with widened bfloat16 weights: six passes of the
    # matrix unit for a gradient that is rounded to bfloat16 afterwards.
    x, kernel = residuals
    grad = grad.astype(x.dtype)
    batch = tuple(range(x.ndim - 1))
    d_x = _contract_float32(grad, kernel, (x.ndim - 1,), (1,))
    d_kernel = _contract_float32(x, grad, batch, batch)
    return d_x.astype(x.dtype), d_kernel.astype(kernel.dtype)


_float32_logits.defvjp(_float32_logits_fwd, _float32_logits_bwd)


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], rotary_dim: int, theta: float
) -> Float[Array, "B T N H"]:
    """Rotate the first `rotary_dim` dims of each head. Dim i pairs with i + rotary_dim / 2.

    Precision: phases are float32 products of position and frequency, as in the release. The
    rotation is float32. The result has x's dtype.
    """
    half = rotary_dim // 2
    # By NumPy, a constant of the program: the same frequencies on every backend.
    inv_freq = jnp.asarray(
        1.0 / theta ** (np.arange(0, rotary_dim, 2, dtype=np.float32) / rotary_dim), jnp.float32
    )
    phase = positions.astype(jnp.float32)[..., None, None] * inv_freq.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    x32 = x.astype(jnp.float32)
    first, second, unrotated = x32[..., :half], x32[..., half:rotary_dim], x32[..., rotary_dim:]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated, unrotated], axis=-1).astype(x.dtype)
