"""Memory of a run's programs on a chip: from m1-plan's records, or else by its arithmetic."""

import dataclasses
import functools
import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from m1_jax import local_path, sharding
from m1_jax.plan import aot, estimate, jobs, meshes, shapes
from m1_jax.plan import config as plan_config
from m1_jax.plan import report as report_lib
from train.rehearsal import findings as findings_lib
from train.rehearsal import setting as setting_lib

GIB = 2**30
# What the arithmetic estimates, see `estimate.estimate_resources`.
_UNCERTAIN_PARTS = ("gradients", "activations")


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A job of m1-plan that a run needs.

    Attributes:
      label: name on the page.
      plan: what m1-plan takes.
      layout: layout of the job's mesh.
    """

    label: str
    plan: plan_config.PlanConfig
    layout: sharding.MeshLayout

    def command_line(self, directory: pathlib.Path) -> list[str]:
        """Return the arguments of m1-plan that write the job's record."""
        default = plan_config.PlanConfig(self.plan.topology, "train")
        names = ("topology", "slices", "job", "config", "mesh", "serving_mesh", "seq", "batch")
        flags = []
        for name in (*names, "accumulate", "remat", "lightning"):
            value = getattr(self.plan, name)
            if name in ("topology", "job") or value != getattr(default, name):
                flags.append(f"--{name}={value}")
        return [*flags, f"--json={directory / self.file_name}"]

    @property
    def file_name(self) -> str:
        """Return the name of the job's record."""
        plan = self.plan
        parts = (plan.slices, plan.topology, plan.job, pathlib.Path(plan.config).name, plan.mesh)
        parts += (plan.serving_mesh, plan.seq, plan.batch, plan.accumulate, plan.remat)
        parts += (plan.lightning,) if plan.lightning else ()
        text = "_".join(str(part) for part in parts)
        return "".join(c if c.isalnum() or c in "_-" else "-" for c in text) + ".json"


def name_model(setting: setting_lib.RehearsalSetting) -> str | None:
    """Return how m1-plan calls the run's model, or None for shapes that are in no file."""
    config = setting.model.config
    # What m1-plan has flags for beside the model's name.
    choices = {name: getattr(config, name) for name in ("remat", "lightning_implementation")}
    for name, make in plan_config.MODEL_PRESETS.items():
        if dataclasses.replace(make(), **choices) == config:
            return name
    if setting_lib.find_file(setting.run_config.checkpoint, "config.json") is not None:
        return setting.run_config.checkpoint
    path = local_path.resolve_path(setting.rehearsal.model, "--model")
    return str(path) if path.exists() else None


def format_mesh(layout: sharding.MeshLayout) -> str:
    """Return the axes of more than one device, as --mesh takes them."""
    sizes = {axis: size for axis, size in layout.mesh.shape.items() if size > 1}
    return report_lib.format_mesh(sizes or {"fsdp": 1})


def find_record(program: PlannedProgram, directory: pathlib.Path) -> Mapping[str, Any] | None:
    """Return the record of a job in a directory, whatever its file is called, or None."""
    wanted = _make_key(dataclasses.asdict(program.plan))
    for file in sorted(directory.glob("*.json")) if directory.is_dir() else ():
        try:
            record = json.loads(file.read_text())
            if _make_key(record) == wanted:
                return record
        except (ValueError, KeyError, TypeError):
            continue  # another file, or another version's record
    return None


def _make_key(record: Mapping[str, Any]) -> tuple:
    """Return what tells jobs apart."""
    names = ("topology", "slices", "job", "config", "seq", "batch", "accumulate", "remat")
    names += ("lightning",)
    axis_sizes = (_parse_sizes(record["mesh"]), _parse_sizes(record["serving_mesh"] or {}))
    return (*(record[name] for name in names), *axis_sizes)


