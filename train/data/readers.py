"""Files of records, each read in any order: lines of JSON, a JSON list, Parquet and ArrayRecord.

A reader opens its file when it is first needed. It can be pickled, without the open file.
"""

import array
import bisect
import collections
import functools
import itertools
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from etils import epath

from train.data import data_errors, decompress, find_files

_MAX_CACHED_GROUPS = 4  # row groups of one Parquet file in memory
_MAX_FIRST_LINE = 2**20  # bytes


class RecordReader:
    """One file. Its handle is opened when it is first needed, and stays out of pickles.

    Attributes:
      file: the file.
      num_records: number of its records.
    """

    num_records: int

    def __init__(self, file: epath.Path):
        self.file = file

    def __getstate__(self):
        # A `cached_property` stores its value in the instance's dict.
        return {key: value for key, value in self.__dict__.items() if key != "_handle"}

    @functools.cached_property
    def _handle(self) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        """Close the file. Reading opens it again."""
        handle = self.__dict__.pop("_handle", None)
        if handle is not None:
            handle.close()

    def read(self, record_number: int) -> bytes | dict:
        """Return a record: bytes of JSON, or an object from a table."""
        raise NotImplementedError

    def location(self, record_number: int) -> str:
        """Return a record's file and line, or its number where the file has no lines."""
        return f"{self.file}, record {record_number}"


