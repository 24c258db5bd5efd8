"""Which of our own functions an instruction of a compiled program came from.

The dump of the TPU compiler has four tables before its computations, and each instruction names a
row of the last one:

    FileNames       1 "/somewhere/m1_jax/moe.py"
    FunctionNames   1 "MoE.route"
    FileLocations   1 {file_name_id=1 function_name_id=1 line=140 ...}
    StackFrames     1 {file_location_id=1 parent_frame_id=2}
"""

import dataclasses
import re
from collections.abc import Mapping

_OWN_FILE_PATTERN = re.compile(r".*/((?:m1_jax|pallas_kernels|train|infer)/.+)\.py$")
_TABLE_ROW_PATTERN = re.compile(r"(\d+) (.*)")
# Parts of an operation's name that are no scope of ours: what JAX writes for transformations.
_NO_SCOPE_PATTERN = re.compile(
    r"(transpose|jit|jvp|vmap)\(.*|checkpoint|remat\w*|rematted_computation|shard_map|while|body|cond"
    r"|closed_call|branch_\w+|custom_\w+"
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


@dataclasses.dataclass(frozen=True)
class SourceFrame:
    """A call in one of our own files.

    Attributes:
      module: dotted name, like m1_jax.moe.
      function: without the class or the function that it is defined in.
      line: number of the line in the file.
    """

    module: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line} {self.function}"


def parse_source_frames(text: str) -> dict[int, list[SourceFrame]]:
    """Return the calls in our own files by stack frame, innermost first."""
    tables = {title: _parse_table(text, title) for title in _TABLES}
    chains = {}
    for start in tables["StackFrames"]:
        number, chain = start, []
        while number in tables["StackFrames"]:
            row = tables["StackFrames"][number]
            frame = _resolve_frame(tables, row)
            chain += [frame] if frame else []
            parent = _parse_number(row, "parent_frame_id")
            if parent == number:  # the outermost frame is its own parent
                break
            number = parent
        chains[start] = chain
    return chains


def find_frames(
    frames: Mapping[int, list[SourceFrame]], operands_and_attributes: str
) -> list[SourceFrame]:
    """Return the calls that an instruction came from, innermost first."""
    match = re.search(r"stack_frame_id=(\d+)", operands_and_attributes)
    return frames.get(int(match[1]), []) if match else []


def find_scopes(operands_and_attributes: str) -> str:
    """Return the named scopes of an instruction and its operation, like experts/dot_general.

    Where a program has several passes, "backward" stands before those of the gradient.
    """
    match = re.search(r'op_name="([^"]*)"', operands_and_attributes)
    if not match:
        return ""
    scopes = [part for part in match[1].split("/") if not _NO_SCOPE_PATTERN.fullmatch(part)]
    return "/".join((["backward"] if "transpose(" in match[1] else []) + scopes)


def _parse_table(text: str, title: str) -> dict[int, str]:
    rows: dict[int, str] = {}
    start = text.find(f"\n{title}\n")
    if start < 0:
        return rows
    position = start + len(title) + 2
    while match := _TABLE_ROW_PATTERN.match(text, position):
        rows[int(match[1])] = match[2]
        position = match.end() + 1
    return rows


def _parse_number(row: str, key: str) -> int:
    match = re.search(rf"{key}=(\d+)", row)
    return int(match[1]) if match else 0


def _resolve_frame(tables: Mapping[str, Mapping[int, str]], row: str) -> SourceFrame | None:
    """Return a row of the last table as a frame, and None where it is of another package."""
    location = tables["FileLocations"].get(_parse_number(row, "file_location_id"), "")
    path = tables["FileNames"].get(_parse_number(location, "file_name_id"), "").strip('"')
    match = _OWN_FILE_PATTERN.match(path)
    if not match:
        return None
    name = tables["FunctionNames"].get(_parse_number(location, "function_name_id"), "").strip('"')
    # A lambda or a comprehension is called by the name of the function around it.
    parts = [part for part in name.split(".") if "<" not in part]
    function = parts[-1] if parts else name
    return SourceFrame(match[1].replace("/", "."), function, _parse_number(location, "line"))
