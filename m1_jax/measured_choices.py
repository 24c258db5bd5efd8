"""Which implementations m1-selfcheck found right and fastest on a kind of device.

`m1-selfcheck` writes one file, `choices_path()`. Where a config or a flag names an implementation,
that one runs and the file is not asked. Where it says None, the default of these four uses is what
the file says for the device, as far as the shapes fit:

    lightning           training and whole prompts: "tpu" or "gpu" (kernels), "chunked" (XLA)
    softmax             whole rows: "splash", "xla"
    serving_lightning   the engine's lightning attention: "tpu", "xla"
    serving_softmax     the engine's softmax attention: "tpu", "xla"

An entry belongs to a kind of device and to versions (`versions_of_kernels`), because other versions
compile other programs. Without an entry nothing changes.

The file is read once in a process, so that all programs of the process agree. Several processes
must agree, too: process 0 reads, in `share_choices`, and without that call none of them does.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

import pallas_kernels
from m1_jax import json_file, multihost, sharding, strict_json

_log = logging.getLogger(__name__)

FORMAT_VERSION = 1
# The values of each use.
USES = {
    "lightning": ("tpu", "gpu", "chunked"),
    "softmax": ("splash", "xla"),
    "serving_lightning": ("tpu", "xla"),
    "serving_softmax": ("tpu", "xla"),
}
_REMEDY = "Run m1-selfcheck again, or delete the file."


@dataclasses.dataclass(frozen=True)
class MeasuredChoice:
    """The default of one use on one kind of device."""

    implementation: str  # one of `USES` of its use
    reason: str  # one line: what was measured


class ChoiceFileError(ValueError):
    """A file of choices that is none. The message names it and says what to do."""


def choices_path() -> pathlib.Path:
    """Return where the file lies: $XDG_CACHE_HOME/m1_jax, by default ~/.cache/m1_jax."""
    # A relative path is invalid by the XDG specification, which wants it ignored.
    root = os.environ.get("XDG_CACHE_HOME", "")
    base = pathlib.Path(root) if os.path.isabs(root) else pathlib.Path.home() / ".cache"
    return base / "m1_jax" / "implementations.json"


@functools.cache
def versions_of_kernels() -> dict[str, str]:
    """Return what compiled programs depend on: versions, and a digest of the kernels' sources."""
    folder = pathlib.Path(pallas_kernels.__path__[0])
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    packages = {name: package_version(name) or "none" for name in ("jax", "jaxlib", "libtpu")}
    return {**packages, "kernels": digest.hexdigest()[:12]}


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def entry_key(device_kind: str) -> str:
    """Return the key of a kind of device with this process's versions."""
    versions = " ".join(f"{name} {version}" for name, version in versions_of_kernels().items())
    return f"{device_kind} | {versions}"


def find_choice(use: str, target: sharding.TargetDevice | None = None) -> str | None:
    """Return the measured default of a use, a value of `USES[use]`, or None: nothing was measured.

    The first call of a process reads the file, and logs each choice once.

    Args:
      target: the device that a program is for. None: this process's first one.
    """
    if target is None:
        device = jax.local_devices()[0]
        target = sharding.TargetDevice(device.platform, device.device_kind)
    if target.platform == "cpu":
        return None
    choice = _find_logged_choice(use, target.kind)
    return None if choice is None else choice.implementation


@functools.cache
def _find_logged_choice(use: str, device_kind: str) -> MeasuredChoice | None:
    entries = _current_entries()
    choice = entries.get(entry_key(device_kind), {}).get(use)
    if choice is not None:
        _log.info(
            "%s on %s: %s by default, as m1-selfcheck measured (%s)",
            use,
            device_kind,
            choice.implementation,
            choice.reason,
        )
    return choice


_ChoiceEntries = dict[str, dict[str, MeasuredChoice]]
# What process 0 told all processes. None: nobody told anything.
_shared_entries: list[_ChoiceEntries] = []


@functools.cache
def _current_entries() -> _ChoiceEntries:
    if _shared_entries:
        return _shared_entries[-1]
    if jax.process_count() > 1:
        # Processes of different files would run different programs, and wait for each other.
        _log.info("choices of m1-selfcheck: not read, because process 0 did not share its own")
        return {}
    return _read_entries_or_none()


def _read_entries_or_none() -> _ChoiceEntries:
    """Return the entries of the file. One that cannot be used is logged and is as none."""
    try:
        path = choices_path()
        entries = read_entries(path)
    except (ChoiceFileError, OSError, RuntimeError) as error:  # the last one: no home directory
        _log.warning("choices of m1-selfcheck: ignored. %s", error)
        return {}
    versions = entry_key("").removeprefix(" | ")
    others = [key for key in entries if key.partition(" | ")[2] != versions]
    if others and len(others) == len(entries):
        _log.warning(
            "choices of m1-selfcheck: ignored. %s is of other versions (%s); these are %s. %s",
            path,
            others[0],
            versions,
            _REMEDY,
        )
    return entries


def share_choices() -> None:
    """Give the choices of process 0 to all processes. All of them call this, before any program."""
    entries = multihost.broadcast_object(
        _read_entries_or_none() if jax.process_index() == 0 else None
    )
    _shared_entries.append(entries or {})
    forget_choices()


def forget_choices() -> None:
    """Read the file anew at the next question, for tests and for m1-selfcheck itself."""
    _current_entries.cache_clear()
    _find_logged_choice.cache_clear()


def read_entries(path: pathlib.Path) -> _ChoiceEntries:
    """Return the file's choices by `entry_key` and use. A file that is not there has none.

    Raises:
      ChoiceFileError: a file of another form.
    """
    if not os.path.lexists(path):
        return {}
    content = json_file.read_json_object(path, ChoiceFileError, _REMEDY)
    if content.get("format") != FORMAT_VERSION:
        raise ChoiceFileError(
            f"{path}: format is {strict_json.show_value(content.get('format'))}; wanted "
            f"{FORMAT_VERSION}. {_REMEDY}"
        )
    raw_entries = content.get("choices")
    if not isinstance(raw_entries, dict):
        raise ChoiceFileError(f"{path}: choices is no object. {_REMEDY}")
    return {key: _parse_entry(path, key, value) for key, value in raw_entries.items()}


def _parse_entry(path: pathlib.Path, key: str, value: Any) -> dict[str, MeasuredChoice]:
    members: dict[str, Any] = value if isinstance(value, dict) else {"": None}
    choices = {}
    for use, choice in members.items():
        is_choice = (
            use in USES
            and isinstance(choice, dict)
            and choice.get("implementation") in USES[use]
            and isinstance(choice.get("reason"), str)
        )
        if not is_choice:
            name = strict_json.shorten_text(f"{key} {use}")
            raise ChoiceFileError(
                f"{path}: {name}: got {strict_json.show_value(choice)}; wanted an implementation "
                f"of {', '.join(USES)}, and a reason. {_REMEDY}"
            )
        choices[use] = MeasuredChoice(choice["implementation"], choice["reason"])
    return choices


def format_entries(entries: Mapping[str, Mapping[str, MeasuredChoice]]) -> dict[str, Any]:
    """Return what the file holds, which `read_entries` reads back."""
    return {
        "format": FORMAT_VERSION,
        "choices": {
            key: {use: dataclasses.asdict(choice) for use, choice in choices.items()}
            for key, choices in entries.items()
        },
    }
