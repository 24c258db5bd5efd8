"""The words and tables that `command.py` prints for a record."""

from collections.abc import Mapping
from typing import Any

from m1_jax.plan import time_report

GIB = 2**30


def format_report(record: Mapping[str, Any]) -> str:
    """Return a record of `command.run` as text. The last line says whether the program fits."""
    chips = f"{record['devices'] // record['devices_per_chip']} chips"
    if record["devices_per_chip"] > 1:
        chips += f", {record['devices']} devices of half a chip: below, a chip is such a half"
    slices = f"{record['slices']} x " if record["slices"] > 1 else ""
    serving = f", serving mesh {record['serving_mesh']}" if record["serving_mesh"] else ""
    lines = [
        f"{record['job']} of {record['config']} on {slices}{record['topology']} ({chips}), "
        f"mesh {format_mesh(record['mesh'])}{serving}",
        _describe_job(record),
        *_describe_links(record),
        _describe_options(record),
        "",
    ]
    for program in record["programs"]:
        if len(record["programs"]) > 1:
            lines.append(f"program {program['program']}")
        for part in (
            _format_memory(program),
            _format_flops(program),
            _format_collectives(program),
            time_report.format_time(program["time"]),
        ):
            lines += [*part, ""] if part else []
    lines += [
        *(f"warning: {warning}" for warning in record["warnings"]),
        *_format_tried_meshes(record),
        *_format_tried_remat(record),
        *_format_capacity(record),
        f"traced in {record['trace_secs']:.1f} s, compiled in {record['compile_secs']:.1f} s "
        f"({record['compile_cpu_secs']:.1f} s of CPU), "
        f"host memory {record['host_peak_bytes'] / GIB:.1f} GiB",
        format_verdict(record),
    ]
    return "\n".join(lines)


def _describe_job(record: Mapping[str, Any]) -> str:
    # A copy of weights has no rows.
    words = [] if record["job"] == "reshard" else [_describe_rows(record)]
    if record["weights"] is not None:
        words.append(f"weights {record['weights']}")
    words.append(f"lightning {record['lightning_runs']}")
    words += [f"{name} {record['versions'][name]}" for name in ("jax", "libtpu")]
    return ", ".join(words)


def _describe_links(record: Mapping[str, Any]) -> list[str]:
    """Return on which dimensions of the slice the axes lie. A ring's ends are joined by links."""
    axes = [f"{axis} on {' '.join(dims)}" for axis, dims in record["mesh_dimensions"].items()]
    rings = [d for d, closed in zip("xyz", record["closed_dimensions"], strict=False) if closed]
    return [f"{', '.join(axes)}; rings: {', '.join(rings) or 'none'}"] if axes else []


def _describe_options(record: Mapping[str, Any]) -> str:
    options = [f"{name}={value}" for name, value in record["compiler_options"].items()]
    return f"compiler options: {', '.join(options) or 'none'}"


def _describe_rows(record: Mapping[str, Any]) -> str:
    rows = f"{record['batch']} rows of {record['seq']} tokens"
    if record["job"] == "rl_update":
        return f"{rows} in a microbatch, remat {record['remat']}"
    if record["job"] == "train":
        return f"{rows}, remat {record['remat']}, {record['accumulate']} microbatches"
    return rows


