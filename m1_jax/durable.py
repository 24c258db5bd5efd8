"""Writing files that survive a crash, whole or not at all."""

import os
import pathlib
from typing import IO


def flush_to_disk(file: IO) -> None:
    """Bring what was written to an open file to the disk, past all buffers."""
    file.flush()
    os.fsync(file.fileno())


def write_text_atomically(path: pathlib.Path, text: str) -> None:
    """Replace a file in one go: a reader, also after a crash, sees the old or the new text.

    The text grows in `path`.part. It reaches the disk before the rename, because a rename may
    survive a crash that the bytes do not.
    """
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        flush_to_disk(file)
    part.replace(path)
