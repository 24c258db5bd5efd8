"""Documents whose tokens cost nothing, in records that the real readers read.

A record says how many tokens it has. Its text is that number, which `StandInTokenizer` encodes to
so many ids. Readers, encoder, lanes and packer are those of a run, and so are lengths where the
config's own files are here to be sampled.
"""

import dataclasses
import json
import pathlib
from typing import Any, cast

import numpy as np

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, data_errors, packing
from train.data import config as data_config
from train.data import records as records_lib

DEFAULT_MEAN_TOKENS = 1000
_SPREAD = 1.2  # standard deviation of the logarithm of a length, as web texts have
_MIN_TOKENS = 8
_MAX_TOKENS = 8 * 2**20
_IDS = 251  # ids of the stand-in's tokens, so that neighbouring documents differ


class StandInTokenizer:
    """Encodes a number to so many tokens, and any other text to a token for each 4 characters."""

    vocab_size = _IDS

    def __init__(self, max_tokens: int):
        # Small integers are single objects, so the list takes 8 bytes a token.
        self._ids = [i % _IDS for i in range(max_tokens)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self._ids[: int(text) if text.isdecimal() else len(text) // 4 + 1]

    def special_token_id(self, name: str) -> int:
        """Return the id of a control token."""
        return len(name)


def as_tokenizer(stand_in: StandInTokenizer) -> tokenizer_lib.Tokenizer:
    """Return the stand-in with the type of what it stands in for."""
    return cast(tokenizer_lib.Tokenizer, stand_in)


@dataclasses.dataclass(frozen=True)
class StandInSource:
    """Records of a source, by the numbers of tokens of their contents.

    Attributes:
      name: name of the source.
      is_chat: whether the records are conversations.
      lengths: tokens of each record's content, without control tokens and heads of turns.
    """

    name: str
    is_chat: bool
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int) -> dict[str, Any]:
        """Return a record, as `records.RecordFiles.read` would of `write`'s file."""
        text = str(self.lengths[index])
        if not self.is_chat:
            return {"text": text}
        question = {"role": "user", "content": "32"}
        return {"messages": [question, {"role": "assistant", "content": text}]}

    def location(self, index: int) -> str:
        """Return a record's place, for messages."""
        return f"{self.name}, record {index}"

    def write(self, path: pathlib.Path) -> None:
        """Write the records as JSON lines."""
        with path.open("w") as file:
            for index in range(len(self)):
                file.write(json.dumps(self.read(index)) + "\n")


def make_stand_in_source(
    source: data_config.DataSource,
    num_records: int,
    mean_tokens: float,
    max_tokens: int,
    seed: int,
    measured_lengths: np.ndarray | None = None,
) -> StandInSource:
    """Return records with lengths of the source's own, or else of a log-normal distribution.

    Args:
      source: the config's source.
      num_records: number of records to make.
      mean_tokens: mean length where there is nothing to measure.
      max_tokens: longest record.
      seed: seed of the lengths.
      measured_lengths: lengths of a sample of the source's own records.
    """
    rng = np.random.default_rng((seed, len(source.name), sum(source.name.encode())))
    if measured_lengths is not None and len(measured_lengths):
        lengths = rng.choice(measured_lengths, num_records)
    else:
        # The mean of a log-normal is exp(mu + sigma^2 / 2).
        mu = np.log(mean_tokens) - _SPREAD**2 / 2
        lengths = rng.lognormal(mu, _SPREAD, num_records)
    lengths = np.clip(lengths, _MIN_TOKENS, min(max_tokens, _MAX_TOKENS)).astype(np.int64)
    return StandInSource(source.name, source.kind == "chat", lengths)


class LengthEncoder(chat.RecordEncoder):
    """Encodes records of stand-ins to views of one array: a document has its length, and no copy.

    Every document begins at the same token. So rows of tokens are not those of `RecordEncoder`, but
    lengths and cuts are, and these decide which document lies where.
    """

    def encode(self, record: dict, kind: str = "auto") -> packing.TokenizedDocument:
        """Return a record's document of the right length."""
        is_chat = chat.is_chat(record, kind)
        text = record["messages"][1]["content"] if is_chat else record["text"]
        length = int(text) + _count_overhead(self, is_chat)
        tokens, mask = _shared_arrays(length)
        return packing.TokenizedDocument(tokens[:length], mask[:length])


_OVERHEAD: dict[tuple, int] = {}
_SHARED: list[np.ndarray] = []


def _count_overhead(encoder: chat.RecordEncoder, is_chat: bool) -> int:
    """Return the tokens of a stand-in's record beside those of its content."""
    key = (is_chat, encoder.begin_token, encoder.end_token, encoder.thinking, encoder.profile)
    if key not in _OVERHEAD:
        record = StandInSource("", is_chat, np.array([1])).read(0)
        names = [field.name for field in dataclasses.fields(encoder)]
        fields: dict[str, Any] = {name: getattr(encoder, name) for name in names}
        fields["tokenizer"] = as_tokenizer(StandInTokenizer(4096))
        real = chat.RecordEncoder(**fields)
        _OVERHEAD[key] = len(real.encode(record).tokens) - 1
    return _OVERHEAD[key]


def _shared_arrays(length: int) -> list[np.ndarray]:
    """Return tokens and a mask of at least this length, which all documents view."""
    if not _SHARED or len(_SHARED[0]) < length:
        size = max(2 * length, 2**20)
        _SHARED[:] = [np.arange(size, dtype=np.int32) % _IDS, np.ones(size, bool)]
    return _SHARED


def open_records(
    source: data_config.DataSource,
) -> records_lib.RecordFiles | None:
    """Return a source's own files, or None where there are none on this machine.

    Raises:
      DataError: files that are there, and cannot be read.
    """
    # A bucket is opened as well: it may be within reach. Whatever refuses it says that it is not.
    try:
        return records_lib.RecordFiles(source.name, source.path)
    except data_errors.NoFilesError:
        return None
    except records_lib.DataError:
        raise
    except Exception:
        if "://" in source.path:
            return None
        raise
