"""The time of a collective: bytes received over the links of its algorithm, and a start.

A gather or a reduction in one dimension of the torus uses two links, and in two dimensions four.
The compiler writes the algorithm into its dump.
"""

import re

from m1_jax.plan import chip_specs, collectives, hlo, instruction_costs
from m1_jax.plan.time_assumptions import EXCHANGE_HOPS

_START_SECS, _HOP_SECS, _MAX_HOPS = 2e-6, 0.5e-6, 32
_ALL_TO_ALLS = ("all-to-all", "ragged-all-to-all")


def price_collective(
    module: hlo.HloModule,
    chip: chip_specs.ChipSpec,
    computation: str,
    instruction: hlo.HloInstruction,
    fusion_attributes: str = "",
) -> instruction_costs.InstructionCost:
    """Return the cost of a collective.

    Args:
      computation: the computation that `instruction` is in.
      fusion_attributes: those of the fusion around it, where the algorithm may be written.
    """
    attributes = fusion_attributes + instruction.operands_and_attributes
    group_size = collectives.parse_group_size(
        instruction.operands_and_attributes, module.num_partitions
    )
    opcode = instruction.opcode.removesuffix("-start")
    kind, num_bytes = collectives.kind_and_received_bytes(
        module, computation, instruction, opcode, group_size
    )
    secs = num_bytes / (_count_links(kind, attributes) * chip.link_bytes_per_sec)
    if kind in _ALL_TO_ALLS:
        secs *= EXCHANGE_HOPS
    secs += _START_SECS + _HOP_SECS * min(group_size, _MAX_HOPS)
    report_kind = "exchange" if kind in _ALL_TO_ALLS else kind
    return instruction_costs.InstructionCost(report_kind, secs, secs, num_bytes, kind)


def _count_links(kind: str, attributes: str) -> int:
    if kind in _ALL_TO_ALLS:
        return 2
    if kind == "collective-permute":
        return 1
    algorithm = re.search(r'"emitter":"(\d)D', attributes)
    if algorithm:
        return 2 * int(algorithm[1])
    return 4 if "ND{" in attributes else 2
