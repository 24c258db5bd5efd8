"""Documents to rows of a fixed length, by best fit, cutting none that fits into a row.

A document longer than a row becomes consecutive pieces: as many whole rows as it fills, and a rest
that shares a row. Each piece is a segment of its own with positions from 0. Nothing is lost by a
cut but context: the last token of a piece still learns to predict the first of the next.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int32

_MAX_PENDING_ROWS = 16  # rows' worth of tokens that wait at most, whatever the number of documents


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """n tokens. learn: whether a token is one that the model must learn to predict."""

    tokens: Int32[np.ndarray, "n"]
    loss_mask: Bool[np.ndarray, "n"]


@dataclasses.dataclass(eq=False)
class PendingPiece:
    """The places start to end of a document that are in no row yet.

    sample: "source:index:epoch" of the document. source: number of its source, from 0.
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
    """T places of `batch.TrainBatch`, and where they come from.

    sources: number of the source from 1, 0 for padding. samples: of each piece "source:index:epoch"
    and, where it does not start its document, "@" and the place where it starts.
    """

    tokens: Int32[np.ndarray, "T"]
    segment_ids: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "T"]
    targets: Int32[np.ndarray, "T"]
    weights: Float32[np.ndarray, "T"]
    source_ids: Int32[np.ndarray, "T"]
    sample_ids: list[str]


def split_document(
    sample_id: str, source_index: int, document: TokenizedDocument, seq_len: int
) -> list[PendingPiece]:
    """Return a new document as what waits: the whole rows that it fills, then its rest."""
    length = len(document.tokens)
    body = length // seq_len * seq_len if length > seq_len else 0
    cuts = ((0, body), (body, length))
    return [
        PendingPiece(sample_id, source_index, document, start, end)
        for start, end in cuts
        if end > start
    ]


def pack_next_row(
    pending: list[PendingPiece],
    draw: Callable[[], list[PendingPiece]],
    seq_len: int,
    lookahead: int,
    pack: bool = True,
) -> PackedRow | None:
    """Take one row out of `waiting`, drawing documents as long as fewer than `lookahead` wait.

    The oldest goes first, so that none waits for ever; then always the longest that still fits.

    Args:
      waiting: in order of arrival; changed in place.
      draw: returns what is to wait next, nothing once there is no more.
      pack: several documents in a row; otherwise one, and padding.

    Returns:
      The row, or None when nothing is left.
    """
    row, space = make_padding_row(seq_len), seq_len
    _refill_pending(pending, draw, seq_len, lookahead)
    if not pending:
        return None
    chosen = pending[0]
    while True:
        length = min(chosen.length, space)
        _write_piece(row, seq_len - space, chosen, length)
        space -= length
        chosen.start += length
        if not chosen.length:
            pending.remove(chosen)
        if not pack or not space:
            return row
        _refill_pending(pending, draw, seq_len, lookahead)
        fitting = [one for one in pending if one.length <= space]
        if not fitting:
            return row
        chosen = max(fitting, key=lambda one: one.length)


def make_padding_row(seq_len: int) -> PackedRow:
    """Return a row of padding."""
    ints = [np.zeros(seq_len, np.int32) for _ in range(5)]
    tokens, segment_ids, positions, targets, sources = ints
    weights = np.zeros(seq_len, np.float32)
    return PackedRow(tokens, segment_ids, positions, targets, weights, sources, [])


def _refill_pending(pending: list[PendingPiece], draw, seq_len: int, lookahead: int) -> None:
    tokens = sum(one.length for one in pending)
    while len(pending) < lookahead and tokens < _MAX_PENDING_ROWS * seq_len:
        more = draw()
        if not more:
            return
        pending += more
        tokens += sum(one.length for one in more)


def _write_piece(row: PackedRow, offset: int, piece: PendingPiece, length: int) -> None:
    here, start = slice(offset, offset + length), piece.start
    document = piece.document
    row.tokens[here] = document.tokens[start : start + length]
    row.segment_ids[here] = len(row.sample_ids) + 1
    row.positions[here] = np.arange(length)
    targets = document.tokens[start + 1 : start + length + 1]  # one less at the document's end
    row.targets[offset : offset + len(targets)] = targets
    row.weights[offset : offset + len(targets)] = document.loss_mask[start + 1 : start + length + 1]
    row.source_ids[here] = piece.source_index + 1
    row.sample_ids.append(f"{piece.sample_id}@{start}" if start else piece.sample_id)
