"""Loading a model from a release directory or from a converted Orbax directory.

A converted directory, which `convert.py` and `export.py` write, holds
    params/        an Orbax checkpoint: the parameters as a nested dict, stacked as in the model
    config.json    as in the release, with the tokenizer and other small files beside it
    release.json   how the tensors lay in the release's shards, for the way back
"""

import json
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import quantize, sharding
from m1_jax.checkpoints import params_map, release

PARAMS_DIR = "params"
MANIFEST_FILE = "release.json"
FORMAT_VERSION = "m1_jax converted checkpoint, version 2"


def load(
    path,
    dtype=jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    mode: str = sharding.TRAIN,
    weights: str | None = None,
    param_dtype=None,
) -> model_lib.MiniMaxM1:
    """Load a model for computation in `dtype`.

    Args:
      path: a release directory (config.json and safetensors), in the release's or transformers'
        native layout, or a directory that `m1_jax.convert` or `export.save` made.
      dtype: of activations, float32 or bfloat16; routers stay float32.
      mesh: devices to spread the parameters over, with some of `sharding.MESH_AXES` (see
        `sharding.make_mesh`); None: one device. Each process reads only what its own devices hold.
      mode: "train" splits every large parameter over all devices, which gather it where they need
        it; "prefill" and "decode" leave weights where they compute.
      weights: for inference, "int8-experts" rounds the experts to int8 as they are read, and
        "int8-all" also the projections of attention and of a shared expert, see `quantize.py`;
        None: all stay `param_dtype`.
      param_dtype: of the parameters, float32 or bfloat16; None: as `dtype`. A trainer wants
        float32 parameters with computation in bfloat16.

    Raises:
      ValueError: a dtype, recipe, mesh or mode that this model cannot have.
      CheckpointError: a directory that is not a complete checkpoint.
      ConfigError: a config.json that this model cannot compute.
    """
    path = pathlib.Path(path)
    param_dtype = param_dtype or dtype
    quantize.check_recipe(weights)
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if jnp.dtype(value) not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name}: got {jnp.dtype(value)}; wanted float32 or bfloat16")
    if is_converted(path):
        read_manifest(path)
        config = config_lib.ModelConfig.from_file(path / "config.json")
        fill, matrices = _make_orbax_readers(path, config)
    elif (path / "config.json").is_file():
        source = release.Release(path)
        config = source.config
        fill, matrices = _make_release_readers(source)
    else:
        raise release.CheckpointError(
            f"{path} is no checkpoint: wanted a release directory (config.json, {release.INDEX_FILE}, "
            f"shards) or one made by m1_jax.convert ({PARAMS_DIR}/, {MANIFEST_FILE})"
        )
    layout = sharding.make_layout(mesh, config, mode)
    model = abstract_model(config, dtype, param_dtype, layout, weights)
    params = params_by_path(model)
    wanted = {name: param.get_value() for name, param in params.items()}
    for name in [name for name, value in wanted.items() if value.dtype == jnp.int8]:
        values, scales = wanted.pop(name), wanted.pop(f"{name}_scale")
        values, scales = quantize.build_quantized_arrays(
            values, scales, matrices(name, values.shape)
        )
        params[name].set_value(values)
        params[f"{name}_scale"].set_value(scales)
    for name, value in fill(wanted).items():
        params[name].set_value(value)
    return model


def abstract_model(
    config: config_lib.ModelConfig,
    dtype=jnp.bfloat16,
    param_dtype=None,
    layout: sharding.MeshLayout | None = None,
    weights: str | None = None,
) -> model_lib.MiniMaxM1:
    """Return a model whose parameters are shapes, dtypes and shardings only; it costs no memory.

    weights: see `load`.
    """
    model = nnx.eval_shape(
        lambda: model_lib.MiniMaxM1(
            config,
            nnx.Rngs(0),
            dtype=dtype,
            param_dtype=param_dtype,
            layout=layout,
        )
    )
    quantize.declare_int8_params(model, weights)
    for param in params_by_path(model).values():
        where = sharding.make_param_sharding(
            layout, param.get_metadata()["logical_axes"], param.shape
        )
        param.set_value(jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=where))
    return model


