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
    """All runs of one table, task and number of updates."""

    table: str  # "clip" or "published"
    task: str  # "a" or "b"
    updates: int  # updates a generation batch
    measured: tuple[
        float, float
    ]  # of the tuned model: probability of W, and of right work after it
    batches: int  # generation batches of a run
    common_rate: float
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]  # empty: `seeds` chose the rates as well
    tuning: dict[str, dict[float, list[cispo_curves.RunOutcome]]]  # outcomes by arm and rate
    best_rates: dict[str, float]  # each arm's own rate
    common: dict[str, list[cispo_curves.RunOutcome]]  # outcomes at the common rate, by arm
    best: dict[str, list[cispo_curves.RunOutcome]]  # outcomes at each arm's own rate
    curves: dict[str, list[float]]  # rewards of every batch, by the run's name
    secs: list[float]  # seconds of every batch of every run

    def runs(self) -> list[tuple[str, float, str, list[cispo_curves.RunOutcome]]]:
        """Return (arm, rate, purpose, outcomes) of each set of runs, without repetitions."""
        rows = []
        for arm, rates in self.tuning.items():
            for rate, outcomes in rates.items():
                if self.tuning_seeds:
                    rows.append((arm, rate, "tuning", outcomes))
                elif rate == self.common_rate:
                    rows.append((arm, rate, "common", outcomes))
                else:
                    rows.append((arm, rate, "", outcomes))
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
    """Return a section's table and conclusion as Markdown."""
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


def _row_cells(
    section: Section,
    arm: str,
    rate: float,
    purpose: str,
    outcomes: Sequence[cispo_curves.RunOutcome],
) -> list[str]:
    clipped = [run.fork_clipped for run in outcomes if run.fork_clipped is not None]
    last, lowest = statistics.mean(run.last for run in outcomes), min(r.lowest for r in outcomes)
    return [
        arm,
        f"{rate:g}",
        f"{len(outcomes)} {purpose}".strip(),
        _format_counts([run.half for run in outcomes], section.batches),
        _format_counts([run.sustained for run in outcomes], section.batches),
        ", ".join("-" if run.tokens is None else str(run.tokens) for run in outcomes),
        f"{statistics.mean(run.mean for run in outcomes):.3f}",
        f"{last:.3f}/{lowest:.3f}",
        f"{statistics.mean(clipped):.2f}" if clipped else "-",
        f"{sum(run.collapsed for run in outcomes)} of {len(outcomes)}",
    ]


def _ratio_lines(section: Section) -> list[str]:
    lines = []
    for label, outcomes in (("the common rate", section.common), ("own best rates", section.best)):
        for arm in ("dapo", "grpo"):
            ratio = cispo_ratio(outcomes, arm)
            rates = f"{section.common_rate:g}"
            if outcomes is section.best:
                rates = f"{section.best_rates['cispo']:g} against {section.best_rates[arm]:g}"
            lines.append(f"CISPO / {arm.upper()} at {label} ({rates}): {_format_ratio(ratio)}")
    if not section.tuning_seeds:
        lines.append("Own rates were chosen on the very seeds that they are compared on.")
    return lines


def cispo_ratio(
    outcomes: dict[str, list[cispo_curves.RunOutcome]], arm: str
) -> cispo_curves.PairedRatio | None:
    """Return CISPO's batches to sustained .9 over another arm's."""
    batches = {name: [run.sustained for run in outcomes[name]] for name in ("cispo", arm)}
    return cispo_curves.paired_ratio(batches["cispo"], batches[arm])


def _conclusion_lines(section: Section, parameters: int) -> list[str]:
    """Return the conclusion that the numbers permit, and how many runs collapsed."""
    rows = section.runs()
    collapsed = []
    for arm in section.common:
        runs = [run for name, _, _, outcomes in rows if name == arm for run in outcomes]
        collapsed.append(f"{arm.upper()} {sum(run.collapsed for run in runs)} of {len(runs)}")
    collapse_line = f"Collapsed runs, at all rates: {', '.join(collapsed)}."
    if section.table != "clip" or section.task != "a":
        if section.task == "b":
            return ["W is not rare here: no difference was expected.", collapse_line]
        return [collapse_line]
    common, best = (cispo_ratio(outcomes, "dapo") for outcomes in (section.common, section.best))
    if common is None:
        return ["Neither CISPO nor DAPO reached the target at the common rate.", collapse_line]
    size = f"{parameters / 1e6:.1f}M"
    # The whole bootstrap interval must lie below 1, not the median alone.
    verdict = (
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
        verdict,
        collapse_line,
    ]


def _format_ratio(ratio: cispo_curves.PairedRatio | None, short: bool = False) -> str:
    if ratio is None:
        return "unknown: no pair arrived"
    median, low, high = (_format_number(x) for x in (ratio.median, ratio.low, ratio.high))
    if short:
        return f"{median} ({low} to {high})"
    unknown = f", {ratio.unknown} more where neither arrived" if ratio.unknown else ""
    return f"median {median}, 95% bootstrap {low} to {high}, {ratio.pairs} pairs{unknown}"


def _format_number(value: float) -> str:
    if math.isinf(value):
        return "more than known"
    return "less than known" if value == 0 else f"{value:.2f}"


def _format_counts(values: Sequence[int | None], batches: int) -> str:
    return ",".join(f">{batches}" if value is None else str(value) for value in values)


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_json(section: Section) -> dict[str, Any]:
    """Return a section as JSON values, with infinite numbers as strings."""
    value = dataclasses.asdict(section)
    value["ratios"] = {
        f"{label}/{arm}": ratio and {key: _plain(number) for key, number in vars(ratio).items()}
        for label, outcomes in (("common", section.common), ("best", section.best))
        for arm in ("dapo", "grpo")
        for ratio in [cispo_ratio(outcomes, arm)]
    }
    return value


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def require_matplotlib() -> Any:
    """Return matplotlib's pyplot, or exit and name the remedy where it is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")  # draws to a file, without a screen
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
