"""Files of records: JSONL, Parquet and ArrayRecord, on disk or in a bucket, read in any order.

A record is a JSON object with a `text`, or with `messages` and optional `tools`. Training reads in
random order, for which `train.prepare` writes the best files. A Parquet file must read a whole row
group for one record. A JSONL file is read through once to find its lines.
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

# A fingerprint covers this much of a file's head, and as much of its tail.
_DIGEST_BYTES = 64 * 2**10
_RECORD_COLUMNS = ("text", "messages", "tools")  # what supervised training reads
_MAX_CACHED_GROUPS = 4  # row groups of one Parquet file in memory
_MAX_OPEN_FILES = 256  # files of one source, as a process may have only so many
_WILDCARDS = "*?["


class DataError(ValueError):
    """Data cannot be trained on. The message names the file and the record."""


class RecordFiles:
    """All records of one source, numbered through its files in the order of their names.

    It can be pickled. Another process then opens the files anew, but does not look for the lines of
    JSONL files again. It is not safe for threads, as an open file has one position.
    """

    def __init__(self, name: str, path: str, columns: tuple[str, ...] | None = _RECORD_COLUMNS):
        """Find and open the files.

        Args:
          name: name of the source, for messages.
          path: a file, a directory, or a pattern such as gs://bucket/books/*.arrayrecord.
          columns: columns to read of Parquet files. None reads all of them.

        Raises:
          DataError: there is no such file, its format is unknown, or it is damaged or empty.
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
        # Numbers of the open files, in the order of their last use. A dict is an ordered set.
        self._open_files: dict[int, None] = {}

    def __getstate__(self):
        # Readers drop their open handles, too.
        return {**self.__dict__, "_open_files": {}}

    def __len__(self) -> int:
        return self._cumulative_records[-1]

    def read(self, index: int) -> dict[str, Any]:
        """Return a record.

        Raises:
          DataError: the record cannot be read, or is no JSON object.
        """
        file_number, reader, record_number = self._locate(index)
        # Moved to the end, as the file that was used last.
        self._open_files.pop(file_number, None)
        self._open_files[file_number] = None
        if len(self._open_files) > _MAX_OPEN_FILES:
            longest_unused = next(iter(self._open_files))
            self._readers[longest_unused].close()
            del self._open_files[longest_unused]
        try:
            record = reader.read(record_number)
            # Parquet gives objects, the other formats bytes of JSON.
            record = json.loads(record) if isinstance(record, bytes) else record
        except (ValueError, OSError, RuntimeError) as error:
            location = reader.location(record_number)
            raise DataError(f"{location}: not a JSON record: {error}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{reader.location(record_number)}: got {record!r:.80}; wanted an object with text "
                "or messages"
            )
        return record

    def location(self, index: int) -> str:
        """Return a record's file and number, for messages."""
        _, reader, record_number = self._locate(index)
        return reader.location(record_number)

    def close(self) -> None:
        """Close the files. Reading opens them again."""
        for file_number in self._open_files:
            self._readers[file_number].close()
        self._open_files.clear()

    def fingerprint(self) -> list[list]:
        """Return [name, bytes, digest of head and tail, records] of each file, JSON-able.

        Names begin below the folder that all files share, as that folder may move.
        """
        # `commonprefix` compares tuples part by part. A prefix of text could end within a name.
        folders = [reader.file.parent.parts for reader in self._readers]
        num_shared = len(os.path.commonprefix(folders))
        return [
            [
                "/".join(reader.file.parts[num_shared:]),
                *_digest_file(reader.file),
                reader.num_records,
            ]
            for reader in self._readers
        ]

    def check_fingerprint(self, saved: list[list]) -> None:
        """Compare with an earlier fingerprint.

        Raises:
          DataError: a file differs from its fingerprint. The message names the first such file.
        """
        remedy = "Put the old files back, or begin a new run without the old state of the data."
        present = {name: values for name, *values in self.fingerprint()}
        recorded = {name: values for name, *values in saved}
        for name in [*recorded, *present]:
            if present.get(name) != recorded.get(name):
                change = "changed"
                if name not in present:
                    change = "is gone"
                elif name not in recorded:
                    change = "is new"
                raise DataError(
                    f"source {self.name!r}: {name} {change} since the checkpoint: got "
                    f"{present.get(name)}; wanted {recorded.get(name)} (bytes, digest, records). "
                    f"{remedy}"
                )

    def _locate(self, index: int) -> tuple[int, Any, int]:
        """Return the number of a record's file, its reader, and the record's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: got record {index}; wanted less than {len(self)}")
        file_number = bisect.bisect_right(self._cumulative_records, index)
        first_index = self._cumulative_records[file_number - 1] if file_number else 0
        return file_number, self._readers[file_number], index - first_index


class _RecordReader:
    """One file. Its handle is opened when it is first needed, and stays out of pickles."""

    num_records: int
    columns: tuple[str, ...] | None = None  # columns to read of a table. None reads all of them

    def __init__(self, file: epath.Path):
        self.file = file

    def __getstate__(self):
        # A `cached_property` stores its value in the instance's dict.
        return {key: value for key, value in self.__dict__.items() if key != "_handle"}

    @functools.cached_property
    def _handle(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        handle = self.__dict__.pop("_handle", None)
        if handle is not None:
            handle.close()

    def read(self, record_number: int) -> bytes | dict:
        raise NotImplementedError

    def location(self, record_number: int) -> str:
        return f"{self.file}, record {record_number}"


class _JsonlReader(_RecordReader):
    """JSONL. Lines of white space alone are no records."""

    def __init__(self, file: epath.Path):
        super().__init__(file)
        offsets, offset = [], 0
        # disable=None: no bar where the output is no terminal.
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

    def read(self, record_number: int) -> bytes:
        self._handle.seek(int(self._offsets[record_number]))
        return self._handle.readline()

    def location(self, record_number: int) -> str:
        remaining_bytes, lines_before = int(self._offsets[record_number]), 0
        with self.file.open("rb") as stream:  # slow, and only for messages
            while remaining_bytes:
                block = stream.read(min(remaining_bytes, 2**20))
                lines_before += block.count(b"\n")
                remaining_bytes -= len(block)
        return f"{self.file}:{lines_before + 1}"


class _ParquetReader(_RecordReader):
    """Parquet. The columns messages and tools may be strings of JSON.

    Elsewhere nulls within a value are left out, because a column of objects has every key that any
    of its records has.
    """

    def __init__(self, file: epath.Path):
        super().__init__(file)
        metadata = self._handle.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._cumulative_rows = list(itertools.accumulate(counts))
        self.num_records = metadata.num_rows
        # Tables of row groups by number, in the order of their last use.
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self.close()  # a source may have more files than a process may open

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
            # force: pyarrow leaves a stream that it did not open itself open otherwise.
            self.__dict__.pop("_handle").close(force=True)
        self._groups.clear()

    def read(self, record_number: int) -> dict:
        group = bisect.bisect_right(self._cumulative_rows, record_number)
        if group not in self._groups:
            columns = None
            if self.columns is not None:
                # pyarrow refuses columns that the file does not have.
                names = set(self._handle.schema_arrow.names)
                columns = [name for name in self.columns if name in names]
            self._groups[group] = self._handle.read_row_group(group, columns=columns)
            if len(self._groups) > _MAX_CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        first_row = self._cumulative_rows[group - 1] if group else 0
        (record,) = self._groups[group].slice(record_number - first_row, 1).to_pylist()
        for key, value in record.items():
            is_json = key in ("messages", "tools") and isinstance(value, str)
            record[key] = json.loads(value) if is_json else _drop_nulls(value)
        return record


class _ArrayRecordReader(_RecordReader):
    """ArrayRecord of JSON. Best with group_size:1, as `train.prepare` writes it."""

    def __init__(self, file: epath.Path):
        super().__init__(file)
        self.num_records = self._handle.num_records()
        self.close()  # for the reason in `_ParquetReader`

    @functools.cached_property
    def _handle(self):
        reader = array_record_module.ArrayRecordReader(str(self.file))
        if not reader.ok():
            raise DataError(f"{self.file}: not a whole ArrayRecord file. Write it again.")
        return reader

    def read(self, record_number: int) -> bytes:
        return self._handle.read([record_number])[0]


_READERS_BY_SUFFIX = {
    ".jsonl": _JsonlReader,
    ".parquet": _ParquetReader,
    ".arrayrecord": _ArrayRecordReader,
    ".array_record": _ArrayRecordReader,
}


def _drop_nulls(value: Any) -> Any:
    """Return a value without the keys of objects within it whose value is null."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _find_files(name: str, path: str) -> list[epath.Path]:
    """Return the files of a path, a directory or a pattern, sorted.

    A directory's files are those with a known suffix.

    Raises:
      DataError: there is no file, or one of an unknown format.
    """
    root = epath.Path(path)
    parts = root.parts
    # A glob starts in a folder that is certain to exist: the parts before the first wildcard.
    first_wild = next(
        (i for i, part in enumerate(parts) if any(c in part for c in _WILDCARDS)), None
    )
    if first_wild is not None:
        files = list(epath.Path(*parts[:first_wild]).glob("/".join(parts[first_wild:])))
    elif root.is_dir():
        files = [file for file in root.iterdir() if file.suffix in _READERS_BY_SUFFIX]
    else:
        files = [root] if root.exists() else []
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
    """Return a file's size and a digest of its two ends.

    Both are cheap in a bucket, too. An accidental change hardly leaves both as they were.
    """
    size = file.stat().length
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_DIGEST_BYTES))
        stream.seek(max(0, size - _DIGEST_BYTES))
        digest.update(stream.read(_DIGEST_BYTES))
    return size, digest.hexdigest()[:16]
