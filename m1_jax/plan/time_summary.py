"""A predicted time summed up: by kind, exposed collectives, rates, and the dearest instructions.

The summary is plain data, part of the record that `--json` writes.
"""

import collections
from collections.abc import Mapping
from typing import Any

from m1_jax.plan import chip_specs, program_work, time_assumptions, time_prediction

NUM_DEAREST = 10
_CYCLES_MARK = '"estimated_cycles"'
_SECS_PER_HOUR = 3600


def summarize_time(
    codegen_text: str,
    chip: chip_specs.ChipSpec,
    assumptions: time_assumptions.TimeAssumptions,
    work: program_work.ProgramWork,
    num_chips: int,
) -> dict[str, Any]:
    """Return the predicted time of one run of a program.

    The result has the key "unavailable" alone, with the reason, where the compiler wrote nothing to
    predict from. Keys that end in _secs, and rates, hold {"low", "high"}: by the bytes model and by
    the compiler's cost model. So the rate "low" belongs to the time "low", and is the larger rate.

    Args:
      codegen_text: the compiler's dump `*.after_codegen.txt`. Empty where there is none.
    """
    if _CYCLES_MARK not in codegen_text:
        return {"unavailable": "this compiler's dump has no estimated cycles (*.after_codegen.txt)"}
    times = time_prediction.predict_time(codegen_text, chip, assumptions)
    secs = {model: time.secs for model, time in times.items()}
    low = times[time_prediction.LOW]
    return {
        "secs": secs,
        "kinds": _sum_by_kind(times),
        "collectives": {model: _sum_collectives(time) for model, time in times.items()},
        **_compute_rates(secs, chip, work, num_chips),
        "dearest": _list_dearest(low),
        "assumptions": list(assumptions.notes),
        "uncovered_loops": list(low.uncovered_loops),
        "unknown_kernels": list(low.unknown_kernels),
    }


def _sum_by_kind(
    times: Mapping[str, time_prediction.ProgramTime],
) -> dict[str, dict[str, float]]:
    """Return by kind the exposed seconds of both models, and busy seconds and bytes of the low."""
    kinds: dict[str, dict[str, float]] = {}
    for model, time in times.items():
        for row in time.instructions:
            total = kinds.setdefault(
                row.cost.kind, {"low_secs": 0.0, "high_secs": 0.0, "busy_secs": 0.0, "bytes": 0.0}
            )
            total[f"{model}_secs"] += row.exposed_secs * row.num_runs
            if model == time_prediction.LOW:
                total["busy_secs"] += row.busy_secs * row.num_runs
                total["bytes"] += row.cost.num_bytes * row.num_runs
    return dict(sorted(kinds.items(), key=lambda item: -item[1]["low_secs"]))


def _sum_collectives(time: time_prediction.ProgramTime) -> dict[str, float]:
    rows = [row for row in time.instructions if row.is_collective]
    exposed_secs = sum(row.exposed_secs * row.num_runs for row in rows)
    return {
        "busy_secs": sum(row.busy_secs * row.num_runs for row in rows),
        "exposed_secs": exposed_secs,
        "exposed_share": exposed_secs / time.secs if time.secs else 0.0,
    }


def _compute_rates(
    secs: Mapping[str, float],
    chip: chip_specs.ChipSpec,
    work: program_work.ProgramWork,
    num_chips: int,
) -> dict[str, Any]:
    def rate(amount: float) -> dict[str, float]:
        return {model: amount / max(time, 1e-12) for model, time in secs.items()}

    rates: dict[str, Any] = {}
    if work.tokens:
        rates["tokens_per_sec"] = rate(work.tokens)
        rates["tokens_per_chip_hour"] = rate(work.tokens * _SECS_PER_HOUR / num_chips)
    if work.roofline_bytes is not None:
        rates["hbm_roofline_secs"] = work.roofline_bytes / chip.hbm_bytes_per_sec
        rates["hbm_roofline_share"] = rate(rates["hbm_roofline_secs"])
    elif work.flops:
        rates["mfu"] = rate(work.flops / chip.flops_per_sec)
    return rates


def _list_dearest(time: time_prediction.ProgramTime) -> list[dict[str, Any]]:
    """Return the instructions that hold up the program longest, all of their runs together."""
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    rows = {}
    for row in time.instructions:
        key = row.name, row.shape
        totals[key] += row.exposed_secs * row.num_runs
        rows[key] = row
    dearest = sorted(totals, key=lambda key: -totals[key])[:NUM_DEAREST]
    return [
        {
            "name": rows[key].name,
            "kind": rows[key].cost.kind,
            "secs": totals[key],
            "num_runs": rows[key].num_runs,
            "shape": rows[key].shape,
            "detail": rows[key].cost.detail,
            "scopes": rows[key].scopes,
            "sources": [str(frame) for frame in rows[key].sources],
        }
        for key in dearest
    ]
