"""The words and tables of a predicted time, as `report.py` prints them beside the memory."""

from collections.abc import Mapping
from typing import Any

_SHAPE_CHARS = 44


def format_time(time: Mapping[str, Any]) -> list[str]:
    """Return the lines of a program's predicted time, a record of `time_summary`."""
    if "unavailable" in time:
        return [f"no predicted time: {time['unavailable']}"]
    return [
        f"predicted time {_format_range(time['secs'])}, low by bytes and high by the compiler's "
        "cost model; no TPU has timed it",
        *_format_rates(time),
        *_format_collectives(time),
        *_format_kinds(time),
        *_format_dearest(time),
        *(f"assumed: {note}" for note in time["assumptions"]),
        *(f"counted once, of unknown length: a loop of {s}" for s in time["uncovered_loops"]),
        *(f"of unknown cost, priced by its bytes: {name}" for name in time["unknown_kernels"]),
    ]


def format_secs(secs: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if secs >= size:
            return f"{secs / size:.3g} {unit}"
    return f"{secs / 1e-6:.3g} us"


def _format_range(secs: Mapping[str, float]) -> str:
    return f"{format_secs(secs['low'])} to {format_secs(secs['high'])}"


def _format_rates(time: Mapping[str, Any]) -> list[str]:
    words = []
    if "mfu" in time:
        mfu = time["mfu"]
        words.append(f"MFU {mfu['high']:.1%} to {mfu['low']:.1%}")
    if "hbm_roofline_share" in time:
        share = time["hbm_roofline_share"]
        words.append(
            f"{share['high']:.1%} to {share['low']:.1%} of the HBM roofline "
            f"({format_secs(time['hbm_roofline_secs'])})"
        )
    if "tokens_per_sec" in time:
        rate, hourly = time["tokens_per_sec"], time["tokens_per_chip_hour"]
        words += [
            f"{rate['high']:,.0f} to {rate['low']:,.0f} tokens/s",
            f"{hourly['high']:,.0f} to {hourly['low']:,.0f} tokens a chip-hour",
        ]
    return [", ".join(words)] if words else []


def _format_collectives(time: Mapping[str, Any]) -> list[str]:
    low = time["collectives"]["low"]
    if not low["busy_secs"]:
        return []
    return [
        f"collectives: {format_secs(low['busy_secs'])}, of them "
        f"{format_secs(low['exposed_secs'])} exposed, {low['exposed_share']:.1%} of the time"
    ]


def _format_kinds(time: Mapping[str, Any]) -> list[str]:
    low_secs = time["secs"]["low"]
    lines = [f"{'kind':<30}{'low':>10}{'share':>8}{'high':>10}{'busy':>10}{'GB':>10}"]
    for kind, total in time["kinds"].items():
        share = total["low_secs"] / low_secs if low_secs else 0.0
        lines.append(
            f"{kind:<30}{format_secs(total['low_secs']):>10}{share:>8.1%}"
            f"{format_secs(total['high_secs']):>10}{format_secs(total['busy_secs']):>10}"
            f"{total['bytes'] / 1e9:>10.3g}"
        )
    return lines


def _format_dearest(time: Mapping[str, Any]) -> list[str]:
    lines = ["dearest instructions, all of their runs (low):"]
    for row in time["dearest"]:
        words = [
            f"{row['name']} {row['shape'][:_SHAPE_CHARS]}",
            row["kind"] + (f", {row['detail']}" if row["detail"] else ""),
            f"{row['num_runs']:g} runs",
            " < ".join([row["scopes"] or "no scope", *row["sources"]]),
        ]
        lines.append(f"{format_secs(row['secs']):>9}  {' | '.join(words)}")
    return lines
