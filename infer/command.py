"""What the commands of this package share: flags, loading of a model on a mesh, and signals."""

import dataclasses
import os
import pathlib
import signal
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import multihost_utils

import m1_jax
from infer import config as config_lib
from infer.execution import programs
from m1_jax import command_help, command_mesh, distributed, memory_check, multihost, sharding
from m1_jax import local_path as local_path_lib
from m1_jax import params as params_lib
from m1_jax.checkpoints import checkpoint_dir as checkpoint_dir_lib

DTYPES = command_mesh.DTYPES


def flag_field(default: Any, text: str, required: bool = False) -> Any:
    """Return a field of a dataclass whose fields are flags.

    Args:
      default: the field's default, and the flag's.
      text: the flag's help.
      required: whether the flag must be given. Its class refuses the default.
    """
    return dataclasses.field(default=default, metadata={"help": text, "required": required})


def define_flags(config: type, groups: Mapping[str, Sequence[str]]) -> None:
    """Define a flag for each field, of the field's type. `X | None` is a flag of type X.

    Args:
      config: a dataclass whose fields are made by `flag_field`.
      groups: names of fields by their title in --help. Together they name every field once.
    """
    types = typing.get_type_hints(config)
    class_fields: Any = dataclasses.fields(config)  # `Any`: a bare `type` is none to pyright
    fields = {field.name: field for field in class_fields}
    for title, names in groups.items():
        with command_help.flag_group(title):
            for name in names:
                _define_flag(fields.pop(name), types[name])
    if fields:
        raise AssertionError(f"{config.__name__}: no group has {', '.join(fields)}")


def _define_flag(field: dataclasses.Field, field_type: Any) -> None:
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        tuple: flags.DEFINE_multi_string,
    }
    # The arguments of `X | None`; a plain type has none. tuple[str, ...] is told by its origin.
    kinds = [kind for kind in typing.get_args(field_type) if kind is not type(None)]
    kind = typing.get_origin(field_type)
    kind = tuple if kind is tuple else kinds[0] if kinds else field_type
    field_default: Any = field.default  # `flag_field` gives one to every field
    default = list(field_default) if kind is tuple else field_default
    text, required = field.metadata["help"], field.metadata["required"]
    if required:  # absl wants None for a flag that must be given
        flags.DEFINE_string(field.name, None, text, required=True)
    else:
        define.get(kind, flags.DEFINE_string)(field.name, default, text)


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


def local_path(name: str, text: str) -> pathlib.Path:
    """Return the path that a flag gives, with `~` as the home directory.

    Raises:
      ValueError: a bucket or another address, or the home of an unknown user.
    """
    return local_path_lib.resolve_path(text, f"--{name}")


def check_paths(config: Any, names: Sequence[str]) -> None:
    """Raise ValueError for the first of these fields that is no path, as `local_path` says."""
    for name in names:
        if getattr(config, name) is not None:
            local_path(name, getattr(config, name))


def output_path(name: str, text: str, inputs: Sequence[str | None]) -> pathlib.Path:
    """Return the path of a file that a command will write.

    Args:
      name: the flag's name.
      text: the flag's value.
      inputs: paths of files that the command reads, which it must not replace.

    Raises:
      ValueError: a directory, a file in a directory that does not exist or cannot be written, or
        one of the inputs.
    """
    path = local_path(name, text)
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        raise ValueError(f"--{name}: got {path}; wanted a file in a directory that exists")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"--{name}: got {path}; wanted a file that may be written")
    for input_text in filter(None, inputs):
        source = local_path(name, input_text)
        if path.exists() and source.exists() and path.samefile(source):
            raise ValueError(f"--{name}: got {path}, which is read; wanted another file")
    return path


