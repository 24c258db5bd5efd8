"""Writing files so that a crash leaves the old text or the new text, never a part of it."""

import os
import pathlib
from typing import IO


def flush_to_disk(file: IO) -> None:
    """Bring an open file's content to the disk, past all buffers."""
    file.flush()  # Python's buffer
    os.fsync(file.fileno())  # the operating system's


def write_text_atomically(path: pathlib.Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new one, even after a crash.

    The text is first written to `path`.part, in the same directory, because a rename works within
    one file system only.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        # Before the rename: otherwise a crash could keep the new name and lose the bytes.
        flush_to_disk(file)
    part.replace(path)
