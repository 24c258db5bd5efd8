"""What the lines of an output depend on, and nothing else: the fingerprint of a run.

A run that goes on must have the same input, options, recipe and checkpoint. What no line depends
on may change: where the files lie, the sizes of the engine, other files of the checkpoint's
directory.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from infer import batch_input
from infer import config as config_lib
from infer import options as options_lib
from m1_jax import command_mesh, sharding
from m1_jax import config as model_config_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release
from m1_jax.serving import implementations

# The files that a config and a tokenizer are read from.
_SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_MAX_SAMPLES = 64  # of a group of files of weights
_SAMPLE_BYTES = 2**16


def fingerprint_run(
    config: batch_input.BatchConfig,
    layout: sharding.MeshLayout | None,
    folder: pathlib.Path,
    requests: Sequence[batch_input.BatchRequest],
) -> dict[str, Any]:
    """Return the run's fingerprint, as JSON holds it.

    Args:
      config: the flags.
      layout: where the model lies. None: on one device.
      folder: the checkpoint.
      requests: all requests of the input.

    Raises:
      ValueError, OSError: a checkpoint that cannot be read.
    """
    # The tiles decide the order of sums, so the last bits, as do JAX's version and the hardware.
    sizes = config_lib.EngineConfig().for_platform(jax.default_backend())
    dtype = command_mesh.resolve_dtype(config.dtype)
    model_config = dataclasses.replace(
        model_config_lib.ModelConfig.from_file(folder / "config.json"),
        lightning_implementation=config.lightning,
    )
    lines = "\n".join(request.line for request in requests)
    fingerprint = {
        "input": hashlib.sha256(lines.encode()).hexdigest(),
        "checkpoint": digest_checkpoint(folder),
        **{name: getattr(config, name) for name in ("seed", "tokens", "system", "raw", "profile")},
        "weights": config.weights,
        "dtype": dtype,
        "attention": implementations.resolve_implementations(
            model_config, dtype, layout, sizes.attention_tile, sizes.chunk_tokens
        ),
        # Sums over devices come in the mesh's order, so another mesh may have other bits.
        "mesh": command_mesh.format_axis_sizes(layout),
        "defaults": options_lib.options_to_json(config.options),
        "recipe": [sizes.chunk_tokens, sizes.attention_tile, sizes.matmul_tile],
        "jax": f"{jax.__version__} on {jax.default_backend()}",
    }
    # JSON has no tuples, and its keys are text.
    return json.loads(json.dumps(fingerprint))


def digest_checkpoint(folder: pathlib.Path) -> dict[str, str | None]:
    """Return a digest of each file of a checkpoint that is read, None for one that is not there.

    Weights are too large to be read twice. Their sizes and headers stand for them, and samples of
    their bytes. Up to 4 MiB of a file are read whole. A parameter of a converted checkpoint, which
    is a directory, counts as one file.
    """
    digests: dict[str, str | None] = {}
    for name in _SMALL_FILES:
        path = folder / name
        digests[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if format_lib.is_converted(folder):
        params_dir = folder / format_lib.PARAMS_DIR
        for path in sorted(path for path in params_dir.iterdir() if path.is_dir()):
            digests[f"{params_dir.name}/{path.name}"] = _sample_digest(
                path, sorted(path.rglob("*"))
            )
    else:
        for shard in release.Release(folder).shards:
            # Samples of a large shard would miss most of its header.
            header = hashlib.sha256(shard.header.encode()).hexdigest()
            digests[shard.file.name] = f"{header} {_sample_digest(folder, [shard.file])}"
    return digests


def _sample_digest(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> str:
    """Return a digest of the names and sizes of files, and of samples of their bytes."""
    # Hidden files are notes of file systems and tools.
    files = [file for file in files if file.is_file() and not file.name.startswith(".")]
    sizes = [file.stat().st_size for file in files]
    step = max(sum(sizes) // _MAX_SAMPLES, _SAMPLE_BYTES)
    digest = hashlib.sha256()
    for path, size in zip(files, sizes, strict=True):
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
