"""From the trainer's layout and dtype to the sampler's: one jitted identity on one set of chips.

Trainer and sampler share a mesh's devices (M1 trains colocated; plain multi-controller JAX cannot
copy between disjoint meshes of several hosts), so new weights are one program of collectives away.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import sharding
from train import lora


class WeightSync:
    """Copies a trainer's weights into a sampler's model; compiled once.

    Args:
      config: of the model. dtype: the sampler's; routers stay float32.
      layout: where the sampler wants its weights, on the trainer's devices; None: one device.
    """

    def __init__(
        self, config: config_lib.ModelConfig, dtype, layout: sharding.MeshLayout | None = None
    ):
        self.abstract_model = params_lib.abstract_model(config, dtype, dtype, layout)
        shapes = {
            n: p.get_value() for n, p in params_lib.params_by_path(self.abstract_model).items()
        }

        def cast(values):
            # A copy also where nothing changes: the trainer donates what it hands over.
            return {n: jnp.copy(values[n]).astype(shapes[n].dtype) for n in shapes}

        where = {name: shape.sharding for name, shape in shapes.items()}
        self.program = jax.jit(cast, out_shardings=where)

    def __call__(self, model: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
        """Return the sampler's model with the trainer's weights, adapters merged."""
        merged = lora.merge_adapters(model)
        values = {n: p.get_value() for n, p in params_lib.params_by_path(merged).items()}
        made = jax.tree.map(lambda leaf: leaf, self.abstract_model)
        params = params_lib.params_by_path(made)
        for name, value in self.program(values).items():
            params[name].set_value(value)
        return made


def make_serving_mesh(
    mesh: jax.sharding.Mesh | None, sizes: Mapping[str, int] | Sequence[tuple[str, int]]
) -> jax.sharding.Mesh | None:
    """Return a mesh of the trainer's devices, in the same order, cut along other axes.

    sizes: (axis, devices); empty is expert over all, which serves whatever the trainer's axes.

    Raises:
      ValueError: an unknown axis, or sizes whose product is another number of devices.
    """
    number = 1 if mesh is None else mesh.size
    sizes = dict(sizes) or {"expert": number}
    unknown = [name for name in sizes if name not in sharding.MESH_AXES]
    if unknown or min(sizes.values()) < 1 or math.prod(sizes.values()) != number:
        raise ValueError(
            f"serving mesh: got {sizes}; wanted axes of {', '.join(sharding.MESH_AXES)} "
            "whose product "
            f"is the trainer's {number} devices"
        )
    if mesh is None:
        return None
    shape = [sizes.get(name, 1) for name in sharding.MESH_AXES]
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.Mesh(mesh.devices.reshape(shape), sharding.MESH_AXES, axis_types=types)
