"""Weight-only int8 for inference: matrices as integers with a float32 scale per output column.

W is approximated by values * scale, where scale is the column's largest |weight| / 127. A weight
changes by at most half a scale. Products take the integers, which bfloat16 represents exactly, and
the scale multiplies the sums.
"""

import concurrent.futures
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8, Shaped

from m1_jax import configlib

MAX_INT8 = 127  # and not 128 for negative weights, so that rounding is symmetric
NUM_THREADS = 8  # on the host, each with a few float32 copies of one matrix of one expert
# Recipe -> pattern of the parameter paths that it rounds. Routers, norms, the shared expert's
# coefficient, embedding and head keep their dtype.
_EXPERT_PATHS = r"moe\.(gate|up|down)"
INT8_RECIPES = {
    "int8-experts": rf"layers\.\d+\.{_EXPERT_PATHS}",
    # The same modules that the release's main.py lets quanto quantize.
    "int8-all": rf"layers\.\d+\.({_EXPERT_PATHS}|.+\.kernel)",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrices:
    """Matrices of E experts, I inputs and O outputs: values * scale, one scale per column."""

    values: Int8[Array, "*E I O"]  # -127 to 127
    scale: Float[Array, "*E O"]  # float32, more than 0 where the weights are finite

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def scaled_matmul(
    x: Float[Array, "*batch I"], values: Shaped[Array, "I O"], scale: Float[Array, "O"]
) -> Float[Array, "*batch O"]:
    """Return x (values * scale), in x's dtype.

    Precision: operands have x's dtype. Sums and their scaling are float32, rounded once.
    """
    # The scale multiplies sums, not weights, because a float copy of the weights would cost the
    # memory that int8 saves.
    y = jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def check_recipe(recipe: str | None) -> None:
    """Raise ValueError for a recipe that is neither None nor a key of `INT8_RECIPES`."""
    if recipe is None or recipe in INT8_RECIPES:
        return
    hint = configlib.suggest_names(recipe, INT8_RECIPES, "None leaves weights as they are")
    raise ValueError(f"weights: got {recipe!r}; wanted None, {' or '.join(INT8_RECIPES)}; {hint}")


def declare_int8_params(model: nnx.Module, recipe: str | None) -> None:
    """Declare the parameters that a recipe rounds, in an abstract model, as int8.

    Each such parameter `x` gets a parameter `x_scale` beside it. The scale has the matrix's axes
    without its rows: one float32 number per output column.
    """
    check_recipe(recipe)
    if recipe is None:
        return
    # A dict, because the loop below adds parameters to the graph.
    nodes = dict(nnx.iter_graph(model))
    for path, param in nodes.items():
        if not re.fullmatch(INT8_RECIPES[recipe], ".".join(map(str, path))):
            continue
        axes = param.get_metadata()["logical_axes"]
        *leading, _, columns = param.shape
        scale = jax.ShapeDtypeStruct((*leading, columns), jnp.float32)
        param.set_value(jax.ShapeDtypeStruct(param.shape, jnp.int8))
        scale = nnx.Param(scale, logical_axes=(*axes[:-2], axes[-1]), float32=True, frozen=False)
        # Set on the module that owns the parameter, whose code looks for the scale.
        setattr(nodes[path[:-1]], f"{path[-1]}_scale", scale)


def refuse_int8_weights(model: nnx.Module) -> None:
    """Raise ValueError for a model with int8 weights, which cannot be trained."""
    if any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(model)):
        raise ValueError(
            "got a model with int8 weights, which are for inference: they have no gradient. "
            "Load the model without weights=..."
        )


# ---- rounding, on the host: the same numbers for every mesh and backend


