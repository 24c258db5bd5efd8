"""Loading a model from a release directory or from a converted directory (see `format.py`).

Each process reads only the slices that its own devices hold.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import quantize, sharding
from m1_jax.checkpoints import array_futures, checkpoint_dir, release
from m1_jax.checkpoints import format as format_lib


def load(
    path,
    dtype: jax.typing.DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | sharding.MeshLayout | None = None,
    mode: str = sharding.TRAIN,
    weights: str | None = None,
    param_dtype: jax.typing.DTypeLike | None = None,
    lightning: str | None = None,
) -> model_lib.MiniMaxM1:
    """Load a model for computation in `dtype`.

    Args:
      path: a release directory (config.json and safetensors), in the release's or transformers'
        native layout, or a directory that `m1_jax.convert` or `m1_jax.save` wrote.
      dtype: dtype of activations, float32 or bfloat16. Routers stay float32.
      mesh: devices to spread the parameters over, with some of `sharding.MESH_AXES` (see
        `sharding.make_mesh`), or a layout on them, which has a mode of its own. None: one device.
      mode: "train" splits every large parameter over all devices, which gather it where they need
        it. "prefill" and "decode" leave weights on the devices that compute with them.
      weights: an int8 recipe of `quantize.py`, for inference. "int8-experts" rounds the experts as
        they are read, and "int8-all" also the projections of attention and of a shared expert.
        None: all parameters have `param_dtype`.
      param_dtype: dtype of the parameters, float32 or bfloat16. None: as `dtype`. A trainer needs
        float32 parameters with computation in bfloat16.
      lightning: implementation of lightning attention, as `ModelConfig.lightning_implementation`.

    Raises:
      ValueError: a dtype, recipe, mesh or mode that this model cannot have, or a path that is not
        of this machine.
      CheckpointError: a directory that is not a complete checkpoint.
      ConfigError: a config.json that this model cannot compute.
    """
    param_dtype = param_dtype or dtype
    quantize.check_recipe(weights)
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if jnp.dtype(value) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: got {jnp.dtype(value)}; wanted float32 or bfloat16")
    source = _open_source(checkpoint_dir.require_checkpoint(path))
    config = dataclasses.replace(source.config, lightning_implementation=lightning)
    layout = sharding.make_layout(mesh, config, mode)
    model = params_lib.abstract_model(config, dtype, param_dtype, layout, weights)
    params = params_lib.params_by_path(model)
    # The abstract model's values: jax.ShapeDtypeStruct with shardings.
    specs = {name: param.get_value() for name, param in params.items()}
    # Int8 parameters are read matrix by matrix, because all of them in float would not fit on the
    # host.
    for name in [name for name, spec in specs.items() if spec.dtype == jnp.int8]:
        value_spec, scale_spec = specs.pop(name), specs.pop(f"{name}_scale")
        values, scales = quantize.build_quantized_arrays(
            value_spec, scale_spec, source.matrix_reader(name, value_spec.shape)
        )
        params[name].set_value(values)
        params[f"{name}_scale"].set_value(scales)
    for name, value in source.read_params(specs).items():
        params[name].set_value(value)
    return model


def read_config(path) -> config_lib.ModelConfig:
    """Return the config of a checkpoint's model. Nothing else is read.

    Raises:
      CheckpointError: there is none.
      ConfigError: a config.json that this model cannot compute.
    """
    directory = checkpoint_dir.require_checkpoint(path)
    return config_lib.ModelConfig.from_file(directory / checkpoint_dir.CONFIG_FILE)


class _ParamSource(Protocol):
    """A directory to read parameters from: a release or a converted directory."""

    config: config_lib.ModelConfig  # read from its config.json

    def read_params(self, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return arrays of the given shapes, dtypes and shardings, by parameter path."""
        ...

    def matrix_reader(
        self, name: str, shape: tuple[int, ...]
    ) -> Callable[[tuple[int, ...], slice], np.ndarray]:
        """Return a function (index on the leading axes, columns) -> these columns of the matrix.

        The values have the dtype of the file. `shape` is that of the whole stacked parameter.
        """
        ...


