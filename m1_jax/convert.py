"""Command: convert a release directory to an Orbax directory, and back to the same bytes.

    python -m m1_jax.convert --to=orbax --src=RELEASE_DIR --dst=DIR
    python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR

Tensors are streamed: to Orbax about --memory_gib of them are in memory at once, and back to a
release one tensor. The result is written to DST.partial, which is renamed when it is complete.
After an interruption, the same command continues where it stopped.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import tensorstore as ts
import tqdm
from absl import app, flags, logging

from m1_jax import command_help, durable
from m1_jax import config as config_lib
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import params_map, release

# Where the source does not say how it was cut. A larger tensor is a shard of its own.
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and where to.

    Attributes:
      to: "orbax" or "hf", the form of the result.
      src: the directory to read.
      dst: the directory to make, which must not exist.
      memory_gib: bound on the tensor bytes in memory at once, in GiB, more than 0. Only to="orbax"
        uses it.
      progress: whether to show a progress bar.
    """

    to: str
    src: str
    dst: str
    memory_gib: float = 2.0
    progress: bool = True

    def __post_init__(self):
        if self.to not in ("orbax", "hf"):
            raise ValueError(f"--to is {self.to!r}; wanted orbax or hf")
        if not self.src or not self.dst:
            raise ValueError("got an empty path; wanted both --src and --dst")
        if self.memory_gib <= 0:
            raise ValueError(f"--memory_gib is {self.memory_gib}; wanted more than 0")