def format_mesh(shape: Mapping[str, int]) -> str:
    """Return axis=size,axis=size, as `--mesh` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items())


def format_verdict(record: Mapping[str, Any]) -> str:
    """Return whether the program fits, and how far it is from the limit."""
    needed, limit = record["hbm_bytes_per_chip"] / GIB, record["hbm_limit_bytes"] / GIB
    if record["fits"]:
        return f"fits: {needed:.2f} of {limit:.2f} GiB a chip, {limit - needed:.2f} GiB are free"
    return (
        f"does not fit: needs {needed:.2f} GiB a chip and has {limit:.2f}, "
        f"{needed - limit:.2f} GiB too much"
    )


def _format_memory(record: Mapping[str, Any]) -> list[str]:
    parts, estimates = record["hbm_parts"], dict(record["hbm_estimate"])
    # Gradients and activations are both temporaries of the program.
    estimates["activations"] += estimates.pop("gradients", 0)
    # The estimate has one number for all decode states. Keys and values are known exactly.
    if "kv" in parts:
        estimates["state"] = estimates.get("state", 0) - parts["kv"]
        estimates["kv"] = parts["kv"]
    lines = [f"{'HBM of a chip, GiB':<28}{'compiled':>10}{'by hand':>10}"]
    for name, size in parts.items():
        label = {"activations": "activations and temporaries"}.get(name, name)
        lines.append(f"{label:<28}{size / GIB:>10.2f}{estimates.get(name, 0) / GIB:>10.2f}")
    # The compiler does not know of co-resident arrays, so both columns show our own size.
    for name, size in record["hbm_beside"].items():
        estimates[f"{name}, beside"] = size
        lines.append(f"{f'{name}, beside':<28}{size / GIB:>10.2f}{size / GIB:>10.2f}")
    total = record["hbm_bytes_per_chip"] / GIB
    return [*lines, f"{'total':<28}{total:>10.2f}{sum(estimates.values()) / GIB:>10.2f}"]


def _format_flops(record: Mapping[str, Any]) -> list[str]:
    if not record["flops_per_chip"]:  # a copy of weights
        return []
    # Both are our own count. The compiler's is of one run of each loop, so it is smaller.
    counted, recomputed = record["flops_per_chip"], record["flops_again_per_chip"]
    compiler = record["flops_compiler_per_chip"]
    compiler_text = "none" if compiler is None else f"{compiler / 1e12:.2f}"
    return [
        f"TFLOPs of a chip: {counted / 1e12:.2f}, of them {recomputed / 1e12:.2f} computed again; "
        f"compiler: {compiler_text} (it counts a loop once)"
    ]


def _format_collectives(record: Mapping[str, Any]) -> list[str]:
    compiled, estimates = record["collectives"], record["collectives_estimate"]
    header = f"{'received by a chip':<22}{'compiled':>10}{'GiB':>10}"
    lines = [header + (f"{'by hand':>10}{'GiB':>10}" if estimates else "")]
    for kind in dict.fromkeys([*estimates, *compiled]):  # each kind once, in this order
        row = f"{kind:<22}"
        for source in (compiled, estimates) if estimates else (compiled,):
            traffic = source.get(kind, {"count": 0, "bytes": 0})
            row += f"{traffic['count']:>10.0f}{traffic['bytes'] / GIB:>10.2f}"
        lines.append(row)
    if record["unknown_loops"]:
        lines.append(f"{record['unknown_loops']} loops as long as the data asks count as one run")
    return lines


def _format_tried_remat(record: Mapping[str, Any]) -> list[str]:
    """Return a line for each policy of rematerialisation that `--remat=auto` looked at."""
    return [
        f"remat {trial['remat']}: {trial['hbm_bytes_per_chip'] / GIB:.2f} GiB a chip, "
        + ("compiled" if trial["compiled"] else "predicted, not compiled")
        + (", fits" if trial["fits"] else ", does not fit")
        for trial in record.get("tried_remat", ())
    ]


def _format_capacity(record: Mapping[str, Any]) -> list[str]:
    rows = [f"{num_rows} of {length:,} tokens" for length, num_rows in record["capacity"].items()]
    requests = "the sampler's requests beside it" if record["job"] == "rl_update" else "requests"
    return [f"room for {requests}, weights in place: {', '.join(rows)}"] if rows else []


def _format_tried_meshes(record: Mapping[str, Any]) -> list[str]:
    if len(record["tried"]) < 2:  # the one mesh is in the first line of the report
        return []
    rows = [
        f"  {format_mesh(attempt['mesh'])}: {attempt['hbm_bytes_per_chip'] / GIB:.2f} GiB, "
        f"{'fits' if attempt['fits'] else 'does not fit'}, {attempt['compile_secs']:.0f} s"
        for attempt in record["tried"]
    ]
    return ["meshes tried:", *rows]
