"""Reading a release directory: config.json, safetensors shards and their index.

A shard (safetensors) begins with the length of its header, 8 bytes in little-endian order. The
header is JSON: dtype, shape and byte range of each tensor. The tensors' bytes follow without gaps.

The format is read here and not with the safetensors library for three reasons: an error names the
file and the remedy, the header is kept as text for the way back, and a tensor is a memory map. Its
checks are stricter than those of safetensors 0.8.0: the model takes float32, float16 and bfloat16
alone, and a tensor that is named twice is refused. This reader also compares the shards with the
index, with each other and with config.json.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from m1_jax import config as config_lib
from m1_jax import json_file, lightning, local_path, strict_json
from m1_jax.checkpoints import params_map

INDEX_FILE = "model.safetensors.index.json"
SINGLE_SHARD_FILE = "model.safetensors"
DTYPES_BY_CODE = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
CODES_BY_DTYPE = {dtype: code for code, dtype in DTYPES_BY_CODE.items()}
_MAX_HEADER_BYTES, _MAX_NAME_CHARACTERS = 100_000_000, 200  # the format's limit, and our own
_DOWNLOAD_AGAIN = "Download it again."
_shorten, _show = strict_json.shorten_text, strict_json.show_value


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as what it claims to be."""


@dataclasses.dataclass(frozen=True)
class ReleaseTensor:
    """Where a tensor's bytes lie.

    Attributes:
      name: the release's name of the tensor.
      file: the shard that holds it.
      dtype: one of `DTYPES_BY_CODE`.
      shape: in the release's layout, so matrices are [out, in].
      byte_offset: of its first byte, counted from the start of the file.
      nbytes: the number of bytes, which are contiguous and in C order.
    """

    name: str
    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    byte_offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """Map the tensor read-only. Bytes are fetched from disk when they are used."""
        if self.nbytes == 0:  # an empty range cannot be mapped
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.file, np.uint8, "r", offset=self.byte_offset, shape=(self.nbytes,))
        return raw.view(self.dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class ReleaseShard:
    """One safetensors file."""

    file: pathlib.Path
    header: str  # the raw JSON, so that `convert --to=hf` can write the same bytes again
    tensors: tuple[ReleaseTensor, ...]  # in the order of their bytes


class Release:
    """A checked release directory: every tensor that the config asks for, once, and no other.

    Shapes are not compared here. `check_tensor_shape` compares a tensor with its parameter.

    Attributes:
      directory: the path that was read.
      config: the model's configuration, from config.json.
      shards: the safetensors files, in the order of their names.
      tensors: the tensors by name, without the constants of the native layout.
      entries: where each tensor belongs in the model, in the order of the layers.

    Raises:
      CheckpointError: a missing or truncated shard, an index that disagrees with the files, or
        tensors whose names or decay rates are not those of config.json's model.
      ConfigError: a config.json that this model cannot compute.
    """

    def __init__(self, directory):
        self.directory = local_path.resolve_path(directory)
        self.config = config_lib.ModelConfig.from_file(self.directory / "config.json")
        self.shards = _read_shards(self.directory)
        self.tensors = _collect_tensors(self.shards)
        self.entries = params_map.list_tensor_entries(self.config)
        self._check_names()

    def _check_names(self) -> None:
        expected_names = {entry.name for entry in self.entries}
        derived_layers = params_map.list_derived_tensors(self.config)
        # Constants that the model computes itself: compared, then dropped, so that no reader sees
        # a tensor without a parameter.
        for name in sorted(self.tensors.keys() & derived_layers.keys()):
            self._check_slope(name, derived_layers[name])
            del self.tensors[name]
        missing_names = expected_names - self.tensors.keys()
        extra_names = self.tensors.keys() - expected_names
        if missing_names or extra_names:
            raise CheckpointError(
                f"{self.directory}: config.json and the weights disagree: "
                f"{describe_names(missing_names, 'missing')}; "
                f"{describe_names(extra_names, 'not in the model')}. "
                "Is config.json the one that these weights were saved with?"
            )

    def _check_slope(self, name: str, layer: int) -> None:
        """Compare a stored decay rate with the model's.

        The other constants of a layer follow from its decay rates and are not compared.
        """
        if not name.endswith(params_map.SLOPE_RATE.rsplit(".", 1)[1]):
            return
        tensor = self.tensors[name]
        rates = lightning.decay_slopes(self.config)[layer]  # [N], from the config
        if tensor.shape != (rates.size, 1, 1):
            raise CheckpointError(
                f"{tensor.file}: {name} has shape {_show(list(tensor.shape))}; wanted "
                f"{[rates.size, 1, 1]}. Is config.json the one that these weights were saved with?"
            )
        file_rates = tensor.read().astype(np.float32).reshape(-1)
        # transformers divides the layer by L - 1 + 1e-5, the release by L - 1. The rates differ by
        # less than 1e-5 / (L - 1) of the head's slope. That matters in the last layer alone, whose
        # rate is 1e-5 of the slope.
        tolerance = 1e-5 / max(self.config.num_hidden_layers - 1, 1)
        tolerance *= np.asarray(lightning.alibi_slopes(rates.size))
        # Storage in bfloat16 or float16 rounds as well. The last layer's rates are below the normal
        # numbers of float16, whose subnormal ones are multiples of 6e-8.
        tolerance += rates * (1e-4 if tensor.dtype == np.float32 else 1e-2)
        tolerance += float(ml_dtypes.finfo(tensor.dtype).smallest_subnormal)
        if not np.all(np.abs(file_rates - rates) <= tolerance):
            raise CheckpointError(
                f"{name}: got decay rates {file_rates[:3]}...; wanted {rates[:3]}..., those of "
                f"layer {layer} of {self.config.num_hidden_layers} with {rates.size} heads. "
                "Is config.json the one that these weights were saved with?"
            )


def check_tensor_shape(
    tensor: ReleaseTensor, entry: params_map.TensorEntry, param_shape: tuple[int, ...]
) -> None:
    """Compare a tensor with the (stacked) parameter that it belongs to.

    Raises:
      CheckpointError: their shapes differ.
    """
    # The leading axes number tensors, so they are no dimensions of one tensor.
    tensor_shape = param_shape[len(entry.index) :]
    tensor_shape = tensor_shape[::-1] if entry.transposed else tensor_shape
    if tensor.shape != tensor_shape:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} has shape {_show(list(tensor.shape))}; config.json "
            f"asks for {list(tensor_shape)}. Are these weights of another config.json?"
        )