def checkpoint_dir(checkpoint: str) -> pathlib.Path:
    """Return a checkpoint's directory.

    Raises:
      ValueError: there is no checkpoint.
    """
    return checkpoint_dir_lib.require_checkpoint(checkpoint, "--checkpoint")


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """What an engine is made for, the same on all processes."""

    layout: sharding.MeshLayout | None  # where the model lies. None: on one device
    sizes: config_lib.EngineConfig  # sizes of the engine


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """Which model a command loads, and how.

    Attributes:
      checkpoint: the directory.
      dtype: dtype of the computation. None: the platform's, as `command_mesh.resolve_dtype` says.
      weights: the int8 recipe, or None.
      mesh: axis=size,... None: the default of `command_mesh.make_command_layout`.
      lightning: as `ModelConfig.lightning_implementation`.
    """

    checkpoint: str
    dtype: str | None
    weights: str | None
    mesh: str | None
    lightning: str | None = None

    def plan_engine(self, sizes: config_lib.EngineConfig | None) -> EnginePlan:
        """Return where the model lies, and process 0's sizes. Nothing of the weights is read.

        All processes call this.

        Args:
          sizes: the engine's sizes on process 0, and anything on the others.

        Raises:
          ValueError: a mesh that the model cannot lie on, or too little memory.
        """
        known_sizes = multihost.broadcast_object(sizes)

        def plan() -> EnginePlan:
            folder = checkpoint_dir(self.checkpoint)
            model_config = m1_jax.ModelConfig.from_file(folder / "config.json")
            layout = command_mesh.make_command_layout(self.mesh, model_config, sharding.DECODE)
            job = make_serve_job(self, model_config, known_sizes)
            memory_check.check_memory(job, layout, command_mesh.resolve_dtype(self.dtype))
            return EnginePlan(layout, known_sizes)

        return distributed.run_on_all(plan)

    def load(self, layout: sharding.MeshLayout | None) -> m1_jax.MiniMaxM1:
        """Load the model, each process the parts of its own devices. All processes call this.

        Raises the errors of `m1_jax.load`.
        """
        return distributed.run_on_all(
            lambda: m1_jax.load(
                checkpoint_dir(self.checkpoint),
                dtype=DTYPES[command_mesh.resolve_dtype(self.dtype)],
                mesh=layout,
                mode=sharding.DECODE,
                weights=self.weights,
                lightning=self.lightning,
            )
        )


def make_serve_job(
    choice: ModelChoice, model_config: m1_jax.ModelConfig, sizes: config_lib.EngineConfig
) -> memory_check.MemoryJob:
    """Return what an engine of these sizes needs memory for."""
    models = {
        name: params_lib.abstract_model(model_config, dtype, weights=choice.weights)
        for name, dtype in DTYPES.items()
    }

    def count_parts(layout: sharding.MeshLayout | None, dtype: str) -> dict[str, int]:
        parameters = memory_check.local_param_bytes(models[dtype], layout)
        mesh_layout = memory_check.as_mesh_layout(layout, sharding.DECODE)
        state, inputs = programs.abstract_decode_inputs(model_config, mesh_layout, sizes)
        item_bytes = jnp.dtype(DTYPES[dtype]).itemsize  # keys and values have the dtype
        return {
            "parameters": parameters,
            "states and pages": memory_check.local_bytes(state, item_bytes),
            "sampling": memory_check.local_bytes(inputs, item_bytes),
        }

    return memory_check.MemoryJob(
        "serve",
        sharding.DECODE,
        model_config,
        choice.checkpoint,
        sizes.max_rows,
        sizes.max_length,
        choice.weights,
        count_parts,
    )


class StopSignals:
    """Signals that ask a command to stop.

    The first one is a request, and a second SIGINT ends the process at once. With several
    processes, SIGTERM to any of them counts: JAX's coordination service hears it there, and tells
    process 0.
    """

    def __init__(self):
        self._signal_number: int | None = None
        self._num_polls = 0

    def listen(self) -> None:
        """Catch signals from now on. With several processes, call this after they are joined."""
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            signal.signal(number, self._receive)

    def poll(self) -> int | None:
        """Return the number of a signal that came, or None."""
        if self._signal_number is None and jax.process_count() > 1:
            # The service picks a coming poll of process 0, who alone asks.
            self._num_polls += 1
            if multihost_utils.reached_preemption_sync_point(self._num_polls):
                self._signal_number = signal.SIGTERM
        return self._signal_number

    def _receive(self, signal_number: int, _: Any) -> None:
        signal.signal(signal_number, signal.SIG_DFL)
        self._signal_number = signal_number