def random_model(
    config: config_lib.ModelConfig,
    key: jax.Array,
    dtype=jnp.bfloat16,
    param_dtype=None,
    layout: sharding.MeshLayout | None = None,
) -> model_lib.MiniMaxM1:
    """Return a model with fresh parameters, each made on the devices that hold it."""
    model = abstract_model(config, dtype, param_dtype, layout)

    def make(key):
        made = model_lib.MiniMaxM1(config, nnx.Rngs(key), dtype=dtype, param_dtype=param_dtype)
        return {name: param[...] for name, param in params_by_path(made).items()}

    params = params_by_path(model)
    where = {name: param.get_value().sharding for name, param in params.items()}
    for name, value in jax.jit(make, out_shardings=where)(key).items():
        params[name].set_value(value)
    return model


def params_by_path(model: model_lib.MiniMaxM1) -> dict[str, nnx.Param]:
    """Return the model's own parameters by the dotted paths of `params_map`."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param)
    }


def is_converted(path: pathlib.Path) -> bool:
    return (path / PARAMS_DIR).is_dir() or (path / MANIFEST_FILE).exists()


def read_manifest(path: pathlib.Path) -> dict:
    """Return release.json of a converted directory, which is written last."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
    except (FileNotFoundError, ValueError):
        raise release.CheckpointError(
            f"{path}: {MANIFEST_FILE} is missing or damaged, so this conversion is not complete. "
            "Run m1_jax.convert again."
        ) from None
    made_by = manifest.get("format") if isinstance(manifest, dict) else None
    if made_by != FORMAT_VERSION:
        raise release.CheckpointError(
            f"{path / MANIFEST_FILE}: got format {made_by!r}; wanted {FORMAT_VERSION!r}. "
            "Run this version's m1_jax.convert again."
        )
    return manifest


def unflatten_paths(flat: Mapping[str, object]) -> dict:
    """Nest a dict of dotted paths: {"a.b": x} becomes {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def check_tensor_shape(
    tensor: release.ReleaseTensor, entry: params_map.TensorEntry, shape: tuple[int, ...]
) -> None:
    """Compare a tensor with the parameter of the given (stacked) shape that it belongs to."""
    wanted = shape[len(entry.index) :]
    wanted = wanted[::-1] if entry.transposed else wanted
    if tensor.shape != wanted:
        raise release.CheckpointError(
            f"{tensor.file}: {tensor.name} has shape {list(tensor.shape)}; config.json asks for "
            f"{list(wanted)}. Is it the config.json that these weights were saved with?"
        )


# ---- where parameters come from: each source gives two functions
#     fill({name: shape, dtype and sharding}) -> {name: array}
#     matrices(name, shape)(place on the leading axes, columns) -> one matrix's columns, as stored


def _make_release_readers(source: release.Release) -> tuple[Callable, Callable]:
    def fill(wanted):
        parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {name: {} for name in wanted}
        for entry in source.entries:
            if entry.param_path not in wanted:
                continue
            tensor = source.tensors[entry.name]
            check_tensor_shape(tensor, entry, wanted[entry.param_path].shape)
            data = tensor.read()
            parts[entry.param_path][entry.index] = data.T if entry.transposed else data
        return {name: _assemble_array(spec, parts[name]) for name, spec in wanted.items()}

    def matrices(name, shape):
        entries = {entry.index: entry for entry in source.entries if entry.param_path == name}
        for entry in entries.values():
            check_tensor_shape(source.tensors[entry.name], entry, shape)

        def read(place, columns):
            data = source.tensors[entries[place].name].read()
            return (data.T if entries[place].transposed else data)[:, columns]

        return read

    return fill, matrices


def _assemble_array(spec: jax.ShapeDtypeStruct, parts: Mapping[tuple[int, ...], np.ndarray]):
    """Build a sharded array from its parts, each device's slice on its own."""
    depth = len(next(iter(parts)))

    def piece(index):
        ranges = [range(*dim.indices(size)) for dim, size in zip(index, spec.shape, strict=True)]
        out = np.empty([len(r) for r in ranges], spec.dtype)
        for place in np.ndindex(*out.shape[:depth]):
            lead = tuple(r[i] for r, i in zip(ranges, place, strict=False))
            out[place] = parts[lead][index[depth:]]
        return out

    return jax.make_array_from_callback(spec.shape, spec.sharding, piece)


