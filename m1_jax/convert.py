"""Command: a release directory to an Orbax directory, and back, byte for byte.

    python -m m1_jax.convert --to=orbax --src=RELEASE_DIR --dst=DIR
    python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR

Tensors are streamed one by one, so memory stays at about --memory_gib whatever the model's size.
The result grows in DST.partial and is renamed when it is complete; the same command run again
after an interruption goes on where it stopped.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections import deque

import numpy as np
import tensorstore as ts
import tqdm
from absl import app, flags, logging

from m1_jax import config as config_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import params_map, release
from m1_jax.checkpoints import save as save_lib

MAX_SHARD_BYTES = 5 * 10**9  # of one shard, where the source does not say how it was cut


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """to: "orbax" or "hf". src, dst: directories; dst must not exist. progress: show a bar."""

    to: str
    src: str
    dst: str
    memory_gib: float = 2.0
    progress: bool = True

    def __post_init__(self):
        if self.to not in ("orbax", "hf"):
            raise ValueError(f"--to is {self.to!r}; wanted orbax or hf")
        if not self.src or not self.dst:
            raise ValueError("wanted both --src and --dst")
        if self.memory_gib <= 0:
            raise ValueError(f"--memory_gib is {self.memory_gib}; wanted more than 0")


def run(config: ConvertConfig) -> pathlib.Path:
    """Convert, and return the finished directory.

    Raises:
      CheckpointError, ConfigError: a source that is not a complete checkpoint.
      FileExistsError: the destination exists.
    """
    src, dst = pathlib.Path(config.src), pathlib.Path(config.dst)
    if dst.exists():
        raise FileExistsError(f"{dst} exists; wanted a new directory. Remove it or choose another.")
    if not src.is_dir():
        raise release.CheckpointError(f"{src} is not a directory; wanted the checkpoint to convert")
    if load_lib.is_converted(src) != (config.to == "hf"):
        what = "not converted yet" if config.to == "hf" else "converted already"
        raise release.CheckpointError(f"{src} is {what}; --to={config.to} does not apply to it")
    partial = dst.with_name(dst.name + ".partial")
    if config.to == "orbax":
        _convert_to_orbax(release.Release(src), partial, config)
    else:
        _convert_to_hf(src, partial, config)
    partial.rename(dst)
    (dst / save_lib.JOURNAL_FILE).unlink()
    return dst


# ---- release to Orbax


def _convert_to_orbax(
    source: release.Release, partial: pathlib.Path, config: ConvertConfig
) -> None:
    leaves = _stored_params_from_release(source)
    done = _start_or_resume(partial, source.config, [shard.file for shard in source.shards])
    params = partial / load_lib.PARAMS_DIR
    if not params.exists():
        save_lib.allocate_params(params, leaves)
    arrays = {
        path: ts.open(load_lib.tensorstore_spec(params, path), open=True).result()
        for path in leaves
    }
    by_name = {entry.name: entry for entry in source.entries}
    # In the order of the shards' bytes, so that a disk reads each file once from front to back.
    tensors = [t for shard in source.shards for t in shard.tensors if t.name in by_name]
    budget, held = int(config.memory_gib * 2**30), 0
    pending: deque[tuple[release.ReleaseTensor, ts.WriteFutures]] = deque()
    with _ConvertProgress(partial, tensors, done, config.progress) as progress:
        for tensor in (*(t for t in tensors if t.name not in done), None):
            # None ends the list: everything still under way is waited for.
            while pending and (tensor is None or held + tensor.nbytes > budget):
                oldest, future = pending.popleft()
                future.result()
                progress.finish(oldest.name, oldest.nbytes)
                held -= oldest.nbytes
            if tensor is not None:
                entry, data = by_name[tensor.name], tensor.read()
                target = arrays[entry.param_path][entry.index]
                pending.append((tensor, target.write(data.T if entry.transposed else data)))
                held += tensor.nbytes
    save_lib.copy_small_files(source.directory, partial)
    (partial / load_lib.MANIFEST_FILE).write_text(json.dumps(save_lib.build_manifest(source)))


def _stored_params_from_release(source: release.Release) -> dict[str, save_lib.StoredParam]:
    """Return every parameter, after checking each of its tensors against it."""
    params = load_lib.params_by_path(load_lib.abstract_model(source.config))
    leaves: dict[str, save_lib.StoredParam] = {}
    first: dict[str, release.ReleaseTensor] = {}
    for entry in source.entries:
        tensor, shape = source.tensors[entry.name], params[entry.param_path].shape
        load_lib.check_tensor_shape(tensor, entry, shape)
        before = first.setdefault(entry.param_path, tensor)
        if before.dtype != tensor.dtype:
            raise release.CheckpointError(
                f"{tensor.name} is {release.CODES_BY_DTYPE[tensor.dtype]} but {before.name} is "
                f"{release.CODES_BY_DTYPE[before.dtype]}; they are parts of one parameter and must agree"
            )
        leaves[entry.param_path] = save_lib.StoredParam(shape, tensor.dtype, len(entry.index))
    if left := params.keys() - leaves.keys():
        raise AssertionError(f"params_map.py has no row for {sorted(left)}")
    return leaves


# ---- Orbax to release


def _convert_to_hf(src: pathlib.Path, partial: pathlib.Path, config: ConvertConfig) -> None:
    manifest = load_lib.read_manifest(src)
    model_config = config_lib.ModelConfig.from_file(src / "config.json")
    arrays = load_lib.open_params(src, model_config)
    tensors = _describe_tensors(src, model_config, arrays)
    shards = _original_shard_headers(manifest, tensors) or _new_shard_headers(tensors)
    done = _start_or_resume(partial, model_config, [src / load_lib.MANIFEST_FILE])
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model_config)}
    order = {file: _sort_names_by_offset(header) for file, header in shards.items()}
    listed = [tensors[name] for names in order.values() for name in names]
    finished = {name for file in order if file in done for name in order[file]}
    with _ConvertProgress(partial, listed, finished, config.progress) as progress:
        for file, header in shards.items():
            if file in done:
                continue
            growing = partial / (file + ".tmp")
            with growing.open("wb") as stream:
                raw = header.encode()
                stream.write(len(raw).to_bytes(8, "little") + raw)
                for name in order[file]:
                    entry = entries[name]
                    reading = arrays[entry.param_path][entry.index].read()
                    data = load_lib.wait_for_read(
                        reading, src / load_lib.PARAMS_DIR / entry.param_path
                    )
                    data = np.ascontiguousarray(data.T if entry.transposed else data)
                    stream.write(data.reshape(-1).view(np.uint8).data)
                    progress.advance(data.nbytes)
                stream.flush()
                os.fsync(stream.fileno())  # the journal must not say more than the disk holds
            growing.rename(partial / file)
            progress.finish(file, 0)
    if _has_original_shards(manifest, shards):
        index = manifest["index"]
    else:
        total = sum(tensor.nbytes for tensor in tensors.values())
        where = {name: file for file, names in order.items() for name in names}
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        index = json.dumps(content, indent=2) + "\n"
    if index is not None:
        (partial / release.INDEX_FILE).write_text(index)
    save_lib.copy_small_files(src, partial)
    release.Release(partial)  # the checks that every reader makes


def _describe_tensors(src, model_config, arrays) -> dict[str, release.ReleaseTensor]:
    """Return what each tensor will look like in the release."""
    tensors = {}
    for entry in params_map.list_tensor_entries(model_config):
        array = arrays[entry.param_path]
        shape, dtype = array.shape[len(entry.index) :], array.dtype.numpy_dtype
        shape = shape[::-1] if entry.transposed else shape
        nbytes = int(np.prod(shape)) * dtype.itemsize
        tensors[entry.name] = release.ReleaseTensor(entry.name, src, dtype, shape, 0, nbytes)
    return tensors


def _has_original_shards(manifest: dict, shards: dict[str, str]) -> bool:
    return shards == manifest["shards"]


def _original_shard_headers(manifest, tensors) -> dict[str, str] | None:
    """Return the release's own headers by file, if they still describe these tensors."""
    found = {}
    for header in manifest["shards"].values():
        for name, spec in json.loads(header).items():
            if name != "__metadata__":
                found[name] = (spec["dtype"], tuple(spec["shape"]))
    ours = {t.name: (release.CODES_BY_DTYPE[t.dtype], t.shape) for t in tensors.values()}
    return manifest["shards"] if found == ours else None


