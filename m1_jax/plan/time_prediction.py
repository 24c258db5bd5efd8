"""The time of a compiled program, predicted by going through its schedule on paper.

Instructions run one after another, in the order of the schedule. Asynchronous collectives, those on
SparseCores and prefetches run beside what stands between their start and their end, one after
another on each resource. What is left of them at the end is exposed, and all of a synchronous one.
Trip counts of loops are read off the program or come from `TimeAssumptions`.

Not in the model: bandwidth that prefetches share with computation, imbalance of experts,
stragglers, the host, and the start of the program. No TPU has timed any of it.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from m1_jax.plan import (
    chip_specs,
    collective_costs,
    executions,
    hlo,
    instruction_costs,
    kernel_costs,
    source_frames,
    time_assumptions,
)
from m1_jax.plan import collectives as collectives_lib

LOW, HIGH = "low", "high"  # the bytes model and the compiler's cost model
_MAX_HANDLES = 12  # instructions between an asynchronous start and its end
_INTERCONNECT = "interconnect"


@dataclasses.dataclass(frozen=True)
class TimedInstruction:
    """What one instruction takes in a run of the program.

    Attributes:
      name, shape: as in the program.
      sources: the two innermost of our own calls that it came from, as far as there are any.
      scopes: named scopes and operation, as `source_frames.find_scopes` returns them.
      cost: of one execution.
      busy_secs: time that its resource works, in one execution.
      exposed_secs: time that it holds up the program, in one execution.
      is_collective: whether it exchanges data with other devices.
      num_runs: executions.
    """

    name: str
    shape: str
    sources: Sequence[source_frames.SourceFrame]
    scopes: str
    cost: instruction_costs.InstructionCost
    busy_secs: float
    exposed_secs: float
    is_collective: bool
    num_runs: float = 1.0


@dataclasses.dataclass(frozen=True)
class ProgramTime:
    """The predicted time of one run of a program by one of the two models.

    Attributes:
      secs: of the whole run.
      instructions: what takes time.
      uncovered_loops: our own calls with loops of unknown length that were counted once.
      unknown_kernels: kernels that only their bytes priced.
    """

    secs: float
    instructions: Sequence[TimedInstruction]
    uncovered_loops: Sequence[str]
    unknown_kernels: Sequence[str]


def predict_time(
    text: str,
    chip: chip_specs.ChipSpec,
    assumptions: time_assumptions.TimeAssumptions,
) -> dict[str, ProgramTime]:
    """Return the times by the low and the high model.

    Args:
      text: the compiler's dump `*.after_codegen.txt`.
    """
    module = hlo.parse_module(text)
    frames = source_frames.parse_source_frames(text)
    times = {}
    for model in (LOW, HIGH):
        clock = _ScheduleClock(module, frames, chip, assumptions, model)
        secs, instructions = clock.run(module.entry)
        times[model] = ProgramTime(
            secs,
            instructions,
            sorted(clock.uncovered_loops),
            sorted(clock.kernels.unknown_kernels),
        )
    return times


@dataclasses.dataclass
class _Timeline:
    """One run of a computation under way.

    Attributes:
      now: seconds since it began.
      rows: what has taken time so far.
      free_at: when each resource has done what was started on it.
      pending: by name of what started it, an operation's end, resource and cost.
    """

    now: float = 0.0
    rows: list[TimedInstruction] = dataclasses.field(default_factory=list)
    free_at: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )
    pending: dict[str, tuple[float, str, instruction_costs.InstructionCost]] = dataclasses.field(
        default_factory=dict
    )


class _ScheduleClock:
    """Goes through the schedule of one module by one model."""

    def __init__(
        self,
        module: hlo.HloModule,
        frames: Mapping[int, list[source_frames.SourceFrame]],
        chip: chip_specs.ChipSpec,
        assumptions: time_assumptions.TimeAssumptions,
        model: str,
    ):
        self._module, self._frames, self._chip = module, frames, chip
        self._assumptions, self._model = assumptions, model
        self._pricer = instruction_costs.InstructionPricer(module, chip)
        self.kernels = kernel_costs.KernelPricer(module, chip, assumptions)
        self.uncovered_loops: set[str] = set()
        self._results: dict[str, tuple[float, list[TimedInstruction]]] = {}

    def run(self, computation: str) -> tuple[float, list[TimedInstruction]]:
        """Return the seconds of one run of a computation, and what takes them."""
        if computation not in self._results:
            timeline = _Timeline()
            for instruction in self._module.computations.get(computation, {}).values():
                self._advance(timeline, computation, instruction)
            self._results[computation] = timeline.now, timeline.rows
        return self._results[computation]

    def _advance(
        self, timeline: _Timeline, computation: str, instruction: hlo.HloInstruction
    ) -> None:
        opcode = instruction.opcode
        if opcode in instruction_costs.FREE_OPCODES:
            return
        if opcode == "while":
            self._advance_loop(timeline, computation, instruction)
        elif opcode == "conditional":
            self._advance_conditional(timeline, instruction)
        elif opcode == "call":
            (callee,) = next(iter(instruction.called_computations().values()))
            self._include(timeline, callee, 1)
        elif instruction.is_start:
            self._start(timeline, computation, instruction)
        elif opcode.endswith("-done"):
            self._finish(timeline, computation, instruction)
        elif collective := self._find_collective(computation, instruction):
            self._advance_collective(timeline, instruction, *collective)
        else:
            frames = self._frames_of(instruction)
            if opcode == "custom-call":
                kind = instruction_costs.find_kind_by_source(frames)
                cost = self.kernels.price(computation, instruction, kind)
            else:
                cost = self._pricer.price(computation, instruction, frames)
            secs = self._secs_of(cost)
            timeline.now += secs
            if secs:
                self._note(timeline, instruction, cost, secs)

    # ---- control flow

    def _include(self, timeline: _Timeline, computation: str, num_runs: float) -> None:
        secs, rows = self.run(computation)
        timeline.now += secs * num_runs
        timeline.rows += (
            dataclasses.replace(row, num_runs=row.num_runs * num_runs) for row in rows
        )

    def _advance_loop(
        self, timeline: _Timeline, computation: str, loop: hlo.HloInstruction
    ) -> None:
        num_trips: float | None = executions.trip_count(self._module, computation, loop)
        if num_trips is None:
            frames = self._frames_of(loop)
            num_trips = self._assumptions.find_trips(frames)
            if num_trips is None:
                self.uncovered_loops.add(str(frames[0]) if frames else loop.name)
                num_trips = 1
        self._include(timeline, loop.called_computations()["body"][0], num_trips)

    def _advance_conditional(self, timeline: _Timeline, conditional: hlo.HloInstruction) -> None:
        branches = executions.list_branches(conditional)
        dearest = max(branches, key=lambda name: self.run(name)[0])
        share = self._assumptions.find_branch_share(self._frames_of(conditional))
        self._include(timeline, dearest, share if len(branches) > 1 else 1.0)

    # ---- what runs beside

    def _start(
        self, timeline: _Timeline, computation: str, instruction: hlo.HloInstruction
    ) -> None:
        cost, resource = self._price_start(computation, instruction)
        begin = max(timeline.now, timeline.free_at[resource])
        end = begin + self._secs_of(cost)
        timeline.free_at[resource] = end
        timeline.pending[instruction.name] = end, resource, cost

    def _finish(
        self, timeline: _Timeline, computation: str, instruction: hlo.HloInstruction
    ) -> None:
        start = self._find_start(computation, instruction)
        if start is None or start.name not in timeline.pending:
            return
        end, resource, cost = timeline.pending[start.name]
        exposed_secs = max(0.0, end - timeline.now)
        timeline.now += exposed_secs
        self._note(timeline, start, cost, exposed_secs, is_collective=resource == _INTERCONNECT)

    def _find_start(
        self, computation: str, instruction: hlo.HloInstruction
    ) -> hlo.HloInstruction | None:
        """Follow first operands back to what an asynchronous operation started with."""
        body = self._module.computations[computation]
        for _ in range(_MAX_HANDLES):
            name = next((operand for operand in instruction.operand_names if operand in body), None)
            if name is None:
                return None
            instruction = body[name]
            if instruction.is_start:
                return instruction
        return None

    def _price_start(
        self, computation: str, instruction: hlo.HloInstruction
    ) -> tuple[instruction_costs.InstructionCost, str]:
        """Return the cost of what starts here, and the resource that it runs on."""
        if instruction.opcode.removesuffix("-start") in collectives_lib.COLLECTIVE_KINDS:
            cost = collective_costs.price_collective(
                self._module, self._chip, computation, instruction
            )
            return cost, _INTERCONNECT
        if instruction.opcode == "copy-start":
            shapes = hlo.split_tuple_shape(instruction.shape)[:2]
            num_bytes = sum(map(hlo.hbm_bytes, shapes))
            return self._make_copy_cost("prefetches", num_bytes, 1.0), "prefetch"
        wrapped = self._find_wrapped_collective(instruction)
        if wrapped:
            cost = collective_costs.price_collective(self._module, self._chip, *wrapped)
            return dataclasses.replace(cost, detail=f"{cost.detail} on SparseCore"), _INTERCONNECT
        # A gather or scatter of rows on SparseCore: read and written once.
        body = self._module.computations[computation]
        num_bytes = 2 * sum(
            hlo.hbm_bytes(end.shape)
            for end in body.values()
            if end.opcode == "async-done" and self._find_start(computation, end) is instruction
        )
        kind = instruction_costs.find_kind_by_source(self._frames_of(instruction))
        kind = kind or "gathers and scatters of rows"
        share = kernel_costs.CUSTOM_HBM_SHARE
        return self._make_copy_cost(kind, num_bytes, share, "on SparseCore"), "sparsecore"

    def _make_copy_cost(
        self, kind: str, num_bytes: float, hbm_share: float, detail: str = ""
    ) -> instruction_costs.InstructionCost:
        secs = num_bytes / (hbm_share * self._chip.hbm_bytes_per_sec)
        return instruction_costs.InstructionCost(kind, secs, secs, num_bytes, detail)

    # ---- collectives

    def _find_wrapped_collective(
        self, instruction: hlo.HloInstruction
    ) -> tuple[str, hlo.HloInstruction] | None:
        """Return (computation, collective) of what an async-start wraps, if it is one."""
        stack = instruction.called_computations().get("calls", [])[:]
        while stack:
            computation = stack.pop()
            for inner in self._module.computations.get(computation, {}).values():
                if inner.opcode in collectives_lib.COLLECTIVE_KINDS:
                    return computation, inner
                # Some chips have it wrapped once more.
                called = re.search(
                    r"called_computations=\{([^}]*)\}", inner.operands_and_attributes
                )
                stack += re.findall(r"%?([\w.\-]+)", called[1]) if called else []
        return None

    def _find_collective(
        self, computation: str, instruction: hlo.HloInstruction
    ) -> tuple[str, hlo.HloInstruction] | None:
        """Return (computation, collective) of a synchronous collective, fused or not."""
        if instruction.opcode in collectives_lib.COLLECTIVE_KINDS:
            return computation, instruction
        has_algorithm = "collective_algorithm_config" in instruction.operands_and_attributes
        if instruction.opcode != "fusion" or not has_algorithm:
            return None
        fused = self._pricer.traffic.iterate_fused(instruction)
        return next((f for f in fused if f[1].opcode in collectives_lib.COLLECTIVE_KINDS), None)

    def _advance_collective(
        self,
        timeline: _Timeline,
        instruction: hlo.HloInstruction,
        computation: str,
        collective: hlo.HloInstruction,
    ) -> None:
        is_fused = collective is not instruction
        attributes = instruction.operands_and_attributes if is_fused else ""
        cost = collective_costs.price_collective(
            self._module, self._chip, computation, collective, attributes
        )
        secs = self._secs_of(cost)
        if is_fused:
            cycles = instruction_costs.read_cycles(instruction) or 0
            secs = max(secs, cycles / self._chip.clock_hz)
        # It shares the links: what is under way there is done that much later.
        for name, (end, resource, pending_cost) in timeline.pending.items():
            if end > timeline.now and resource == _INTERCONNECT:
                timeline.pending[name] = end + secs, resource, pending_cost
        timeline.free_at[_INTERCONNECT] = max(timeline.now, timeline.free_at[_INTERCONNECT]) + secs
        timeline.now += secs
        cost = dataclasses.replace(cost, low_secs=secs, high_secs=secs)
        self._note(timeline, instruction, cost, secs, is_collective=True)

    # ---- records

    def _frames_of(self, instruction: hlo.HloInstruction) -> list[source_frames.SourceFrame]:
        return source_frames.find_frames(self._frames, instruction.operands_and_attributes)

    def _secs_of(self, cost: instruction_costs.InstructionCost) -> float:
        return cost.low_secs if self._model == LOW else cost.high_secs

    def _note(
        self,
        timeline: _Timeline,
        instruction: hlo.HloInstruction,
        cost: instruction_costs.InstructionCost,
        exposed_secs: float,
        is_collective: bool = False,
    ) -> None:
        frames = self._frames_of(instruction)
        timeline.rows.append(
            TimedInstruction(
                name=instruction.name,
                shape=instruction.shape,
                sources=frames[:2],
                scopes=source_frames.find_scopes(instruction.operands_and_attributes),
                cost=cost,
                busy_secs=self._secs_of(cost),
                exposed_secs=exposed_secs,
                is_collective=is_collective,
            )
        )
