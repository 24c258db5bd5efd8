"""Whether a directory is a checkpoint. If not, the error says what it is, and what to do.

    nothing at the path          download it (a repository's name), or another name of the folder
    a file                       the directory that holds it
    the directory of a run       m1-export makes a checkpoint of it
    a part of a checkpoint       the directory that holds it
    an unfinished conversion     the same command goes on with it
    a cache of Hugging Face      the snapshot in it
    a folder of checkpoints      one of them

No weights are read here: `load.py` and `release.py` check these.
"""

import os
import pathlib

from m1_jax import local_path, missing_directory, strict_json
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release

CONFIG_FILE = "config.json"
# Of these fields a run's config.json has one, and a model's has none.
_RUN_FIELDS = ("stages", "rollout")
_WANTED = (
    f"wanted a release directory ({CONFIG_FILE}, {release.INDEX_FILE}, shards) or one made by "
    f"m1-convert ({CONFIG_FILE}, {format_lib.PARAMS_DIR}/, {format_lib.MANIFEST_FILE})"
)
_MAX_LISTED = 3  # checkpoints that an error names


def require_checkpoint(path: str | os.PathLike[str], name: str = "checkpoint") -> pathlib.Path:
    """Return a checkpoint's directory, which has a config.json.

    Args:
      path: what the user gave.
      name: what the error calls it, such as "--src".

    Raises:
      PathError: a path that is not of this machine.
      CheckpointError: anything but a checkpoint. The message says what it is, and what to do.
    """
    directory = local_path.resolve_path(path, name)
    problem = missing_directory.describe_missing_directory(directory)
    problem = problem or _describe_other_directory(directory)
    if problem:
        raise release.CheckpointError(f"{name}: {directory} {problem}")
    return directory


def _describe_other_directory(directory: pathlib.Path) -> str | None:
    """Return what a directory is, if it is not a checkpoint."""
    if _is_run(directory):
        return _advise_to_export("is the directory of a run, not a checkpoint.", directory)
    if os.path.lexists(directory / CONFIG_FILE):
        return None  # `ModelConfig` reads it, and says what is wrong with it
    parent = directory.absolute().parent
    if directory.name == format_lib.PARAMS_DIR and (parent / CONFIG_FILE).is_file():
        return f"is the part of a checkpoint that holds its arrays. Give {directory.parent}."
    if (directory / format_lib.JOURNAL_FILE).exists():
        return "was left unfinished by the command that made it. Start the same command again."
    for folder in (parent, parent.parent):
        if _is_run(folder):
            return _advise_to_export(f"lies in the directory of a run, {folder}.", folder)
    entries = sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    if not entries:
        return "is empty. Is the download complete?"
    if snapshots := sorted(directory.glob(f"snapshots/*/{CONFIG_FILE}")):
        return f"is a cache of Hugging Face. Give the snapshot in it, {snapshots[-1].parent}."
    if (directory / "adapter_config.json").exists():
        return "holds adapters, not a model. Merge them into their model first."
    if format_lib.is_converted(directory) or any(e.suffix == ".safetensors" for e in entries):
        return f"has weights, but no {CONFIG_FILE}. Copy it from the release, beside them."
    inner = [entry for entry in entries if (entry / CONFIG_FILE).is_file() and not _is_run(entry)]
    if inner:
        shown = " or ".join(map(str, inner[:_MAX_LISTED]))
        return f"holds checkpoints, but is none itself. Give {shown}."
    return f"has no {CONFIG_FILE}, so it is no checkpoint; {_WANTED}."


def _is_run(directory: pathlib.Path) -> bool:
    """Return whether a directory is the workdir of a training run."""
    file = directory / CONFIG_FILE
    try:
        content = strict_json.parse_json(file.read_bytes(), str(file)) if file.is_file() else None
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and any(field in content for field in _RUN_FIELDS)


def _advise_to_export(problem: str, workdir: pathlib.Path) -> str:
    return f"{problem} Make one: m1-export --workdir={workdir} --dst=DIR, then give DIR."