def _new_shard_headers(tensors: dict[str, release.ReleaseTensor]) -> dict[str, str]:
    """Cut the tensors into shards of up to SHARD_BYTES; return a header per file."""
    groups: list[list[release.ReleaseTensor]] = [[]]
    for tensor in tensors.values():
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > MAX_SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    shards = {}
    for number, group in enumerate(groups, 1):
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
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file] = text + " " * (-len(text.encode()) % 8)
    return shards


def _sort_names_by_offset(header: str) -> list[str]:
    """Return the tensors of a header in the order of their bytes."""
    content = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
    return sorted(content, key=lambda name: content[name]["data_offsets"])


# ---- both ways


class _ConvertProgress:
    """A bar over bytes, and the journal of what is finished."""

    def __init__(self, partial: pathlib.Path, tensors, finished_names, show_bar: bool):
        total = sum(tensor.nbytes for tensor in tensors)
        initial = sum(tensor.nbytes for tensor in tensors if tensor.name in finished_names)
        self._bar = tqdm.tqdm(
            total=total, initial=initial, unit="B", unit_scale=True, disable=not show_bar
        )
        self._journal = (partial / save_lib.JOURNAL_FILE).open("a")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()
        self._journal.close()

    def advance(self, nbytes: int) -> None:
        self._bar.update(nbytes)

    def finish(self, name: str, nbytes: int) -> None:
        self._journal.write(name + "\n")
        self._journal.flush()
        self.advance(nbytes)


def _start_or_resume(
    partial: pathlib.Path, model_config, source_files: list[pathlib.Path]
) -> set[str]:
    """Start or continue `partial`; return what its journal says is finished.

    files: what the source is told by. Two models of one shape differ in when they were written.
    """
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source_files]
    source = repr((model_config, stats))
    fingerprint = "source " + hashlib.sha256(source.encode()).hexdigest()
    journal = partial / save_lib.JOURNAL_FILE
    if not journal.exists():
        if partial.exists() and any(partial.iterdir()):
            raise FileExistsError(
                f"{partial} exists and was not made by this command. Remove it or choose another "
                "--dst."
            )
        partial.mkdir(parents=True, exist_ok=True)
        journal.write_text(fingerprint + "\n")
        return set()
    # A line without its newline was cut off while it was written.
    text = journal.read_text()
    text = text[: text.rfind("\n") + 1]
    lines = text.splitlines()
    if lines[:1] != [fingerprint]:
        raise FileExistsError(
            f"{partial} is an interrupted conversion of another source. Remove it to start anew, "
            "or choose another --dst."
        )
    os.truncate(journal, len(text.encode()))
    return set(lines[1:])


# ---- command line


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax tells every step, and warns of none of ours
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
    flags.DEFINE_float("memory_gib", 2.0, "Most tensor bytes under way at once, GiB.")
    flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    cli()
