"""What the commands of this package share: flags from a dataclass, and loading of a model."""

import dataclasses
import pathlib
import typing
from typing import Any

import jax.numpy as jnp
from absl import flags

import m1_jax

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def flag_field(default: Any, text: str) -> Any:
    """Return a field of a dataclass whose fields are flags, `text` being the flag's help."""
    return dataclasses.field(default=default, metadata={"help": text})


def define_flags(config: type) -> None:
    """Define a flag for each field, of the field's type. `X | None` is a flag of type X."""
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_multi_string,
    }
    types = typing.get_type_hints(config)
    fields: Any = dataclasses.fields(config)  # `Any`: a bare `type` is no dataclass to pyright
    for field in fields:
        # The arguments of `X | None`; a plain type has none. tuple[str, ...] is told by its origin.
        kinds = [kind for kind in typing.get_args(types[field.name]) if kind is not type(None)]
        kind = typing.get_origin(types[field.name])
        kind = tuple if kind is tuple else kinds[0] if kinds else types[field.name]
        default = list(field.default) if kind is tuple else field.default
        define.get(kind, flags.DEFINE_string)(field.name, default, field.metadata["help"])


def config_from_flags(config: type) -> Any:
    """Return the dataclass with the flags' values."""
    values = {field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(config)}
    # A repeatable flag is a list, its field a tuple.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return config(**values)


def check_fields(config: Any, checks: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first field that is not valid.

    Args:
      config: a dataclass of flags.
      checks: whether a field's value is valid, and which values would be, by the field's name.
    """
    for name, (valid, text) in checks.items():
        if not valid:
            raise ValueError(f"--{name}: got {getattr(config, name)!r}; wanted {text}")


def checkpoint_dir(checkpoint: str) -> pathlib.Path:
    """Return a checkpoint's directory.

    Raises:
      ValueError: there is no such directory.
    """
    path = pathlib.Path(checkpoint)
    if not path.is_dir():
        raise ValueError(f"--checkpoint: {path} is no directory; wanted a release or a conversion")
    return path


def load_model(checkpoint: str, dtype: str, weights: str | None) -> m1_jax.MiniMaxM1:
    """Load a model in a dtype, quantized where `weights` names how.

    Raises the errors of `m1_jax.load`.
    """
    return m1_jax.load(checkpoint_dir(checkpoint), dtype=DTYPES[dtype], weights=weights)
