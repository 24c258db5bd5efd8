"""The bytes of HBM that an instruction of a compiled program reads and writes.

A fusion reads of an operand only what its slices take, and an update in place writes only the
update. What lies in VMEM moves no byte of HBM.
"""

import re
from collections.abc import Iterator

from m1_jax.plan import hlo

_MAX_DEPTH = 8  # of fusions and reshapes within each other
_SLICES = ("dynamic-slice", "slice", "gather")
_RESHAPES = ("bitcast", "reshape")


class TrafficCounter:
    """Counts the traffic of the instructions of one module."""

    def __init__(self, module: hlo.HloModule):
        self._module = module
        self._operands: dict[tuple[str, str], list[str]] = {}

    def count_bytes(self, computation: str, instruction: hlo.HloInstruction) -> float:
        """Return the bytes of HBM that one execution reads and writes."""
        body = self._body(computation)
        operands = self._operands_of(computation, instruction)
        shapes = [body[name].shape if name in body else "" for name in operands]
        aliased = re.search(
            r'"aliasing_operands":\{"lists":\[\{"indices":\["(\d+)"',
            instruction.operands_and_attributes,
        )
        inner = fused_computation(instruction)
        has_scatter = any(i.opcode == "scatter" for _, i in self.iterate_fused(instruction))
        if aliased and has_scatter:  # in place: what is scattered, there and back
            updates = (shape for k, shape in enumerate(shapes) if k != int(aliased[1]))
            return 2 * sum(map(hlo.hbm_bytes, updates))
        if inner and self._body(inner):
            read = sum(
                min(self._count_fusion_reads(instruction, {k}), hlo.hbm_bytes(shape))
                for k, shape in enumerate(shapes)
            )
            return read + self._count_written(inner, self._root_name(inner), instruction.shape)
        if instruction.opcode in _SLICES:
            return 2 * hlo.hbm_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * hlo.hbm_bytes(shapes[1])
        return sum(map(hlo.hbm_bytes, shapes)) + hlo.hbm_bytes(instruction.shape)

    def iterate_fused(
        self, instruction: hlo.HloInstruction
    ) -> Iterator[tuple[str, hlo.HloInstruction]]:
        """Yield (computation, instruction) of all that a fusion fuses, nested ones too."""
        stack = [fused_computation(instruction)]
        while stack:
            name = stack.pop()
            for fused in self._body(name).values():
                yield name, fused
                if fused.opcode == "fusion":
                    stack.append(fused_computation(fused))

    def _body(self, computation: str):
        return self._module.computations.get(computation, {})

    def _operands_of(self, computation: str, instruction: hlo.HloInstruction) -> list[str]:
        key = computation, instruction.name
        if key not in self._operands:
            self._operands[key] = instruction.operand_names
        return self._operands[key]

    def _root_name(self, computation: str) -> str:
        return list(self._body(computation))[-1]  # the last instruction is the result

    def _count_read(self, computation: str, name: str, depth: int = 0) -> float:
        """Return the bytes that a fused computation reads of one of its values."""
        body = self._body(computation)
        whole_bytes, total = hlo.hbm_bytes(body[name].shape), 0.0
        for user in body.values():
            operands = self._operands_of(computation, user)
            if name not in operands:
                continue
            is_first = operands[0] == name
            if user.opcode in _SLICES and is_first:
                total += hlo.array_bytes(user.shape)
            elif user.opcode == "dynamic-update-slice" and is_first and name not in operands[1:]:
                continue
            elif user.opcode in _RESHAPES and depth < _MAX_DEPTH:
                total += self._count_read(computation, user.name, depth + 1)
            elif user.opcode == "fusion" and depth < _MAX_DEPTH:
                positions = {k for k, operand in enumerate(operands) if operand == name}
                total += self._count_fusion_reads(user, positions, depth + 1)
            else:
                return whole_bytes
        return min(total, whole_bytes)

    def _count_fusion_reads(
        self, fusion: hlo.HloInstruction, positions: set[int], depth: int = 0
    ) -> float:
        """Return the bytes that a fusion reads of the operands at these positions."""
        inner = fused_computation(fusion)
        parameters = {}
        for instruction in self._body(inner).values():
            number = re.match(r"(\d+)", instruction.operands_and_attributes)
            if instruction.opcode == "parameter" and number:
                parameters[int(number[1])] = instruction.name
        return sum(
            self._count_read(inner, parameters[k], depth) for k in positions if k in parameters
        )

    def _count_written(self, computation: str, name: str, shape: str, depth: int = 0) -> float:
        """Return the bytes that a fused computation writes. An update counts twice."""
        body = self._body(computation)
        result = body.get(name)
        if result is None or depth > _MAX_DEPTH:
            return hlo.hbm_bytes(shape)
        operands = self._operands_of(computation, result)
        if result.opcode == "dynamic-update-slice" and operands[1] in body:
            update_bytes = hlo.array_bytes(body[operands[1]].shape)
            return 2 * update_bytes if hlo.hbm_bytes(shape) else 0.0
        if result.opcode in _RESHAPES and operands:
            return self._count_written(computation, operands[0], shape, depth + 1)
        if result.opcode == "tuple":
            parts = zip(operands, hlo.split_tuple_shape(shape), strict=False)
            return sum(self._count_written(computation, o, part, depth + 1) for o, part in parts)
        inner = fused_computation(result)
        if result.opcode == "fusion" and self._body(inner):
            return self._count_written(inner, self._root_name(inner), shape, depth + 1)
        return hlo.hbm_bytes(shape)


def fused_computation(instruction: hlo.HloInstruction) -> str:
    """Return the name of what a fusion fuses, and an empty one for any other instruction."""
    if instruction.opcode != "fusion":
        return ""
    return instruction.called_computations().get("calls", [""])[0]
