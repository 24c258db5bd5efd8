"""What a rehearsal found: the lines of its page, and the same as JSON."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

# In the order of the page. "fails" alone decides the exit status.
FINDING_KINDS = ("fails", "fits", "costs", "assumes")


@dataclasses.dataclass(frozen=True)
class RehearsalFinding:
    """One line of the page.

    Attributes:
      kind: one of `FINDING_KINDS`. "costs" is what takes time or memory, and "assumes" is what was
        not run as it will be: stand-ins and extrapolations.
      topic: part of the run, such as "placement".
      text: the line.
      secs: seconds that the chips wait for it in each `period`, by which costs are ranked. 0 where
        they do not wait, or where it is not known.
      values: the figures of the line, JSON-able.
    """

    kind: str
    topic: str
    text: str
    secs: float = 0.0
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


class FindingList:
    """Collects findings, in the order of the rehearsal."""

    def __init__(self):
        self.findings: list[RehearsalFinding] = []

    def add(self, kind: str, topic: str, text: str, secs: float = 0.0, **values: Any) -> None:
        """Add a line. See `RehearsalFinding`."""
        assert kind in FINDING_KINDS, kind
        self.findings.append(RehearsalFinding(kind, topic, text, secs, values))

    def of_kind(self, kind: str) -> list[RehearsalFinding]:
        """Return the findings of a kind. Costs come dearest first."""
        chosen = [finding for finding in self.findings if finding.kind == kind]
        return sorted(chosen, key=lambda finding: -finding.secs) if kind == "costs" else chosen

    @property
    def has_failed(self) -> bool:
        return bool(self.of_kind("fails"))

    @contextlib.contextmanager
    def catch_refusals(self, topic: str, place: str = "") -> Iterator[None]:
        """Make a refusal of the run's own code a line that "fails", and go on after the block.

        The run itself would end with the line of a ValueError or an OSError (`train.command`). Of
        other errors it would print a traceback, so the line has their kind.
        """
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split("\n"))
            if not isinstance(error, ValueError | OSError):
                text = f"{type(error).__name__}: {text}"
            self.add("fails", topic, f"{place}: {text}" if place else text)