def quantize_columns(
    matrix: Float[np.ndarray, "*L I O"],
) -> tuple[Int8[np.ndarray, "*L I O"], Float[np.ndarray, "*L O"]]:
    """Return values and scales. The largest |weight| of each column becomes 127.

    Precision: float32 throughout, rounded to the nearest. A column of zeros has scale 1. A column
    with a NaN or an infinity has such a scale, so its products are not finite either.
    """
    # A copy, because the arithmetic below works in place to save memory.
    matrix = np.array(matrix, np.float32)
    top = np.maximum(matrix.max(axis=-2), -matrix.min(axis=-2))
    with np.errstate(invalid="ignore", under="ignore"):
        scale = top / np.float32(MAX_INT8)
        # After the division, which may underflow to 0 where `top` is not 0.
        scale = np.where(scale == 0, np.float32(1), scale)
        matrix /= scale[..., None, :]
        # A subnormal scale has so few digits that a quotient may exceed 127.
        np.clip(np.rint(matrix, out=matrix), -MAX_INT8, MAX_INT8, out=matrix)
        return matrix.astype(np.int8), scale


def build_quantized_arrays(
    values: jax.ShapeDtypeStruct,
    scales: jax.ShapeDtypeStruct,
    read_columns: Callable[[tuple[int, ...], slice], np.ndarray],
) -> tuple[jax.Array, jax.Array]:
    """Build a stacked parameter and its scales, with the shardings of their specs.

    A scale belongs to a whole column, so every process that holds a part of a column reads all of
    it. Float weights exist on the host for one matrix per thread at a time.

    Args:
      values: shape, dtype and sharding of the int8 parameter, [*leading, rows, columns].
      scales: shape, dtype and sharding of its scales, [*leading, columns].
      read_columns: a function (index on the leading axes, columns) -> these columns of the matrix,
        all rows, in the dtype of the file.
    """
    # Host arrays by the ranges of their global indices.
    value_shards, scale_shards = _allocate_shards(values), _allocate_shards(scales)
    # (matrix, its columns) -> the shards that need them, so that each is read and rounded once.
    shards_by_matrix: dict[tuple[tuple[int, ...], range], list[tuple[range, ...]]] = {}
    for ranges in value_shards:
        # ranges[-2] is left out: one reading serves all shards of the rows.
        for index in itertools.product(*ranges[:-2]):
            shards_by_matrix.setdefault((index, ranges[-1]), []).append(ranges)

    def quantize_matrix(key: tuple[tuple[int, ...], range]) -> None:
        index, columns = key
        matrix = read_columns(index, slice(columns.start, columns.stop))
        rounded_values, scale = quantize_columns(matrix)
        for ranges in shards_by_matrix[key]:
            *leading, rows, _ = ranges
            local_index = tuple(i - r.start for i, r in zip(index, leading, strict=True))
            value_shards[ranges][local_index] = rounded_values[rows.start : rows.stop]
            scale_shards[(*leading, columns)][local_index] = scale

    # No locks: threads write to different parts of the shards. numpy and the reads release the GIL.
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in pool.map(quantize_matrix, shards_by_matrix):
            pass  # iterating raises the exception of a thread here
    return _make_global_array(values, value_shards), _make_global_array(scales, scale_shards)


def _allocate_shards(spec: jax.ShapeDtypeStruct) -> dict[tuple[range, ...], np.ndarray]:
    """Return empty host arrays for the shards of this process's devices, one for all replicas."""
    indices = spec.sharding.addressable_devices_indices_map(spec.shape).values()
    shards = {_index_ranges(index, spec.shape) for index in indices}
    return {ranges: np.empty([len(r) for r in ranges], spec.dtype) for ranges in shards}


def _make_global_array(
    spec: jax.ShapeDtypeStruct, shards: Mapping[tuple[range, ...], np.ndarray]
) -> jax.Array:
    """Return the global array whose shards on this process are the host arrays."""
    return jax.make_array_from_callback(
        spec.shape, spec.sharding, lambda index: shards[_index_ranges(index, spec.shape)]
    )


def _index_ranges(index: Any, shape: tuple[int, ...]) -> tuple[range, ...]:
    """Return a device's slices as ranges, which can be keys of a dict and have definite bounds."""
    return tuple(range(*dim.indices(size)) for dim, size in zip(index, shape, strict=True))
