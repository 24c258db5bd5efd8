"""Meshes, and which of their axes split what: the one file that names mesh axes.

    data     rows. Parameters are copied along it, and it may cross slices.
    fsdp     rows, and parameters that each layer gathers before it computes (`fsdp.py`)
    expert   rows outside of the experts, experts inside: tokens travel (`expert_exchange.py`)
    tensor   heads, columns of every product, vocabulary
    context  the length of a sequence (`context_parallel.py` for lightning, `ring_attention.py` for
             softmax attention)

Everything else names logical axes, such as "heads". The tables below map them to mesh axes. The
model runs in one `shard_map` with all axes manual (`run_sharded`), so a program has exactly the
collectives that the model's code calls (`collectives.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from m1_jax import config as config_lib
from m1_jax import physical_mesh

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
TRAIN, PREFILL, DECODE = "train", "prefill", "decode"

# ZeRO-3 axes: parameters are sharded over them for storage and all-gathered before use. They split
# the rows of a product's matrix, because XLA reduce-scatters rows in place and copies for columns.
FSDP_AXES = ("fsdp", "expert", "context")
# Axes that may cross slices, which a slow network joins. The first that is long enough does.
CROSS_SLICE_AXES = ("data", "fsdp")
# The tables of rules: logical axis -> mesh axes. A mesh axis is used once per array, by the first
# dimension that asks for it: experts take theirs before embed. Names ending in `_in` are the rows
# of a product's matrix, whose partial sums are added up over devices.
_UNSPLIT_RULES = {"layers": (), "norm": (), "embed_out": (), None: ()}
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
    # Each device stores its own slice of every large parameter, and of its optimizer state.
    TRAIN: {
        **_UNSPLIT_RULES,
        **_SPLIT_RULES,
        "embed": FSDP_AXES,
        "heads_in": ("tensor", *FSDP_AXES),
        "mlp_in": ("tensor", *FSDP_AXES),
    },
    # Weights stay where they compute: gathering 912 GB for every token would take longer than the
    # token itself.
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
# Kinds of devices over whose links the compiler refuses to route a ragged all-to-all.
_NO_RAGGED_DEVICE_KINDS = ("TPU v5 lite", "TPU v5e")
# Kinds of devices for which the compiler widens int8 operands of grouped products outside of them.
_NO_INT8_DEVICE_KINDS = ("TPU7x",)
# Platform and kind of the devices that a program is traced for. A context, since the code of the
# model sees only the mesh's axes while it is traced, not its devices. None: not known.
_target_device = jax.make_user_context(None)
# By mode: axes that must be 1, and why.
UNUSABLE_AXES = {
    TRAIN: {},
    PREFILL: {"fsdp": "weights would be gathered for every prompt: use expert and tensor"},
    DECODE: {"fsdp": "weights would be gathered for every token: use expert and tensor"},
}


class TargetDevice(NamedTuple):
    """A device of the mesh that a program is traced for."""

    platform: str  # such as "tpu"
    kind: str  # JAX's `device_kind`, such as "TPU v5 lite"


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """A mesh with all of `MESH_AXES`, and which table of `PARAM_RULES` places parameters on it."""

    mesh: Mesh
    mode: str = TRAIN  # a key of `PARAM_RULES`

    def axis_size(self, logical: str) -> int:
        """Return over how many devices a logical axis of activations is split."""
        return math.prod(self.mesh.shape[axis] for axis in ACTIVATION_RULES[logical])

    def param_spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """Return the mesh axes of each dimension of a parameter."""
        used: set[str] = set()
        spec = []
        for name in logical_axes:
            axes = [a for a in PARAM_RULES[self.mode][name] if a not in used]
            # An axis of one device splits nothing.
            axes = [a for a in axes if self.mesh.shape[a] > 1]
            used.update(axes)
            spec.append(_make_spec_entry(axes))
        return PartitionSpec(*spec)

    def param_sharding(self, logical_axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(self.mesh, self.param_spec(logical_axes))

    def fsdp_dim_and_axes(self, logical_axes: Sequence[str | None]) -> tuple[int, tuple[str, ...]]:
        """Return which dimension of a parameter is split for storage, and over which axes.

        (0, ()) means that it is not split for storage.
        """
        for dim, axes in enumerate(self.param_spec(logical_axes)):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            fsdp_axes = tuple(axis for axis in axes if axis in FSDP_AXES)
            # The experts themselves are split to be computed there, not for storage.
            if fsdp_axes and logical_axes[dim] != "experts":
                return dim, fsdp_axes
        return 0, ()

    def activation_spec(self, *logical: str | None) -> PartitionSpec:
        """Return the mesh axes of each dimension of an activation."""
        return PartitionSpec(*(_make_spec_entry(ACTIVATION_RULES[name]) for name in logical))

    def field_spec(self, *logical: str | None) -> Any:
        """Return `activation_spec` as the value of a field that is annotated as an array.

        `shard_map` takes the specs of a dataclass as one of the same class, with a spec in each
        field. The type is Any, because no annotation of the field is right for both.
        """
        return self.activation_spec(*logical)

    def activation_sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.activation_spec(*logical))


def _make_spec_entry(axes):
    """Return one dimension's entry of a `PartitionSpec`, in JAX's shortest spelling."""
    axes = tuple(axes)
    return axes[0] if len(axes) == 1 else (axes or None)


def make_param_sharding(layout: MeshLayout | None, logical_axes, shape) -> jax.sharding.Sharding:
    """Return where a parameter lies. Without a layout it lies on the first device.

    Raises:
      ValueError: a dimension that its mesh axes do not divide.
    """
    if layout is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    param_sharding = layout.param_sharding(logical_axes)
    for size, axes, name in zip(shape, param_sharding.spec, logical_axes, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        num_devices = math.prod(layout.mesh.shape[axis] for axis in axes)
        if size % num_devices:
            raise ValueError(
                f"a {name} dimension of {size} cannot be split over "
                f"{_format_axis_sizes(layout.mesh, axes)} "
                f"= {num_devices} devices; make that a divisor of {size}"
            )
    return param_sharding


# ---- meshes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with all of `MESH_AXES`, whose neighbours are near on the chips' links.

    Axes lie on whole dimensions of a TPU slice where they can (`physical_mesh.py`).

    Several slices are joined by a slow network. They lie along `data`, or along `fsdp` if `data`
    is not a multiple of their number. No other axis crosses slices.

    Args:
      sizes: devices along each axis, 1 where an axis is not named. One size may be -1: all devices
        that remain.
      devices: None: all devices, of every process.

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
    mesh_size = math.prod(shape.values())
    if mesh_size != len(devices):
        comparison = "too few" if mesh_size > len(devices) else "more than that"
        raise ValueError(
            "mesh: "
            f"{_format_axis_sizes(shape, [a for a in MESH_AXES if shape[a] > 1]) or '1'} "
            f"is {mesh_size} devices; got {len(devices)}, {comparison}. "
            "Change a size, or give one as -1 to take what is left."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        cross_axis = next((a for a in CROSS_SLICE_AXES if shape[a] % slices == 0), None)
        if cross_axis is None:
            raise ValueError(
                f"mesh: {slices} slices, but neither data={shape['data']} nor "
                f"fsdp={shape['fsdp']} is a multiple of {slices}; only these may cross slices"
            )
        # Sizes within a slice, and of slices: the mesh is their product, slices the slowest part.
        inner = [n // slices if a == cross_axis else n for a, n in shape.items()]
        outer = [slices if a == cross_axis else 1 for a in MESH_AXES]
        device_array = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        device_array = physical_mesh.arrange_devices(list(shape.values()), devices)
    return Mesh(device_array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def add_missing_axes(mesh: Mesh) -> Mesh:
    """Return the mesh with all of `MESH_AXES`. Axes are automatic outside of `run_sharded`.

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
    """Return the layout of a model on a mesh, or None without a mesh.

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
    layout = MeshLayout(mesh, mode)
    width = config.num_attention_heads * config.head_dim
    # A parameter for each size of the config that is split, so that the error names the field:
    # (field, its size, the parameter's logical axes, which of them has that size).
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
        axes = layout.param_spec(logical_axes)[dim]
        axes = (axes,) if isinstance(axes, str) else axes or ()
        num_devices = math.prod(mesh.shape[axis] for axis in axes)
        if size % num_devices:
            raise ValueError(
                f"mesh: {field} {size} cannot be split over {_format_axis_sizes(mesh, axes)}"
                f"{f' = {num_devices}' if len(axes) > 1 else ''}; wanted a divisor of {size}"
            )
    return layout


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
    """Return `function` of global arrays. Each device runs it on its own slices of them."""
    # `check_vma=False` turns JAX's replication types off. The cotangent of a copied value is then
    # each copy's own share, and the transpose of `psum` adds the shares up.
    program = jax.shard_map(
        function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

    def traced(*arguments):
        device = layout.mesh.devices.flat[0]
        with _target_device(TargetDevice(device.platform, device.device_kind)):
            return program(*arguments)

    return traced


def target_device() -> TargetDevice | None:
    """Return what the program being traced will run on, or None where nobody knows yet."""
    return _target_device.value


def has_ragged_all_to_all() -> bool:
    """Say whether the devices of the program being traced have a ragged all-to-all."""
    target = _target_device.value
    return target is None or target.kind not in _NO_RAGGED_DEVICE_KINDS


def kernels_take_int8() -> bool:
    """Say whether a TPU's grouped products read int8 weights without a widened copy of them."""
    target = _target_device.value
    return target is None or target.kind not in _NO_INT8_DEVICE_KINDS


def param_specs(layout: MeshLayout, module):
    """Return the module with its parameters replaced by their specs."""
    return map_params(lambda p: layout.param_spec(param_logical_axes(p)), module)


def map_params(function, *modules):
    """Return the first module with each parameter replaced by what `function` returns for it.

    `function` gets the parameters at the same place in all modules, which have one structure.
    """
    return jax.tree.map(function, *modules, is_leaf=lambda node: isinstance(node, nnx.Param))


def param_logical_axes(param: nnx.Param) -> tuple[str | None, ...]:
    """Return the name of each dimension of a parameter."""
    # A loop over stacked layers slices leading axes off, and the metadata still names them.
    names = param.get_metadata()["logical_axes"]
    return names[len(names) - param.ndim :] if param.ndim else ()
