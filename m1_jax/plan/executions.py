"""How often each computation of a compiled program runs: loops, branches and calls."""

import collections
import math
import re
from collections.abc import Callable, Mapping

from m1_jax.plan import hlo

_MAX_COPIES = 4  # between a loop and the constant that its counter starts with


def count_executions(
    module: hlo.HloModule,
    find_trips: Callable[[hlo.HloInstruction], float | None] = lambda loop: None,
    find_branch_share: Callable[[hlo.HloInstruction], float] = lambda conditional: 1.0,
) -> tuple[dict[str, float], int]:
    """Return how often each computation runs, and the number of loops of unknown length.

    Args:
      find_trips: returns how often a loop runs whose length the program does not tell. None: it
        counts as unknown, and once.
      find_branch_share: returns the share of a conditional's runs that take each of its branches,
        of which there are several.
    """
    edges: dict[str, dict[str, float]] = {}  # calls in one run of a caller, by caller and callee
    num_unknown = 0
    for name, instructions in module.computations.items():
        calls: dict[str, float] = collections.defaultdict(float)
        for instruction in instructions.values():
            num_runs = 1.0
            if instruction.opcode == "conditional" and len(list_branches(instruction)) > 1:
                num_runs = find_branch_share(instruction)
            elif instruction.opcode == "while":
                num_trips: float | None = trip_count(module, name, instruction)
                num_trips = find_trips(instruction) if num_trips is None else num_trips
                num_unknown += num_trips is None
                num_runs = 1.0 if num_trips is None else num_trips
            for callees in instruction.called_computations().values():
                for callee in callees:
                    calls[callee] += num_runs
        edges[name] = {callee: n for callee, n in calls.items() if callee in module.computations}
    runs = dict.fromkeys(module.computations, 0.0)
    runs[module.entry] = 1.0
    # A computation's own runs must be complete before they are passed on to its callees.
    for name in _sort_callers_first(module.entry, edges):
        for callee, calls_per_run in edges[name].items():
            runs[callee] += runs[name] * calls_per_run
    return runs, num_unknown


def list_branches(conditional: hlo.HloInstruction) -> list[str]:
    """Return the branches' computations. One alone always runs.

    That is what `platform_dependent` leaves of its platforms.
    """
    return [name for names in conditional.called_computations().values() for name in names]


def trip_count(module: hlo.HloModule, caller: str, loop: hlo.HloInstruction) -> int | None:
    """Return how often a while loop runs: the compiler's own note, or read off `i < constant`.

    TPU programs carry no note. None where the condition is of another form.
    """
    note = re.search(
        r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)', loop.operands_and_attributes
    )
    if note:
        return int(note[1])
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
    index = hlo.parse_tuple_index(counter)
    start = _find_carry_start(module.computations[caller], loop, index) or 0
    end = hlo.parse_constant(limit)
    # A limit that the loop carries along is a constant outside of it.
    if end is None and limit.opcode == "get-tuple-element":
        limit_index = hlo.parse_tuple_index(limit)
        end = _find_carry_start(module.computations[caller], loop, limit_index)
    if end is None:
        return None
    return max(math.ceil((end - start) / _find_counter_step(body, index)), 0)


def _sort_callers_first(entry: str, edges: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the computations reachable from `entry`, every caller before what it calls.

    This is a depth-first search without recursion. A computation is on the stack twice: to push its
    callees, and below them to append it once all of these are in the order.
    """
    order, visited, stack = [], set(), [(entry, False)]
    while stack:
        name, callees_are_ordered = stack.pop()
        if callees_are_ordered:
            order.append(name)
        elif name not in visited:
            visited.add(name)
            stack.append((name, True))
            stack.extend((callee, False) for callee in edges[name])
    return order[::-1]


def _find_carry_start(
    instructions: Mapping[str, hlo.HloInstruction], loop: hlo.HloInstruction, index: int
) -> int | None:
    """Return the constant that a loop's carry starts with at `index`, if it is one."""
    start = instructions.get(loop.operand_names[0])
    for _ in range(_MAX_COPIES):  # copies of the tuple and of the element
        if start is None or start.opcode not in ("tuple", "copy", "bitcast"):
            break
        start = instructions.get(start.operand_names[index if start.opcode == "tuple" else 0])
    return hlo.parse_constant(start)


def _find_counter_step(body: Mapping[str, hlo.HloInstruction], index: int) -> int:
    """Return what the body adds to the counter, or 1 where that cannot be read."""
    root = list(body.values())[-1] if body else None  # the last instruction is the result
    if root is None or root.opcode != "tuple":
        return 1
    next_counter = body.get(root.operand_names[index])
    while next_counter is not None and next_counter.opcode in ("copy", "bitcast"):
        next_counter = body.get(next_counter.operand_names[0])
    if next_counter is None or next_counter.opcode != "add":
        return 1
    steps = [hlo.parse_constant(body.get(name)) for name in next_counter.operand_names]
    return next((step for step in steps if step), 1)
