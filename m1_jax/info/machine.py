"""Versions, devices, memory, disks and settings of this machine, each as a dict for JSON.

A function may raise whatever it meets: `report.collect_sections` notes it in the part's place.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
from typing import Any

import m1_jax
from m1_jax import memory_check, version
from m1_jax.info import device_probe

# Distributions that decide what a program computes, or how a checkpoint is read.
_PACKAGES = (
    *("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain"),
    *("numpy", "ml_dtypes", "safetensors", "tokenizers", "llguidance", "absl-py"),
)
# Beginnings of the names of variables that change what JAX and XLA do.
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "CUDA_", "NVIDIA_", "M1_JAX_")
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "API_KEY")
# Of training runs without `compilation_cache` of their own.
_DEFAULT_CACHE = "~/.cache/m1_jax/xla"
_NOT_INSTALLED = "not installed"


def describe_software() -> dict[str, Any]:
    """Return the versions of m1_jax, Python, the system and the packages that matter."""
    folder = pathlib.Path(m1_jax.__file__).resolve().parent
    return {
        "m1_jax": version.VERSION,
        "m1_jax_folder": str(folder),
        "m1_jax_commit": _read_commit(folder.parent),
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "python_program": sys.executable,
        "system": f"{_system_name()}, {platform.release()}, {platform.machine()}",
        **{name: _package_version(name) for name in _PACKAGES},
    }


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _NOT_INSTALLED


def _read_commit(checkout: pathlib.Path) -> str | None:
    """Return the commit of a checkout, with a mark for changes. None: it is none, or has no git."""
    if not (checkout / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout.strip() or None


def _system_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not a Linux, or one without a name
        return platform.platform(terse=True)


def describe_devices(limit_secs: float) -> dict[str, Any]:
    """Return what `device_probe.describe_devices` does, found by another process.

    Raises:
      TimeoutError: JAX did not answer in `limit_secs`.
      RuntimeError: it ended without an answer. The message is the end of what it printed.
    """
    # -P: its folder would come first on the path of modules.
    command = [sys.executable, "-P", device_probe.__file__]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit_secs
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError(
            f"JAX found no devices in {limit_secs:g} s. Has a slice this command on one host only, "
            "or does another process hold the TPU? --limit_secs waits longer."
        ) from None
    if done.returncode:
        last_lines = done.stderr.strip().splitlines()[-3:]
        raise RuntimeError(f"JAX ended with status {done.returncode}: {' '.join(last_lines)}")
    return json.loads(done.stdout)


def describe_host() -> dict[str, Any]:
    """Return the host's processors and memory, with the limits of a container."""
    return {
        "name": platform.node(),
        "processors": os.cpu_count(),
        "processors_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available_bytes": memory_check.available_host_bytes(),
    }


def describe_disk(path: pathlib.Path) -> dict[str, Any]:
    """Return how large the disk of a path is, and how much of it is free."""
    usage = shutil.disk_usage(path)
    return {"path": str(path.absolute()), "disk_bytes": usage.total, "free_bytes": usage.free}


def describe_compilation_cache() -> dict[str, Any]:
    """Return where compiled programs are kept, and how large that is."""
    variable = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    directory = pathlib.Path(variable or _DEFAULT_CACHE).expanduser()
    description: dict[str, Any] = {
        "directory": str(directory),
        "set_by": "JAX_COMPILATION_CACHE_DIR" if variable else "the default of training runs",
    }
    if "://" in str(variable):
        return description | {"size": "not measured: it is not on this machine"}
    # An entry may vanish meanwhile, as other processes use the cache.
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    return description | {"files": len(sizes), "size_bytes": sum(sizes)}


def describe_environment() -> dict[str, str]:
    """Return the variables that change what JAX and XLA do. Secrets are left out."""
    return {
        name: "(set, not shown)" if any(word in name for word in _SECRET_WORDS) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES)
    }