def _open_source(path: pathlib.Path) -> _ParamSource:
    # A converted directory has a config.json as well, so it is recognised first.
    return _ConvertedSource(path) if format_lib.is_converted(path) else _ReleaseSource(path)


# ---- a release


class _ReleaseSource:
    def __init__(self, path: pathlib.Path):
        self._release = release.Release(path)
        self.config = self._release.config

    def read_params(self, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        # Parameter -> its tensors, each a memory map, by their index on its leading axes.
        parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {name: {} for name in specs}
        for entry in self._release.entries:
            if entry.param_path not in specs:
                continue
            tensor = self._release.tensors[entry.name]
            release.check_tensor_shape(tensor, entry, specs[entry.param_path].shape)
            parts[entry.param_path][entry.index] = entry.orient(tensor.read())
        return {name: _assemble_array(spec, parts[name]) for name, spec in specs.items()}

    def matrix_reader(
        self, name: str, shape: tuple[int, ...]
    ) -> Callable[[tuple[int, ...], slice], np.ndarray]:
        entries = {e.index: e for e in self._release.entries if e.param_path == name}
        for entry in entries.values():
            release.check_tensor_shape(self._release.tensors[entry.name], entry, shape)

        def read_columns(index: tuple[int, ...], columns: slice) -> np.ndarray:
            entry = entries[index]
            return entry.orient(self._release.tensors[entry.name].read())[:, columns]

        return read_columns


def _assemble_array(
    spec: jax.ShapeDtypeStruct, parts: Mapping[tuple[int, ...], np.ndarray]
) -> jax.Array:
    """Build a sharded array from its tensors. The host copies one device's slice at a time."""
    num_leading_axes = len(next(iter(parts)))

    def read_slice(index) -> np.ndarray:
        # Ranges, because the slices of an unsplit axis have no bounds.
        ranges = [range(*dim.indices(size)) for dim, size in zip(index, spec.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], spec.dtype)
        for local_index in np.ndindex(*out.shape[:num_leading_axes]):
            # Not strict, because `ranges` goes on with the axes of the tensor itself.
            global_index = tuple(r[i] for r, i in zip(ranges, local_index, strict=False))
            # The assignment casts to the parameter's dtype.
            out[local_index] = parts[global_index][index[num_leading_axes:]]
        return out

    return jax.make_array_from_callback(spec.shape, spec.sharding, read_slice)


# ---- a converted directory


class _ConvertedSource:
    def __init__(self, path: pathlib.Path):
        format_lib.read_manifest(path)  # raises for an interrupted conversion
        self.config = config_lib.ModelConfig.from_file(path / "config.json")
        self._arrays = format_lib.open_params(path, self.config)
        self._params_dir = path / format_lib.PARAMS_DIR

    def read_params(self, specs: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        return {
            name: _read_sharded_array(self._arrays[name], spec, self._params_dir / name)
            for name, spec in specs.items()
        }

    def matrix_reader(
        self, name: str, shape: tuple[int, ...]
    ) -> Callable[[tuple[int, ...], slice], np.ndarray]:
        del shape  # `open_params` has compared shapes already

        def read_columns(index: tuple[int, ...], columns: slice) -> np.ndarray:
            reading = self._arrays[name][(*index, slice(None), columns)].read()
            return array_futures.wait_for_read(
                reading, self._params_dir / name, format_lib.CONVERT_AGAIN
            )

        return read_columns


def _read_sharded_array(
    array: ts.TensorStore, spec: jax.ShapeDtypeStruct, source: pathlib.Path
) -> jax.Array:
    """Read the slices of this process's devices, all at once, and the slice of replicas once."""
    indices = spec.sharding.addressable_devices_indices_map(spec.shape).values()
    # Keyed by repr, because slices have no hash before Python 3.12. Equal keys are replicas. The
    # reads run in the background.
    reads = {repr(index): array[index].read() for index in indices}

    def wait_for_slice(index) -> np.ndarray:
        data = array_futures.wait_for_read(reads[repr(index)], source, format_lib.CONVERT_AGAIN)
        return data.astype(spec.dtype, copy=False)

    return jax.make_array_from_callback(spec.shape, spec.sharding, wait_for_slice)
