"""Mesh axes, what lies on which of them, and the collectives between: the one file to name them.

    data     copies of everything; the axis for slices that only a slow network joins
    fsdp     tokens, and parameters that each layer gathers before it computes
    expert   tokens outside of the experts, experts inside: tokens travel (`expert_exchange.py`)
    tensor   heads, columns of every product, vocabulary
    context  the length of a sequence (`context_parallel.py` for lightning, `ring_attention.py` for
             softmax attention)

The model runs in one `shard_map` with all axes manual (`run_sharded`), so every collective of a
program is a call of this file. Outside of `run_sharded`, and over axes of one device, the
collectives do nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import ad_checkpoint
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from m1_jax import config as config_lib

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
TRAIN, PREFILL, DECODE = "train", "prefill", "decode"

# Logical axis -> mesh axes. A mesh axis is used once per array: experts take theirs before embed.
_UNSPLIT_RULES = {"layers": (), "norm": (), "embed_out": (), None: ()}
# Axes over which a parameter is split only to store it, on top of those it computes on. They split
# rows, the last dimension but one: XLA scatters rows in place, and copies to scatter columns.
FSDP_AXES = ("fsdp", "expert", "context")
CROSS_SLICE_AXES = ("data", "fsdp")  # axes that a slow network may join, the first that can
_SPLIT_RULES = {
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
STATIONARY_RULES = {
    **_UNSPLIT_RULES,
    **_SPLIT_RULES,
    "embed": (),
    "heads_in": ("tensor",),
    "mlp_in": ("tensor",),
}
PARAM_RULES = {
    # Every device holds its own piece of every large parameter, and of its optimizer state.
    TRAIN: {
        **_UNSPLIT_RULES,
        **_SPLIT_RULES,
        "embed": FSDP_AXES,
        "heads_in": ("tensor", *FSDP_AXES),
        "mlp_in": ("tensor", *FSDP_AXES),
    },
    # Weights stay where they are: gathering 912 GB for every token would cost more than computing.
    PREFILL: STATIONARY_RULES,
    DECODE: STATIONARY_RULES,
}
ACTIVATION_RULES = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "tokens": ("data", "fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "heads_in": ("tensor",),
    "mlp_in": ("tensor",),
    "experts": ("expert",),
    "embed": (),
    "norm": (),
    None: (),
}
# Kinds of devices whose links the compiler refuses to route a ragged all-to-all over.
_NO_RAGGED_DEVICE_KINDS = ("TPU v5 lite", "TPU v5e")
_supports_ragged_all_to_all = jax.make_user_context(True)
GATHERED_NAME = "gathered"  # the name of gathered parameters, for rematerialisation
UNUSABLE_AXES = {
    TRAIN: {},
    PREFILL: {"fsdp": "weights would be gathered for every prompt: use expert and tensor"},
    DECODE: {"fsdp": "weights would be gathered for every token: use expert and tensor"},
}


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh with all of `MESH_AXES`, and which table of `PARAM_RULES` places parameters on it."""

    mesh: Mesh
    mode: str = TRAIN

    def axis_size(self, logical: str) -> int:
        """Return over how many devices a logical axis of activations is spread."""
        return math.prod(self.mesh.shape[axis] for axis in ACTIVATION_RULES[logical])

    def param_spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """Return the mesh axes of each dimension of a parameter."""
        used: set[str] = set()
        spec = []
        for name in logical_axes:
            axes = [a for a in PARAM_RULES[self.mode][name] if a not in used]
            axes = [a for a in axes if self.mesh.shape[a] > 1]
            used.update(axes)
            spec.append(_make_spec_entry(axes))
        return PartitionSpec(*spec)

    def param_sharding(self, logical_axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.param_spec(logical_axes))

    def fsdp_dim_and_axes(self, logical_axes: Sequence[str | None]) -> tuple[int, tuple[str, ...]]:
        """Return which dimension of a parameter is split for storage, and over which axes."""
        for dim, axes in enumerate(self.param_spec(logical_axes)):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            kept = tuple(axis for axis in axes if axis in FSDP_AXES)
            if kept and logical_axes[dim] != "experts":
                return dim, kept
        return 0, ()

    def activation_spec(self, *logical: str | None) -> PartitionSpec:
        """Return the mesh axes of each dimension of an activation."""
        return PartitionSpec(*(_make_spec_entry(ACTIVATION_RULES[name]) for name in logical))

    def activation_sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.activation_spec(*logical))


def _make_spec_entry(axes):
    axes = tuple(axes)
    return axes[0] if len(axes) == 1 else (axes or None)