def _collect_tensors(shards: Collection[ReleaseShard]) -> dict[str, ReleaseTensor]:
    """Return the tensors of all shards by name. No two shards may hold one name."""
    tensors: dict[str, ReleaseTensor] = {}
    for tensor in (tensor for shard in shards for tensor in shard.tensors):
        if tensor.name in tensors:
            raise CheckpointError(
                f"{tensor.file.parent}: {_shorten(tensor.name)} is in "
                f"{tensors[tensor.name].file.name} and "
                f"in {tensor.file.name}; wanted it once. Download both again."
            )
        tensors[tensor.name] = tensor
    return tensors


def describe_names(names: Collection[str], label: str) -> str:
    """Return the number of names and the first of them, for an error message."""
    if not names:
        return f"none {label}"
    # Names of the release have up to 60 characters.
    return f"{len(names)} {label}, e.g. {_shorten(min(names), 64)}"


def _read_shards(directory: pathlib.Path) -> list[ReleaseShard]:
    """Read every shard's header and compare the shards with the index.

    A directory without an index holds a single file, `SINGLE_SHARD_FILE`.
    """
    index_file = directory / INDEX_FILE
    if not os.path.lexists(index_file):
        if not os.path.lexists(directory / SINGLE_SHARD_FILE):
            raise CheckpointError(
                f"{directory}: got neither {INDEX_FILE} nor {SINGLE_SHARD_FILE}; wanted one of "
                "them. Is the download complete?"
            )
        return [read_shard(directory / SINGLE_SHARD_FILE)]
    index = parse_index(
        json_file.read_bytes(index_file, CheckpointError, _DOWNLOAD_AGAIN), str(index_file)
    )
    files = sorted(set(index.files.values()))
    missing_files = [name for name in files if not (directory / name).is_file()]
    if missing_files:
        raise CheckpointError(
            f"{directory}: {describe_names(missing_files, 'shards missing')} of {len(files)} in "
            f"{INDEX_FILE}. Download them again."
        )
    shards = [read_shard(directory / name) for name in files]
    check_index(index, shards)
    return shards


# ---- the index


class ReleaseIndex(NamedTuple):
    """The index of a release, not yet compared with its shards."""

    source: str  # what errors call it, most often its path
    files: dict[str, str]  # tensor -> name of its shard
    total_bytes: Any  # what it says, which may be any JSON value. None: nothing


def parse_index(text: str | bytes, source: str) -> ReleaseIndex:
    """Return what an index says.

    Raises:
      CheckpointError: no JSON, no map of names, or a name that is no file of this directory.
    """
    try:
        content = strict_json.parse_json(text, source)
        files = dict(content["weight_map"].items())
        # Optional: some tools write an index without it.
        metadata = content.get("metadata")
        total_bytes = metadata.get("total_size") if isinstance(metadata, dict) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", repr(error))
        raise CheckpointError(
            f"{source} is damaged ({_shorten(reason, 120)}); wanted JSON with a weight_map. "
            f"{_DOWNLOAD_AGAIN}"
        ) from None
    for file in files.values():
        check_shard_name(file, source)
    return ReleaseIndex(source, files, total_bytes)


def check_shard_name(name: Any, source: str) -> None:
    """Refuse a shard's name that is not the plain name of a safetensors file.

    Any other could be read or written outside of the directory, or over its other files.

    Raises:
      CheckpointError: such a name.
    """
    if not (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and len(name) <= _MAX_NAME_CHARACTERS
        and not set(name) & {"/", "\\"}
    ):
        raise CheckpointError(
            f"{source} names the shard {_show(name)}; wanted the name of a .safetensors file, "
            f"without a directory. {_DOWNLOAD_AGAIN}"
        )


