"""Texts of several outputs on one stream, as they come."""

import io
import os
from typing import Any, Protocol, TextIO


class TextStream(Protocol):
    """What texts are printed to."""

    def write(self, text: str, /) -> Any: ...

    def flush(self) -> Any: ...


class TextPrinter:
    """Prints texts as they come.

    A single text is printed as it is. Several are printed in whole lines, each marked `[i] `.
    """

    def __init__(self, num_texts: int, stream: bool, out: TextStream):
        self._unprinted = [""] * num_texts  # the rest of each text, by index
        self._stream, self._out = stream, out

    def push(self, index: int, new_text: str, last: bool) -> None:
        """Take the next part of a text. `last` ends the text."""
        text = self._unprinted[index] + new_text
        self._unprinted[index] = ""
        if not (self._stream or last):
            self._unprinted[index] = text
            return
        if last and not text.endswith("\n"):
            text += "\n"
        if len(self._unprinted) > 1:
            # The last element is a line without its end yet, or empty.
            *lines, self._unprinted[index] = text.split("\n")
            text = "".join(f"[{index}] {line}\n" for line in lines)
        if text:
            self._out.write(text)
            self._out.flush()


class PipeWriter:
    """A stream that may end before the texts: its reader may go away, as `head` does.

    What is written after an error is dropped. So a callback of the engine, which writes, never
    raises. Characters that the stream's encoding does not have are written as escapes.

    Attributes:
      error: the first error of the stream, a BrokenPipeError if its reader went away.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str, /) -> None:
        """Write and flush."""
        if self.error is None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except OSError as error:
                self.error = error
                self._drop_buffer()

    def flush(self) -> None:
        """Do nothing, as `write` flushes."""

    def _drop_buffer(self) -> None:
        """Let what the stream still holds go nowhere: Python writes it at the process's end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
