"""Command: convert a release directory to an Orbax directory, and back to the same bytes.

    python -m m1_jax.convert --to=orbax --src=RELEASE_DIR --dst=DIR
    python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR

Tensors are streamed: to Orbax about --memory_gib of them are in memory at once, and back to a
release one tensor. The result is written to DST.partial, which is renamed when it is complete.
After an interruption, the same command continues where it stopped.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorstore as ts
from absl import flags, logging

from m1_jax import command_help, durable, file_lock, local_path, progress_bar
from m1_jax import config as config_lib
from m1_jax import params as params_lib
from m1_jax.checkpoints import array_futures, checkpoint_dir, params_map, release, shard_plan
from m1_jax.checkpoints import format as format_lib

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
      PathError: a bucket, or another path that is not of this machine.
      LockError: another process converts to the destination.
    """
    dst = local_path.resolve_path(config.dst, "--dst")
    _check_absent(dst)
    src = checkpoint_dir.require_checkpoint(config.src, "--src")
    if format_lib.is_converted(src) != (config.to == "hf"):
        state = "not converted yet" if config.to == "hf" else "converted already"
        source = "a converted directory" if config.to == "hf" else "a release directory"
        raise release.CheckpointError(f"{src} is {state}; wanted {source} for --to={config.to}")
    prepare = _prepare_to_orbax if config.to == "orbax" else _prepare_to_hf
    convert_to = prepare(src, config)  # reads and checks the source
    format_lib.check_small_files(src)
    partial = dst.with_name(dst.name + ".partial")
    dst.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same files would leave holes in them.
    with file_lock.hold_lock(dst, "converts to"):
        _check_absent(dst)  # the owner before may have made it
        convert_to(partial)
        # The journal is removed last. An interruption before that leaves a complete result.
        partial.rename(dst)
        (dst / format_lib.JOURNAL_FILE).unlink()
    return dst


def _check_absent(dst: pathlib.Path) -> None:
    if os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists; wanted a new directory. Remove it or choose another.")


# ---- release to Orbax


def _prepare_to_orbax(src: pathlib.Path, config: ConvertConfig) -> Callable[[pathlib.Path], None]:
    """Read a release's headers, and return what converts it to the directory `partial`."""
    source = release.Release(src)
    stored_params = _stored_params_from_release(source)
    return lambda partial: _convert_to_orbax(source, stored_params, partial, config)


def _convert_to_orbax(
    source: release.Release,
    stored_params: Mapping[str, format_lib.StoredParam],
    partial: pathlib.Path,
    config: ConvertConfig,
) -> None:
    """Write every tensor of the release to its place in the stacked parameters."""
    finished_names = _start_or_resume(
        partial, source.config, [shard.file for shard in source.shards]
    )
    params_dir = partial / format_lib.PARAMS_DIR
    # `allocate_params` is atomic, so an existing directory has all arrays.
    if not params_dir.exists():
        format_lib.allocate_params(params_dir, stored_params)
    remedy = f"Remove {partial.name} to start anew."
    arrays = {}
    for name, param in stored_params.items():
        arrays[name] = format_lib.open_array(params_dir, name, remedy)
        format_lib.check_array(arrays[name], param, params_dir / name, remedy)
    entries = {entry.name: entry for entry in source.entries}
    finished_entries = [entry for entry in source.entries if entry.name in finished_names]
    if lost_names := _find_incomplete(params_dir, arrays, finished_entries):
        logging.warning("%s", f"made again: {release.describe_names(lost_names, 'lost tensors')}")
        finished_names -= lost_names
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
                param_path = entries[oldest_tensor.name].param_path
                array_futures.wait_for_write(future, params_dir / param_path, remedy)
                # Only now: a tensor in the journal is never written again.
                progress.finish(oldest_tensor.name, oldest_tensor.nbytes)
                pending_bytes -= oldest_tensor.nbytes
            if tensor is not None:
                entry = entries[tensor.name]
                target = arrays[entry.param_path][entry.index]  # a view of the array on disk
                writes.append((tensor, target.write(entry.orient(tensor.read()))))
                pending_bytes += tensor.nbytes
    if lost_names := _find_incomplete(params_dir, arrays, source.entries):
        raise OSError(
            f"{params_dir}: {release.describe_names(lost_names, 'tensors lost on the disk')}. "
            "Start the same command again, which makes them again."
        )
    format_lib.copy_small_files(source.directory, partial)
    format_lib.write_manifest(partial, format_lib.build_manifest(source))


