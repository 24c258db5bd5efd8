"""Writing a model from memory as a converted directory (see `format.py`).

Every process writes the shards of its own devices. A replicated shard is written once.
"""

import contextlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from m1_jax import config as config_lib
from m1_jax import distributed, file_lock, local_path
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax.checkpoints import array_futures, checkpoint_dir, params_map, release
from m1_jax.checkpoints import format as format_lib

# Keys of config.json that neither parameters nor logits depend on.
_TRAINING_ONLY_KEYS = ("router_aux_loss_coef", "initializer_range", "max_position_embeddings")
_SAVE_JOURNAL = "save\n"  # this text tells a directory of `save` from a directory of `convert`


def save(
    model: model_lib.MiniMaxM1, path, source=None, dtype: jax.typing.DTypeLike | None = None
) -> pathlib.Path:
    """Write the model to a new directory that `load` reads and `convert --to=hf` exports.

    Files are written to `path`.partial, which is renamed when it is complete. The remains of an
    interrupted `save` in it are removed. All processes call this, with one path on a file system
    that all of them share.

    Args:
      model: a model with the parameters of a release: no adapters, no int8 weights.
      path: the directory to make.
      source: a release or converted directory of a model of this shape. Its config.json, tokenizer
        and other small files are copied. Its cut into shards is used again on the way back, if
        dtypes are the same. None: config.json is written from the model's config alone.
      dtype: dtype of the parameters on disk, float32 or bfloat16. None: as in the model. Routers
        stay float32.

    Raises:
      FileExistsError: the directory exists, or a partial one that another command made.
      ValueError: parameters that a release does not have, a source of another architecture, or a
        path that is not of this machine.
      LockError: another process writes the directory.
      CheckpointError, ConfigError: a source that is not a complete checkpoint.
    """
    path = local_path.resolve_path(path)
    if source is not None:
        source = checkpoint_dir.require_checkpoint(source, "source")
        format_lib.check_small_files(source)
    stored_params = _stored_params_from_model(model, dtype)
    manifest = _build_model_manifest(model, source)
    with contextlib.ExitStack() as held_lock:

        def lock() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            held_lock.enter_context(file_lock.hold_lock(path, "writes"))

        distributed.run_on_first(lock)
        # All processes look before process 0 removes anything. Otherwise a late one would see the
        # new directory and refuse it.
        distributed.run_on_all(lambda: _check_absent(path))
        _write_model(model, path, source, stored_params, manifest)
    return path


def _check_absent(path: pathlib.Path) -> None:
    partial = _partial_path(path)
    journal = partial / format_lib.JOURNAL_FILE
    is_interrupted_save = journal.is_file() and journal.read_bytes() == _SAVE_JOURNAL.encode()
    if path.exists() or (partial.exists() and not is_interrupted_save):
        raise FileExistsError(
            f"{path if path.exists() else partial} exists; wanted a new directory. "
            "Remove it or choose another."
        )


def _partial_path(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".partial")


def _write_model(
    model: model_lib.MiniMaxM1,
    path: pathlib.Path,
    source: pathlib.Path | None,
    stored_params: dict[str, format_lib.StoredParam],
    manifest: dict,
) -> None:
    """Write all files of the directory, and give it its name. All processes call this."""
    partial = _partial_path(path)
    params_dir, journal = partial / format_lib.PARAMS_DIR, partial / format_lib.JOURNAL_FILE
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # The journal comes first, so that an interruption from here on is recognised.
        journal.write_text(_SAVE_JOURNAL)
        format_lib.allocate_params(params_dir, stored_params)
    multihost_utils.sync_global_devices("m1_jax save: allocated")
    for name, param in params_lib.params_by_path(model).items():
        _write_param(params_dir, name, param.get_value(), stored_params[name].dtype)
    multihost_utils.sync_global_devices("m1_jax save: written")
    if jax.process_index() == 0:
        if source is None:
            text = json.dumps(model.config.to_hf(), indent=2) + "\n"
            (partial / "config.json").write_text(text)
        else:
            format_lib.copy_small_files(source, partial)
        # The manifest makes the directory complete, the rename gives it its name.
        format_lib.write_manifest(partial, manifest)
        partial.rename(path)
        (path / format_lib.JOURNAL_FILE).unlink()
    multihost_utils.sync_global_devices("m1_jax save: complete")


def _stored_params_from_model(
    model: model_lib.MiniMaxM1, dtype: jax.typing.DTypeLike | None
) -> dict[str, format_lib.StoredParam]:
    """Return how every parameter of the model is stored, after checking that a release has it."""
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype: got {jnp.dtype(dtype)}; wanted float32, bfloat16 or None")
    leading_axes = {
        entry.param_path: len(entry.index) for entry in params_map.list_tensor_entries(model.config)
    }
    params = params_lib.params_by_path(model)
    if unknown := params.keys() - leading_axes.keys():
        raise ValueError(
            f"got {len(unknown)} parameters that a checkpoint cannot hold, such as "
            f"{sorted(unknown)[0]}; wanted a model without adapters and without int8 weights. "
            "Merge adapters with lora.merge_adapters, or load the model without weights=..."
        )
    stored_params = {}
    for name, param in params.items():
        # Parameters whose metadata says float32, such as routers, keep that dtype.
        keeps_dtype = dtype is None or param.get_metadata()["float32"]
        stored_dtype = np.dtype(param.dtype if keeps_dtype else dtype)
        # A shard is written by one process, so it is cut into chunks of its own.
        shard_shape = param.get_value().sharding.shard_shape(param.shape)
        stored_params[name] = format_lib.StoredParam(
            param.shape, stored_dtype, leading_axes[name], shard_shape
        )
    return stored_params


def _build_model_manifest(model: model_lib.MiniMaxM1, source: pathlib.Path | None) -> dict:
    """Return the manifest of the source, after comparing the source's config with the model's.

    Raises:
      ValueError: their configs differ in more than `_TRAINING_ONLY_KEYS`.
    """
    if source is None:
        return format_lib.build_manifest(None)
    # Through ModelConfig, so that both spellings of config.json compare.
    source_config = config_lib.ModelConfig.from_file(source / "config.json").to_hf()
    for key, value in model.config.to_hf().items():
        if source_config[key] != value and key not in _TRAINING_ONLY_KEYS:
            raise ValueError(
                f"{source / 'config.json'}: got {key} {source_config[key]!r}; the model has "
                f"{value!r}. Choose the directory that this model came from, or none."
            )
    if format_lib.is_converted(source):
        return format_lib.read_manifest(source)
    return format_lib.build_manifest(release.Release(source))


def _write_param(params_dir: pathlib.Path, name: str, value: jax.Array, dtype: np.dtype) -> None:
    """Write this process's shards of a parameter. The host holds one parameter at a time."""
    array = format_lib.open_array(params_dir, name)
    # Replica numbers are global, so among all processes exactly one writes a shard.
    first_replicas = [shard for shard in value.addressable_shards if shard.replica_id == 0]
    writes = [
        array[shard.index].write(np.asarray(shard.data).astype(dtype, copy=False))
        for shard in first_replicas
    ]
    # The writes run at the same time. They are awaited before the next parameter.
    for write in writes:
        array_futures.wait_for_write(write, params_dir / name, "Remove it and save again.")
