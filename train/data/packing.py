"""Documents to rows of a fixed length, by best fit, cutting none that fits into a row.

A document longer than a row becomes two pieces: the whole rows that it fills, and a remainder that
shares a row. Each part of a document in a row is a segment with positions from 0. A cut loses
context and no token: the last token of a segment still learns to predict the next one's first.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

from train.data import batch as batch_lib
from train.data import document_refs

# No document is drawn while this number of rows is pending, whatever the look-ahead. Long documents
# would otherwise fill the memory, and a resumed run would tokenise all of them again.
_MAX_PENDING_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document of n tokens.

    Attributes:
      tokens: ids.
      loss_mask: whether the loss counts the prediction of a token.
    """

    tokens: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]


# eq=False here and above: pieces are told apart by identity. `list.remove` would otherwise compare
# their arrays.
@dataclasses.dataclass(eq=False)
class PendingPiece:
    """A part of a document that is in no row yet.

    Attributes:
      sample_id: text of the document's `document_refs.DocumentRef`.
      source_index: number of the document's source, from 0.
      document: all of it.
      start: number of the first token that is in no row yet. It grows as rows take tokens.
      end: number of the token after the piece's last.
    """

    sample_id: str
    source_index: int
    document: TokenizedDocument
    start: int
    end: int

    @property
    def length(self) -> int:
        """Return the number of tokens that are in no row yet."""
        return self.end - self.start

    def to_ref(self) -> document_refs.PendingPieceRef:
        """Return what a state keeps of the piece: all but its tokens."""
        length = len(self.document.tokens)
        return document_refs.PendingPieceRef(self.sample_id, self.start, self.end, length)


@dataclasses.dataclass(eq=False)
class PackedRow:
    """One row of a batch, and where its tokens come from.

    Attributes:
      arrays: the row's tokens, targets and weights [T].
      source_ids: number of each token's source from 1, 0 for padding.
      sample_ids: the segments' names, see `document_refs.segment_to_text`.
    """

    arrays: batch_lib.HostTrainBatch
    source_ids: Int32[np.ndarray, "T"]
    sample_ids: list[str]


@dataclasses.dataclass(frozen=True, eq=False)
class RowSegment:
    """A part of a document that was chosen for a row.

    Attributes:
      sample_id: text of the document's `document_refs.DocumentRef`.
      source_index: number of the document's source, from 0.
      document: all of it.
      start: number of the part's first token.
      length: number of the part's tokens, at least 1.
    """

    sample_id: str
    source_index: int
    document: TokenizedDocument
    start: int
    length: int


def split_document(
    sample_id: str, source_index: int, document: TokenizedDocument, seq_len: int
) -> list[PendingPiece]:
    """Return a new document as pending pieces: the whole rows that it fills, and its remainder.

    The whole rows are one piece. `pack_next_row` takes one row of it at a time.
    """
    length = len(document.tokens)
    # A document of exactly one row needs no cut, so it is the second piece alone.
    body = length // seq_len * seq_len if length > seq_len else 0
    return [
        PendingPiece(sample_id, source_index, document, start, end)
        for start, end in ((0, body), (body, length))
        if end > start
    ]


def pack_next_row(
    pending: list[PendingPiece],
    draw: Callable[[], list[PendingPiece]],
    seq_len: int,
    lookahead: int,
    pack: bool = True,
) -> PackedRow | None:
    """Take one row out of `pending`, see `choose_segments`. None when all is read."""
    segments = choose_segments(pending, draw, seq_len, lookahead, pack)
    return None if segments is None else write_row(segments, seq_len)