def run(config: ConvertConfig) -> pathlib.Path:
    """Convert, and return the finished directory.

    Raises:
      CheckpointError, ConfigError: a source that is not a complete checkpoint.
      FileExistsError: the destination exists, or an interrupted conversion of another source.
    """
    src, dst = pathlib.Path(config.src), pathlib.Path(config.dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists; wanted a new directory. Remove it or choose another.")
    if not src.is_dir():
        raise release.CheckpointError(f"{src} is not a directory; wanted the checkpoint to convert")
    if format_lib.is_converted(src) != (config.to == "hf"):
        state = "not converted yet" if config.to == "hf" else "converted already"
        source = "a converted directory" if config.to == "hf" else "a release directory"
        raise release.CheckpointError(f"{src} is {state}; wanted {source} for --to={config.to}")
    partial = dst.with_name(dst.name + ".partial")
    if config.to == "orbax":
        _convert_to_orbax(release.Release(src), partial, config)
    else:
        _convert_to_hf(src, partial, config)
    # The journal is removed last. An interruption before that leaves a complete result.
    partial.rename(dst)
    (dst / format_lib.JOURNAL_FILE).unlink()
    return dst


# ---- release to Orbax


def _convert_to_orbax(
    source: release.Release, partial: pathlib.Path, config: ConvertConfig
) -> None:
    """Write every tensor of the release to its place in the stacked parameters."""
    stored_params = _stored_params_from_release(source)
    finished_names = _start_or_resume(
        partial, source.config, [shard.file for shard in source.shards]
    )
    params_dir = partial / format_lib.PARAMS_DIR
    # `allocate_params` is atomic, so an existing directory has all arrays.
    if not params_dir.exists():
        format_lib.allocate_params(params_dir, stored_params)
    arrays = {name: format_lib.open_array(params_dir, name) for name in stored_params}
    entries = {entry.name: entry for entry in source.entries}
    # In the order of the shards' bytes: each file is read once, from front to back.
    tensors = [t for shard in source.shards for t in shard.tensors if t.name in entries]
    max_pending_bytes, pending_bytes = int(config.memory_gib * 2**30), 0
    writes: deque[tuple[release.ReleaseTensor, ts.WriteFutures]] = deque()  # pending, oldest first
    with _ConvertProgress(partial, tensors, finished_names, config.progress) as progress:
        for tensor in (*(t for t in tensors if t.name not in finished_names), None):
            # The None at the end waits for every pending write. A tensor larger than the bound
            # waits until nothing is pending and is then written alone.
            while writes and (tensor is None or pending_bytes + tensor.nbytes > max_pending_bytes):
                oldest_tensor, future = writes.popleft()
                future.result()
                # Only now: a tensor in the journal is never written again.
                progress.finish(oldest_tensor.name, oldest_tensor.nbytes)
                pending_bytes -= oldest_tensor.nbytes
            if tensor is not None:
                entry = entries[tensor.name]
                target = arrays[entry.param_path][entry.index]  # a view of the array on disk
                writes.append((tensor, target.write(entry.orient(tensor.read()))))
                pending_bytes += tensor.nbytes
    format_lib.copy_small_files(source.directory, partial)
    format_lib.write_manifest(partial, format_lib.build_manifest(source))


def _stored_params_from_release(source: release.Release) -> dict[str, format_lib.StoredParam]:
    """Return how every parameter is stored, after checking its tensors' shapes and dtypes."""
    params = params_lib.params_by_path(params_lib.abstract_model(source.config))
    stored_params: dict[str, format_lib.StoredParam] = {}
    first_tensors: dict[str, release.ReleaseTensor] = {}
    for entry in source.entries:
        tensor, shape = source.tensors[entry.name], params[entry.param_path].shape
        release.check_tensor_shape(tensor, entry, shape)
        first_tensor = first_tensors.setdefault(entry.param_path, tensor)
        if first_tensor.dtype != tensor.dtype:
            raise release.CheckpointError(
                f"{tensor.name} is {release.CODES_BY_DTYPE[tensor.dtype]} but {first_tensor.name} "
                f"is {release.CODES_BY_DTYPE[first_tensor.dtype]}; they are parts of one parameter "
                "and must agree"
            )
        stored_params[entry.param_path] = format_lib.StoredParam(
            shape, tensor.dtype, len(entry.index)
        )
    if unmapped := params.keys() - stored_params.keys():
        raise AssertionError(f"params_map.py has no row for {sorted(unmapped)}")
    return stored_params


# ---- Orbax to release


def _convert_to_hf(src: pathlib.Path, partial: pathlib.Path, config: ConvertConfig) -> None:
    """Write the shards of a release one after another, as they were cut if that is still known."""
    manifest = format_lib.read_manifest(src)
    model_config = config_lib.ModelConfig.from_file(src / "config.json")
    arrays = format_lib.open_params(src, model_config)
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model_config)}
    tensors = _describe_tensors(src, entries, arrays)
    shards = _original_shard_headers(manifest, tensors) or _new_shard_headers(tensors)
    finished_files = _start_or_resume(partial, model_config, [src / format_lib.MANIFEST_FILE])
    names_by_file = {file: _sort_names_by_offset(header) for file, header in shards.items()}
    tensors_in_order = [tensors[name] for names in names_by_file.values() for name in names]
    # The journal of this direction names files, but the bar counts tensors.
    finished_tensors = {
        name for file, names in names_by_file.items() if file in finished_files for name in names
    }
    with _ConvertProgress(partial, tensors_in_order, finished_tensors, config.progress) as progress:
        for file, header in shards.items():
            if file in finished_files:
                continue
            # An interrupted file is written anew: "wb" empties what is left of it.
            growing_file = partial / (file + ".tmp")
            with growing_file.open("wb") as stream:
                raw = header.encode()
                stream.write(len(raw).to_bytes(8, "little") + raw)
                for name in names_by_file[file]:
                    data = _read_tensor(entries[name], arrays, src / format_lib.PARAMS_DIR)
                    stream.write(data)
                    progress.advance(data.nbytes)
                # Before the journal names the file: it must not say more than the disk holds.
                durable.flush_to_disk(stream)
            growing_file.rename(partial / file)
            progress.finish(file, 0)  # its bytes are on the bar already
    index = _build_index(manifest, shards, names_by_file, tensors)
    if index is not None:
        (partial / release.INDEX_FILE).write_text(index)
    format_lib.copy_small_files(src, partial)
    release.Release(partial)  # the checks that every reader makes


