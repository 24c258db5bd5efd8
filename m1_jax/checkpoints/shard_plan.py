"""The shards that a converted directory becomes: their headers, and the index over them."""

import json
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
import tensorstore as ts

from m1_jax.checkpoints import params_map, release


def describe_tensors(
    src: pathlib.Path,
    entries: Mapping[str, params_map.TensorEntry],
    arrays: Mapping[str, ts.TensorStore],
) -> dict[str, release.ReleaseTensor]:
    """Return what each tensor will look like in the release. Its file and offset are not set."""
    tensors = {}
    for name, entry in entries.items():
        array = arrays[entry.param_path]
        shape, dtype = array.shape[len(entry.index) :], array.dtype.numpy_dtype
        shape = shape[::-1] if entry.transposed else shape
        nbytes = int(np.prod(shape)) * dtype.itemsize
        tensors[name] = release.ReleaseTensor(name, src, dtype, shape, 0, nbytes)
    return tensors


def original_headers(
    manifest: Mapping, tensors: Mapping[str, release.ReleaseTensor]
) -> dict[str, str] | None:
    """Return the release's own headers by file, or None if they do not describe these tensors."""
    # They do not if the model never had shards, or if it was saved in another dtype.
    original_specs = {}
    for header in manifest["shards"].values():
        for name, spec in json.loads(header).items():
            if name != "__metadata__":
                original_specs[name] = (spec["dtype"], tuple(spec["shape"]))
    current_specs = {t.name: (release.CODES_BY_DTYPE[t.dtype], t.shape) for t in tensors.values()}
    return manifest["shards"] if original_specs == current_specs else None


def new_headers(
    tensors: Mapping[str, release.ReleaseTensor], max_shard_bytes: int
) -> dict[str, str]:
    """Cut the tensors into shards, and return a header for each file.

    A tensor of more than `max_shard_bytes` is a shard of its own.
    """
    groups: list[list[release.ReleaseTensor]] = [[]]
    for tensor in tensors.values():
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > max_shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    shards = {}
    for shard_number, group in enumerate(groups, 1):
        # transformers 4 refuses a file without this metadata.
        header: dict = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in group:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {
                "dtype": release.CODES_BY_DTYPE[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"))
        file = f"model-{shard_number:05d}-of-{len(groups):05d}.safetensors"
        # Spaces align the data after the header to 8 bytes.
        shards[file] = text + " " * (-len(text.encode()) % 8)
    return shards


def sort_names_by_offset(header: str) -> list[str]:
    """Return the tensors of a header in the order of their bytes."""
    specs = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
    return sorted(specs, key=lambda name: specs[name]["data_offsets"])


def build_index(
    manifest: Mapping,
    shards: Mapping[str, str],
    names_by_file: Mapping[str, list[str]],
    tensors: Mapping[str, release.ReleaseTensor],
) -> str | None:
    """Return the text of the index, which is the release's own if its shards are.

    None: the release had no index, because it was a single file.
    """
    if shards == manifest["shards"]:
        return manifest["index"]
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {name: file for file, names in names_by_file.items() for name in names}
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def is_whole(file: pathlib.Path, header: str, tensors: Iterable[release.ReleaseTensor]) -> bool:
    """Return whether a finished shard is still there, of its right size."""
    size = 8 + len(header.encode()) + sum(tensor.nbytes for tensor in tensors)
    return file.is_file() and file.stat().st_size == size
