"""Weight-only int8 for inference: matrices as integers with a float32 scale per output column.

W is about values * scale, where scale is the column's largest |weight| / 127: a weight moves by at
most half a scale. Products take the integers, which are exact in bfloat16, and scale the sums.
"""

import concurrent.futures
import dataclasses
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int8, Shaped

from m1_jax import configlib

MAX_INT8 = 127
NUM_THREADS = 8  # of the host; each holds a few float32 copies of one matrix of one expert
# Which parameters a recipe rounds, by their paths. Routers, norms, the shared expert's coefficient,
# embedding and head stay what they are.
_EXPERT_PATHS = r"moe\.(gate|up|down)"
INT8_RECIPES = {
    "int8-experts": rf"layers\.\d+\.{_EXPERT_PATHS}",
    # What the release's main.py hands to quanto.
    "int8-all": rf"layers\.\d+\.({_EXPERT_PATHS}|.+\.kernel)",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMatrices:
    """Matrices of E experts, I inputs and O outputs: values * scale."""

    values: Int8[Array, "*E I O"]
    scale: Float[Array, "*E O"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape


def scaled_matmul(
    x: Float[Array, "*batch I"], values: Shaped[Array, "I O"], scale: Float[Array, "O"]
) -> Float[Array, "*batch O"]:
    """Return x (values * scale), in x's dtype.

    Precision: operands have x's dtype; sums and their scaling are float32, rounded once.
    """
    y = jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)
    return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def check_recipe(recipe: str | None) -> None:
    """Raise ValueError for what is neither None nor one of `INT8_RECIPES`."""
    if recipe is None or recipe in INT8_RECIPES:
        return
    hint = configlib.suggest_names(recipe, INT8_RECIPES, "None leaves weights as they are")
    raise ValueError(f"weights: got {recipe!r}; wanted None, {' or '.join(INT8_RECIPES)}; {hint}")


def declare_int8_params(model: nnx.Module, recipe: str | None) -> None:
    """Turn a recipe's parameters in a model of shapes into int8, each `x` beside an `x_scale`."""
    check_recipe(recipe)
    if recipe is None:
        return
    nodes = dict(nnx.iter_graph(model))
    for path, param in nodes.items():
        if not re.fullmatch(INT8_RECIPES[recipe], ".".join(map(str, path))):
            continue
        axes = param.get_metadata()["logical_axes"]
        *lead, _, columns = param.shape
        scale = jax.ShapeDtypeStruct((*lead, columns), jnp.float32)
        param.set_value(jax.ShapeDtypeStruct(param.shape, jnp.int8))
        scale = nnx.Param(scale, logical_axes=(*axes[:-2], axes[-1]), float32=True, frozen=False)
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
    """Return values and scales: the largest weight of each column becomes 127.

    Precision: float32 throughout, rounded to the nearest; a column of zeros has scale 1. One with
    a NaN or infinity has such a scale too, so that its products are not finite either.
    """
    matrix = np.array(matrix, np.float32)
    top = np.maximum(matrix.max(axis=-2), -matrix.min(axis=-2))
    with np.errstate(invalid="ignore", under="ignore"):
        scale = top / np.float32(MAX_INT8)
        scale = np.where(scale == 0, np.float32(1), scale)
        matrix /= scale[..., None, :]
        # A subnormal scale is rough enough to let values past the largest.
        np.clip(np.rint(matrix, out=matrix), -MAX_INT8, MAX_INT8, out=matrix)
        return matrix.astype(np.int8), scale


def build_quantized_arrays(
    values: jax.ShapeDtypeStruct,
    scales: jax.ShapeDtypeStruct,
    read_columns: Callable[[tuple[int, ...], slice], np.ndarray],
) -> tuple[jax.Array, jax.Array]:
    """Build a stacked parameter and its scales, each as its sharding says.

    A scale is that of a whole column, also where devices split rows. Of float weights, the host
    holds one matrix for each of its threads.

    Args:
      read: returns a matrix's columns, of all rows, as they are stored; by the matrix's place on
        the leading axes.
    """
    value_pieces, scale_pieces = _allocate_shards(values), _allocate_shards(scales)
    users: dict[tuple, list] = {}
    for ranges in value_pieces:
        for place in itertools.product(*ranges[:-2]):
            users.setdefault((place, ranges[-1]), []).append(ranges)

    def one(key):
        place, columns = key
        whole, scale = quantize_columns(read_columns(place, slice(columns.start, columns.stop)))
        for ranges in users[key]:
            *lead, rows, _ = ranges
            at = tuple(index - r.start for index, r in zip(place, lead, strict=True))
            value_pieces[ranges][at] = whole[rows.start : rows.stop]
            scale_pieces[(*lead, columns)][at] = scale

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for _ in pool.map(one, users):
            pass
    return _make_global_array(values, value_pieces), _make_global_array(scales, scale_pieces)


def _allocate_shards(spec: jax.ShapeDtypeStruct) -> dict[tuple[range, ...], np.ndarray]:
    """Return room for what this process's devices hold, copies once."""
    places = spec.sharding.addressable_devices_indices_map(spec.shape).values()
    found = {_index_ranges(index, spec.shape) for index in places}
    return {ranges: np.empty([len(r) for r in ranges], spec.dtype) for ranges in found}


def _make_global_array(spec: jax.ShapeDtypeStruct, pieces) -> jax.Array:
    return jax.make_array_from_callback(
        spec.shape, spec.sharding, lambda index: pieces[_index_ranges(index, spec.shape)]
    )


def _index_ranges(index: Any, shape: tuple[int, ...]) -> tuple[range, ...]:
    return tuple(range(*dim.indices(size)) for dim, size in zip(index, shape, strict=True))
