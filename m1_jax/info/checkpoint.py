"""What kind of checkpoint a directory is, and how large. No weights are read."""

import collections
import math
import pathlib
from typing import Any

from m1_jax import config as config_lib
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import checkpoint_dir, release
from m1_jax.checkpoints import format as format_lib
from m1_jax.info import machine

# Fields of `ModelConfig` that tell models apart.
_FIELDS = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "num_local_experts", "num_experts_per_tok", "vocab_size"),
    *("max_position_embeddings", "rope_theta", "rotary_dim"),
)


def describe_checkpoint(path: str) -> dict[str, Any]:
    """Return a checkpoint's kind, files, sizes and disk.

    Raises:
      CheckpointError, ConfigError, ValueError: it is no checkpoint, or is damaged.
    """
    directory = checkpoint_dir.require_checkpoint(path, "--checkpoint")
    config = config_lib.ModelConfig.from_file(directory / checkpoint_dir.CONFIG_FILE)
    is_converted = format_lib.is_converted(directory)
    params = params_lib.params_by_path(params_lib.abstract_model(config))
    files = [file for file in directory.rglob("*") if file.is_file()]
    layers = collections.Counter(config.layer_types)
    return {
        "directory": str(directory.absolute()),
        "kind": "converted (Orbax)" if is_converted else "release (safetensors)",
        **(
            _describe_converted(directory, config) if is_converted else _describe_release(directory)
        ),
        "parameters": sum(math.prod(param.shape) for param in params.values()),
        "layers": config.num_hidden_layers,
        **{f"layers_{kind}": number for kind, number in sorted(layers.items())},
        **{name: getattr(config, name) for name in _FIELDS},
        "tokenizer": _describe_tokenizer(directory),
        "files": len(files),
        "size_bytes": sum(file.stat().st_size for file in files),
        "free_bytes": machine.describe_disk(directory)["free_bytes"],
    }


def _describe_release(directory: pathlib.Path) -> dict[str, Any]:
    source = release.Release(directory)  # with the checks that every reader makes
    tensors = source.tensors.values()
    return {
        "shards": len(source.shards),
        "tensors": len(source.tensors),
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": ", ".join(sorted({tensor.dtype.name for tensor in tensors})),
    }


def _describe_converted(directory: pathlib.Path, config: config_lib.ModelConfig) -> dict[str, Any]:
    format_lib.read_manifest(directory)  # raises for an interrupted conversion
    arrays = format_lib.open_params(directory, config).values()
    return {
        "arrays": len(arrays),
        "weights_bytes": sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays),
        "dtypes": ", ".join(sorted({array.dtype.name for array in arrays})),
    }


def _describe_tokenizer(directory: pathlib.Path) -> str:
    """Return the tokenizer's size, or what is wrong with it: a model can be read without one."""
    try:
        tokenizer = tokenizer_lib.Tokenizer.load(directory)
    except (ValueError, OSError) as error:
        return f"none that can be read: {error}"
    return f"{tokenizer.vocab_size} ids, ends at {', '.join(map(str, tokenizer.stop_ids))}"
