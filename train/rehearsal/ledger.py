"""What becomes of every document of a lane: none is lost, cut wrongly or handed out twice."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.data import document_refs, mixture, packing


@dataclasses.dataclass
class _OpenDocument:
    """A document of which some tokens were handed out."""

    length: int
    num_tokens: int
    spans: list[tuple[int, int]]


class DocumentLedger:
    """Follows the segments of one lane."""

    def __init__(self, source_names: Sequence[str]):
        self._source_numbers = {name: i for i, name in enumerate(source_names)}
        self._open: dict[str, _OpenDocument] = {}
        self._complete_ids: list[tuple[int, int, int]] = []
        self.num_tokens = 0
        self.errors: list[str] = []

    def add_row(self, segments: Sequence[packing.RowSegment]) -> None:
        """Take a row's segments."""
        for segment in segments:
            length = len(segment.document.tokens)
            self.num_tokens += segment.length
            # Most documents lie in one row, whole.
            if segment.length == length and segment.sample_id not in self._open:
                self._complete_ids.append(self._number_of(segment.sample_id))
                continue
            document = self._open.setdefault(segment.sample_id, _OpenDocument(length, 0, []))
            document.num_tokens += segment.length
            document.spans.append((segment.start, segment.start + segment.length))
            if document.num_tokens >= document.length:
                self._check_spans(segment.sample_id, document.spans, document.length)
                self._complete_ids.append(self._number_of(segment.sample_id))
                del self._open[segment.sample_id]

    def close(self, state: mixture.LaneState) -> np.ndarray:
        """Compare with the lane's last state, whose pending pieces were handed out to nobody.

        Returns:
          (source, index, epoch) of all documents that the lane drew and did not leave out [n, 3].
        """
        pending: dict[str, list[document_refs.PendingPieceRef]] = {}
        for piece in state.pending:
            pending.setdefault(piece.sample_id, []).append(piece)
        for sample_id in self._open.keys() - pending.keys():
            self.errors.append(f"document {sample_id}: some tokens are in no row and not pending")
        for sample_id, pieces in pending.items():
            spans = [(piece.start, piece.end) for piece in pieces]
            document = self._open.get(sample_id)
            if document is not None:
                spans += document.spans
            self._check_spans(sample_id, spans, pieces[0].length)
        ids = [*self._complete_ids, *map(self._number_of, pending)]
        num_drawn = sum(state.documents_read.values()) - state.num_dropped
        if len(ids) != num_drawn:
            self.errors.append(f"got {len(ids)} documents; wanted the {num_drawn} that were drawn")
        return np.array(ids, np.int64).reshape(-1, 3)

    def _number_of(self, sample_id: str) -> tuple[int, int, int]:
        reference = document_refs.DocumentRef.from_text(sample_id)
        return self._source_numbers[reference.source], reference.index, reference.epoch

    def _check_spans(self, sample_id: str, spans: list[tuple[int, int]], length: int) -> None:
        position = 0
        for start, end in sorted(spans):
            if start != position:
                word = "twice" if start < position else "never"
                self.errors.append(
                    f"document {sample_id}: tokens {min(start, position)} to "
                    f"{max(start, position)} were handed out {word}"
                )
            position = end
        if position != length:
            self.errors.append(f"document {sample_id}: got {position} tokens; wanted {length}")


def check_documents(
    documents: np.ndarray, num_read: np.ndarray, num_records: Sequence[int], num_dropped: int
) -> list[str]:
    """Return what is wrong with the documents of all lanes together.

    Args:
      documents: (source, index, epoch) of each document that was drawn [n, 3].
      num_read: documents that each lane drew of each source [lanes, sources].
      num_records: number of each source's records.
      num_dropped: conversations left out as too long.
    """
    errors = []
    unique = np.unique(documents, axis=0)
    if len(unique) < len(documents):
        errors.append(f"{len(documents) - len(unique)} documents were read twice in an epoch")
    num_lanes = len(num_read)
    for source, total in enumerate(num_records):
        # An epoch is over for all once the lane that is furthest behind has left it.
        num_whole_epochs = int(num_read[:, source].min()) * num_lanes // total
        for epoch in range(num_whole_epochs):
            here = (unique[:, 0] == source) & (unique[:, 2] == epoch)
            num_missing = total - int(here.sum())
            if num_missing > num_dropped:
                errors.append(
                    f"source {source}: {num_missing} of {total} records of epoch {epoch} were not "
                    f"read, and {num_dropped} were left out as too long"
                )
    return errors
