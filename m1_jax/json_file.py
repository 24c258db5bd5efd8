"""Small files of a checkpoint, which a download or a hand may have damaged.

Each error is one short line that names the file, and is of the class that the caller asks for.
"""

import os
import pathlib
from typing import Any

from m1_jax import strict_json

_LFS_START = b"version https://git-lfs.github.com/spec/"
_MAX_BYTES = 2**29  # the release's tokenizer.json has 10 MB, and its headers have 1 MB
COPY_AGAIN = "Copy it again."


def check_regular_file(path: pathlib.Path, error: type[ValueError], remedy: str) -> None:
    """Refuse what is no regular file, and the pointer that Git LFS leaves in a file's place.

    Raises:
      error: a directory, a pipe, a device, no file at all, or a pointer.
    """
    # A pipe would wait for a writer, and a device may never end.
    if not path.is_file():
        problem = "is not a file" if os.path.lexists(path) else "does not exist"
        raise error(f"{path} {problem}. {remedy}")
    with path.open("rb") as stream:
        if stream.read(len(_LFS_START)) == _LFS_START:
            raise error(
                f"{path} is a Git LFS pointer, not the file itself. Run git lfs pull in the clone "
                "that it is from, or download it again."
            )


def read_bytes(path: pathlib.Path, error: type[ValueError], remedy: str = COPY_AGAIN) -> bytes:
    """Return the bytes of a small file.

    Raises:
      error: no regular file, a Git LFS pointer, or a file of more than 512 MiB.
    """
    check_regular_file(path, error, remedy)
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise error(f"{path} has {size} bytes; wanted at most {_MAX_BYTES}. {remedy}")
    return path.read_bytes()


def read_json(path: pathlib.Path, error: type[ValueError], remedy: str = COPY_AGAIN) -> Any:
    """Return the JSON value of a small file. A byte order mark is left out.

    Raises:
      error: as `read_bytes`, or no valid JSON.
    """
    raw = read_bytes(path, error, remedy)
    try:
        return strict_json.parse_json(raw, str(path))
    except strict_json.JsonError as failure:
        raise error(f"{path} is not valid JSON: {failure.reason}. {remedy}") from None


def read_json_object(
    path: pathlib.Path, error: type[ValueError], remedy: str = COPY_AGAIN
) -> dict[str, Any]:
    """Return the JSON object of a small file, as `read_json` does.

    Raises:
      error: as `read_json`, or JSON that is no object.
    """
    value = read_json(path, error, remedy)
    if not isinstance(value, dict):
        raise error(f"{path}: got a JSON {type(value).__name__}; wanted an object. {remedy}")
    return value
