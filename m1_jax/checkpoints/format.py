"""The format of a converted directory. No other file knows it.

    params/         an Orbax checkpoint: the parameters as a nested dict, stacked as in the model
    config.json     as in the release, with the tokenizer and other small files beside it
    release.json    the manifest: how the tensors lay in the release's shards, for the way back
    progress.txt    the journal, only while the directory is being written

The manifest is written last, so a directory without one is an interrupted conversion. Sizes and
names are checked, bits are not: that would take a digest of each tensor in the manifest, made while
its bytes pass by. `load.py`
reads a model from a converted directory, `save.py` writes one, and `convert.py` streams tensors to
and from it. Arrays are opened with TensorStore and not with Orbax, because TensorStore's errors
name the file, and one failure is one message.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
import stat
from collections.abc import Iterable, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from m1_jax import config as config_lib
from m1_jax import json_file, strict_json
from m1_jax import params as params_lib
from m1_jax.checkpoints import array_futures, release

PARAMS_DIR = "params"
MANIFEST_FILE = "release.json"
JOURNAL_FILE = "progress.txt"
FORMAT_VERSION = "m1_jax converted checkpoint, version 2"
# Upper bound of one array chunk, if its rows can be halved. Devices read chunks independently.
CHUNK_BYTES = 32 * 2**20
CONVERT_AGAIN = "Run m1_jax.convert again."
# Files that `copy_small_files` leaves out: weights, and locks of commands that run.
_OMITTED_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".tmp", ".lock")
# Small files that must be JSON objects where they exist.
_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}]


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """One stacked parameter on disk.

    Attributes:
      shape: shape of the whole stacked parameter.
      dtype: dtype on disk.
      num_leading_axes: number of axes over the release's tensors: repeats, layers, experts.
      shard_shape: shape of one device's shard, where several processes write. None: the whole
        parameter. No chunk spans two shards, because two processes must not write to one file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    num_leading_axes: int
    shard_shape: tuple[int, ...] | None = None

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """One tensor per chunk, its first dimension halved until it has at most `CHUNK_BYTES`."""
        rows, *trailing = (self.shard_shape or self.shape)[self.num_leading_axes :]
        # An odd number of rows ends the halving, because all chunks have one shape.
        while rows % 2 == 0 and rows * math.prod(trailing) * self.dtype.itemsize > CHUNK_BYTES:
            rows //= 2
        return (1,) * self.num_leading_axes + (rows, *trailing)


# ---- the manifest


def is_converted(path: pathlib.Path) -> bool:
    """Return whether a directory is a converted one, complete or not."""
    return (path / PARAMS_DIR).is_dir() or (path / MANIFEST_FILE).exists()


def build_manifest(source: release.Release | None) -> dict:
    """Return the manifest of a release. None stands for a model that never had shards."""
    if source is None:
        return {"format": FORMAT_VERSION, "index": None, "shards": {}}
    index = source.directory / release.INDEX_FILE
    return {
        "format": FORMAT_VERSION,
        # Index and headers are kept as raw text, so that the way back writes the same bytes. Not
        # `read_text`, which would replace the line ends of Windows.
        "index": index.read_bytes().decode() if index.exists() else None,
        "shards": {shard.file.name: shard.header for shard in source.shards},
    }


def write_manifest(path: pathlib.Path, manifest: dict) -> None:
    """Write the manifest of the directory `path`, which makes the directory complete."""
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def read_manifest(path: pathlib.Path) -> dict:
    """Return the manifest of the directory `path`, whose index and headers agree.

    Raises:
      CheckpointError: an interrupted conversion, a manifest that is damaged, or a directory of
        another format version.
    """
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise release.CheckpointError(
            f"{path}: {MANIFEST_FILE} is missing or damaged, so this conversion is not complete. "
            f"{CONVERT_AGAIN}"
        )
    remedy = f"So this conversion is not complete. {CONVERT_AGAIN}"
    manifest = json_file.read_json(file, release.CheckpointError, remedy)
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise release.CheckpointError(
            f"{file}: got format {strict_json.show_value(version)}; wanted {FORMAT_VERSION!r}. "
            "Run this version's m1_jax.convert again."
        )
    _check_manifest(manifest, file)
    return manifest


def _check_manifest(manifest: dict, file: pathlib.Path) -> None:
    """Refuse a manifest whose shards could not be written back."""
    index, shards = manifest.get("index", ...), manifest.get("shards")
    if (
        not isinstance(shards, dict)
        or not all(isinstance(header, str) for header in shards.values())
        or not (index is None or isinstance(index, str))
    ):
        raise release.CheckpointError(
            f"{file} is damaged: wanted shards, an object of texts, and index, a text or null. "
            f"{CONVERT_AGAIN}"
        )
    try:
        parsed_shards = []
        for name, header in shards.items():
            release.check_shard_name(name, "shards")
            # The name stands for the shard in the message below.
            tensors = release.parse_header(header, pathlib.Path(name), 8 + len(header.encode()))
            parsed_shards.append(release.ReleaseShard(pathlib.Path(name), header, tensors))
        if index is not None:
            release.check_index(release.parse_index(index, release.INDEX_FILE), parsed_shards)
        elif shards.keys() - {release.SINGLE_SHARD_FILE}:
            raise release.CheckpointError("index is null, but there are several shards.")
    except ValueError as error:
        reason = strict_json.shorten_text(str(error), 120)
        raise release.CheckpointError(f"{file} is damaged: {reason} {CONVERT_AGAIN}") from None


