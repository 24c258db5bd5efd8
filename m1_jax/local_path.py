"""Paths that users give: `~` is the home, and buckets are refused before anything is made."""

import os
import pathlib
import re

# A scheme, as in gs://bucket/name. pathlib makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class PathError(ValueError):
    """A path that does not lie in a file system of this machine."""


def resolve_path(path: str | os.PathLike[str], name: str = "path") -> pathlib.Path:
    """Return a path of this machine's file systems, with `~` and `~user` as home directories.

    Args:
      path: what the user gave.
      name: what the error calls it, such as "--dst".

    Raises:
      PathError: a URL, a path that is empty or holds a NUL, or the home of an unknown user.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text or "\0" in text:
        raise PathError(f"{name}: got {text[:80]!r}; wanted a path")
    if _URL.match(text):
        raise PathError(
            f"{name}: got {text[:80]!r}; wanted a local path. Mount the bucket (gcsfuse), or copy "
            "to or from a local directory (gcloud storage cp -r)."
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise PathError(
            f"{name}: got {text[:80]!r}, the home of an unknown user; wanted a path"
        ) from None
