"""Tests of infer.text_printer: streams that end before the texts."""

import io
import os
import subprocess
import sys

import pytest

from infer import text_printer


def open_pipe():
    """Return a pipe's reading end and a text stream on its other end."""
    reader, writer = os.pipe()
    return reader, os.fdopen(writer, "w", encoding="utf-8")


def test_a_reader_that_goes_away_is_no_exception():
    reader, stream = open_pipe()
    with stream:
        pipe = text_printer.PipeWriter(stream)
        pipe.write("one\n")
        assert os.read(reader, 100) == b"one\n"
        os.close(reader)
        pipe.write("two\n")
        assert isinstance(pipe.error, BrokenPipeError)
        pipe.write("three\n")
        pipe.flush()
    # Closing the stream has written "two" to nowhere.


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_kept_as_the_error():
    with open("/dev/full", "w") as stream:
        pipe = text_printer.PipeWriter(stream)
        pipe.write("x")
        assert pipe.error is not None
        assert "No space left" in str(pipe.error)


def test_what_the_encoding_lacks_is_escaped():
    data = io.BytesIO()
    pipe = text_printer.PipeWriter(io.TextIOWrapper(data, encoding="ascii"))
    pipe.write("é a\U0001f600\n")
    assert data.getvalue() == b"\\xe9 a\\U0001f600\n"


def test_a_process_ends_quietly():
    """The interpreter writes buffers at its end, which must not fail again."""
    code = (
        "import sys; from infer import text_printer; w = text_printer.PipeWriter(sys.stdout);"
        "[w.write('y' * 999) for _ in range(999)]; sys.exit(7 if w.error else 0)"
    )
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", code], stdout=writer, stderr=-1) as process:
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 7


def test_lines_of_several_texts_are_marked():
    out = io.StringIO()
    printer = text_printer.TextPrinter(2, stream=True, out=out)
    printer.push(1, "a", last=False)
    printer.push(0, "b\nc", last=False)
    printer.push(1, "", last=True)
    printer.push(0, "", last=True)
    assert out.getvalue() == "[0] b\n[1] a\n[0] c\n"