def tensorstore_spec(params: pathlib.Path, name: str) -> dict:
    """Return the TensorStore spec of one parameter below an Orbax directory."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{params.resolve() / name}/"},
        # A chunk of zeros is stored like any other, so a missing one is always an error.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def open_params(path: pathlib.Path, config: config_lib.ModelConfig) -> dict[str, ts.TensorStore]:
    """Open every parameter of a converted directory, by the dotted paths of `params_map`.

    TensorStore rather than Orbax: its errors name the file, and one error is one message.

    Raises:
      CheckpointError: a parameter that is missing, left over, or of another shape than config.json
        asks for.
    """
    params = path / PARAMS_DIR
    wanted = params_by_path(abstract_model(config))
    stored = {file.parent.name for file in params.glob("*/zarr.json")}
    if stored != wanted.keys():
        raise release.CheckpointError(
            f"{params}: config.json and the parameters disagree: "
            f"{release.describe_names(wanted.keys() - stored, 'missing')}; "
            f"{release.describe_names(stored - wanted.keys(), 'not in the model')}. "
            "Is config.json the one of this conversion? Else run m1_jax.convert again."
        )
    arrays = {}
    for name, param in wanted.items():
        array = wait_for_read(ts.open(tensorstore_spec(params, name), open=True), params / name)
        if array.shape != param.shape:
            raise release.CheckpointError(
                f"{params / name} has shape {list(array.shape)}; config.json asks for "
                f"{list(param.shape)}. Is config.json the one of this conversion?"
            )
        if array.dtype.numpy_dtype not in release.CODES_BY_DTYPE:
            raise release.CheckpointError(
                f"{params / name} has dtype {array.dtype.name}; wanted one of "
                f"{', '.join(dtype.name for dtype in release.CODES_BY_DTYPE)}"
            )
        arrays[name] = array
    return arrays


def wait_for_read(future: ts.Future, source: pathlib.Path):
    """Wait for a TensorStore read; say in one line which file is wrong."""
    try:
        return future.result()
    except ValueError as error:
        reason = str(error).split(" [", 1)[0]  # what follows is TensorStore's own state
        raise release.CheckpointError(
            f"{source} cannot be read: {reason}. Run m1_jax.convert again."
        ) from None


def _make_orbax_readers(
    path: pathlib.Path, config: config_lib.ModelConfig
) -> tuple[Callable, Callable]:
    arrays = open_params(path, config)

    def fill(wanted):
        return {
            name: _read_sharded_array(arrays[name], spec, path / PARAMS_DIR / name)
            for name, spec in wanted.items()
        }

    def matrices(name, _):
        def read(place, columns):
            reading = arrays[name][(*place, slice(None), columns)].read()
            return wait_for_read(reading, path / PARAMS_DIR / name)

        return read

    return fill, matrices


def _read_sharded_array(
    array: ts.TensorStore, spec: jax.ShapeDtypeStruct, source: pathlib.Path
) -> jax.Array:
    """Read what this process's devices hold, all slices at once and replicas only once."""
    places = spec.sharding.addressable_devices_indices_map(spec.shape).values()
    reading = {repr(index): array[index].read() for index in places}

    def piece(index):
        return wait_for_read(reading[repr(index)], source).astype(spec.dtype, copy=False)

    return jax.make_array_from_callback(spec.shape, spec.sharding, piece)