# ---- arrays


def array_spec(params_dir: pathlib.Path, name: str) -> dict:
    """Return the TensorStore spec of one parameter below `params_dir`."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{params_dir.resolve() / name}/"},
        # By default a chunk of zeros is not stored, and a missing chunk reads as zeros. Here every
        # chunk is stored, so a missing chunk is an error.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def open_array(params_dir: pathlib.Path, name: str, remedy: str = CONVERT_AGAIN) -> ts.TensorStore:
    """Open one allocated parameter.

    Args:
      params_dir: the directory of all parameters.
      name: the parameter's dotted path.
      remedy: how the error ends.

    Raises:
      CheckpointError: no array, or one that this format does not have.
    """
    file = params_dir / name / "zarr.json"
    # Read here first: TensorStore's own parser ends the process where JSON is deep.
    metadata = json_file.read_json_object(file, release.CheckpointError, remedy)
    if metadata.get("codecs") != _CODECS:
        raise release.CheckpointError(
            f"{file}: got codecs {strict_json.show_value(metadata.get('codecs'))}; wanted bytes in "
            f"little-endian order. {remedy}"
        )
    array = array_futures.wait_for_read(
        ts.open(array_spec(params_dir, name), open=True), file.parent, remedy
    )
    chunk_shape = _read_chunk_shape(array)
    if any(size % chunk for size, chunk in zip(array.shape, chunk_shape, strict=True)):
        raise release.CheckpointError(
            f"{file}: got chunks of shape {list(chunk_shape)}; wanted divisors of the shape "
            f"{list(array.shape)}. {remedy}"
        )
    return array


def _read_chunk_shape(array: ts.TensorStore) -> tuple[int, ...]:
    # The types allow for unknown sizes, which an open zarr array does not have.
    return tuple(size or 1 for size in array.chunk_layout.read_chunk.shape or ())


def check_array(
    array: ts.TensorStore, param: StoredParam, source: pathlib.Path, remedy: str
) -> None:
    """Compare an array on disk with how it was allocated.

    Raises:
      CheckpointError: another shape, dtype or chunk.
    """
    got = array.shape, _read_chunk_shape(array), array.dtype.numpy_dtype
    wanted = param.shape, param.chunk_shape, param.dtype
    if got != wanted:
        raise release.CheckpointError(
            f"{source}: got shape, chunk and dtype {list(got[0])} {list(got[1])} {got[2]}; wanted "
            f"{list(wanted[0])} {list(wanted[1])} {wanted[2]}. {remedy}"
        )


def open_params(path: pathlib.Path, config: config_lib.ModelConfig) -> dict[str, ts.TensorStore]:
    """Open every parameter of a converted directory, by the dotted paths of `params_map`.

    Raises:
      CheckpointError: a parameter that is missing, not in the model, or of another shape than
        config.json asks for, an array of a dtype that no release has, or a chunk that is missing or
        of a wrong size.
    """
    params_dir = path / PARAMS_DIR
    model_params = params_lib.params_by_path(params_lib.abstract_model(config))
    # Each array is a directory of that name with its metadata.
    array_names = {file.parent.name for file in params_dir.glob("*/zarr.json")}
    if array_names != model_params.keys():
        raise release.CheckpointError(
            f"{params_dir}: config.json and the parameters disagree: "
            f"{release.describe_names(model_params.keys() - array_names, 'missing')}; "
            f"{release.describe_names(array_names - model_params.keys(), 'not in the model')}. "
            "Is config.json the one of this conversion? Else run m1_jax.convert again."
        )
    arrays = {}
    for name, param in model_params.items():
        array = open_array(params_dir, name)
        if array.shape != param.shape:
            raise release.CheckpointError(
                f"{params_dir / name} has shape {list(array.shape)}; config.json asks for "
                f"{list(param.shape)}. Is config.json the one of this conversion?"
            )
        # The conversion keeps the release's dtypes, so no other dtype can be written back.
        if array.dtype.numpy_dtype not in release.CODES_BY_DTYPE:
            raise release.CheckpointError(
                f"{params_dir / name} has dtype {array.dtype.name}; wanted one of "
                f"{', '.join(dtype.name for dtype in release.CODES_BY_DTYPE)}"
            )
        # Before any work: a shard may come hours later.
        if problem := find_bad_chunk(params_dir, name, array):
            raise release.CheckpointError(
                f"{params_dir / name} cannot be read: {problem}. {CONVERT_AGAIN}"
            )
        arrays[name] = array
    return arrays


def find_bad_chunk(
    params_dir: pathlib.Path, name: str, array: ts.TensorStore, index: tuple[int, ...] = ()
) -> str | None:
    """Return what is wrong with the first chunk that is missing, no file, or of a wrong size.

    Args:
      params_dir: the directory of all parameters.
      name: the parameter's dotted path.
      array: the open array.
      index: on the leading axes, to look at the chunks of one tensor. Those have chunks of 1.
    """
    chunk_shape = _read_chunk_shape(array)
    wanted_bytes = math.prod(chunk_shape) * array.dtype.numpy_dtype.itemsize
    counts = [size // chunk for size, chunk in zip(array.shape, chunk_shape, strict=True)]
    for position in itertools.product(*map(range, counts[len(index) :])):
        chunk = "/".join(map(str, ("c", *index, *position)))
        try:
            status = (params_dir / name / chunk).stat()
        except OSError as error:
            return f"{chunk} is missing ({error.strerror})"
        if not stat.S_ISREG(status.st_mode):
            return f"{chunk} is not a file"
        if status.st_size != wanted_bytes:
            problem = "Not enough data" if status.st_size < wanted_bytes else "Too much data"
            return f"{problem} in {chunk}: got {status.st_size} bytes, wanted {wanted_bytes}"
    return None


def allocate_params(params_dir: pathlib.Path, stored_params: Mapping[str, StoredParam]) -> None:
    """Create an Orbax checkpoint with every array at its true shape and no data yet.

    Orbax writes a skeleton of one-element arrays with all of its metadata. Each array is then
    created anew at its true shape, so no array of that size is ever in memory. Only one process of
    a mesh calls this.
    """
    skeleton = {path: np.zeros((1,), param.dtype) for path, param in stored_params.items()}
    building_dir = params_dir.with_name(params_dir.name + ".building")
    # An interrupted call may have left it.
    shutil.rmtree(building_dir, ignore_errors=True)
    # By default Orbax waits for every process at its barriers, but only this one takes part.
    process = jax.process_index()
    single_process = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix="m1_jax"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,  # a directory of plain zarr files per array, as `array_spec` opens it
        use_zarr3=True,
        multiprocessing_options=single_process,
    )
    with ocp.Checkpointer(handler, multiprocessing_options=single_process) as checkpointer:
        checkpointer.save(building_dir.resolve(), args=ocp.args.PyTreeSave(_nest_paths(skeleton)))
    for path, param in stored_params.items():
        chunks = {"name": "regular", "configuration": {"chunk_shape": param.chunk_shape}}
        metadata = {
            "shape": param.shape,
            "data_type": param.dtype.name,
            "chunk_grid": chunks,
            "codecs": _CODECS,
        }
        spec = array_spec(building_dir, path) | {"metadata": metadata}
        ts.open(spec, create=True, delete_existing=True).result()
    # The rename comes last, so a params directory that exists has all of its arrays.
    building_dir.rename(params_dir)


def _nest_paths(flat: Mapping[str, object]) -> dict:
    """Nest a dict of dotted paths: {"a.b": x} becomes {"a": {"b": x}}."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


