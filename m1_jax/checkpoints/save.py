"""Writing a model from memory as a converted directory; see `checkpoints/load.py` for its form.

Every process writes what its own devices hold, and of copies only the first.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import params_map, release

CHUNK_BYTES = 32 * 2**20  # of one array chunk on disk: what a device can read on its own
JOURNAL_FILE = "progress.txt"  # what is finished of a directory that is being made
# Of config.json, what neither parameters nor logits depend on.
_TRAINING_ONLY_KEYS = ("router_aux_loss_coef", "initializer_range", "max_position_embeddings")
_SAVE_JOURNAL = "save\n"  # the journal of `save`
_SKIPPED_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".tmp")


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """One stacked parameter on disk; `lead` leading axes number its tensors.

    piece: the shape that one device holds; None: the whole. No chunk lies in two pieces, because
    two processes must not write to one file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    num_leading_axes: int
    shard_shape: tuple[int, ...] | None = None

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """One tensor per chunk, its first dimension halved until the chunk is small enough."""
        rows, *rest = (self.shard_shape or self.shape)[self.num_leading_axes :]
        while rows % 2 == 0 and rows * math.prod(rest) * self.dtype.itemsize > CHUNK_BYTES:
            rows //= 2
        return (1,) * self.num_leading_axes + (rows, *rest)


def save(model: model_lib.MiniMaxM1, path, source=None, dtype=None) -> pathlib.Path:
    """Write the model to a new directory that `load` reads and `convert --to=hf` exports.

    It grows in `path`.partial and is renamed when it is complete; what an interrupted `save` left
    there is removed. With several processes all of them call this, with one path that all see.

    Args:
      source: a release or converted directory of a model of this shape, whose config.json,
        tokenizer and other small files are copied, and whose cut into shards the way back takes
        over if dtypes are the same; None: config.json is written from the model's config alone.
      dtype: of the parameters on disk, float32 or bfloat16; None: as they are. Routers stay
        float32.

    Raises:
      FileExistsError: the directory exists, or its partial one, made by something else.
      ValueError: parameters that a release does not have, or those of another shape than source's.
      CheckpointError, ConfigError: a source that is not a complete checkpoint.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    params = partial / load_lib.PARAMS_DIR
    leaves = _stored_params_from_model(model, dtype)
    content = _build_model_manifest(model, source)
    journal = partial / JOURNAL_FILE
    mine = journal.exists() and journal.read_text() == _SAVE_JOURNAL
    if path.exists() or (partial.exists() and not mine):
        raise FileExistsError(
            f"{path if path.exists() else partial} exists; wanted a new directory. "
            "Remove it or choose another."
        )
    multihost_utils.sync_global_devices("m1_jax save: checked")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        journal.write_text(_SAVE_JOURNAL)
        allocate_params(params, leaves)
    multihost_utils.sync_global_devices("m1_jax save: allocated")
    for name, param in load_lib.params_by_path(model).items():
        _write_param(params, name, param.get_value(), leaves[name].dtype)
    multihost_utils.sync_global_devices("m1_jax save: written")
    if jax.process_index() == 0:
        if source is None:
            text = json.dumps(model.config.to_hf(), indent=2) + "\n"
            (partial / "config.json").write_text(text)
        else:
            copy_small_files(pathlib.Path(source), partial)
        (partial / load_lib.MANIFEST_FILE).write_text(json.dumps(content))
        partial.rename(path)
        (path / JOURNAL_FILE).unlink()
    multihost_utils.sync_global_devices("m1_jax save: complete")
    return path


def _stored_params_from_model(model: model_lib.MiniMaxM1, dtype) -> dict[str, StoredParam]:
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}; wanted float32, bfloat16 or None")
    leads = {
        entry.param_path: len(entry.index) for entry in params_map.list_tensor_entries(model.config)
    }
    params = load_lib.params_by_path(model)
    if more := params.keys() - leads.keys():
        raise ValueError(
            f"a checkpoint has no place for {sorted(more)[0]} and {len(more) - 1} others; wanted "
            "a model without adapters (merge them) and without int8 weights"
        )
    leaves = {}
    for name, param in params.items():
        kept = dtype is None or param.get_metadata()["float32"]
        stored = np.dtype(param.dtype if kept else dtype)
        piece = param.get_value().sharding.shard_shape(param.shape)
        leaves[name] = StoredParam(param.shape, stored, leads[name], piece)
    return leaves


def _build_model_manifest(model: model_lib.MiniMaxM1, source) -> dict:
    """Return the manifest, after comparing the model with its source."""
    if source is None:
        return {"format": load_lib.FORMAT_VERSION, "index": None, "shards": {}}
    source = pathlib.Path(source)
    theirs = config_lib.ModelConfig.from_file(source / "config.json").to_hf()
    for key, ours in model.config.to_hf().items():
        if theirs[key] != ours and key not in _TRAINING_ONLY_KEYS:
            raise ValueError(
                f"{source / 'config.json'}: got {key} {theirs[key]!r}; the model has {ours!r}. "
                "Choose the directory that this model came from, or none."
            )
    if load_lib.is_converted(source):
        return load_lib.read_manifest(source)
    return build_manifest(release.Release(source))


def build_manifest(source: release.Release) -> dict:
    """Return what release.json says of a release."""
    index = source.directory / release.INDEX_FILE
    return {
        "format": load_lib.FORMAT_VERSION,
        "index": index.read_text() if index.exists() else None,
        "shards": {shard.file.name: shard.header for shard in source.shards},
    }


def _write_param(params: pathlib.Path, name: str, value: jax.Array, dtype: np.dtype) -> None:
    """Write this process's pieces of a parameter; on the host, it exists one at a time."""
    array = ts.open(load_lib.tensorstore_spec(params, name), open=True).result()
    mine = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    writes = [array[s.index].write(np.asarray(s.data).astype(dtype, copy=False)) for s in mine]
    for write in writes:
        write.result()


def allocate_params(params: pathlib.Path, stored_params: Mapping[str, StoredParam]) -> None:
    """Make an Orbax checkpoint of the right arrays, all still without data.

    Orbax writes a skeleton of one-element arrays with all of its metadata; each array is then
    created anew at its true shape. So no array of the true size is ever in memory. One process
    does it, whatever their number.
    """
    skeleton = {path: np.zeros((1,), leaf.dtype) for path, leaf in stored_params.items()}
    building = params.with_name(params.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix="m1_jax"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, multiprocessing_options=alone
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        tree = load_lib.unflatten_paths(skeleton)
        checkpointer.save(building.resolve(), args=ocp.args.PyTreeSave(tree))
    for path, leaf in stored_params.items():
        chunks = {"name": "regular", "configuration": {"chunk_shape": leaf.chunk_shape}}
        metadata = {
            "shape": leaf.shape,
            "data_type": leaf.dtype.name,
            "chunk_grid": chunks,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        spec = load_lib.tensorstore_spec(building, path) | {"metadata": metadata}
        ts.open(spec, create=True, delete_existing=True).result()
    building.rename(params)


def copy_small_files(src: pathlib.Path, dst: pathlib.Path) -> None:
    """Copy tokenizer and other files beside the weights, but no weights; config.json last.

    Without config.json nothing is a checkpoint, so a half-written result is not taken for one.
    """
    own = (JOURNAL_FILE, load_lib.MANIFEST_FILE)
    for file in sorted(src.iterdir(), key=lambda file: (file.name == "config.json", file.name)):
        if file.is_file() and not file.name.endswith(_SKIPPED_SUFFIXES) and file.name not in own:
            shutil.copyfile(file, dst / file.name)
