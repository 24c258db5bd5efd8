"""What is at a path where a directory was wanted: nothing, a file, or a name on Hugging Face."""

import difflib
import os
import pathlib
import re

# Bytes that a download of a release takes, of all its files: 413 shards, index and tokenizer.
_RELEASE_SIZES = {
    "MiniMaxAI/MiniMax-M1-40k": "912 GB",
    "MiniMaxAI/MiniMax-M1-80k": "912 GB",
}
# An owner and a name, as in the address of a repository. Owners have no dots.
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def describe_missing_directory(path: pathlib.Path) -> str | None:
    """Return what is there instead of a directory, and what to do about it. None: a directory.

    The text follows a path, as in f"{path} {text}", and is one line that ends with a full stop.
    """
    if path.is_dir():
        return None
    if path.is_symlink() and not path.exists():
        return f"is a link to {os.readlink(path)}, which does not exist."
    if os.path.lexists(path):
        return f"is a file; wanted a directory. {_advise_on_file(path)}"
    return f"does not exist. {_advise_on_nothing(path)}"


def _advise_on_file(path: pathlib.Path) -> str:
    if path.suffix == ".gguf":
        return "GGUF holds weights in a form that is not read here: download the release."
    if path.suffix in (".safetensors", ".json"):
        return f"Give the directory that holds it, {path.parent}."
    return "Give the directory of a checkpoint."


def _advise_on_nothing(path: pathlib.Path) -> str:
    if not path.parent.exists() and _REPOSITORY.fullmatch(path.as_posix()):
        size = _RELEASE_SIZES.get(path.as_posix())
        free_space = f" It takes {size} of disk." if size else ""
        return (
            "It looks like a repository of Hugging Face, and nothing is downloaded here: run "
            f"hf download {path.as_posix()} --local-dir {path.name}, then give {path.name}."
            f"{free_space}"
        )
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if folder != path.parent:
        return f"The path is there as far as {folder}."
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    near_names = difflib.get_close_matches(path.name, names, 1)
    return f"Did you mean {folder / near_names[0]}?" if near_names else "Is the path right?"