class _JsonReader(RecordReader):
    """Lines of JSON, or one list of objects. Lines of white space alone are no records."""

    def __init__(self, file: epath.Path, file_format: str, codec: str | None):
        super().__init__(file)
        self._range = decompress.open_range(file, codec)
        self._spans = self._find_spans(is_json=file_format == "json")  # [records, start and end]
        self.num_records = len(self._spans)

    def _find_spans(self, is_json: bool) -> np.ndarray:
        """Return where each record starts and ends.

        A `.json` file holds lines, a list, or objects that go over several lines. A file of lines
        may turn out to be one list.
        """
        first_line = self._read_first_line()
        has_lines = first_line.startswith(b"{") and first_line.endswith(b"}")
        if first_line.startswith(b"[") or (is_json and not has_lines):
            try:
                return _to_array(self._scan_values())
            except data_errors.DataError:
                if is_json:
                    raise
        return _to_array(self._scan_lines())

    @functools.cached_property
    def _handle(self):
        return self._range.file.open("rb")

    def read(self, record_number: int) -> bytes:
        start, end = map(int, self._spans[record_number])
        return self._read_bytes(self._handle, start, end)

    def location(self, record_number: int) -> str:
        offset, lines_before = self._range.start, 0
        with self._range.file.open("rb") as stream:  # slow, and only for messages
            while offset < (end := int(self._spans[record_number][0])):
                block = self._read_bytes(stream, offset, min(end, offset + 2**20))
                lines_before += block.count(b"\n")
                offset += len(block)
        return f"{self.file}:{lines_before + 1}"

    def _read_bytes(self, stream: IO[bytes], start: int, end: int) -> bytes:
        """Return bytes of the file.

        Raises:
          ValueError: the file has become shorter.
        """
        stream.seek(start)
        content = stream.read(end - start)
        if len(content) < end - start:
            raise ValueError("the file has become shorter since it was opened")
        return content

    def _read_first_line(self) -> bytes:
        """Return the first line that is not empty, without white space and byte order mark.

        Of a long line, such as a list without line breaks, it is the beginning.
        """
        start = self._range.start
        with self._range.file.open("rb") as stream:
            end = min(self._range.end, start + _MAX_FIRST_LINE)
            content = self._read_bytes(stream, start, end)
        return content.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].rstrip()

    def _scan_lines(self) -> Iterator[tuple[int, int]]:
        offset, end = self._range.start, self._range.end
        # disable=None: no bar where the output is no terminal.
        with (
            self._range.file.open("rb") as stream,
            tqdm.tqdm(
                desc=f"lines of {self.file.name}",
                total=end - offset,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=None,
            ) as bar,
        ):
            stream.seek(offset)
            for line in stream:
                if offset >= end:
                    break
                if line.strip():
                    yield offset, min(offset + len(line), end)
                offset += len(line)
                bar.update(len(line))

    def _scan_values(self) -> Iterator[tuple[int, int]]:
        """Find the values of a list, or values one after another. The file is in memory meanwhile.

        Raises:
          DataError: the file is damaged, so that no later value can be found.
        """
        offset = self._range.start
        with self._range.file.open("rb") as stream:
            # In Latin-1 a character is a byte, and quotes and brackets are those of UTF-8.
            text = self._read_bytes(stream, offset, self._range.end).decode("latin-1")
        position = _skip_space(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
        is_list = text.startswith("[", position)
        position = _skip_space(text, position + 1) if is_list else position
        closing = "]" if is_list else ""
        while position < len(text) and text[position] != closing:
            start = position
            try:
                _, position = _SCANNER.raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                fault = getattr(error, "pos", start)
                reason = getattr(error, "msg", "too many values within each other")
                raise self._damage(text, fault, reason) from None
            yield offset + start, offset + position
            position = _skip_space(text, position)
            if is_list and text.startswith(",", position):
                position = _skip_space(text, position + 1)
            elif is_list and not text.startswith("]", position):
                raise self._damage(text, position, "wanted a comma or the list's end")
        if is_list and _skip_space(text, position + 1) < len(text):
            raise self._damage(text, position + 1, "got more after the list's end")
        if is_list and position >= len(text):
            raise self._damage(text, position, "the list does not end")

    def _damage(self, text: str, position: int, reason: str) -> data_errors.DataError:
        line = text.count("\n", 0, position) + 1
        return data_errors.DataError(
            f"{self.file}:{line}: not a whole JSON file: {data_errors.shorten_reason(reason)}. "
            "Mend it or copy it again."
        )


# It only finds where values end, so numbers of any length are not converted.
_SCANNER = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def _to_array(spans: Iterator[tuple[int, int]]) -> np.ndarray:
    """Return pairs as an array, by way of machine words: a list would take ten times the memory."""
    return np.array(array.array("q", itertools.chain.from_iterable(spans)), np.int64).reshape(-1, 2)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


class _ParquetReader(RecordReader):
    """Parquet. Nulls within a value are left out.

    A column of objects has every key that any of its records has.
    """

    def __init__(self, file: epath.Path, columns: tuple[str, ...] | None):
        """Open a file.

        Args:
          file: the file.
          columns: columns to read, of those that the file has. None reads all.

        Raises:
          DataError: a damaged file, or one without any of the columns.
        """
        super().__init__(file)
        # Tables of row groups by number, in the order of their last use.
        self._groups: collections.OrderedDict[int, Any] = collections.OrderedDict()
        try:
            self._counts = self._count_rows()
            self._columns = None if columns is None else self._choose_columns(columns)
        finally:
            self.close()  # a source may have more files than a process may open
        self._cumulative_rows = list(itertools.accumulate(self._counts))
        self.num_records = sum(self._counts)

    def _count_rows(self) -> list[int]:
        """Return the rows of each group."""
        metadata = self._handle.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(counts) != metadata.num_rows or min(counts, default=0) < 0:
            reason = f"its parts have {counts!r:.60} of {metadata.num_rows} rows"
            raise _parquet_error(self.file, reason)
        return counts

    def _choose_columns(self, columns: tuple[str, ...]) -> list[str]:
        """Return those of the columns that the file has: pyarrow refuses others."""
        names = self._handle.schema_arrow.names
        present = [name for name in columns if name in names]
        if not present:
            raise data_errors.DataError(
                f"{self.file}: got the columns {', '.join(names)!r:.80}; wanted one of "
                f"{', '.join(columns)}"
            )
        return present

    @functools.cached_property
    def _handle(self):
        stream = self.file.open("rb")
        try:
            return pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            stream.close()
            raise _parquet_error(self.file, error) from None

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
            table = self._handle.read_row_group(group, columns=self._columns)
            # Offsets of damaged lists may lie outside of their values.
            table.validate()
            if len(table) != self._counts[group]:
                raise ValueError(f"got {len(table)} rows; wanted the {self._counts[group]}")
            self._groups[group] = table
            if len(self._groups) > _MAX_CACHED_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        first_row = self._cumulative_rows[group - 1] if group else 0
        (record,) = self._groups[group].slice(record_number - first_row, 1).to_pylist()
        return {key: _drop_nulls(value) for key, value in record.items()}


def _parquet_error(file: epath.Path, reason: object) -> data_errors.DataError:
    return data_errors.DataError(
        f"{file}: not a Parquet file: {data_errors.shorten_reason(reason)}. Copy it again."
    )


def _drop_nulls(value: Any) -> Any:
    """Return a value without the keys of objects within it whose value is null."""
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


class _ArrayRecordReader(RecordReader):
    """ArrayRecord of JSON. Best with group_size:1, as `train.prepare` writes it."""

    def __init__(self, file: epath.Path):
        super().__init__(file)
        self.num_records = self._handle.num_records()
        self.close()  # for the reason in `_ParquetReader`

    @functools.cached_property
    def _handle(self):
        reader = array_record_module.ArrayRecordReader(str(self.file))
        if not reader.ok():
            raise data_errors.DataError(
                f"{self.file}: not a whole ArrayRecord file. Write it again."
            )
        return reader

    def read(self, record_number: int) -> bytes:
        return self._handle.read([record_number])[0]


def open_reader(file: epath.Path, columns: tuple[str, ...] | None) -> RecordReader:
    """Return the reader of a file that `find_files.find_files` found.

    Args:
      file: the file.
      columns: columns to read of a Parquet file. None reads all.

    Raises:
      DataError: the file is damaged, holds no records, or cannot be opened.
    """
    found_format = find_files.find_format(file)
    assert found_format is not None
    file_format, codec = found_format
    try:
        if file_format == "parquet":
            reader = _ParquetReader(file, columns)
        elif file_format == "arrayrecord":
            reader = _ArrayRecordReader(file)
        else:
            reader = _JsonReader(file, file_format, codec)
    except OSError as error:
        raise data_errors.DataError(f"{file}: {data_errors.shorten_reason(error)}") from None
    if not reader.num_records:
        raise data_errors.DataError(
            f"{file}: got no records; wanted at least one. Remove the file."
        )
    return reader
