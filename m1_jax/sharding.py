"""Which mesh axis each logical axis lies on: the only file that names mesh axes."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

# Logical axis -> mesh axis, for parameters. An axis that the mesh lacks, or whose size does not
# divide the dimension, leaves the dimension whole.
PARAM_RULES = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "embed": "fsdp",
    "layers": None,
    None: None,
}


def param_sharding(
    mesh: Mesh | None, logical_axes: Sequence[str | None], shape: Sequence[int]
) -> jax.sharding.Sharding:
    """Return where a parameter lies; on the first device without a mesh."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    # jax.make_mesh gives explicit axes by default; here the compiler places the intermediates.
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    spec = []
    for name, size in zip(logical_axes, shape, strict=True):
        axis = PARAM_RULES[name]
        fits = axis in mesh.shape and axis not in spec and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
    return NamedSharding(mesh, PartitionSpec(*spec))
