"""Which document comes next: lanes, the independent readers that a stream consists of.

A run has a fixed number of lanes. Lane l of n reads every n-th document of each source's shuffled
order, beginning with the l-th. It chooses among the sources by itself and packs its own rows. So
the rows are a function of the config alone. Which process or host runs a lane changes nothing. A
lane's state is the number of documents that it read, and the few of them that are in no row yet.
"""

import re
from typing import Any

from train.data import chat, packing, shuffle
from train.data import config as data_config
from train.data import records as records_lib


def find_lane(step: int, row: int, num_rows: int, num_lanes: int) -> int:
    """Return the lane that a row of a step's batch comes from.

    With more lanes than rows, each row has a block of lanes, which serve the row in turn. Otherwise
    each lane has a block of rows. Either way a host with consecutive rows has consecutive lanes, so
    that equal shares of rows are equal shares of lanes.
    """
    if num_lanes >= num_rows:
        turns = num_lanes // num_rows
        return row * turns + step % turns
    return row // (num_rows // num_lanes)


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
        state: dict[str, Any],
    ):
        """Go on from a state. Pending documents are read and tokenised again.

        Args:
          lane_number: from 0 to `num_lanes` - 1.
          num_lanes: of the run.
          config: of the stream.
          records: of each source, by name.
          encoder: makes documents of records.
          num_epochs: number of times to read every source. None reads for ever.
          state: of `get_state`. An empty one is the beginning.

        Raises:
          DataError: see `_restore_pieces`.
        """
        self._lane_number, self._num_lanes, self._num_epochs = lane_number, num_lanes, num_epochs
        self._config, self._records, self._encoder = config, records, encoder
        self._sources = {source.name: source for source in config.data.sources}
        # A source's number in a batch is its place in the config.
        self._source_indices = {name: i for i, name in enumerate(self._sources)}
        # A source that the state does not know was added at the checkpoint; it begins at 0.
        unread = dict.fromkeys(self._sources, 0)
        self._documents_read: dict[str, int] = unread | state.get("read", {})
        self._tokens_read: dict[str, int] = unread | state.get("tokens", {})
        self._num_dropped: int = state.get("dropped", 0)
        self._pending = [
            waiting for entry in state.get("waiting", []) for waiting in self._restore_pieces(entry)
        ]

    def next_row(self, step: int) -> packing.PackedRow | None:
        """Return the lane's next row, for a batch of this step. None when all is read."""
        return packing.pack_next_row(
            self._pending,
            lambda: self._draw_document(step),
            self._config.seq_len,
            self._config.data.lookahead,
            self._config.data.pack,
        )

    def get_state(self) -> dict[str, Any]:
        """Return what continues this lane, JSON-able and without any token.

        Returns:
          A dict with the keys
          read: number of documents drawn, by source.
          tokens: number of tokens in them, by source.
          dropped: number of conversations left out as too long.
          waiting: pending pieces as "sample@start-end/length", in tokens of the document.
        """
        return {
            "read": dict(self._documents_read),
            "tokens": dict(self._tokens_read),
            "dropped": self._num_dropped,
            "waiting": [
                f"{waiting.sample_id}@{waiting.start}-{waiting.end}/{len(waiting.document.tokens)}"
                for waiting in self._pending
            ],
        }

    def _draw_document(self, step: int) -> list[packing.PendingPiece]:
        """Return the pieces of the next document, none at the end of the last epoch.

        Raises:
          DataError: a record cannot be used, or all conversations of a source are too long.
        """
        # A loop, because a conversation that is too long is left out, and the next one is drawn.
        while (name := self._choose_source(step)) is not None:
            num_records = len(self._records[name])
            epoch, position = divmod(self._next_position(name), num_records)
            # Counted also where it is dropped below: the count is the position in the order.
            self._documents_read[name] += 1
            index = shuffle.shuffle_position(position, num_records, self._config.seed, name, epoch)
            document = self._encode_record(name, index)
            if document is not None:
                self._tokens_read[name] += len(document.tokens)
                return self._split_document(f"{name}:{index}:{epoch}", name, document)
            self._num_dropped += 1
            self._check_some_fit(name)
        return []

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
        # Of all sources, also of those that have ended or lost their weight.
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
            raise records_lib.DataError(
                f"source {name!r}: got {num_read} conversations, all longer than "
                f"{self._config.seq_len} tokens; wanted some that fit. Use longer rows."
            )

    def _encode_record(self, name: str, index: int) -> packing.TokenizedDocument | None:
        """Return a record's document, None for a conversation to leave out.

        Raises:
          DataError: the record cannot be used.
        """
        records = self._records[name]
        record = records.read(index)
        try:
            return self._encoder.encode_or_drop(record, self._sources[name].kind)
        except ValueError as error:
            raise records_lib.DataError(f"{records.location(index)}: {error}") from None

    def _split_document(
        self, sample_id: str, name: str, document: packing.TokenizedDocument
    ) -> list[packing.PendingPiece]:
        return packing.split_document(
            sample_id, self._source_indices[name], document, self._config.seq_len
        )

    def _restore_pieces(self, entry: str) -> list[packing.PendingPiece]:
        """Tokenise a pending piece of a state again.

        Args:
          entry: of `waiting` in a state.

        Raises:
          DataError: the document has another number of tokens than before, and some of its tokens
            are in earlier rows.
        """
        # From the right, as for "source:index:epoch@start-end/length". `DataSource` allows neither
        # `@` nor `:` in names.
        sample_id, span = entry.rsplit("@", 1)
        name, index, _ = sample_id.rsplit(":", 2)
        start, end, length = map(int, re.split("[-/]", span))
        document = self._encode_record(name, int(index))
        if document is None:  # rows have become shorter since, and the conversation fits no more
            self._num_dropped += 1
            return []
        if end - start == length:
            # No token is in a row yet, so rows of another length may cut the document anew.
            return self._split_document(sample_id, name, document)
        if len(document.tokens) != length:
            raise records_lib.DataError(
                f"{self._records[name].location(int(index))}: got {len(document.tokens)} tokens; "
                f"wanted the {length} of which the checkpoint had handed out some. Take its "
                "tokenizer and its settings of texts and conversations."
            )
        return [packing.PendingPiece(sample_id, self._source_indices[name], document, start, end)]