def _parse_sizes(mesh: str | Mapping[str, int]) -> frozenset[tuple[str, int]]:
    if not isinstance(mesh, str):
        return frozenset((axis, int(size)) for axis, size in mesh.items() if int(size) > 1)
    parts = [part.partition("=") for part in mesh.split(",")]
    return frozenset((axis, int(size)) for axis, _, size in parts if int(size) > 1)


@functools.cache
def probe_limit_bytes(device: Any) -> float:
    """Return the memory of a device of a topology."""
    return aot.probe_hbm_limit_bytes(device)


def check_program(
    program: PlannedProgram,
    setting: setting_lib.RehearsalSetting,
    findings: findings_lib.FindingList,
) -> None:
    """Add a line with the memory of a program, and m1-plan's warnings of its mesh."""
    directory = setting.rehearsal.plans_directory
    record = find_record(program, directory)
    if record is None and setting.rehearsal.compile:
        record = _compile_record(program, directory, findings)
    if record is not None:
        verdict = report_lib.format_verdict(record)
        kind = "fits" if record["fits"] else "fails"
        findings.add(
            kind,
            "programs",
            f"{program.label}: {verdict} (compiled, jax {record['versions']['jax']})",
            needed_bytes=record["hbm_bytes_per_chip"],
        )
        # A weight sync's are those of the sampler's mesh, which `sampling` adds.
        if program.plan.job != "reshard":
            add_warnings(program.label, record.get("warnings", ()), findings)
        return
    _estimate_program(program, setting, findings)


def add_warnings(label: str, warnings: Sequence[str], findings: findings_lib.FindingList) -> None:
    """Add a line for each of m1-plan's warnings."""
    for warning in warnings:
        findings.add("costs", "mesh", f"{label}: {warning}")


def _compile_record(
    program: PlannedProgram, directory: pathlib.Path, findings: findings_lib.FindingList
) -> Mapping[str, Any] | None:
    """Run m1-plan in a process of its own, which takes minutes and tens of GiB."""
    directory.mkdir(parents=True, exist_ok=True)
    arguments = program.command_line(directory)
    print(f"compiling: m1-plan {shlex.join(arguments)}", file=sys.stderr)
    command = [sys.executable, "-m", "m1_jax.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    record = find_record(program, directory)
    if record is None:
        error = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        findings.add("fails", "programs", f"{program.label}: m1-plan: {error[0]}")
    return record


def _estimate_program(
    program: PlannedProgram,
    setting: setting_lib.RehearsalSetting,
    findings: findings_lib.FindingList,
) -> None:
    plan, model_config = program.plan, setting.model.config
    job = estimate.PlanJob(plan.job, plan.seq, plan.batch, plan.accumulate)
    line = f"m1-plan {shlex.join(program.command_line(setting.rehearsal.plans_directory))}"
    model = shapes.abstract_job_model(model_config, job, program.layout)
    if plan.job == "reshard":
        findings.add("assumes", "programs", f"{program.label}: not compiled; {line}")
        return
    padded = meshes.describe_padded_columns(model_config, job, program.layout, model)
    add_warnings(program.label, padded, findings)
    resources = jobs.estimate_job(model_config, job, program.layout, model)
    limit_bytes = probe_limit_bytes(setting.devices[0])
    certain_bytes = sum(
        size for name, size in resources.hbm_bytes.items() if name not in _UNCERTAIN_PARTS
    )
    if certain_bytes > limit_bytes:
        findings.add(
            "fails",
            "programs",
            f"{program.label}: parameters and moments alone are {certain_bytes / GIB:.1f} GiB a "
            f"chip; wanted at most {limit_bytes / GIB:.1f}. Use more chips, or split them further",
            needed_bytes=certain_bytes,
        )
        return
    needed = resources.total_bytes
    doubt = ", which is too much if it is right" if needed > limit_bytes else ""
    findings.add(
        "assumes",
        "programs",
        f"{program.label}: {needed / GIB:.1f} of {limit_bytes / GIB:.1f} GiB a chip by arithmetic"
        f"{doubt}; not compiled: {line}",
        needed_bytes=needed,
    )