def check_index(index: ReleaseIndex, shards: Collection[ReleaseShard]) -> None:
    """Compare an index with the shards that it names.

    Raises:
      CheckpointError: a tensor that is in one of them alone, or is in another shard, or a wrong
        total_size.
    """
    actual_files = {name: tensor.file.name for name, tensor in _collect_tensors(shards).items()}
    for name in sorted(index.files.keys() | actual_files.keys()):
        if index.files.get(name) != actual_files.get(name):
            raise CheckpointError(
                f"{index.source} disagrees with the files on {_shorten(name)}: the index says "
                f"{index.files.get(name, 'nowhere')}, it is in "
                f"{actual_files.get(name, 'no shard')}. Are both of one download?"
            )
    shard_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    if index.total_bytes is not None and index.total_bytes != shard_bytes:
        raise CheckpointError(
            f"{index.source}: total_size is {_show(index.total_bytes)}, but the shards that it "
            f"names hold {shard_bytes} bytes and all of its tensors. Set total_size to "
            f"{shard_bytes}, or download the index again."
        )


# ---- shards


def read_shard(file: pathlib.Path) -> ReleaseShard:
    """Read one safetensors header, and check it against itself and the file's size.

    Raises:
      CheckpointError: a header that is damaged, or a file that is longer or shorter than it says.
    """
    json_file.check_regular_file(file, CheckpointError, _DOWNLOAD_AGAIN)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # Checked before the header is read, because a damaged length may say gigabytes.
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} is truncated: {size} bytes do not hold its header of {length}. "
                f"{_DOWNLOAD_AGAIN}"
            )
        raw = stream.read(length)
    tensors = parse_header(raw, file, 8 + length)
    end = 8 + length + sum(tensor.nbytes for tensor in tensors)
    if end != size:
        problem = "truncated" if size < end else "longer than its header says"
        raise CheckpointError(
            f"{file} is {problem}: got {size} bytes, wanted {end}. {_DOWNLOAD_AGAIN}"
        )
    return ReleaseShard(file, raw.decode(), tensors)


def parse_header(
    header: str | bytes, file: pathlib.Path, data_offset: int
) -> tuple[ReleaseTensor, ...]:
    """Return the tensors of a shard's header, in the order of their bytes.

    Args:
      header: the JSON of the header.
      file: the shard.
      data_offset: bytes before the first tensor.

    Raises:
      CheckpointError: a header that is damaged.
    """
    try:
        content = strict_json.parse_json(header, str(file))
        metadata = content.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError(f"__metadata__ is {_show(metadata)}; wanted a map of strings")
        tensors = [_parse_tensor(file, name, spec, data_offset) for name, spec in content.items()]
    except CheckpointError:
        raise  # it is a ValueError, but has its message already
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "reason", repr(error))
        raise CheckpointError(
            f"{file} has a damaged safetensors header: {_shorten(reason, 140)}. {_DOWNLOAD_AGAIN}"
        ) from None
    # The header may list tensors in any order. Each must begin where the one before it ends, so
    # there are no gaps and no overlaps.
    tensors.sort(key=lambda tensor: tensor.byte_offset)
    end = data_offset
    for tensor in tensors:
        if tensor.byte_offset != end:
            raise CheckpointError(
                f"{file} has a damaged safetensors header: {_shorten(tensor.name)} starts at byte "
                f"{tensor.byte_offset}; wanted {end}, where the tensor before it ends. "
                f"{_DOWNLOAD_AGAIN}"
            )
        end += tensor.nbytes
    return tuple(tensors)


def _parse_tensor(
    file: pathlib.Path, name: str, spec: Mapping[str, Any], data_offset: int
) -> ReleaseTensor:
    """Return one tensor of a header, whose `data_offsets` count from the header's end."""
    shown_name, code = _shorten(name), spec["dtype"]
    if code not in DTYPES_BY_CODE:
        wanted = ", ".join(DTYPES_BY_CODE)
        raise CheckpointError(
            f"{file}: {shown_name} has dtype {_shorten(str(code), 40)}; wanted one of {wanted}"
        )
    dtype, shape = DTYPES_BY_CODE[code], tuple(spec["shape"])
    start, end = spec["data_offsets"]
    # type() and not isinstance(): True is an int, and 2.0 equals one.
    if any(type(count) is not int or count < 0 for count in (*shape, start, end)):
        raise ValueError(
            f"{shown_name} has shape {_show(list(shape), 40)} and range {[start, end]}; wanted "
            "integers from 0"
        )
    nbytes = math.prod(shape) * dtype.itemsize  # in Python's integers, which do not wrap
    if end - start != nbytes:
        raise CheckpointError(
            f"{file} has a damaged safetensors header: {shown_name} of shape "
            f"{_show(list(shape), 40)} and dtype {code} takes {_show(nbytes, 30)} bytes, "
            f"but its range has {end - start}. {_DOWNLOAD_AGAIN}"
        )
    return ReleaseTensor(name, file, dtype, shape, data_offset + start, nbytes)
