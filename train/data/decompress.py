"""Compressed files as bytes that can be read in any order.

Each process decompresses a file once, into one file without a name that all of its compressed files
share. It lies in the folder for temporary files (TMPDIR) and is gone with the process, however that
ends. Processes that it starts read the file as well.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import tempfile
from typing import IO

import pyarrow
from etils import epath

from train.data import data_errors

_COPY_BYTES = 2**20  # decompressed at once


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """A part of a file, or all of it.

    Attributes:
      file: the file.
      start: its first byte.
      end: the byte after its last.
    """

    file: epath.Path
    start: int
    end: int


def open_range(file: epath.Path, codec: str | None) -> ByteRange:
    """Return where the bytes of a file are: in itself, or decompressed.

    Args:
      file: the file.
      codec: pyarrow's name of the codec that compressed it, or None.

    Raises:
      DataError: the file is damaged, or there is no space.
    """
    stat = file.stat()
    if codec is None:
        return ByteRange(file, 0, stat.length)
    # Another process, such as a forked one, has a file of its own.
    key = (os.getpid(), str(file), stat.length, stat.mtime)
    if key not in _ranges:
        _ranges[key] = _decompress(file, codec, _open_shared_file(os.getpid()))
    return _ranges[key]


_ranges: dict[tuple, ByteRange] = {}


@functools.cache
def _open_shared_file(process: int) -> IO[bytes]:
    """Return the file of a process, without a name."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(tempfile.TemporaryFile(prefix="m1-data-"))


def _decompress(file: epath.Path, codec: str, shared_file: IO[bytes]) -> ByteRange:
    """Append what a file decompresses to, and a line end, which is not in the range."""
    start = shared_file.seek(0, os.SEEK_END)
    try:
        with (
            file.open("rb") as stream,
            pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), codec) as blocks,
        ):
            shutil.copyfileobj(blocks, shared_file, _COPY_BYTES)
        end = shared_file.tell()
        shared_file.write(b"\n")
        shared_file.flush()
    except OSError as error:
        shared_file.truncate(start)
        if error.errno == errno.ENOSPC:
            raise data_errors.DataError(
                f"{file}: no space in {tempfile.gettempdir()} to decompress it; wanted room for "
                "all of it. Set TMPDIR, or prepare the data by m1-prepare."
            ) from None
        if error.errno is not None:  # such as a file without permission
            raise
        raise data_errors.DataError(
            f"{file}: not a whole {codec} file: {data_errors.shorten_reason(error)}. Copy it again."
        ) from None
    # By this path other processes of the user open the file, too.
    return ByteRange(epath.Path(f"/proc/{os.getpid()}/fd/{shared_file.fileno()}"), start, end)