# ---- files beside the arrays


def check_small_files(directory: pathlib.Path) -> None:
    """Check the files that `copy_small_files` copies, before any work is done.

    Raises:
      CheckpointError: a pointer of Git LFS, or a tokenizer's file that is not what it should be.
    """
    for file in _list_small_files(directory):
        json_file.check_regular_file(file, release.CheckpointError, json_file.COPY_AGAIN)
    for file in (directory / name for name in _JSON_FILES):
        if not os.path.lexists(file):
            continue
        content = json_file.read_json_object(file, release.CheckpointError)
        if file.name == "tokenizer.json" and "model" not in content:
            raise release.CheckpointError(
                f"{file}: got no model; wanted a tokenizer. {json_file.COPY_AGAIN}"
            )


def copy_small_files(src: pathlib.Path, dst: pathlib.Path) -> None:
    """Copy the tokenizer and all other files but weights, config.json last.

    No directory is a checkpoint without config.json, so a half-written one is not taken for one.
    """
    for file in _sort_config_last(_list_small_files(src)):
        shutil.copyfile(file, dst / file.name)


def _list_small_files(directory: pathlib.Path) -> list[pathlib.Path]:
    format_files = (JOURNAL_FILE, MANIFEST_FILE)
    return [
        file
        for file in directory.iterdir()
        if file.is_file()
        and not file.name.endswith(_OMITTED_SUFFIXES)
        and file.name not in format_files
    ]


def _sort_config_last(files: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    return sorted(files, key=lambda file: (file.name == "config.json", file.name))
