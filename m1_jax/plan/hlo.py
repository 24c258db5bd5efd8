"""Reading the HLO text of a compiled program: computations, instructions, shapes.

Pure functions of text. `compiled.as_text()` fails inside XLA for some TPU programs. The compiler's
own dump of the same module (`after_optimizations.txt`, see `aot.py`) always exists.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_DTYPE_BITS_PATTERN = re.compile(r"[a-z]+?(\d+)")
_ARRAY_PATTERN = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
# A layout names the memory that an array lies in, where that is not HBM.
_OTHER_MEMORY_PATTERN = re.compile(r"S\([1-9]\d*\)")
# The first line of a computation, and one line in it.
_COMPUTATION_PATTERN = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION_PATTERN = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLEES_PATTERN = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME_PATTERN = re.compile(r"%?([A-Za-z_][\w.\-]*)")
# The opcodes that run the computation an attribute names, by attribute. Elsewhere, `to_apply`
# combines single elements (the sum of an all-reduce), and `calls` repeats what has been counted at
# its start.
_CALLING_OPCODES = {"to_apply": ("call",), "calls": ("fusion", "async-start", "call")}
_HEADER_CHARS = 100_000  # the module's first line, with its attributes, is within


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shape: text of the result's shape, a tuple's in round brackets.
      opcode: like all-gather-start.
      operands_and_attributes: everything after the bracket that opens the operands.
    """

    name: str
    shape: str
    opcode: str
    operands_and_attributes: str

    @property
    def operand_names(self) -> list[str]:
        operands = _strip_types(_extract_operands(self.operands_and_attributes))
        return [match[1] for match in _NAME_PATTERN.finditer(operands)]

    @property
    def is_start(self) -> bool:
        """Whether an asynchronous operation begins here."""
        return self.opcode.endswith("-start")

    def called_computations(self) -> dict[str, list[str]]:
        """Return the computations that run inside this instruction, by attribute."""
        callees = {}
        for attribute, names in _CALLEES_PATTERN.findall(self.operands_and_attributes):
            # Any opcode may have a body, a condition or branches.
            if self.opcode in _CALLING_OPCODES.get(attribute, (self.opcode,)):
                callees[attribute] = [match[1] for match in _NAME_PATTERN.finditer(names)]
        return callees


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A program.

    Attributes:
      entry: name of the computation that runs first.
      num_partitions: chips that run the program together.
      computations: the instructions of each computation by name, in order, by its name.
    """

    entry: str
    num_partitions: int
    computations: Mapping[str, Mapping[str, HloInstruction]]


def parse_module(text: str) -> HloModule:
    """Read HLO text.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, dict[str, HloInstruction]] = {}
    entry, current = None, None
    for line in _join_broken_lines(text):
        if current is None:
            header = _COMPUTATION_PATTERN.match(line)
            # Tables of file names, before the computations, have no result type.
            if header and " -> " in line:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            match = _INSTRUCTION_PATTERN.match(line)
            if match:
                current[match[1]] = HloInstruction(*match.groups())
    if entry is None:
        raise ValueError("no ENTRY computation; wanted the text of a compiled HLO module")
    partitions = re.search(r"num_partitions=(\d+)", text[:_HEADER_CHARS])
    return HloModule(entry, int(partitions[1]) if partitions else 1, computations)


@dataclasses.dataclass(frozen=True)
class HloArray:
    """One array of a shape.

    Attributes:
      dtype: like bf16.
      dims: sizes. That of a dynamic dimension is its bound.
      layout: text of order, tiles and memory in curly brackets. Empty where there is none.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        # A dtype without a number, like token, has no bytes.
        match = _DTYPE_BITS_PATTERN.match(self.dtype)
        bits = 8 if self.dtype == "pred" else int(match[1]) if match else 0
        return self.size * bits / 8

    @property
    def is_in_hbm(self) -> bool:
        return not _OTHER_MEMORY_PATTERN.search(self.layout)


def parse_arrays(shape: str) -> list[HloArray]:
    """Return the arrays of a shape, those of a tuple in order."""
    return [
        # A bounded dynamic dimension is printed as <=8.
        HloArray(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _ARRAY_PATTERN.findall(shape)
    ]


def _join_broken_lines(text: str) -> Iterator[str]:
    """Yield lines, with those joined that a kernel's metadata breaks.

    The metadata of some kernels (jax's splash attention) are JSON on lines of their own, and the
    rest of the instruction stands behind the last one, which begins with brackets.
    """
    parts: list[str] = []
    for line in text.splitlines():
        if parts:
            parts.append(line)
            if line.startswith("}"):
                yield " ".join(parts)
                parts = []
        elif line.startswith("  ") and line.endswith("{"):
            parts = [line]
        else:
            yield line
    yield from parts


def array_bytes(shape: str) -> float:
    """Return the bytes of a shape, or those of all arrays of a tuple shape."""
    return sum(array.num_bytes for array in parse_arrays(shape))


def hbm_bytes(shape: str) -> float:
    """Return the bytes of those arrays of a shape that lie in HBM."""
    return sum(array.num_bytes for array in parse_arrays(shape) if array.is_in_hbm)


def split_tuple_shape(shape: str) -> list[str]:
    """Split a tuple shape at its outermost commas. A plain shape is its own only element."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for char in shape[1:-1]:
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def parse_tuple_index(instruction: HloInstruction) -> int:
    """Return which element a get-tuple-element takes."""
    match = re.search(r"index=(\d+)", instruction.operands_and_attributes)
    assert match is not None, instruction
    return int(match[1])


def parse_constant(instruction: HloInstruction | None) -> int | None:
    """Return the value of an integer constant, and None for any other instruction."""
    if instruction is None or instruction.opcode != "constant":
        return None
    match = re.match(r"(-?\d+)\)", instruction.operands_and_attributes)
    return int(match[1]) if match else None


def _extract_operands(operands_and_attributes: str) -> str:
    """Return what stands before the bracket that closes the operands."""
    depth = 1  # the opening bracket is not in the text
    for position, char in enumerate(operands_and_attributes):
        depth += (char in "({[") - (char in ")}]")
        if depth == 0:
            return operands_and_attributes[:position]
    return operands_and_attributes


def _strip_types(operands: str) -> str:
    """Leave names alone: some printers write `f32[8]{0} %x` for each operand."""
    if "%" in operands:
        return " ".join(re.findall(r"%[\w.\-]+", operands))
    return re.sub(r"\b[a-z]\w*\[[^\]]*\](\{[^}]*\})?", "", operands)