def make_param_sharding(layout: MeshLayout | None, logical_axes, shape) -> jax.sharding.Sharding:
    """Return where a parameter lies; on the first device without a layout.

    Raises:
      ValueError: a dimension that its mesh axes do not divide.
    """
    if layout is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    where = layout.param_sharding(logical_axes)
    for size, axes, name in zip(shape, where.spec, logical_axes, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        over = math.prod(layout.mesh.shape[axis] for axis in axes)
        if size % over:
            raise ValueError(
                f"a {name} dimension of {size} cannot be split over "
                f"{_format_axis_sizes(layout.mesh, axes)} "
                f"= {over} devices; make that a divisor of {size}"
            )
    return where


# ---- meshes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with all of `MESH_AXES` over the devices, neighbours in it near on the chip's
    links.

    Devices of several slices meet over a slow network: `data` counts the slices as its slowest
    part, and `fsdp` where there is no `data`; no other axis crosses slices.

    Args:
      sizes: devices along each axis; 1 where not named. One may be -1: all that are left.
      devices: by default all of them, of every process.

    Raises:
      ValueError: an unknown axis, too few or too many devices, or slices that no axis can span.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(sizes) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh: got axis {sorted(unknown)[0]!r}; wanted some of {MESH_AXES}")
    shape = {axis: int(sizes.get(axis, 1)) for axis in MESH_AXES}
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise ValueError(f"mesh: got {dict(sizes)}; wanted sizes of at least 1, -1 at most once")
    if free:
        shape[free[0]] = max(len(devices) // -math.prod(shape.values()), 1)
    wanted = math.prod(shape.values())
    if wanted != len(devices):
        short = "too few" if wanted > len(devices) else "more than that"
        raise ValueError(
            "mesh: "
            f"{_format_axis_sizes(shape, [a for a in MESH_AXES if shape[a] > 1]) or '1'} "
            f"is {wanted} devices; "
            f"got {len(devices)}, {short}. Change a size, or give one as -1 to take what is left."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        across = next((a for a in CROSS_SLICE_AXES if shape[a] % slices == 0), None)
        if across is None:
            raise ValueError(
                f"mesh: {slices} slices, but neither data={shape['data']} nor "
                f"fsdp={shape['fsdp']} is a multiple of {slices}; only these may cross slices"
            )
        inner = [n // slices if a == across else n for a, n in shape.items()]
        outer = [slices if a == across else 1 for a in MESH_AXES]
        array = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(
            list(shape.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def add_missing_axes(mesh: Mesh) -> Mesh:
    """Return the mesh with every one of `MESH_AXES`, automatic outside of `run_sharded`.

    Raises:
      ValueError: an axis that is none of `MESH_AXES`.
    """
    unknown = set(mesh.axis_names) - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh: got axis {sorted(unknown)[0]!r}; wanted some of {MESH_AXES}")
    order = [axis for axis in MESH_AXES if axis in mesh.axis_names]
    devices = np.transpose(mesh.devices, [mesh.axis_names.index(axis) for axis in order])
    shape = [mesh.shape.get(axis, 1) for axis in MESH_AXES]
    return Mesh(devices.reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_layout(
    mesh: Mesh | MeshLayout | None, config: config_lib.ModelConfig, mode: str = TRAIN
) -> MeshLayout | None:
    """Return the layout of a model on a mesh; None where there is no mesh.

    Raises:
      ValueError: a mesh that this model cannot lie on, or an axis of no use in this mode.
    """
    if mesh is None or isinstance(mesh, MeshLayout):
        return mesh
    if mode not in PARAM_RULES:
        raise ValueError(f"mode is {mode!r}; wanted one of {list(PARAM_RULES)}")
    mesh = add_missing_axes(mesh)
    for axis, reason in UNUSABLE_AXES[mode].items():
        if mesh.shape[axis] > 1:
            raise ValueError(f"mesh: {axis}={mesh.shape[axis]} cannot be used to {mode}: {reason}")
    found = MeshLayout(mesh, mode)
    width = config.num_attention_heads * config.head_dim
    dimensions = (
        ("num_attention_heads", config.num_attention_heads, ("embed", "heads"), 1),
        ("num_key_value_heads", config.num_key_value_heads, ("embed", "kv_heads"), 1),
        ("heads * head_dim", width, ("heads_in", "embed_out"), 0),
        ("intermediate_size", config.intermediate_size, ("experts", "mlp_in", "embed_out"), 1),
        ("shared_intermediate_size", config.shared_intermediate_size, ("mlp_in", "embed_out"), 0),
        ("vocab_size", config.vocab_size, ("embed", "vocab"), 1),
        ("num_local_experts", config.num_local_experts, ("experts", "embed", "mlp"), 0),
        ("hidden_size", config.hidden_size, ("embed", "heads"), 0),
    )
    for field, size, logical_axes, dim in dimensions:
        axes = found.param_spec(logical_axes)[dim]
        axes = (axes,) if isinstance(axes, str) else axes or ()
        over = math.prod(mesh.shape[axis] for axis in axes)
        if size % over:
            raise ValueError(
                f"mesh: {field} {size} cannot be split over {_format_axis_sizes(mesh, axes)}"
                f"{f' = {over}' if len(axes) > 1 else ''}; wanted a divisor of {size}"
            )
    return found


def check_batch_rows(layout: MeshLayout | None, rows: int) -> None:
    """Raise ValueError for a batch that the mesh cannot split evenly."""
    if layout is not None and rows % layout.axis_size("batch"):
        axes = [a for a in ACTIVATION_RULES["batch"] if layout.mesh.shape[a] > 1]
        raise ValueError(
            f"batch: got {rows} rows over {_format_axis_sizes(layout.mesh, axes)}; "
            "wanted a multiple of "
            f"{layout.axis_size('batch')}: add rows of padding, or use fewer devices on these axes"
        )


def _format_axis_sizes(mesh, axes) -> str:
    shape = mesh.shape if isinstance(mesh, Mesh) else mesh
    return " * ".join(f"{axis}={shape[axis]}" for axis in axes)


# ---- programs


def run_sharded(layout: MeshLayout, function: Callable, in_specs, out_specs) -> Callable:
    """Return `function` of global arrays, run on each device's own piece of them.

    Without JAX's replication types: a cotangent of a copied value is each copy's own share, and
    the transpose of `psum` adds the shares up.
    """
    program = jax.shard_map(
        function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

    def traced(*arguments):
        with _supports_ragged_all_to_all(
            layout.mesh.devices.flat[0].device_kind not in _NO_RAGGED_DEVICE_KINDS
        ):
            return program(*arguments)

    return traced


def replicate_array(x, layout: MeshLayout | None):
    """Return a global array of which every device has all."""
    if layout is None:
        return x
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(x, everywhere)


def has_ragged_all_to_all() -> bool:
    """Say whether the devices of the program being traced have a ragged all-to-all."""
    return _supports_ragged_all_to_all.value


def param_specs(layout: MeshLayout, module):
    """Return a module's parameters replaced by their specs."""
    return map_params(lambda p: layout.param_spec(_logical_axes(p)), module)


def map_params(function, *modules):
    """Return the first module with each parameter replaced by what `function` makes of it.

    It gets the parameters of all modules, which are alike.
    """
    return jax.tree.map(function, *modules, is_leaf=lambda node: isinstance(node, nnx.Param))


def _logical_axes(param: nnx.Param) -> tuple[str | None, ...]:
    # A slice of stacked parameters has lost its leading axes.
    names = param.get_metadata()["logical_axes"]
    return names[len(names) - param.ndim :] if param.ndim else ()


def gather_params(module, layout: MeshLayout | None, dtype):
    """Return a module whose parameters are ready to compute with: gathered, and in `dtype`.

    Parameters marked `float32` (routers) and int8 experts stay what they are. Gathering moves
    `dtype`, and its transpose reduces gradients in float32.
    """

    def one(param):
        to = jnp.float32 if param.get_metadata().get("float32") else dtype
        to = jnp.int8 if param.dtype == jnp.int8 else to
        value = param[...]
        dim, axes = (0, ()) if layout is None else layout.fsdp_dim_and_axes(_logical_axes(param))
        if not axes:
            return param.replace(value.astype(to))
        value = all_gather_fsdp(value, dim, axes, to)
        return param.replace(ad_checkpoint.checkpoint_name(value, GATHERED_NAME))

    return map_params(one, module)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def all_gather_fsdp(value, dim: int, axes: tuple[str, ...], dtype):
    """Return all of a dimension that is split over mesh axes for storage alone, as `dtype`.

    The gradient is reduced in float32 and scattered back. One axis at a time, the small pieces
    first: over several axes at once XLA makes each an all-reduce of the whole, twice the bytes.
    """
    value = value.astype(dtype)
    for axis in reversed(axes):
        value = jax.lax.all_gather(value, axis, axis=dim, tiled=True)
    return value


def _all_gather_fsdp_fwd(value, dim, axes, dtype):
    return all_gather_fsdp(value, dim, axes, dtype), jnp.zeros((0,), value.dtype)


def _all_gather_fsdp_bwd(dim, axes, dtype, like, grad):
    grad = grad.astype(jnp.float32)
    for axis in axes:
        grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dim, tiled=True)
    return (grad.astype(like.dtype),)


all_gather_fsdp.defvjp(_all_gather_fsdp_fwd, _all_gather_fsdp_bwd)
