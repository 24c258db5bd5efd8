"""Weight sync: from the trainer's layout and dtype to the sampler's, by one jitted program.

Trainer and sampler share the devices, so new weights take one program of collectives. M1 trains
colocated, too. Plain multi-controller JAX cannot copy between disjoint meshes of several hosts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import compiler_options, sharding
from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from train import lora
from train.rl import slice_exchange


class WeightSync:
    """Copies a trainer's weights into a sampler's model. The program is compiled once.

    Adapters stay beside their weights. Merged with them, most of what a batch learns would be lost:
    it is smaller than half a step of a bfloat16 weight, and the sampler would draw from the old
    policy.

    Args:
      config: config of the model.
      dtype: dtype of the sampler's parameters. Routers stay float32.
      layout: the sampler's, on the trainer's devices, or None on a single device.

    Attributes:
      abstract_model: the sampler's model as shapes and shardings, with adapters as soon as a model
        with adapters came.
      program: the compiled copy.
      metrics: of the latest copy. With adapters it has handover_share, see
        `lora.measure_served_share`.
    """

    def __init__(
        self, config: config_lib.ModelConfig, dtype, layout: sharding.MeshLayout | None = None
    ):
        self._dtype = dtype
        self.metrics: dict[str, float] = {}
        self._prepare(params_lib.abstract_model(config, dtype, dtype, layout))

    def __call__(self, model: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
        """Return the sampler's model with the trainer's weights, and with its adapters."""
        has_adapters = lora.has_adapters(model)
        if has_adapters and not lora.has_adapters(self.abstract_model):
            self._prepare(lora.declare_adapters(self.abstract_model, model, self._dtype))
        values = _params_values(model)
        # An identity map copies the tree, so that the abstract model itself stays abstract.
        sampler_model = jax.tree.map(lambda leaf: leaf, self.abstract_model)
        params = params_lib.params_by_path(sampler_model)
        for name, value in self.program(values, self._plan_exchanges(values)).items():
            params[name].set_value(value)
        if has_adapters:
            self.metrics = {"handover_share": lora.measure_served_share(model, sampler_model)}
        return sampler_model

    def _prepare(self, abstract_model: model_lib.MiniMaxM1) -> None:
        """Make the program that copies into a model of these shapes."""
        self.abstract_model = abstract_model
        # `jax.ShapeDtypeStruct` with a sharding, by the parameter's path.
        self._shapes = {
            n: p.get_value() for n, p in params_lib.params_by_path(abstract_model).items()
        }
        shardings = {name: shape.sharding for name, shape in self._shapes.items()}
        self.program = compiler_options.jit_for_device(
            self._copy_params, static_argnames="exchanges", out_shardings=shardings
        )

    def trace(self, model: model_lib.MiniMaxM1) -> jax.stages.Traced:
        """Return the traced program for a trainer's model of sharded shapes, without adapters."""
        values = _params_values(model)
        return self.program.trace(values, self._plan_exchanges(values))

    def _plan_exchanges(
        self, values: Mapping[str, Any]
    ) -> tuple[slice_exchange.SliceExchange | None, ...]:
        """Return how each parameter moves, in the order of names. None: XLA decides."""
        exchanges = []
        for name, target in self._shapes.items():
            source = values[name].sharding
            # Without a mesh there is one device, and nothing moves.
            is_on_mesh = all(isinstance(s, jax.NamedSharding) for s in (source, target.sharding))
            exchanges.append(
                slice_exchange.plan_exchange(target.shape, source, target.sharding)
                if is_on_mesh
                else None
            )
        return tuple(exchanges)

    def _copy_params(
        self,
        values: Mapping[str, jax.Array],
        exchanges: tuple[slice_exchange.SliceExchange | None, ...],
    ) -> dict[str, jax.Array]:
        """Return copies in the sampler's dtypes and shardings.

        Copies also where neither changes: the trainer donates its weights to the next step, and the
        sampler would be left with deleted arrays.
        """
        return {
            name: jnp.copy(values[name]).astype(shape.dtype)
            if exchange is None
            else exchange(values[name], shape.dtype)
            for (name, shape), exchange in zip(self._shapes.items(), exchanges, strict=True)
        }


def _params_values(model: model_lib.MiniMaxM1) -> dict[str, Any]:
    return {name: p.get_value() for name, p in params_lib.params_by_path(model).items()}


def make_serving_mesh(
    mesh: jax.sharding.Mesh | None, sizes: Mapping[str, int] | Sequence[tuple[str, int]]
) -> jax.sharding.Mesh | None:
    """Return a mesh of the trainer's devices, in the same order, cut along other axes.

    Args:
      mesh: the trainer's, or None on a single device.
      sizes: (axis, devices) pairs. Empty is expert over all devices.

    Raises:
      ValueError: an unknown axis, or sizes whose product is another number of devices.
    """
    num_devices = 1 if mesh is None else mesh.size
    sizes = dict(sizes) or {"expert": num_devices}
    unknown = [name for name in sizes if name not in sharding.MESH_AXES]
    if unknown or min(sizes.values()) < 1 or math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"serving mesh: got {sizes}; wanted axes of {', '.join(sharding.MESH_AXES)} "
            f"whose product is the trainer's {num_devices} devices"
        )
    if mesh is None:
        return None
    # Every mesh has all axes, those of size 1 too, as sharding rules name them.
    shape = [sizes.get(name, 1) for name in sharding.MESH_AXES]
    types = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.Mesh(mesh.devices.reshape(shape), sharding.MESH_AXES, axis_types=types)
