"""Counting the collectives of a compiled program, and the bytes that a chip receives by them."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from m1_jax.plan import executions, hlo, source_frames

_Frames = Sequence[source_frames.SourceFrame]

COLLECTIVE_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class CollectiveTraffic:
    """The collectives of one kind in one run of a program.

    Attributes:
      count: executions.
      bytes: what one chip receives in all of them.
    """

    count: float = 0
    bytes: float = 0


def count_collectives(
    text: str,
    find_trips: Callable[[_Frames], float | None] = lambda frames: None,
    find_branch_share: Callable[[_Frames], float] = lambda frames: 1.0,
) -> tuple[dict[str, CollectiveTraffic], int]:
    """Return traffic by kind, and the number of loops whose length nothing tells.

    Loops count as often as they run (an unknown one once), every branch of a conditional as often
    as `find_branch_share` says, an asynchronous pair once. Bytes are those that one chip of n in a
    group receives:
      all-gather: its output less the own shard.
      reduce-scatter: its input less the own shard.
      all-reduce: 2 (n - 1) / n of its size, a reduce-scatter and an all-gather.
      all-to-all: (n - 1) / n of its size.
      ragged-all-to-all: (n - 1) / n of the smaller of its two buffers, since the other one is sized
        for the worst case.
      collective-permute, collective-broadcast: its output.

    Args:
      find_trips, find_branch_share: as `TimeAssumptions` has them, by our own calls that a loop or
        a conditional came from.
    """
    module = hlo.parse_module(text)
    frames = source_frames.parse_source_frames(text)

    def find_frames(instruction: hlo.HloInstruction) -> _Frames:
        return source_frames.find_frames(frames, instruction.operands_and_attributes)

    runs, num_unknown = executions.count_executions(
        module,
        lambda loop: find_trips(find_frames(loop)),
        lambda conditional: find_branch_share(find_frames(conditional)),
    )
    totals: dict[str, list[float]] = {}  # executions and bytes, by kind
    for name, times in runs.items():
        for instruction in module.computations[name].values():
            # The end of an asynchronous pair, -done, is no kind, so a pair counts at its start.
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVE_KINDS and times:
                n = parse_group_size(instruction.operands_and_attributes, module.num_partitions)
                kind, size = kind_and_received_bytes(module, name, instruction, kind, n)
                total = totals.setdefault(kind, [0.0, 0.0])
                total[0] += times
                total[1] += times * size
    return {
        kind: CollectiveTraffic(*totals[kind]) for kind in COLLECTIVE_KINDS if kind in totals
    }, num_unknown


def parse_group_size(operands_and_attributes: str, num_partitions: int) -> int:
    """Return how many chips take part, from any of the three spellings of replica_groups."""
    # mesh['x'=2,'y'=4] {'y'}: the group is along y. {'y':(1)2} is a part of y, of size 2.
    mesh = re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\]\s*\{([^}]*)\}", operands_and_attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(
            int(part) if part else sizes[name]
            for name, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        )
    # [2,4]<=[8]: two groups of four.
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", operands_and_attributes)
    if iota:
        return int(iota[1])
    # {{0,1},{2,3}}: groups are of one size, so the first one tells. {}: all chips.
    listed = re.search(r"replica_groups=\{\{([\d,\s]*)\}", operands_and_attributes)
    return len(listed[1].split(",")) if listed else num_partitions


def kind_and_received_bytes(
    module: hlo.HloModule,
    computation: str,
    instruction: hlo.HloInstruction,
    kind: str,
    group_size: int,
) -> tuple[str, float]:
    """Return (kind, bytes that one chip receives) of one execution."""
    parts = hlo.split_tuple_shape(instruction.shape)
    # A start returns (operand, result, ...), but that of an all-reduce only its result.
    is_pair = instruction.opcode.endswith("-start") and kind != "all-reduce"
    size = hlo.array_bytes(parts[1] if is_pair and len(parts) > 1 else instruction.shape)
    peers_share = (group_size - 1) / group_size
    if kind == "all-reduce":
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if computation.startswith("all-reduce-scatter"):
            return "reduce-scatter", size * peers_share
        return kind, 2 * size * peers_share
    if kind == "reduce-scatter":
        return kind, size * (group_size - 1)  # `size` is that of the output, a shard
    if kind == "ragged-all-to-all":
        sent = module.computations[computation].get(instruction.operand_names[0])
        return kind, min(hlo.array_bytes(sent.shape) if sent else size, size) * peers_share
    has_peers_only = kind in ("collective-permute", "collective-broadcast")
    return kind, size if has_peers_only else size * peers_share
