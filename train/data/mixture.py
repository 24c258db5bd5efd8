"""What a stream of rows is made of: its sources, their weights, and the lanes that read them.

A lane is one of a fixed number of independent readers. Lane l of n takes every n-th document of
each source's shuffled order, beginning with the l-th, chooses among the sources by itself and
packs its own rows. So the rows are a function of the config alone: which process or host runs a
lane changes nothing, and a lane's state is what it read and the few documents that wait.
"""

import bisect
import dataclasses
import hashlib
import re
from typing import Any

from grain import experimental as grain

from m1_jax import configlib
from train.data import chat, packing
from train.data import records as records_lib


@dataclasses.dataclass(frozen=True)
class DataSource:
    """name: letters, digits, `_`, `-`, `.`. path, kind: see `sources.RecordFiles`,
    `chat.RECORD_KINDS`.

    weight: where `StreamConfig.weights` has none.
    """

    name: str
    path: str
    kind: str = "auto"
    weight: float = 1.0

    def __post_init__(self):
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"source: got the name {self.name!r}; wanted letters, digits, _ - .")
        _check_choice(f"source {self.name!r}: kind", self.kind, chat.RECORD_KINDS)
        if not self.weight >= 0:
            raise ValueError(
                f"source {self.name!r}: got the weight {self.weight}; wanted 0 or more"
            )


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """A stream of batches.

    sources: what to read. seq_len: T. rows: of the global batch.
    weights: (first step, ((source, weight), ...)), ascending from step 0; sources that are not
      named have weight 0. A weight is a source's share of the tokens, up to the sum of all.
      New ones are for what is drawn from then on: up to lanes * lookahead documents wait already.
    seed: of the order of documents. pack: several documents in a row.
    overlong: "error", "drop" or "split" for conversations longer than a row; texts are split.
    thinking: "keep" or "drop", see `chat`. profile: of the chat template, see `infer.prompt`.
    begin_token, end_token: control tokens around each text, or None.
    workers: processes that tokenise and pack; 0 is a thread of this one. No effect on the rows.
    prefetch: batches made ahead, by each worker.
    lanes: a multiple or a divisor of rows, and a multiple of the number of hosts. Fixed for a run:
      seq_len, rows, weights and the number of hosts may change at any checkpoint.
    lookahead: how many documents a lane's packer chooses from.
    """

    sources: tuple[DataSource, ...]
    seq_len: int
    rows: int
    weights: tuple[tuple[int, tuple[tuple[str, float], ...]], ...] = ()
    seed: int = 0
    pack: bool = True
    overlong: str = "error"
    thinking: str = "keep"
    profile: str = "release"
    begin_token: str | None = "<begin_of_document>"
    end_token: str | None = "<end_of_document>"
    workers: int = 0
    prefetch: int = 2
    lanes: int = 64
    lookahead: int = 64

    def __post_init__(self):
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"sources: got {names}; wanted at least one, of different names")
        for field, least in _MIN_FIELD_VALUES.items():
            value = getattr(self, field)
            configlib.check_field(value >= least, field, value, f"at least {least}")
        _check_choice("overlong", self.overlong, chat.OVERLONG_MODES)
        _check_choice("thinking", self.thinking, chat.THINKING_MODES)
        _check_choice("profile", self.profile, chat.PROFILES)
        if self.lanes % self.rows and self.rows % self.lanes:
            raise ValueError(
                f"lanes: got {self.lanes} with {self.rows} rows; wanted a multiple or a divisor "
                f"of the rows, such as {max(1, round(self.lanes / self.rows)) * self.rows}"
            )
        self._check_weights(names)

    def _check_weights(self, names: list[str]) -> None:
        steps = [step for step, _ in self.weights]
        if steps and (steps[0] != 0 or steps != sorted(set(steps))):
            raise ValueError(f"weights: got the steps {steps}; wanted ascending ones from 0")
        for step, weights in self.weights or ((0, self.weights_at(0).items()),):
            for name, weight in weights:
                if name not in names or not weight >= 0:
                    raise ValueError(
                        f"weights from step {step}: got {name!r}: {weight}; wanted 0 or more for "
                        f"one of {', '.join(names)}"
                    )
            if not sum(weight for _, weight in weights) > 0:
                raise ValueError(f"weights from step {step}: got none above 0; wanted one")

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights of a step by source."""
        if not self.weights:
            return {source.name: source.weight for source in self.sources}
        which = bisect.bisect_right([first for first, _ in self.weights], step) - 1
        return dict(self.weights[which][1])


_MIN_FIELD_VALUES = {
    "seq_len": 2,
    "rows": 1,
    "workers": 0,
    "prefetch": 1,
    "lanes": 1,
    "lookahead": 1,
}


def find_lane(step: int, row: int, num_rows: int, num_lanes: int) -> int:
    """Return the lane that a row of a step's batch comes from.

    Each row has its block of lanes, which serve it in turn, or each lane its block of rows: hosts
    with consecutive rows have consecutive lanes.
    """
    if num_lanes >= num_rows:
        turns = num_lanes // num_rows
        return row * turns + step % turns
    return row // (num_rows // num_lanes)


class DataLane:
    """One reader; see the module's docstring."""

    def __init__(
        self,
        lane_number: int,
        num_lanes: int,
        config: StreamConfig,
        records: dict[str, records_lib.RecordFiles],
        encoder: chat.RecordEncoder,
        num_epochs: int | None,
        state: dict[str, Any],
    ):
        """Go on from `state`; an empty one is the beginning. epochs: None reads for ever."""
        self._lane_number, self._num_lanes, self._num_epochs = lane_number, num_lanes, num_epochs
        self._config, self._records, self._encoder = config, records, encoder
        self._sources = {source.name: source for source in config.sources}
        self._source_indices = {name: i for i, name in enumerate(self._sources)}
        self._documents_read: dict[str, int] = dict.fromkeys(self._sources, 0) | state.get(
            "read", {}
        )
        self._tokens_read: dict[str, int] = dict.fromkeys(self._sources, 0) | state.get(
            "tokens", {}
        )
        self._num_dropped: int = state.get("dropped", 0)
        self._pending = [
            one for entry in state.get("waiting", []) for one in self._restore_pieces(entry)
        ]

    def next_row(self, step: int) -> packing.PackedRow | None:
        """Return the lane's next row, for a batch of this step; None when nothing is left."""
        config = self._config
        return packing.pack_next_row(
            self._pending,
            lambda: self._draw_document(step),
            config.seq_len,
            config.lookahead,
            config.pack,
        )

    def get_state(self) -> dict[str, Any]:
        """Return what continues this lane, JSON-able and without any token.

        read, tokens: documents and tokens by source. waiting: "sample@start-end/length" in tokens.
        """
        return {
            "read": dict(self._documents_read),
            "tokens": dict(self._tokens_read),
            "dropped": self._num_dropped,
            "waiting": [
                f"{one.sample_id}@{one.start}-{one.end}/{len(one.document.tokens)}"
                for one in self._pending
            ],
        }

    def _draw_document(self, step: int) -> list[packing.PendingPiece]:
        """Return what the next document brings, nothing at the end of the last epoch."""
        while (name := self._choose_source(step)) is not None:
            size = len(self._records[name])
            place = self._documents_read[name] * self._num_lanes + self._lane_number
            self._documents_read[name] += 1
            epoch, place = divmod(place, size)
            seed = _stable_hash(self._config.seed, name, epoch) % 2**32
            index = grain.index_shuffle(place, max_index=size - 1, seed=seed, rounds=4)
            document = self._encode_record(name, index)
            if document is not None:
                self._tokens_read[name] += len(document.tokens)
                sample = f"{name}:{index}:{epoch}"
                return packing.split_document(
                    sample, self._source_indices[name], document, self._config.seq_len
                )
            self._num_dropped += 1
            if (
                self._documents_read[name] >= size
                and not self._tokens_read[name]
                and self._num_epochs is None
            ):
                raise records_lib.DataError(
                    f"source {name!r}: got {self._documents_read[name]} conversations, "
                    "all longer than "
                    f"{self._config.seq_len} tokens; wanted some that fit. Use longer rows."
                )
        return []

    def _choose_source(self, step: int) -> str | None:
        """Return the next document's source.

        Chances are by weight over the mean length of what the lane read of a source so far, which
        makes weights shares of the tokens. A source still unread counts as all others together.
        """
        weights = self._config.weights_at(step)
        open_ = [name for name in self._sources if weights.get(name) and self._is_open(name)]
        if not open_:
            return None
        read, tokens = sum(self._documents_read.values()), sum(self._tokens_read.values())
        chances = []
        for name in open_:
            many, total = self._documents_read[name], self._tokens_read[name]
            mean = (total / many if total else tokens / read) if tokens else 1.0
            chances.append(weights[name] / mean)
        at = _stable_hash(self._config.seed, self._lane_number, read) / 2**64 * sum(chances)
        for name, chance in zip(open_, chances, strict=True):
            at -= chance
            if at < 0:
                return name
        return open_[-1]

    def _is_open(self, name: str) -> bool:
        if self._num_epochs is None:
            return True
        place = self._documents_read[name] * self._num_lanes + self._lane_number
        return place < self._num_epochs * len(self._records[name])

    def _encode_record(self, name: str, index: int) -> packing.TokenizedDocument | None:
        records = self._records[name]
        record = records.read(index)
        try:
            return self._encoder.encode_or_drop(record, self._sources[name].kind)
        except ValueError as error:
            raise records_lib.DataError(f"{records.location(index)}: {error}") from None

    def _restore_pieces(self, entry: str) -> list[packing.PendingPiece]:
        """Tokenise again what waited; a document of which nothing was handed out may change."""
        sample, places = entry.rsplit("@", 1)
        name, index, _ = sample.rsplit(":", 2)
        start, end, length = map(int, re.split("[-/]", places))
        document = self._encode_record(name, int(index))
        if document is None:  # rows have become shorter
            self._num_dropped += 1
            return []
        if end - start == length:
            return packing.split_document(
                sample, self._source_indices[name], document, self._config.seq_len
            )
        if len(document.tokens) != length:
            raise records_lib.DataError(
                f"{self._records[name].location(int(index))}: got {len(document.tokens)} tokens; "
                f"wanted the {length} of which the checkpoint had handed out some. Take its "
                "tokenizer and its settings of texts and conversations."
            )
        return [packing.PendingPiece(sample, self._source_indices[name], document, start, end)]


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    configlib.check_field(value in choices, field, value, f"one of {', '.join(choices)}")


def _stable_hash(*parts) -> int:
    """Return 64 bits that look random and are the same everywhere and always."""
    text = ":".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