def _read_tensor(
    entry: params_map.TensorEntry, arrays: Mapping[str, ts.TensorStore], params_dir: pathlib.Path
) -> memoryview:
    """Return a tensor's bytes in the release's layout."""
    reading = arrays[entry.param_path][entry.index].read()
    data = format_lib.wait_for_read(reading, params_dir / entry.param_path)
    # A transpose is a view, but the file has the elements in C order.
    data = np.ascontiguousarray(entry.orient(data))
    # Viewed as bytes, because there is no memoryview of bfloat16.
    return data.reshape(-1).view(np.uint8).data


def _describe_tensors(
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


def _original_shard_headers(
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


def _new_shard_headers(tensors: Mapping[str, release.ReleaseTensor]) -> dict[str, str]:
    """Cut the tensors into shards of up to `MAX_SHARD_BYTES`, and return a header for each file."""
    groups: list[list[release.ReleaseTensor]] = [[]]
    for tensor in tensors.values():
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > MAX_SHARD_BYTES:
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


def _sort_names_by_offset(header: str) -> list[str]:
    """Return the tensors of a header in the order of their bytes."""
    specs = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
    return sorted(specs, key=lambda name: specs[name]["data_offsets"])


def _build_index(
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


# ---- both ways


class _ConvertProgress:
    """A bar over bytes, and the journal of finished tensors (to Orbax) or files (to a release)."""

    def __init__(
        self,
        partial: pathlib.Path,
        tensors: Iterable[release.ReleaseTensor],
        finished_names: set[str],
        show_bar: bool,
    ):
        tensors = list(tensors)
        total = sum(tensor.nbytes for tensor in tensors)
        initial = sum(tensor.nbytes for tensor in tensors if tensor.name in finished_names)
        self._bar = tqdm.tqdm(
            total=total, initial=initial, unit="B", unit_scale=True, disable=not show_bar
        )
        self._journal = (partial / format_lib.JOURNAL_FILE).open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._journal.close()

    def advance(self, nbytes: int) -> None:
        self._bar.update(nbytes)

    def finish(self, name: str, nbytes: int) -> None:
        """Note a name as finished, so that a resumed conversion skips it."""
        self._journal.write(name + "\n")
        self._journal.flush()
        self.advance(nbytes)


def _start_or_resume(
    partial: pathlib.Path, model_config: config_lib.ModelConfig, source_files: list[pathlib.Path]
) -> set[str]:
    """Start or continue `partial`, and return the names that its journal has as finished.

    Args:
      partial: the directory that becomes the result.
      model_config: the source's, which is part of its fingerprint.
      source_files: files whose names, sizes and times tell sources apart. The times are needed for
        two models of one shape.

    Raises:
      FileExistsError: `partial` was made by another command, or from another source.
    """
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source_files]
    source = repr((model_config, stats))
    fingerprint = "source " + hashlib.sha256(source.encode()).hexdigest()
    journal = partial / format_lib.JOURNAL_FILE
    if not journal.exists():
        if partial.exists() and any(partial.iterdir()):
            raise FileExistsError(
                f"{partial} exists and was not made by this command. Remove it or choose another "
                "--dst."
            )
        partial.mkdir(parents=True, exist_ok=True)
        journal.write_text(fingerprint + "\n")
        return set()
    # A last line without a newline was cut off while it was written.
    complete = "".join(journal.read_text().rpartition("\n")[:2])
    lines = complete.splitlines()
    if lines[:1] != [fingerprint]:
        raise FileExistsError(
            f"{partial} is an interrupted conversion of another source. Remove it to start anew, "
            "or choose another --dst."
        )
    # Otherwise the next line would continue the one that was cut off.
    os.truncate(journal, len(complete.encode()))
    return set(lines[1:])


# ---- command line


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax logs each of its steps
    try:
        config = ConvertConfig(
            **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(ConvertConfig)}
        )
        print(f"wrote {run(config)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _define_flags() -> None:
    flags.DEFINE_enum("to", None, ["orbax", "hf"], "What to make.", required=True)
    flags.DEFINE_string("src", None, "Directory to read.", required=True)
    flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
    flags.DEFINE_float("memory_gib", 2.0, "Most tensor bytes in memory at once, GiB.")
    flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    command_help.prepare_help(__doc__, __name__)
    app.run(main)


if __name__ == "__main__":
    cli()
