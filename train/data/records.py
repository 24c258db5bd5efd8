"""Files of records: JSONL, Parquet and ArrayRecord, on disk or in a bucket, read in any order.

A record is a JSON object with a `text`, or with `messages` and, where there are some, `tools`.
What is read in random order is best written by `train.prepare` first: a Parquet file gives up a
whole row group for one record, and a JSONL file is read through once to find its lines.
"""

import bisect
import collections
import functools
import hashlib
import itertools
import json
import os
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

_DIGEST_BYTES = 64 * 2**10  # of a file's head and of its tail that its fingerprint covers
_RECORD_COLUMNS = ("text", "messages", "tools")  # what supervised training reads
_MAX_CACHED_GROUPS = 4  # row groups of one Parquet file in memory
_MAX_OPEN_FILES = 256  # files of one source, as a process may have only so many
_WILDCARDS = "*?["


class DataError(ValueError):
    """Data that cannot be trained on; the message names the file and the record."""


class RecordFiles:
    """All records of one source, numbered through its files in the order of their names.

    Picklable: another process opens the files anew but does not look for the lines again.
    """

    def __init__(self, name: str, path: str, columns: tuple[str, ...] | None = _RECORD_COLUMNS):
        """Find and open the files.

        Args:
          name: of the source, for messages.
          path: a file, a directory, or a pattern such as gs://bucket/books/*.arrayrecord.
          columns: of Parquet files that are read; None: all.

        Raises:
          DataError: no such file, an unknown format, a file that is damaged or has no record.
        """
        self.name = name
        self._readers = [_READERS_BY_SUFFIX[file.suffix](file) for file in _find_files(name, path)]
        for reader in self._readers:
            reader.columns = columns
            if not reader.num_records:
                raise DataError(
                    f"{reader.file}: got no records; wanted at least one. Remove the file."
                )
        self._cumulative_records = list(
            itertools.accumulate(reader.num_records for reader in self._readers)
        )
        self._open: dict[int, None] = {}  # numbers of files, the longest unused first

    def __getstate__(self):
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return self._cumulative_records[-1]

    def read(self, index: int) -> dict[str, Any]:
        """Return a record.

        Raises:
          DataError: it cannot be read, or is not an object with text or messages.
        """
        which, reader, number = self._locate(index)
        self._open.pop(which, None)
        self._open[which] = None
        if len(self._open) > _MAX_OPEN_FILES:
            oldest = next(iter(self._open))
            self._readers[oldest].close()
            del self._open[oldest]
        try:
            record = reader.read(number)
            record = json.loads(record) if isinstance(record, bytes) else record
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{reader.location(number)}: not a JSON record: {error}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{reader.location(number)}: got {record!r:.80}; wanted an object with text or "
                "messages"
            )
        return record

    def location(self, index: int) -> str:
        """Return a record's file and number, for messages."""
        _, reader, number = self._locate(index)
        return reader.location(number)

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for which in self._open:
            self._readers[which].close()
        self._open.clear()

    def fingerprint(self) -> list[list]:
        """Return [name, bytes, digest of head and tail, records] of each file, JSON-able.

        Names begin below the folder that all files share, which may move.
        """
        shared = len(os.path.commonprefix([reader.file.parent.parts for reader in self._readers]))
        return [
            ["/".join(reader.file.parts[shared:]), *_digest_file(reader.file), reader.num_records]
            for reader in self._readers
        ]

    def check_fingerprint(self, saved: list[list]) -> None:
        """Compare with an earlier fingerprint.

        Raises:
          DataError: the files are not those of then; the first that differs is named.
        """
        remedy = "Put the old files back, or begin a new run without the old state of the data."
        now = {name: rest for name, *rest in self.fingerprint()}
        then = {name: rest for name, *rest in saved}
        for name in [*then, *now]:
            if now.get(name) != then.get(name):
                how = "is gone" if name not in now else "is new" if name not in then else "changed"
                raise DataError(
                    f"source {self.name!r}: {name} {how} since the checkpoint: got {now.get(name)};"
                    f" wanted {then.get(name)} (bytes, digest, records). {remedy}"
                )

    def _locate(self, index: int) -> tuple[int, Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: got record {index}; wanted less than {len(self)}")
        which = bisect.bisect_right(self._cumulative_records, index)
        return (
            which,
            self._readers[which],
            index - (self._cumulative_records[which - 1] if which else 0),
        )


class _RecordReader:
    """One file. Handles are opened when they are first needed and stay out of pickles."""

    num_records: int
    columns: tuple[str, ...] | None = None  # of a table, to be read; None: all

    def __init__(self, file: epath.Path):
        self.file = file

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_handle"}

    @functools.cached_property
    def _handle(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        handle = self.__dict__.pop("_handle", None)
        if handle is not None:
            handle.close()

    def read(self, number: int) -> bytes | dict:
        raise NotImplementedError

    def location(self, number: int) -> str:
        return f"{self.file}, record {number}"


class _JsonlReader(_RecordReader):
    """JSONL; lines of white space alone are no records."""

    def __init__(self, file: epath.Path):
        super().__init__(file)
        offsets, offset = [], 0
        # disable=None: no bar where nobody watches.
        with (
            file.open("rb") as stream,
            tqdm.tqdm(
                desc=f"lines of {file.name}",
                total=file.stat().length,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,
            ) as bar,
        ):
            for line in stream:
                if line.strip():
                    offsets.append(offset)
                offset += len(line)
                bar.update(len(line))
        self._offsets = np.array(offsets, np.int64)
        self.num_records = len(offsets)

    @functools.cached_property
    def _handle(self):
        return self.file.open("rb")

    def read(self, number: int) -> bytes:
        self._handle.seek(int(self._offsets[number]))
        return self._handle.readline()

    def location(self, number: int) -> str:
        left, lines_before = int(self._offsets[number]), 0
        with self.file.open("rb") as stream:  # slow, and only for messages
            while left:
                block = stream.read(min(left, 2**20))
                lines_before += block.count(b"\n")
                left -= len(block)
        return f"{self.file}:{lines_before + 1}"


class _ParquetReader(_RecordReader):
    """Columns; messages and tools may also be strings of JSON.

    Otherwise nulls within them are left out: a column has every key that any of its records has.
    """

    def __init__(self, file: epath.Path):
        super().__init__(file)
        metadata = self._handle.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._cumulative_rows = list(itertools.accumulate(counts))
        self.num_records = metadata.num_rows
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.close()

    @functools.cached_property
    def _handle(self):
        stream = self.file.open("rb")
        try:
            return pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as error:
            stream.close()
            raise DataError(f"{self.file}: not a Parquet file: {error}. Copy it again.") from None

    def __getstate__(self):
        return {**super().__getstate__(), "_groups": collections.OrderedDict()}

    def close(self) -> None:
        if "_handle" in self.__dict__:
            self.__dict__.pop("_handle").close(force=True)  # the stream, too
        self._groups.clear()

    def read(self, number: int) -> dict:
        which = bisect.bisect_right(self._cumulative_rows, number)
        if which not in self._groups:
            columns = None
            if self.columns is not None:
                have = set(self._handle.schema_arrow.names)
                columns = [name for name in self.columns if name in have]
            self._groups[which] = self._handle.read_row_group(which, columns=columns)
            if len(self._groups) > _MAX_CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(which)
        start = self._cumulative_rows[which - 1] if which else 0
        (record,) = self._groups[which].slice(number - start, 1).to_pylist()
        for key, value in record.items():
            is_json = key in ("messages", "tools") and isinstance(value, str)
            record[key] = json.loads(value) if is_json else _drop_nulls(value)
        return record


class _ArrayRecordReader(_RecordReader):
    """ArrayRecord of JSON; best with group_size:1, as `train.prepare` writes it."""

    def __init__(self, file: epath.Path):
        super().__init__(file)
        self.num_records = self._handle.num_records()
        self.close()

    @functools.cached_property
    def _handle(self):
        reader = array_record_module.ArrayRecordReader(str(self.file))
        if not reader.ok():
            raise DataError(f"{self.file}: not a whole ArrayRecord file. Write it again.")
        return reader

    def read(self, number: int) -> bytes:
        return self._handle.read([number])[0]


_READERS_BY_SUFFIX = {
    ".jsonl": _JsonlReader,
    ".parquet": _ParquetReader,
    ".arrayrecord": _ArrayRecordReader,
    ".array_record": _ArrayRecordReader,
}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(one) for key, one in value.items() if one is not None}
    return [_drop_nulls(one) for one in value] if isinstance(value, list) else value


def _find_files(name: str, path: str) -> list[epath.Path]:
    """Return the files that a path means, sorted; those of a directory by their suffix."""
    whole = epath.Path(path)
    parts = whole.parts
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in _WILDCARDS)), None)
    if wild is not None:
        files = list(epath.Path(*parts[:wild]).glob("/".join(parts[wild:])))
    elif whole.is_dir():
        files = [file for file in whole.iterdir() if file.suffix in _READERS_BY_SUFFIX]
    else:
        files = [whole] if whole.exists() else []
    if not files:
        raise DataError(
            f"source {name!r}: got {path}, where there is no file; wanted {_describe_formats()}"
        )
    for file in files:
        if file.suffix not in _READERS_BY_SUFFIX:
            raise DataError(f"{file}: got a file of another kind; wanted {_describe_formats()}")
    return sorted(files, key=str)


def _describe_formats() -> str:
    return f"files ending in {', '.join(_READERS_BY_SUFFIX)}"


def _digest_file(file: epath.Path) -> tuple[int, str]:
    """Return a file's size and a digest of its ends: cheap, and no accident keeps both."""
    size = file.stat().length
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_DIGEST_BYTES))
        stream.seek(max(0, size - _DIGEST_BYTES))
        digest.update(stream.read(_DIGEST_BYTES))
    return size, digest.hexdigest()[:16]
