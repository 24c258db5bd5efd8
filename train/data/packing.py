"""Documents to rows of a fixed length, by best fit, cutting none that fits into a row.

A document longer than a row becomes two pieces: the whole rows that it fills, and a remainder that
shares a row. Each part of it in a row is a segment with positions from 0. A cut loses context and
no token: the last token of a piece still learns to predict the first of the next.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from train.data import batch as batch_lib

# Pending tokens stay below this number of rows, however many documents may be pending. Long
# documents would otherwise fill the memory, and be tokenised again in a resumed run.
_MAX_PENDING_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document of n tokens.

    Attributes:
      tokens: their ids.
      loss_mask: whether the model must learn to predict a token.
    """

    tokens: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]


# eq=False here and above: pieces are told apart by identity. `list.remove` would otherwise compare
# their arrays.
@dataclasses.dataclass(eq=False)
class PendingPiece:
    """A part of a document that is in no row yet.

    Attributes:
      sample_id: "source:index:epoch" of the document.
      source_index: number of the document's source, from 0.
      document: all of it.
      start: first token of the piece; grows as rows take tokens.
      end: the token after the piece's last.
    """

    sample_id: str
    source_index: int
    document: TokenizedDocument
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclasses.dataclass(eq=False)
class PackedRow:
    """One row of a batch, and where its tokens come from.

    Attributes:
      batch: the row's arrays [T], numpy.
      source_ids: number of each token's source from 1, 0 for padding.
      sample_ids: of each segment, "source:index:epoch". "@" and the segment's first token in the
        document follow where the segment does not start its document.
    """

    batch: batch_lib.TrainBatch
    source_ids: Int32[np.ndarray, "T"]
    sample_ids: list[str]


def split_document(
    sample_id: str, source_index: int, document: TokenizedDocument, seq_len: int
) -> list[PendingPiece]:
    """Return a new document as pending pieces: the whole rows that it fills, and its remainder.

    The whole rows stay one piece, which `pack_next_row` takes a row from at a time.
    """
    length = len(document.tokens)
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
    """Take one row out of `pending`, drawing documents as long as fewer than `lookahead` wait.

    The row begins with the oldest piece, so that none waits for ever. The longest piece that still
    fits follows, until none does.

    Args:
      pending: pieces in order of arrival; changed in place.
      draw: returns the pieces of the next document, none once there is no next document.
      seq_len: T.
      lookahead: pieces to choose from.
      pack: put several documents in the row; otherwise one, and padding.

    Returns:
      The row, or None when nothing is left.
    """
    row, space = make_padding_row(seq_len), seq_len
    _refill_pending(pending, draw, seq_len, lookahead)
    if not pending:
        return None
    piece = pending[0]
    while True:
        length = min(piece.length, space)
        _write_piece(row, seq_len - space, piece, length)
        space -= length
        piece.start += length
        if not piece.length:
            pending.remove(piece)
        if not pack or not space:
            return row
        # After every piece: the next choice is then always one among `lookahead`.
        _refill_pending(pending, draw, seq_len, lookahead)
        fitting = [piece for piece in pending if piece.length <= space]
        if not fitting:
            return row
        piece = max(fitting, key=lambda piece: piece.length)  # the oldest of equals


def make_padding_row(seq_len: int) -> PackedRow:
    """Return a row of padding."""
    return PackedRow(batch_lib.make_padding(seq_len), np.zeros(seq_len, np.int32), [])


def _refill_pending(
    pending: list[PendingPiece],
    draw: Callable[[], list[PendingPiece]],
    seq_len: int,
    lookahead: int,
) -> None:
    num_tokens = sum(piece.length for piece in pending)
    while len(pending) < lookahead and num_tokens < _MAX_PENDING_ROWS * seq_len:
        pieces = draw()
        if not pieces:
            return
        pending += pieces
        num_tokens += sum(piece.length for piece in pieces)


def _write_piece(row: PackedRow, offset: int, piece: PendingPiece, length: int) -> None:
    """Copy the first `length` tokens of a piece into a row, from `offset` on."""
    arrays: Any = row.batch  # numpy here, so written in place; the schema names the step's arrays
    document, start = piece.document, piece.start
    span = slice(offset, offset + length)
    arrays.tokens[span] = document.tokens[start : start + length]
    arrays.segment_ids[span] = len(row.sample_ids) + 1
    arrays.positions[span] = np.arange(length)
    # Targets are taken from the document, not from the row: the last token of a cut piece then has
    # its target. Only the document's last token has none, where the slice is one shorter.
    targets = document.tokens[start + 1 : start + length + 1]
    target_span = slice(offset, offset + len(targets))
    arrays.targets[target_span] = targets
    arrays.weights[target_span] = document.loss_mask[start + 1 : start + length + 1]
    row.source_ids[span] = piece.source_index + 1
    row.sample_ids.append(f"{piece.sample_id}@{start}" if start else piece.sample_id)
