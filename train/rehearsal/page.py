"""The page that a rehearsal prints, and its JSON."""

import dataclasses
import resource
import textwrap
from typing import Any

from train.rehearsal import findings as findings_lib

_WIDTH = 100
_TITLES = {
    "fails": "What fails",
    "fits": "What fits",
    "costs": "What costs most (in brackets: how long the chips wait, in the mean)",
    "assumes": "Not run as it will be",
}


@dataclasses.dataclass(frozen=True)
class RehearsalResult:
    """A rehearsal that is over.

    Attributes:
      config: spec of the config.
      place: the slice, its chips and hosts.
      findings: what was found.
      secs: seconds that it took.
      cpu_secs: seconds of all cores. Other work on the machine does not stretch them.
      peak_bytes: most host memory of this process and of its largest worker together.
    """

    config: str
    place: str
    findings: findings_lib.FindingList
    secs: float
    cpu_secs: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return all lines with their figures."""
        return {
            "config": self.config,
            "place": self.place,
            "passes": not self.findings.has_failed,
            "secs": self.secs,
            "cpu_secs": self.cpu_secs,
            "peak_bytes": self.peak_bytes,
            "findings": [dataclasses.asdict(finding) for finding in self.findings.findings],
        }


def measure_cpu_secs() -> float:
    """Return the CPU time of this process and of the workers that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_peak_bytes(num_workers: int) -> int:
    """Return the most memory of this process, and of the largest worker for each of them."""
    # ru_maxrss is in KiB on Linux.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest_worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return (own + num_workers * largest_worker) * 1024


def format_page(result: RehearsalResult) -> str:
    """Return the page. Its last line says whether the run passes."""
    lines = [f"rehearsal of {result.config} on {result.place}"]
    for kind, title in _TITLES.items():
        findings = result.findings.of_kind(kind)
        if not findings:
            continue
        lines += ["", title]
        for finding in findings:
            # What makes the chips wait comes first, with its seconds a step or batch.
            waiting = f" [{finding.secs:.3g} s a step]" if finding.secs >= 0.001 else ""
            lines += textwrap.wrap(
                f"{finding.topic}: {finding.text}{waiting}",
                _WIDTH,
                initial_indent="  ",
                subsequent_indent="      ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    num_failures = len(result.findings.of_kind("fails"))
    verdict = f"fails: {num_failures} of the lines above" if num_failures else "passes"
    cost = (
        f"{result.secs:.0f} s, {result.cpu_secs:.0f} s of CPU, "
        f"{result.peak_bytes / 2**30:.1f} GiB of host memory"
    )
    return "\n".join([*lines, "", f"{verdict} ({cost})"])
