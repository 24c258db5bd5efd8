"""The sections of `m1-info`, collected and written as text. A part that fails says why."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from m1_jax.info import checkpoint as checkpoint_lib
from m1_jax.info import machine

GIB = 2**30
# A section whose part failed has this key alone.
ERROR_KEY = "error"
_MAX_ERROR_CHARACTERS = 600


def collect_sections(checkpoint: str, limit_secs: float) -> dict[str, dict[str, Any]]:
    """Return all sections by name. No part that fails keeps another one from being told.

    Args:
      checkpoint: a directory to describe. Empty describes none.
      limit_secs: for how long JAX may look for devices.
    """
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "software": machine.describe_software,
        "devices": lambda: machine.describe_devices(limit_secs),
        "host": machine.describe_host,
        "working_directory": lambda: machine.describe_disk(pathlib.Path.cwd()),
        "compilation_cache": machine.describe_compilation_cache,
        "environment": machine.describe_environment,
    }
    if checkpoint:
        makers["checkpoint"] = lambda: checkpoint_lib.describe_checkpoint(checkpoint)
    return {name: _describe_or_explain(make) for name, make in makers.items()}


def _describe_or_explain(make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return make()
    except Exception as error:  # whatever it is, a bug report needs the other sections
        text = " ".join(str(error).split())
        return {ERROR_KEY: f"{type(error).__name__}: {text}"[:_MAX_ERROR_CHARACTERS]}


def format_sections(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the sections as text, a value a line."""
    parts = []
    for name, section in sections.items():
        lines = [name.replace("_", " ").capitalize()]
        for key, value in section.items():
            rows = value if isinstance(value, list) else [value]
            lines += [f"  {_format_key(key):<24} {_format_value(key, row)}" for row in rows]
        parts.append("\n".join(lines if section else [*lines, "  none"]))
    return "\n\n".join(parts)


def _format_key(key: str) -> str:
    return key.removesuffix("_bytes").replace("_", " ") if key.islower() else key


def _format_value(key: str, value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, Mapping):  # a device
        return ", ".join(f"{_format_key(k)} {_format_value(k, v)}" for k, v in value.items())
    if key.endswith("_bytes"):
        return f"{value / GIB:,.2f} GiB ({value:,} bytes)"
    return f"{value:,}" if isinstance(value, int) and key == "parameters" else str(value)
