"""Compiler options of this code's own programs, by TPU generation.

`jit_for_device` is `jax.jit` with the options of the devices that its arguments lie on. The engine
and the planner, which compile ahead of time, take the same options from `options_for`. A CPU or GPU
has none.

An option that the user names in the environment variable LIBTPU_INIT_ARGS is left out here, so that
the user's value holds. An option that this libtpu does not know is left out with one warning, so an
older or newer libtpu compiles slower programs and not none.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import core

from pallas_kernels.lightning_attention import tiling

_log = logging.getLogger(__name__)

OptionValues = Mapping[str, Any]

# The most VMEM, in KiB, that one instruction may plan with. The grouped matrix product reads its
# rows once for each tile of columns, so a tile as wide as a chip's FLOPs per byte of HBM (v5e 240,
# v5p 166, v6e 560, tpu7x 312) leaves the matrix unit as the bound. By default the tiles have 128
# columns on v5e and v5p, and on v6e and tpu7x 512 or, with rows of 9,216, 256. Here is the least
# that makes them wide enough. More costs compile time: a product of the released size takes 0.7 s
# to compile by default, 0.9 s with 32 MiB, 1.8 s with 48 MiB and 3.1 s with 64 MiB (docs/log.md,
# switches for TPUs). Predicted for a training step of the released size on v5p:8x8x8: -1.4 s of
# 8.5 s with 64 MiB.
_SCOPED_VMEM = "xla_tpu_scoped_vmem_limit_kib"
# Collectives on SparseCore run beside the matrix unit, and without these options before and after
# it. Predicted for the same step: -0.74 s, with the first three options. Compile time stays the
# same. The last two take in gathers over several dimensions of a slice or a part of one, such as
# those of fsdp=16 on v5p:8x8x8, which are the largest of that mesh.
_SPARSE_CORE = {
    f"xla_tpu_enable_sparse_core_collective_offload_{collective}": True
    for collective in (
        "all_gather",
        "reduce_scatter",
        "all_reduce",
        "2d_all_gather",
        "nd_reduce_scatter",
    )
}
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "v5e": {_SCOPED_VMEM: 32_768},  # it has no SparseCore
    "v5p": {_SCOPED_VMEM: 32_768, **_SPARSE_CORE},
    "v6e": {_SCOPED_VMEM: 49_152, **_SPARSE_CORE},
    # It sends collectives to SparseCore by itself.
    "tpu7x": {_SCOPED_VMEM: 49_152},
}


def options_for(device: Any) -> dict[str, Any]:
    """Return the options for programs of a device, or of a device of a topology.

    The first call for a generation compiles a tiny program, to ask libtpu which options it takes.
    """
    generation = tiling.KINDS.get(device.device_kind) if device.platform == "tpu" else None
    if generation is None:
        return {}
    user_arguments = os.environ.get("LIBTPU_INIT_ARGS", "")
    key = generation, user_arguments
    if key not in _accepted_options:
        options = drop_user_options(COMPILER_OPTIONS[generation], user_arguments)
        _accepted_options[key] = _ask_compiler(options, device)
    return dict(_accepted_options[key])


# By generation and LIBTPU_INIT_ARGS. A cache and no lock: two threads would find the same.
_accepted_options: dict[tuple[str, str], OptionValues] = {}


def drop_user_options(options: OptionValues, user_arguments: str) -> OptionValues:
    """Return the options that LIBTPU_INIT_ARGS does not name."""
    named = {argument.lstrip("-").partition("=")[0] for argument in user_arguments.split()}
    return {name: value for name, value in options.items() if name not in named}


def _ask_compiler(options: OptionValues, device: Any) -> OptionValues:
    """Return the options that the compiler takes, and warn of those that it refuses."""
    x = jax.ShapeDtypeStruct(
        (8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device)
    )
    lowered = jax.jit(lambda x: x + 1).trace(x).lower(lowering_platforms=("tpu",))

    def find_refusal(options: OptionValues) -> str | None:
        try:
            lowered.compile(compiler_options=dict(options))
        except jax.errors.JaxRuntimeError as error:
            return str(error).partition("\n")[0]
        return None

    if find_refusal(options) is None:
        return options
    refusals = {name: find_refusal({name: value}) for name, value in options.items()}
    for name, reason in refusals.items():
        if reason is not None:
            _log.warning("libtpu refuses %s (%s): programs are compiled without it", name, reason)
    return {name: value for name, value in options.items() if refusals[name] is None}


class DeviceJit:
    """`jax.jit` of a function, with the compiler options of the arguments' devices.

    Tracing and lowering (`trace`, `lower`) are those of `jax.jit` without options: whoever compiles
    the result takes them from `options_for`.
    """

    def __init__(self, function: Callable, **jit_arguments: Any):
        functools.update_wrapper(self, function)
        self._make_jit = functools.partial(jax.jit, function, **jit_arguments)
        self._jit = self._make_jit()
        self._jits_by_options: dict[tuple, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = tuple(options_of_arguments((args, kwargs)).items())
        if not options:
            return self._jit(*args, **kwargs)
        if options not in self._jits_by_options:
            self._jits_by_options[options] = self._make_jit(compiler_options=dict(options))
        return self._jits_by_options[options](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jit, name)


def jit_for_device(function: Callable, **jit_arguments: Any) -> DeviceJit:
    """Return `jax.jit(function, **jit_arguments)` with the options of the arguments' devices."""
    return DeviceJit(function, **jit_arguments)


def options_of_arguments(arguments: Any) -> dict[str, Any]:
    """Return the options for a program of these arguments, of which arrays count.

    Arrays of a program that is being traced have none, since the options of that program count.
    """
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)]
    if not leaves or any(isinstance(leaf, core.Tracer) for leaf in leaves):
        return {}
    where = leaves[0].sharding
    # A device of this process where there is one, since it may be asked to compile.
    devices = where.addressable_devices or where.device_set
    return options_for(min(devices, key=lambda device: device.id))
