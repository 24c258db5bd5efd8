"""The tables, the sentence and the plot of `cispo_vs_dapo.py`."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import cispo_curves


@dataclasses.dataclass(frozen=True)
class Section:
    """All runs of one table, task and number of updates; outcomes by arm and, tuning, by rate.

    measured: of the tuned model, the probability of W, and of right work after it.
    best: at each arm's own rate. curves: rewards by run. secs: of every batch.
    """

    table: str
    task: str
    updates: int
    measured: tuple[float, float]
    batches: int
    common_rate: float
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    tuning: dict[str, dict[float, list[cispo_curves.RunOutcome]]]
    best_rates: dict[str, float]
    common: dict[str, list[cispo_curves.RunOutcome]]
    best: dict[str, list[cispo_curves.RunOutcome]]
    curves: dict[str, list[float]]
    secs: list[float]

    def runs(self) -> list[tuple[str, float, str, list[cispo_curves.RunOutcome]]]:
        """Return (arm, rate, what for, outcomes) of each set of runs, none of them twice."""
        rows = []
        for arm, rates in self.tuning.items():
            for rate, found in rates.items():
                if self.tuning_seeds:
                    rows.append((arm, rate, "tuning", found))
                elif rate == self.common_rate:
                    rows.append((arm, rate, "common", found))
                else:
                    rows.append((arm, rate, "", found))
            if self.tuning_seeds:
                rows.append((arm, self.common_rate, "common", self.common[arm]))
                if self.best_rates[arm] != self.common_rate:
                    rows.append((arm, self.best_rates[arm], "own best", self.best[arm]))
        return rows


_HEAD = (
    "arm", "rate", "seeds", ">= .5", ">= .9 for good", "tokens to .9", "mean", "last 8",
    "W clipped", "collapsed",
)  # fmt: skip
_TABLES = {"clip": "arms that differ in the clip rule alone", "published": "presets as published"}


def format_section(section: Section, parameters: int) -> str:
    """Return what is printed of a section."""
    lines = [
        f"## {_TABLES[section.table]}: task {section.task}, {section.updates} updates a batch",
        "",
        f"Before: W begins {section.measured[0]:.3f} of the answers; after it "
        f"{section.measured[1]:.3f} of the work is right.",
        f"Batches trained before the first window of three (per seed, >{section.batches}: never in "
        "so many);",
        "W clipped: of W tokens with A > 0 in the first six batches, dropped (CISPO: capped).",
        "",
        _table_row(_HEAD),
        _table_row(["---"] * len(_HEAD)),
    ]
    lines += [_table_row(_row_cells(section, *run)) for run in section.runs()]
    lines += ["", *_ratio_lines(section), "", *_conclusion_lines(section, parameters), ""]
    return "\n".join(lines)


def _row_cells(section, arm: str, rate: float, what: str, found) -> list[str]:
    clipped = [one.fork_clipped for one in found if one.fork_clipped is not None]
    return [
        arm,
        f"{rate:g}",
        f"{len(found)} {what}".strip(),
        _format_counts([one.half for one in found], section.batches),
        _format_counts([one.sustained for one in found], section.batches),
        ", ".join("-" if one.tokens is None else str(one.tokens) for one in found),
        f"{statistics.mean(one.mean for one in found):.3f}",
        f"{statistics.mean(one.last for one in found):.3f}/{min(one.lowest for one in found):.3f}",
        f"{statistics.mean(clipped):.2f}" if clipped else "-",
        f"{sum(one.collapsed for one in found)} of {len(found)}",
    ]


def _ratio_lines(section: Section) -> list[str]:
    lines = []
    for what, some in (("the common rate", section.common), ("own best rates", section.best)):
        for other in ("dapo", "grpo"):
            found = cispo_ratio(some, other)
            at = f"{section.common_rate:g}"
            if some is section.best:
                rates = section.best_rates
                at = f"{rates['cispo']:g} against {rates[other]:g}"
            lines.append(f"CISPO / {other.upper()} at {what} ({at}): {_format_ratio(found)}")
    if not section.tuning_seeds:
        lines.append("Own rates were chosen on the very seeds that they are compared on.")
    return lines


def cispo_ratio(
    some: dict[str, list[cispo_curves.RunOutcome]], other: str
) -> cispo_curves.PairedRatio | None:
    """Return CISPO's batches to sustained .9 over another arm's."""
    ours, theirs = ([one.sustained for one in some[arm]] for arm in ("cispo", other))
    return cispo_curves.paired_ratio(ours, theirs)


def _conclusion_lines(section: Section, parameters: int) -> list[str]:
    """Return what may be said, and beside it how many runs collapsed."""
    rows = section.runs()
    collapsed = []
    for arm in section.common:
        mine = [one for name, _, _, found in rows if name == arm for one in found]
        collapsed.append(f"{arm.upper()} {sum(one.collapsed for one in mine)} of {len(mine)}")
    beside = f"Collapsed runs, at all rates: {', '.join(collapsed)}."
    if section.table != "clip" or section.task != "a":
        if section.task == "b":
            return ["W is not rare here: no difference was expected.", beside]
        return [beside]
    common, best = (cispo_ratio(some, "dapo") for some in (section.common, section.best))
    if common is None:
        return ["Neither CISPO nor DAPO reached the target at the common rate.", beside]
    size = f"{parameters / 1e6:.1f}M"
    made = (
        "This reproduces the mechanism of M1 section 3.1, not its AIME result."
        if common.high < 1
        else "This does not show the mechanism of M1 section 3.1, and says nothing of its AIME "
        "result."
    )
    return [
        f"On a {size}-parameter toy built so that a rare token matters, CISPO reached the target "
        f"in {_format_ratio(common, short=True)} times",
        "the generation batches of DAPO at the same learning rate; with learning rates tuned per "
        f"arm the ratio was {_format_ratio(best, short=True)}.",
        made,
        beside,
    ]


def _format_ratio(found: cispo_curves.PairedRatio | None, short: bool = False) -> str:
    if found is None:
        return "unknown: no pair arrived"
    numbers = [_format_number(x) for x in (found.median, found.low, found.high)]
    if short:
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"
    unknown = f", {found.unknown} more where neither arrived" if found.unknown else ""
    return (
        f"median {numbers[0]}, 95% bootstrap {numbers[1]} to {numbers[2]}, {found.pairs} pairs"
        f"{unknown}"
    )


def _format_number(value: float) -> str:
    if math.isinf(value):
        return "more than known"
    return "less than known" if value == 0 else f"{value:.2f}"


def _format_counts(values: Sequence[int | None], batches: int) -> str:
    return ",".join(f">{batches}" if value is None else str(value) for value in values)


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_json(section: Section) -> dict[str, Any]:
    """Return everything of a section; what is infinite is told as a string."""
    value = dataclasses.asdict(section)
    value["ratios"] = {
        f"{what}/{other}": found and {k: _plain(v) for k, v in vars(found).items()}
        for what, some in (("common", section.common), ("best", section.best))
        for other in ("dapo", "grpo")
        for found in [cispo_ratio(some, other)]
    }
    return value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def require_matplotlib() -> Any:
    """Return matplotlib's pyplot; exit with what to do where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # to a file, whatever the screen
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot: matplotlib is missing. pip install matplotlib") from None
    return pyplot


_COLOURS = {"grpo": "tab:green", "dapo": "tab:blue", "cispo": "tab:red"}


def plot_rewards(sections: Sequence[Section], path: pathlib.Path) -> None:
    """Draw every run's rewards, a panel for each section and rate."""
    pyplot = require_matplotlib()
    panels: dict[str, dict[str, list[list[float]]]] = {}
    for section in sections:
        for name, rewards in section.curves.items():
            front, arm, _ = name.rsplit("-", 2)
            panels.setdefault(front, {}).setdefault(arm, []).append(rewards)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (front, arms) in zip(axes.flat, panels.items(), strict=False):
        for arm, curves in arms.items():
            for i, rewards in enumerate(curves):
                label = arm.upper() if i == 0 else None
                axis.plot(rewards, color=_COLOURS[arm], linewidth=1, alpha=0.8, label=label)
        axis.axhline(cispo_curves.SUSTAINED, color="grey", linewidth=0.5)
        axis.set(title=front, xlabel="generation batch", ylabel="mean reward", ylim=(0, 1))
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
