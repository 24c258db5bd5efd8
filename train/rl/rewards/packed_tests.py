"""Tests that LiveCodeBench has as base64 of zlib of a pickle of JSON text.

A pickle is a program, which may run any code. Of one that holds a single text, that text is read
from the opcodes, and no pickle is ever run. Any other opcode is refused.
"""

import base64
import json
import pickletools
import zlib
from typing import Any

_MAX_BYTES = 2**30  # unpacked: a few bytes could become any number of them
_TEXT_OPCODES = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE")
# They frame a pickle, and note its only value for later use.
_FRAME_OPCODES = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


def unpack_tests(text: str) -> Any:
    """Return the value of the JSON that was packed.

    Raises:
      ValueError: text that was packed otherwise, or a pickle of anything but one text.
    """
    try:
        packed = base64.b64decode(text, validate=True)
        inflater = zlib.decompressobj()
        data = inflater.decompress(packed, _MAX_BYTES)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"it is no base64 of zlib ({error})") from None
    if not inflater.eof:
        problem = f"has more than {_MAX_BYTES} bytes" if inflater.unconsumed_tail else "is cut off"
        raise ValueError(f"its content {problem}")
    try:
        return json.loads(_read_pickled_text(data))
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _read_pickled_text(data: bytes) -> str:
    """Return the text that a pickle holds, without running it.

    Raises:
      ValueError: no pickle, or one that holds anything else.
    """
    texts = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _TEXT_OPCODES:
            texts.append(argument)
        elif opcode.name not in _FRAME_OPCODES:
            raise ValueError(f"its pickle has the opcode {opcode.name}; wanted one text alone")
    if len(texts) != 1:
        raise ValueError(f"its pickle has {len(texts)} texts; wanted one")
    return texts[0]
