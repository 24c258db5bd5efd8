"""What the commands' flags --mesh and --dtype mean: devices to lie on, and what to compute in."""

import jax
import jax.numpy as jnp

from m1_jax import config as config_lib
from m1_jax import sharding

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MESH_HELP = (
    "Devices along each axis, such as expert=8,tensor=8; one size may be -1. Default: one device, "
    "or expert over all devices of several processes or accelerators."
)
LIGHTNING_HELP = (
    "Implementation of lightning attention: chunked (XLA), tpu or gpu (Pallas kernels). Default: "
    "what m1-selfcheck measured, else tpu on TPUs from v5 on and chunked elsewhere."
)
DTYPE_HELP = "Dtype: float32 or bfloat16. Default: float32 on CPU, bfloat16 elsewhere."


def parse_axis_sizes(text: str) -> dict[str, int]:
    """Read axis=size,axis=size. A size may be -1: all devices that remain.

    Raises:
      ValueError: an unknown axis, an axis twice, or a size that is none.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        is_size = size == "-1" or (size.isdecimal() and int(size) >= 1)
        if axis not in sharding.MESH_AXES or axis in sizes or not is_size:
            raise ValueError(
                f"mesh: got {part!r}; wanted axis=size, the axis once and one of "
                f"{', '.join(sharding.MESH_AXES)}"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh: got {text!r}; wanted -1 at most once")
    return sizes


def format_axis_sizes(layout: sharding.MeshLayout | None) -> str | None:
    """Return a layout's mesh as --mesh says it, without axes of one device."""
    if layout is None:
        return None
    return ",".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items() if size > 1)


def make_command_layout(
    mesh: str | None, config: config_lib.ModelConfig, mode: str
) -> sharding.MeshLayout | None:
    """Return where a command's model lies. None stands for one device.

    Args:
      mesh: the flag. None or empty: one device where there is one, and on the CPU of one process;
        else the experts lie over all devices.
      mode: what is computed, such as `sharding.DECODE`.

    Raises:
      ValueError: a mesh that this model cannot lie on, or none where the experts do not divide.
    """
    num_devices, num_experts = jax.device_count(), config.num_local_experts
    if mesh:
        return sharding.make_layout(sharding.make_mesh(parse_axis_sizes(mesh)), config, mode)
    # Several CPU devices of one process are one machine's cores: splitting gains nothing there.
    is_one_host_cpu = jax.process_count() == 1 and jax.default_backend() == "cpu"
    if num_devices == 1 or is_one_host_cpu:
        return None
    if num_experts % num_devices:
        raise ValueError(
            f"--mesh: got none for {num_devices} devices, over which {num_experts} experts cannot "
            "be split; wanted axis=size,... of all devices, such as --mesh=expert=-1,tensor=8"
        )
    return sharding.make_layout(sharding.make_mesh({"expert": num_devices}), config, mode)


def check_model_flags(dtype: str | None, mesh: str | None, lightning: str | None) -> None:
    """Raise ValueError for a flag of another form. None stands for a flag's default."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype: got {dtype!r}; wanted {' or '.join(DTYPES)}")
    if mesh:
        parse_axis_sizes(mesh)
    implementations = config_lib.LIGHTNING_IMPLEMENTATIONS
    if lightning not in (None, *implementations):
        raise ValueError(
            f"--lightning: got {lightning!r}; wanted one of {', '.join(implementations)}"
        )


def resolve_dtype(name: str | None) -> str:
    """Return the name of the dtype to compute in: by default what this platform is made for."""
    return name or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
