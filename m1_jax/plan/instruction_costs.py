"""What one instruction of a compiled program costs: its kind, seconds, bytes.

The compiler's dump `*.after_codegen.txt` has its cost model's cycles in `window_config` of every
fusion, copy and reduction. They are good for products. For other loops they are up to 20 times
those of a simulated schedule, while the bytes are about right. So every instruction has two costs:
a low one by bytes and a high one by the cost model.
"""

import dataclasses
import re
from collections.abc import Sequence

from m1_jax.plan import chip_specs, hbm_traffic, hlo, source_frames

# Shares of the peak that are reached where the compiler gives no cycles.
LOOP_HBM_SHARE, PRODUCT_FLOPS_SHARE = 0.85, 0.7
# The least that an instruction takes: a scalar's, and any other's.
_SCALAR_SECS, _LEAST_SECS = 5e-8, 7e-7
_NO_ESTIMATE = 1 << 60  # the compiler writes the largest integer where it has none

FREE_OPCODES = frozenset(
    {
        "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
        "partition-id", "replica-id", "iota", "reshape", "opt-barrier", "domain",
        "add-dependency", "async-update",
    }
)  # fmt: skip
_PRODUCT_OPCODES = frozenset({"convolution", "dot"})
_MOVE_OPCODES = frozenset(
    {
        "broadcast", "copy", "convert", "concatenate", "pad", "reverse", "slice", "dynamic-slice",
        "dynamic-update-slice", "transpose",
    }
)  # fmt: skip
# Operations of the vector unit that take several steps.
_SLOW_OPCODES = frozenset(
    {
        "exponential", "log", "tanh", "rsqrt", "sqrt", "divide", "logistic", "power", "sine",
        "cosine", "remainder", "exponential-minus-one", "log-plus-one",
    }
)  # fmt: skip
_SLOW_STEPS, _MOVE_STEPS = 4, 0.5
_ELEMENTS_PER_CYCLE = 2048  # two operations a cycle on registers of 8 x 128
# Tiles of two rows, as a ragged all-to-all wants them, waste most of a register. The factors were
# fitted to a simulated schedule.
_THIN_TILE, _THIN_MOVE_STEPS, _THIN_STEPS = "T(2,128)", 20, 8

# The kinds of a report, by the module that an instruction came from. Other instructions have the
# kind of their opcode.
_KINDS_BY_MODULE = (
    ("m1_jax.experts", "experts"),
    ("m1_jax.expert_exchange", "exchange"),
    ("m1_jax.exchange_plan", "exchange"),
    ("m1_jax.ring_attention", "softmax attention"),
    ("m1_jax.splash_attention", "softmax attention"),
    ("m1_jax.serving.softmax", "softmax attention"),
    ("pallas_kernels.paged_attention", "softmax attention"),
    ("pallas_kernels", "lightning attention"),
    ("m1_jax.serving.lightning", "lightning attention"),
    ("m1_jax.context_parallel", "lightning attention"),
    ("train.optim", "optimizer"),
    ("infer.execution.sampling", "sampling"),
)


@dataclasses.dataclass(frozen=True)
class InstructionCost:
    """The cost of one execution of one instruction.

    Attributes:
      kind: as the report sums it up, like "dense products".
      low_secs: time by the bytes model.
      high_secs: time by the compiler's cost model.
      num_bytes: of HBM read and written. Of a collective: bytes that a device receives.
      detail: words for the report, like what bounds a kernel.
    """

    kind: str
    low_secs: float
    high_secs: float
    num_bytes: float
    detail: str = ""


def find_kind_by_source(frames: Sequence[source_frames.SourceFrame]) -> str | None:
    """Return the kind of the innermost call that has one."""
    for frame in frames:
        for module, kind in _KINDS_BY_MODULE:
            if frame.module == module or frame.module.startswith(f"{module}."):
                return kind
    return None


