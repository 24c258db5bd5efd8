"""Expert matrices as int8 with one float32 scale per expert and output column (weight only)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

LARGEST = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Matrices of E experts, I inputs and O outputs: values * scale."""

    values: Int8[Array, "E I O"]
    scale: Float[Array, "E O"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def expert(self, index, dtype) -> Float[Array, "I O"]:
        """Return one expert's matrix."""
        return (self.values[index] * self.scale[index][None, :]).astype(dtype)


def quantize(
    matrices: Float[Array, "*L I O"],
) -> tuple[Int8[Array, "*L I O"], Float[Array, "*L O"]]:
    """Return values and scales: the largest weight of each column becomes 127.

    Precision: float32 throughout, rounded to the nearest; a column of zeros has scale 1.
    """
    matrices = matrices.astype(jnp.float32)
    top = jnp.max(jnp.abs(matrices), axis=-2, keepdims=True)
    scale = jnp.where(top > 0, top / LARGEST, 1.0)
    return jnp.round(matrices / scale).astype(jnp.int8), scale.squeeze(-2)