def choose_segments(
    pending: list[PendingPiece],
    draw: Callable[[], list[PendingPiece]],
    seq_len: int,
    lookahead: int,
    pack: bool = True,
) -> list[RowSegment] | None:
    """Take the segments of one row out of `pending`, which documents fill up to `lookahead` pieces.

    The row begins with the oldest piece, so that no piece waits for ever. Then the longest piece
    that fits follows, again and again until no piece fits. No token is copied here.

    Args:
      pending: pieces in order of arrival. It is changed in place.
      draw: returns the pieces of the next document. They are none when all documents were drawn.
      seq_len: T.
      lookahead: number of pieces to choose from.
      pack: put several documents in the row. False puts one, and padding.

    Returns:
      The segments in the order of the row, or None when no piece is pending and no document
      remains.
    """
    segments: list[RowSegment] = []
    space = seq_len
    num_tokens = sum([piece.end - piece.start for piece in pending])
    num_tokens = _refill_pending(pending, num_tokens, draw, seq_len, lookahead)
    if not pending:
        return None
    chosen = pending[0]
    while True:
        length = min(chosen.length, space)
        segments.append(
            RowSegment(chosen.sample_id, chosen.source_index, chosen.document, chosen.start, length)
        )
        space -= length
        num_tokens -= length
        chosen.start += length
        # A piece of whole rows stays pending until its last row.
        if not chosen.length:
            pending.remove(chosen)
        if not pack or not space:
            return segments
        # After every piece: the next choice is then always one among `lookahead`.
        num_tokens = _refill_pending(pending, num_tokens, draw, seq_len, lookahead)
        longest_fit = _find_longest_fit(pending, space)
        if longest_fit is None:
            return segments
        chosen = longest_fit


def _find_longest_fit(pending: list[PendingPiece], space: int) -> PendingPiece | None:
    """Return the longest piece of at most `space` tokens, of equals the oldest, or None."""
    longest_fit, longest = None, 0
    for candidate in pending:
        # Not `candidate.length`: a property call for each of them would be a third of packing.
        if longest < candidate.end - candidate.start <= space:
            longest_fit, longest = candidate, candidate.end - candidate.start
    return longest_fit


def write_row(segments: list[RowSegment], seq_len: int) -> PackedRow:
    """Return the row of these segments, and padding after them."""
    row, offset = make_padding_row(seq_len), 0
    for segment in segments:
        _write_segment(row, offset, segment)
        offset += segment.length
    return row


def make_padding_row(seq_len: int) -> PackedRow:
    """Return a row of padding, whose arrays may be written in place."""
    return PackedRow(batch_lib.make_padding(seq_len), np.zeros(seq_len, np.int32), [])


def _refill_pending(
    pending: list[PendingPiece],
    num_tokens: int,
    draw: Callable[[], list[PendingPiece]],
    seq_len: int,
    lookahead: int,
) -> int:
    """Draw documents until `lookahead` pieces or `_MAX_PENDING_ROWS` rows of tokens are pending.

    Args:
      pending: pieces in order of arrival. It is changed in place.
      num_tokens: tokens in them. To add them up for every piece of a row would be a tenth of
        packing.
      draw: see `choose_segments`.
      seq_len: T.
      lookahead: number of pieces to choose from.

    Returns:
      The tokens in all pending pieces.
    """
    while len(pending) < lookahead and num_tokens < _MAX_PENDING_ROWS * seq_len:
        pieces = draw()
        if not pieces:
            break
        pending += pieces
        num_tokens += sum([piece.end - piece.start for piece in pieces])
    return num_tokens


def _write_segment(row: PackedRow, offset: int, segment: RowSegment) -> None:
    """Copy a segment's tokens into a row, from `offset` on."""
    arrays, document = row.arrays, segment.document
    start, length = segment.start, segment.length
    span = slice(offset, offset + length)
    arrays.tokens[span] = document.tokens[start : start + length]
    arrays.segment_ids[span] = len(row.sample_ids) + 1
    arrays.positions[span] = np.arange(length)
    # Targets come from the document, not from the row, so that the last token of a cut piece has
    # its target. The document's last token has none: the slice is one shorter there.
    targets = document.tokens[start + 1 : start + length + 1]
    target_span = slice(offset, offset + len(targets))
    arrays.targets[target_span] = targets
    arrays.weights[target_span] = document.loss_mask[start + 1 : start + length + 1]
    row.source_ids[span] = segment.source_index + 1
    row.sample_ids.append(document_refs.segment_to_text(segment.sample_id, start))
