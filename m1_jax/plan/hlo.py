"""Counting the collectives of a compiled program from its HLO text.

Pure functions of text. `compiled.as_text()` fails inside XLA for some TPU programs; the compiler's
own dump of the same module (`after_optimizations.txt`, see `plan.py`) always exists.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

COLLECTIVE_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_DTYPE_BITS_PATTERN = re.compile(r"[a-z]+?(\d+)")
_ARRAY_PATTERN = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_COMPUTATION_PATTERN = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION_PATTERN = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLEES_PATTERN = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME_PATTERN = re.compile(r"%?([A-Za-z_][\w.\-]*)")
# Elsewhere, to_apply is what is done to single elements, and calls what has been counted before.
_CALLING_OPCODES = {"to_apply": ("call",), "calls": ("fusion", "async-start", "call")}


@dataclasses.dataclass(frozen=True)
class CollectiveTraffic:
    """count: executions in one run of the program. bytes: what one chip receives in all of them."""

    count: float = 0
    bytes: float = 0


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line: `shape` is text, `rest` everything after the opening bracket of the operands."""

    name: str
    shape: str
    opcode: str
    operands_and_attributes: str

    @property
    def operand_names(self) -> list[str]:
        return [
            m[1]
            for m in _NAME_PATTERN.finditer(
                _strip_types(_extract_operands(self.operands_and_attributes))
            )
        ]

    def called_computations(self) -> dict[str, list[str]]:
        """Return the computations that run inside this instruction, by attribute."""
        found = {}
        for attribute, names in _CALLEES_PATTERN.findall(self.operands_and_attributes):
            if self.opcode in _CALLING_OPCODES.get(attribute, (self.opcode,)):
                found[attribute] = [m[1] for m in _NAME_PATTERN.finditer(names)]
        return found


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A program: its computations by name, each a dict of instructions in order."""

    entry: str
    num_partitions: int
    computations: Mapping[str, Mapping[str, HloInstruction]]


def count_collectives(text: str) -> tuple[dict[str, CollectiveTraffic], int]:
    """Return traffic by kind, and the number of loops whose length the text does not tell.

    Loops count as often as they run (an unknown one once), every branch of a conditional once, an
    asynchronous pair once. Bytes are those that one chip of n in a group receives:
      all-gather: its output less the own shard. reduce-scatter: its input less the own shard.
      all-reduce: 2 (n - 1) / n of its size, a reduce-scatter and an all-gather.
      all-to-all: (n - 1) / n of its size. ragged-all-to-all: the same of the smaller of its two
      buffers, since the other one is sized for the worst case.
      collective-permute, -broadcast: its output.
    """
    module = parse_module(text)
    runs, unknown = count_executions(module)
    found: dict[str, list[float]] = {}
    for name, times in runs.items():
        for instruction in module.computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVE_KINDS and times:
                n = parse_group_size(instruction.operands_and_attributes, module.num_partitions)
                kind, size = _kind_and_received_bytes(module, name, instruction, kind, n)
                entry = found.setdefault(kind, [0.0, 0.0])
                entry[0] += times
                entry[1] += times * size
    return {
        kind: CollectiveTraffic(*found[kind]) for kind in COLLECTIVE_KINDS if kind in found
    }, unknown


def parse_module(text: str) -> HloModule:
    """Read HLO text.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, dict[str, HloInstruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION_PATTERN.match(line)
            if header and " -> " in line:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION_PATTERN.match(line)
            if found:
                current[found[1]] = HloInstruction(*found.groups())
    if entry is None:
        raise ValueError("no ENTRY computation; wanted the text of a compiled HLO module")
    partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
    return HloModule(entry, int(partitions[1]) if partitions else 1, computations)


def count_executions(module: HloModule) -> tuple[dict[str, float], int]:
    """Return how often each computation runs, and the number of loops of unknown length."""
    edges: dict[str, dict[str, float]] = {}
    unknown = 0
    for name, instructions in module.computations.items():
        calls: dict[str, float] = collections.defaultdict(float)
        for instruction in instructions.values():
            trips = 1
            if instruction.opcode == "while":
                known = trip_count(module, name, instruction)
                unknown += known is None
                trips = 1 if known is None else known
            for callees in instruction.called_computations().values():
                for callee in callees:
                    calls[callee] += trips
        edges[name] = {callee: n for callee, n in calls.items() if callee in module.computations}
    runs = dict.fromkeys(module.computations, 0.0)
    runs[module.entry] = 1.0
    for name in _sort_callers_first(module.entry, edges):
        for callee, times in edges[name].items():
            runs[callee] += runs[name] * times
    return runs, unknown


def trip_count(module: HloModule, caller: str, loop: HloInstruction) -> int | None:
    """Return how often a while loop runs: the compiler's own note, or read off `i < constant`.

    TPU programs carry no note. None where the condition is of another form.
    """
    noted = re.search(
        r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.operands_and_attributes
    )
    if noted:
        return int(noted[1])
    called = loop.called_computations()
    condition, body = (
        module.computations.get(called.get(name, [""])[0], {}) for name in ("condition", "body")
    )
    compares = [i for i in condition.values() if i.opcode == "compare"]
    if len(compares) != 1 or "direction=LT" not in compares[0].operands_and_attributes:
        return None
    counter, limit = (condition.get(name) for name in compares[0].operand_names)
    if counter is None or counter.opcode != "get-tuple-element" or limit is None:
        return None
    index = _parse_tuple_index(counter)
    start = _find_carry_start(module.computations[caller], loop, index) or 0
    end = _parse_constant(limit)
    if end is None and limit.opcode == "get-tuple-element":
        end = _find_carry_start(module.computations[caller], loop, _parse_tuple_index(limit))
    if end is None:
        return None
    return max(math.ceil((end - start) / _find_counter_step(body, index)), 0)


def parse_group_size(operands_and_attributes: str, num_partitions: int) -> int:
    """Return how many chips take part, from any of the three spellings of replica_groups."""
    mesh = re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", operands_and_attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(
            int(part) if part else sizes[name]
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        )
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", operands_and_attributes)
    if iota:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,\s]*)\}", operands_and_attributes)
    return len(listed[1].split(",")) if listed else num_partitions


