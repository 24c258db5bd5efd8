"""Texts that name documents and their parts, in the states of lanes and in the log of samples.

  source:index:epoch                    a document, which is also called a sample
  source:index:epoch@start              a segment of a row that does not start its document
  source:index:epoch@start-end/length   a pending piece

The index is the record's number in its source. Start, end and length count the document's tokens.
All are read from the right: `DataSource` allows neither "@" nor ":" in names.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class DocumentRef:
    """A record of a source, in one epoch."""

    source: str  # name of the source
    index: int  # number of the record, from 0
    epoch: int  # number of earlier readings of the source

    def to_text(self) -> str:
        """Return "source:index:epoch"."""
        return f"{self.source}:{self.index}:{self.epoch}"

    @classmethod
    def from_text(cls, text: str) -> "DocumentRef":
        """Return the reference that `to_text` wrote."""
        source, index, epoch = text.rsplit(":", 2)
        return cls(source, int(index), int(epoch))


@dataclasses.dataclass(frozen=True)
class PendingPieceRef:
    """A part of a document that is in no row yet, without its tokens."""

    sample_id: str  # text of the document's `DocumentRef`
    start: int  # the part's first token
    end: int  # the token after the part's last
    length: int  # number of tokens in the whole document

    def to_text(self) -> str:
        """Return "source:index:epoch@start-end/length"."""
        return f"{self.sample_id}@{self.start}-{self.end}/{self.length}"

    @classmethod
    def from_text(cls, text: str) -> "PendingPieceRef":
        """Return the reference that `to_text` wrote."""
        sample_id, span = text.rsplit("@", 1)
        start, end, length = map(int, re.split("[-/]", span))
        return cls(sample_id, start, end, length)


def segment_to_text(sample_id: str, start: int) -> str:
    """Return the name of a segment that begins at token `start` of a document."""
    return f"{sample_id}@{start}" if start else sample_id