def _find_incomplete(
    params_dir: pathlib.Path,
    arrays: Mapping[str, ts.TensorStore],
    entries: Iterable[params_map.TensorEntry],
) -> set[str]:
    """Return the names of the tensors that lack a chunk on disk, or have one of a wrong size."""
    return {
        entry.name
        for entry in entries
        if format_lib.find_bad_chunk(
            params_dir, entry.param_path, arrays[entry.param_path], entry.index
        )
    }


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


def _prepare_to_hf(src: pathlib.Path, config: ConvertConfig) -> Callable[[pathlib.Path], None]:
    """Open a converted directory, and return what converts it to the directory `partial`."""
    manifest = format_lib.read_manifest(src)
    model_config = config_lib.ModelConfig.from_file(src / "config.json")
    arrays = format_lib.open_params(src, model_config)
    return lambda partial: _convert_to_hf(src, manifest, model_config, arrays, partial, config)


def _convert_to_hf(
    src: pathlib.Path,
    manifest: Mapping,
    model_config: config_lib.ModelConfig,
    arrays: Mapping[str, ts.TensorStore],
    partial: pathlib.Path,
    config: ConvertConfig,
) -> None:
    """Write the shards of a release one after another, as they were cut if that is still known."""
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model_config)}
    tensors = shard_plan.describe_tensors(src, entries, arrays)
    shards = shard_plan.original_headers(manifest, tensors)
    shards = shards or shard_plan.new_headers(tensors, MAX_SHARD_BYTES)
    finished_files = _start_or_resume(partial, model_config, [src / format_lib.MANIFEST_FILE])
    names_by_file = {
        file: shard_plan.sort_names_by_offset(header) for file, header in shards.items()
    }
    finished_files = {
        file
        for file in finished_files & shards.keys()
        if shard_plan.is_whole(
            partial / file, shards[file], [tensors[n] for n in names_by_file[file]]
        )
    }
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
    index = shard_plan.build_index(manifest, shards, names_by_file, tensors)
    if index is not None:
        (partial / release.INDEX_FILE).write_bytes(index.encode())
    format_lib.copy_small_files(src, partial)
    release.Release(partial)  # the checks that every reader makes


def _read_tensor(
    entry: params_map.TensorEntry, arrays: Mapping[str, ts.TensorStore], params_dir: pathlib.Path
) -> memoryview:
    """Return a tensor's bytes in the release's layout."""
    reading = arrays[entry.param_path][entry.index].read()
    data = array_futures.wait_for_read(
        reading, params_dir / entry.param_path, format_lib.CONVERT_AGAIN
    )
    # A transpose is a view, but the file has the elements in C order.
    data = np.ascontiguousarray(entry.orient(data))
    # Viewed as bytes, because there is no memoryview of bfloat16.
    return data.reshape(-1).view(np.uint8).data


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
        self._bar = progress_bar.open_bar(
            "convert", total, "B", initial=initial, shown=show_bar, scaled=True
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
    if not os.path.lexists(journal):
        is_empty = partial.is_dir() and not any(partial.iterdir())
        if os.path.lexists(partial) and not is_empty:
            raise FileExistsError(
                f"{partial} exists and was not made by this command. Remove it or choose another "
                "--dst."
            )
        partial.mkdir(parents=True, exist_ok=True)
        journal.write_text(fingerprint + "\n")
        return set()
    start_anew = f"Remove {partial} to start anew, or choose another --dst."
    if not journal.is_file():
        raise FileExistsError(f"{journal} is not a file. {start_anew}")
    # A last line without a newline was cut off while it was written.
    complete = b"".join(journal.read_bytes().rpartition(b"\n")[:2])
    try:
        lines = complete.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise FileExistsError(
            f"{journal} is damaged: byte {error.start} is no UTF-8. {start_anew}"
        ) from None
    if lines[:1] != [fingerprint]:
        raise FileExistsError(
            f"{partial} is an interrupted conversion of another source. Remove it to start anew, "
            "or choose another --dst."
        )
    # Otherwise the next line would continue the one that was cut off.
    os.truncate(journal, len(complete))
    return set(lines[1:])


# ---- command line


def main(_) -> None:
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
    with command_help.flag_group("What to convert"):
        flags.DEFINE_enum("to", None, ["orbax", "hf"], "Form of the result.", required=True)
        flags.DEFINE_string("src", None, "Directory to read.", required=True)
        flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
    with command_help.flag_group("How"):
        flags.DEFINE_float("memory_gib", 2.0, "Most tensor bytes in memory at once, GiB.")
        flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
