"""Reads and writes of arrays on disk, whose failures become one short line that names the file."""

import pathlib
from typing import Any

import tensorstore as ts

from m1_jax import strict_json
from m1_jax.checkpoints import release

_MAX_REASON = 120  # characters


def wait_for_read(future: ts.Future, source: pathlib.Path, remedy: str) -> Any:
    """Return the result of a TensorStore read.

    Args:
      future: the read.
      source: directory of the array.
      remedy: what to do about a failure.

    Raises:
      CheckpointError: a file that cannot be read, in one line that ends in the remedy.
    """
    try:
        return future.result()
    except ValueError as error:
        reason = _shorten_reason(error, source)
        raise release.CheckpointError(f"{source} cannot be read: {reason}. {remedy}") from None


def wait_for_write(future: ts.WriteFutures, target: pathlib.Path, remedy: str) -> None:
    """Wait for a TensorStore write.

    Args:
      future: the write.
      target: directory of the array.
      remedy: what to do about a failure.

    Raises:
      OSError: a file that cannot be written, in one line that ends in the remedy.
    """
    try:
        future.result()
    except ValueError as error:
        reason = _shorten_reason(error, target)
        raise OSError(f"{target} cannot be written: {reason}. {remedy}") from None


def _shorten_reason(error: ValueError, directory: pathlib.Path) -> str:
    reason = str(error).split(" [", 1)[0]  # TensorStore's internal state follows in brackets
    reason = reason.replace(f"{directory.resolve()}/", "")  # named already
    return strict_json.shorten_text(reason, _MAX_REASON)
