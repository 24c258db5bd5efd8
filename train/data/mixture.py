"""Which document comes next: lanes, the independent readers that a stream consists of.

A run has a fixed number of lanes. Lane l of n reads every n-th document of each source's shuffled
order, beginning with the l-th. It chooses among the sources by itself and packs its own rows. So
the rows are a function of the config alone. Which process or host runs a lane changes nothing. A
lane's state is the number of documents that it read, and the few of them that are in no row yet.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from train.data import chat, data_errors, document_refs, packing, shuffle
from train.data import config as data_config
from train.data import records as records_lib


def find_lanes(row: int, num_rows: int, num_lanes: int) -> range:
    """Return the lanes that serve a row in turn.

    With more lanes than rows, each row has a block of lanes. Otherwise each lane has a block of
    rows, of which it makes one after another.
    """
    if num_lanes >= num_rows:
        turns = num_lanes // num_rows
        return range(row * turns, (row + 1) * turns)
    lane = row // (num_rows // num_lanes)
    return range(lane, lane + 1)


def find_lane(step: int, row: int, num_rows: int, num_lanes: int) -> int:
    """Return the lane that a row of a step's batch comes from."""
    lanes = find_lanes(row, num_rows, num_lanes)
    return lanes[step % len(lanes)]


@dataclasses.dataclass(frozen=True)
class LaneState:
    """What continues a lane. It holds no token.

    Attributes:
      documents_read: number of documents drawn, by source. Empty before the lane's first row.
      tokens_read: number of tokens in these documents, by source.
      num_dropped: number of conversations left out as too long.
      bad_records: number of records left out as bad, by source. Sources without any have no entry.
      pending: the pieces that are in no row yet, in order of arrival.
    """

    documents_read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tokens_read: Mapping[str, int] = dataclasses.field(default_factory=dict)
    num_dropped: int = 0
    bad_records: Mapping[str, int] = dataclasses.field(default_factory=dict)
    pending: tuple[document_refs.PendingPieceRef, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: {} for a lane without a row so far."""
        # Counts begin with the first row. A lane that never ran has none to write.
        if not self.documents_read:
            return {}
        return {
            "read": dict(self.documents_read),
            "tokens": dict(self.tokens_read),
            "dropped": self.num_dropped,
            # Without bad records a state is as it was before they could be left out.
            **({"bad": dict(self.bad_records)} if self.bad_records else {}),
            "waiting": [piece_ref.to_text() for piece_ref in self.pending],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "LaneState":
        """Return the state that `to_json` wrote."""
        return cls(
            dict(value.get("read", {})),
            dict(value.get("tokens", {})),
            value.get("dropped", 0),
            dict(value.get("bad", {})),
            tuple(map(document_refs.PendingPieceRef.from_text, value.get("waiting", ()))),
        )


class DataLane:
    """One reader. It draws documents, packs them into rows, and counts what it drew."""

    def __init__(
        self,
        lane_number: int,
        num_lanes: int,
        config: data_config.StreamConfig,
        records: dict[str, records_lib.RecordFiles],
        encoder: chat.RecordEncoder,
        num_epochs: int | None,
        state: LaneState,
    ):
        """Go on from a state. Pending documents are read and tokenised again.

        Args:
          lane_number: number of the lane, from 0 to `num_lanes` - 1.
          num_lanes: number of the run's lanes.
          config: the stream's config.
          records: the records of each source, by name.
          encoder: makes documents of records.
          num_epochs: number of times to read every source. None reads for ever.
          state: the lane's state. `LaneState()` is the beginning.

        Raises:
          DataError: see `_restore_pieces`.
        """
        self._lane_number, self._num_lanes, self._num_epochs = lane_number, num_lanes, num_epochs
        self._config, self._records, self._encoder = config, records, encoder
        self._sources = {source.name: source for source in config.data.sources}
        # A source's number in a batch is its place in the config.
        self._source_indices = {name: i for i, name in enumerate(self._sources)}
        # A source that the state does not know was added at the checkpoint. It begins at 0.
        unread = dict.fromkeys(self._sources, 0)
        self._documents_read = {**unread, **state.documents_read}
        self._tokens_read = {**unread, **state.tokens_read}
        self._num_dropped = state.num_dropped
        self._bad_records = dict(state.bad_records)
        self._new_errors: list[str] = []  # of records left out since `take_errors`
        # A long document may be pending in two pieces. It is tokenised, and kept, once.
        restored: dict[str, packing.TokenizedDocument | None] = {}
        self._pending = [
            pending_piece
            for piece_ref in state.pending
            for pending_piece in self._restore_pieces(piece_ref, restored)
        ]

    def next_row(self, step: int) -> packing.PackedRow | None:
        """Return the lane's next row, for a batch of this step. None when all is read."""
        segments = self.next_segments(step)
        return None if segments is None else packing.write_row(segments, self._config.seq_len)

    def next_segments(self, step: int) -> list[packing.RowSegment] | None:
        """Return what the lane's next row consists of, without writing it. None at the end."""
        return packing.choose_segments(
            self._pending,
            lambda: self._draw_document(step),
            self._config.seq_len,
            self._config.data.lookahead,
            self._config.data.pack,
        )

    def get_state(self) -> LaneState:
        """Return what continues this lane."""
        pending = tuple(pending_piece.to_ref() for pending_piece in self._pending)
        # Copies: the lane goes on counting, and a state is that of one moment.
        return LaneState(
            dict(self._documents_read),
            dict(self._tokens_read),
            self._num_dropped,
            dict(self._bad_records),
            pending,
        )

    def take_errors(self) -> list[str]:
        """Return the errors of the records that were left out as bad since the last call."""
        errors, self._new_errors = self._new_errors, []
        return errors

    def _draw_document(self, step: int) -> list[packing.PendingPiece]:
        """Return the pieces of the next document, none at the end of the last epoch.

        Raises:
          DataError: a record cannot be used and is not left out, or all records of a source are
            left out.
        """
        # A loop, because a record may be left out, and the next one is drawn.
        while (name := self._choose_source(step)) is not None:
            num_records = len(self._records[name])
            epoch, position = divmod(self._next_position(name), num_records)
            # Counted also where it is dropped below: the count is the position in the order.
            self._documents_read[name] += 1
            index = shuffle.shuffle_position(position, num_records, self._config.seed, name, epoch)
            try:
                document = self._encode_record(name, index)
            except data_errors.BadRecordError as error:
                if self._config.data.bad_records == "error":
                    raise
                self._count_bad_record(name, error)
            else:
                if document is not None:
                    self._tokens_read[name] += len(document.tokens)
                    sample_id = document_refs.DocumentRef(name, index, epoch).to_text()
                    return self._split_document(sample_id, name, document)
                self._num_dropped += 1
            self._check_some_fit(name)
        return []

    def _count_bad_record(self, name: str, error: data_errors.BadRecordError) -> None:
        """Leave out a bad record. `BatchStream` judges the share of all lanes' bad records.

        Raises:
          DataError: they are too many already in this lane, which might never make a row.
        """
        self._bad_records[name] = self._bad_records.get(name, 0) + 1
        self._new_errors.append(str(error))
        data_errors.check_bad_share(
            name,
            self._bad_records[name],
            self._documents_read[name],
            len(self._records[name]),
            self._config.data.max_bad_share,
            str(error),
        )

    def _next_position(self, name: str) -> int:
        """Return the position of the lane's next document in all epochs of a source's order."""
        return self._documents_read[name] * self._num_lanes + self._lane_number

    def _choose_source(self, step: int) -> str | None:
        """Return the next document's source, None when all have ended.

        The chance of a source is its weight over the mean length of the documents that the lane
        read of it so far. Sources of long documents are then drawn less often, so that weights
        become shares of the tokens. A source still unread counts with the mean length of all
        documents.
        """
        weights = self._config.data.weights_at(step)
        names = [name for name in self._sources if weights.get(name) and not self._has_ended(name)]
        if not names:
            return None
        # These count all sources, also those that have ended or lost their weight.
        num_documents = sum(self._documents_read.values())
        num_tokens = sum(self._tokens_read.values())
        chances = {}
        for name in names:
            documents, tokens = self._documents_read[name], self._tokens_read[name]
            # Before the first document all lengths are taken to be equal.
            mean_length = 1.0
            if num_tokens:
                mean_length = tokens / documents if tokens else num_tokens / num_documents
            chances[name] = weights[name] / mean_length
        # The number of documents is the lane's count of draws: every draw uses another key.
        return shuffle.choose_by_weight(
            chances, sum(chances.values()), self._config.seed, self._lane_number, num_documents
        )

    def _has_ended(self, name: str) -> bool:
        if self._num_epochs is None:
            return False
        return self._next_position(name) >= self._num_epochs * len(self._records[name])

    def _check_some_fit(self, name: str) -> None:
        """Refuse a source of which a whole epoch was left out. Reading on would never end.

        Raises:
          DataError: the source is such a one.
        """
        num_read, num_tokens = self._documents_read[name], self._tokens_read[name]
        if self._num_epochs is None and not num_tokens and num_read >= len(self._records[name]):
            num_bad = self._bad_records.get(name, 0)
            bad = f"{num_bad} of them bad, " if num_bad else ""
            raise records_lib.DataError(
                f"source {name!r}: got {num_read} records, {bad}all longer than "
                f"{self._config.seq_len} tokens; wanted some that fit. Use longer rows."
            )

    def _encode_record(self, name: str, index: int) -> packing.TokenizedDocument | None:
        """Return a record's document, None for a conversation to leave out.

        Raises:
          BadRecordError: the record cannot be used.
          DataError: the file cannot be read, or a conversation is too long.
        """
        records = self._records[name]
        record = records.read(index)
        try:
            return self._encoder.encode_or_drop(record, self._sources[name].kind)
        except chat.OverlongError as error:  # `overlong` decides about these
            raise records_lib.DataError(f"{records.location(index)}: {error}") from None
        except ValueError as error:
            raise data_errors.bad_record(records.location(index), error) from None

    def _split_document(
        self, sample_id: str, name: str, document: packing.TokenizedDocument
    ) -> list[packing.PendingPiece]:
        return packing.split_document(
            sample_id, self._source_indices[name], document, self._config.seq_len
        )

    def _restore_pieces(
        self,
        piece_ref: document_refs.PendingPieceRef,
        restored: dict[str, packing.TokenizedDocument | None],
    ) -> list[packing.PendingPiece]:
        """Tokenise a pending piece of a state again.

        Args:
          piece_ref: the piece.
          restored: the documents of earlier pieces, by sample id. This one's is added.

        Raises:
          DataError: the document has another number of tokens than before, and some of its tokens
            are in earlier rows.
        """
        sample_id, start, end = piece_ref.sample_id, piece_ref.start, piece_ref.end
        document_ref = document_refs.DocumentRef.from_text(sample_id)
        name, index = document_ref.source, document_ref.index
        if sample_id not in restored:
            restored[sample_id] = self._encode_record(name, index)
        document = restored[sample_id]
        if document is None:  # rows have become shorter since, and the conversation fits no more
            self._num_dropped += 1
            return []
        if end - start == piece_ref.length:
            # No token is in a row yet, so rows of another length may cut the document anew.
            return self._split_document(sample_id, name, document)
        if len(document.tokens) != piece_ref.length:
            raise records_lib.DataError(
                f"{self._records[name].location(index)}: got {len(document.tokens)} tokens; "
                f"wanted the {piece_ref.length} of which the checkpoint had handed out some. Take "
                "its tokenizer and its settings of texts and conversations."
            )
        return [packing.PendingPiece(sample_id, self._source_indices[name], document, start, end)]