class InstructionPricer:
    """Prices the instructions of one module that are no collective and no kernel."""

    def __init__(self, module: hlo.HloModule, chip: chip_specs.ChipSpec):
        self._module, self._chip = module, chip
        self.traffic = hbm_traffic.TrafficCounter(module)

    def price(
        self,
        computation: str,
        instruction: hlo.HloInstruction,
        frames: Sequence[source_frames.SourceFrame],
    ) -> InstructionCost:
        """Return the cost of a fusion, a copy or a single operation."""
        num_bytes = self.traffic.count_bytes(computation, instruction)
        hbm_secs = num_bytes / self._chip.hbm_bytes_per_sec
        cycles = read_cycles(instruction)
        cycle_secs = cycles / self._chip.clock_hz if cycles else None
        opcodes = self._opcodes_of(instruction)
        kind = find_kind_by_source(frames) or _find_kind_by_opcode(opcodes)
        if opcodes & _PRODUCT_OPCODES:
            rate = PRODUCT_FLOPS_SHARE * self._chip.flops_per_sec
            secs = cycle_secs or self.count_product_flops(instruction) / rate
            return InstructionCost(kind, max(secs, hbm_secs), max(secs, hbm_secs), num_bytes)
        is_scalar = all(not array.dims for array in hlo.parse_arrays(instruction.shape))
        vector_secs = self._count_vector_cycles(computation, instruction) / self._chip.clock_hz
        least_secs = _SCALAR_SECS if is_scalar else _LEAST_SECS
        bytes_secs = max(hbm_secs / LOOP_HBM_SHARE, vector_secs, least_secs)
        if cycle_secs is None:
            return InstructionCost(kind, bytes_secs, bytes_secs, num_bytes)
        high_secs = max(cycle_secs, hbm_secs)
        return InstructionCost(kind, min(bytes_secs, high_secs), high_secs, num_bytes)

    def count_product_flops(self, instruction: hlo.HloInstruction) -> float:
        """Return the operations of the products in a fusion, six passes for exact float32."""
        total = 0.0
        for name, fused in self.traffic.iterate_fused(instruction):
            if fused.opcode not in _PRODUCT_OPCODES:
                continue
            body = self._module.computations[name]
            left, right = (body.get(operand) for operand in fused.operand_names[:2])
            if left is None or right is None:
                continue
            labels = re.search(r"dim_labels=\w+_(\w+)->", fused.operands_and_attributes)
            (result, *_), (matrix, *_) = map(hlo.parse_arrays, (fused.shape, right.shape))
            inner = matrix.dims[labels[1].index("i")] if labels else 1
            is_exact = "operand_precision={highest" in fused.operands_and_attributes
            passes = 6 if is_exact and left.shape.startswith("f32") else 1
            total += 2.0 * result.size * inner * passes
        return total

    def has_product(self, instruction: hlo.HloInstruction) -> bool:
        return bool(self._opcodes_of(instruction) & _PRODUCT_OPCODES)

    def _opcodes_of(self, instruction: hlo.HloInstruction) -> set[str]:
        if instruction.opcode != "fusion":
            return {instruction.opcode}
        return {fused.opcode for _, fused in self.traffic.iterate_fused(instruction)}

    def _count_vector_cycles(self, computation: str, instruction: hlo.HloInstruction) -> float:
        """Return roughly the cycles of the vector unit."""
        is_fusion = instruction.opcode == "fusion"
        fused_instructions = (
            self.traffic.iterate_fused(instruction) if is_fusion else [(computation, instruction)]
        )
        total = 0.0
        for name, fused in fused_instructions:
            if fused.opcode in FREE_OPCODES or fused.opcode in {"fusion", *_PRODUCT_OPCODES}:
                continue
            # A reduction works on its operand, and an update in place on the update.
            positions = {"reduce": 0, "reduce-window": 0, "dynamic-update-slice": 1}
            source = fused
            if fused.opcode in positions:
                operand = fused.operand_names[positions[fused.opcode]]
                source = self._module.computations[name].get(operand, fused)
            arrays = hlo.parse_arrays(source.shape)
            if arrays:
                total += arrays[0].size * _count_vector_steps(fused.opcode, arrays[0])
        return total / _ELEMENTS_PER_CYCLE / self._chip.num_tensor_cores


def read_cycles(instruction: hlo.HloInstruction) -> int | None:
    """Return the cycles of the compiler's cost model, None where it has none."""
    match = re.search(
        r'"window_config":\{.*?"estimated_cycles":"(\d+)"', instruction.operands_and_attributes
    )
    cycles = int(match[1]) if match else 0
    return cycles if 0 < cycles < _NO_ESTIMATE else None


def _count_vector_steps(opcode: str, array: hlo.HloArray) -> float:
    is_move = opcode in _MOVE_OPCODES
    steps = _SLOW_STEPS if opcode in _SLOW_OPCODES else _MOVE_STEPS if is_move else 1.0
    if _THIN_TILE in array.layout:
        steps *= _THIN_MOVE_STEPS if is_move else _THIN_STEPS
    return steps


def _find_kind_by_opcode(opcodes: set[str]) -> str:
    if opcodes & _PRODUCT_OPCODES:
        return "dense products"
    if opcodes & {"gather", "scatter", "sort"}:
        return "gathers and scatters of rows"
    if not opcodes - FREE_OPCODES - _MOVE_OPCODES - {"fusion"}:
        return "copies"
    return "elementwise"