def array_bytes(shape: str) -> float:
    """Return the bytes of a shape or of all arrays of a tuple shape."""
    total = 0.0
    for dtype, dims in _ARRAY_PATTERN.findall(shape):
        bits = 8 if dtype == "pred" else int(m[1]) if (m := _DTYPE_BITS_PATTERN.match(dtype)) else 0
        sizes = [int(size.lstrip("<=")) for size in dims.split(",") if size]
        total += math.prod(sizes) * bits / 8
    return total


def _kind_and_received_bytes(
    module, computation, instruction, kind, group_size
) -> tuple[str, float]:
    """Return (kind, bytes that one chip receives) of one execution."""
    parts = _split_tuple_shape(instruction.shape)
    paired = instruction.opcode.endswith("-start") and kind != "all-reduce"
    size = array_bytes(parts[1] if paired and len(parts) > 1 else instruction.shape)
    others = (group_size - 1) / group_size
    if kind == "all-reduce":
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if computation.startswith("all-reduce-scatter"):
            return "reduce-scatter", size * others
        return kind, 2 * size * others
    if kind == "reduce-scatter":
        return kind, size * (group_size - 1)
    if kind == "ragged-all-to-all":
        sent = module.computations[computation].get(instruction.operand_names[0])
        return kind, min(array_bytes(sent.shape) if sent else size, size) * others
    return kind, size if kind in ("collective-permute", "collective-broadcast") else size * others


def _sort_callers_first(entry: str, edges) -> list[str]:
    """Return the computations reachable from `entry`, every caller before what it calls."""
    order, done, stack = [], set(), [(entry, False)]
    while stack:
        name, left = stack.pop()
        if left:
            order.append(name)
        elif name not in done:
            done.add(name)
            stack.append((name, True))
            stack.extend((callee, False) for callee in edges[name])
    return order[::-1]


def _extract_operands(operands_and_attributes: str) -> str:
    """Return what stands before the bracket that closes the operands."""
    depth = 1
    for place, char in enumerate(operands_and_attributes):
        depth += (char in "({[") - (char in ")}]")
        if depth == 0:
            return operands_and_attributes[:place]
    return operands_and_attributes


def _strip_types(operands: str) -> str:
    """Leave names alone: some printers write `f32[8]{0} %x` for each operand."""
    if "%" in operands:
        return " ".join(re.findall(r"%[\w.\-]+", operands))
    return re.sub(r"\b[a-z]\w*\[[^\]]*\](\{[^}]*\})?", "", operands)


def _split_tuple_shape(shape: str) -> list[str]:
    """Split a tuple shape at its outermost commas; a plain shape is its own only element."""
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


def _parse_tuple_index(instruction: HloInstruction) -> int:
    found = re.search(r"index=(\d+)", instruction.operands_and_attributes)
    assert found is not None, instruction
    return int(found[1])


def _parse_constant(instruction: HloInstruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    found = re.match(r"(-?\d+)\)", instruction.operands_and_attributes)
    return int(found[1]) if found else None


def _find_carry_start(instructions, loop: HloInstruction, index: int) -> int | None:
    """Return the constant that a loop's carry starts with at `index`, if it is one."""
    start = instructions.get(loop.operand_names[0])
    for _ in range(4):  # through copies of the tuple and of the element
        if start is None or start.opcode not in ("tuple", "copy", "bitcast"):
            break
        start = instructions.get(start.operand_names[index if start.opcode == "tuple" else 0])
    return _parse_constant(start)


def _find_counter_step(body, index: int) -> int:
    """Return what the body adds to the counter; 1 where it cannot be read."""
    root = list(body.values())[-1] if body else None
    if root is None or root.opcode != "tuple":
        return 1
    new = body.get(root.operand_names[index])
    while new is not None and new.opcode in ("copy", "bitcast"):
        new = body.get(new.operand_names[0])
    if new is None or new.opcode != "add":
        return 1
    steps = [_parse_constant(body.get(name)) for name in new.operand_names]
    return next((step for step in steps if step), 1)
