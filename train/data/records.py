"""Files of records, in whatever container, on disk or in a bucket, read in any order.

A record is a JSON object with the columns of a text or of a conversation, see `columns`. Training
reads in random order, for which `train.prepare` writes the best files. A Parquet file must read a
whole row group for one record. JSON is read through once to find its records.
"""

import bisect
import hashlib
import itertools
import os
from typing import Any

import pyarrow
from etils import epath

from m1_jax import strict_json
from train.data import columns as columns_lib
from train.data import data_errors, find_files, readers

# A fingerprint covers this much of a file's head, and as much of its tail.
_DIGEST_BYTES = 64 * 2**10
_MAX_OPEN_FILES = 256  # files of one source, as a process may have only so many
DataError = data_errors.DataError


class RecordFiles:
    """All records of one source, numbered through its files in the order of their names.

    It can be pickled. Another process then opens the files anew, but does not look for the records
    of JSON files again. It is not safe for threads, as an open file has one position.
    """

    def __init__(
        self, name: str, path: str, columns: tuple[str, ...] | None = columns_lib.RECORD_COLUMNS
    ):
        """Find and open the files.

        Args:
          name: name of the source, for messages.
          path: a file, a folder or a pattern, see `find_files.find_files`.
          columns: columns to read of Parquet files. None reads all of them.

        Raises:
          DataError: there is no such file, its format is unknown, or it is damaged or empty.
        """
        self.name, self._path = name, path
        files = find_files.find_files(name, path)
        self._use_readers([readers.open_reader(file, columns) for file in files])
        # Numbers of the open files, in the order of their last use. A dict is an ordered set.
        self._open_files: dict[int, None] = {}

    def _use_readers(self, file_readers: list[readers.RecordReader]) -> None:
        """Read these files, in this order."""
        self._readers = file_readers
        self._cumulative_records = list(
            itertools.accumulate(reader.num_records for reader in file_readers)
        )

    def __getstate__(self):
        # Readers drop their open handles, too.
        return {**self.__dict__, "_open_files": {}}

    def __len__(self) -> int:
        return self._cumulative_records[-1]

    def read(self, index: int) -> dict[str, Any]:
        """Return a record. Lists in columns of JSON text, such as `messages`, are parsed.

        Raises:
          BadRecordError: the record is damaged, or is no JSON object.
          DataError: the file cannot be read.
        """
        file_number, reader, record_number = self._locate(index)
        # Moved to the end, as the file that was used last.
        self._open_files.pop(file_number, None)
        self._open_files[file_number] = None
        if len(self._open_files) > _MAX_OPEN_FILES:
            longest_unused = next(iter(self._open_files))
            self._readers[longest_unused].close()
            del self._open_files[longest_unused]
        record = _read_record(reader, record_number)
        for column in columns_lib.TEXT_OF_JSON:
            if isinstance(record.get(column), str):
                name = f"{reader.location(record_number)}: {column}"
                record[column] = _parse_column(record[column], name)
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
        return [
            [name, *_digest_file(reader.file), reader.num_records]
            for name, reader in zip(self._file_names(), self._readers, strict=True)
        ]

    def leave_out_added_kinds(self, saved: list[list]) -> bool:
        """Read no files of kinds that were not read when a run with this fingerprint began.

        Return whether there are any. Other files that the fingerprint lacks stay, and
        `check_fingerprint` refuses them.
        """
        recorded_names = {name for name, *_ in saved}
        readers_by_name = dict(zip(self._file_names(), self._readers, strict=True))
        added = [
            name
            for name, reader in readers_by_name.items()
            if name not in recorded_names and find_files.is_added_kind(self._path, reader.file)
        ]
        is_changed = 0 < len(added) < len(readers_by_name)
        if is_changed:
            self.close()
            self._use_readers([r for name, r in readers_by_name.items() if name not in added])
            find_files.print_once(
                f"source {self.name!r}: leaves out {', '.join(added)}, as the run began"
            )
        return is_changed

    def _file_names(self) -> list[str]:
        """Return the files' names below the folder that all of them share."""
        # `commonprefix` compares tuples part by part. A prefix of text could end within a name.
        folders = [reader.file.parent.parts for reader in self._readers]
        num_shared = len(os.path.commonprefix(folders))
        return ["/".join(reader.file.parts[num_shared:]) for reader in self._readers]

    def check_fingerprint(self, saved: list[list]) -> None:
        """Compare with an earlier fingerprint.

        Raises:
          DataError: a file differs from its fingerprint. The message names the first such file.
        """
        present = {name: values for name, *values in self.fingerprint()}
        recorded = {name: values for name, *values in saved}
        for name in [*recorded, *present]:
            if present.get(name) != recorded.get(name):
                change, remedy = "changed", "Put the old files back"
                if name not in present:
                    change = "is gone"
                elif name not in recorded:
                    change, remedy = "is new", "Move it to a folder that is no source"
                raise DataError(
                    f"source {self.name!r}: {name} {change} since the checkpoint: got "
                    f"{present.get(name)}; wanted {recorded.get(name)} (bytes, digest, records). "
                    f"{remedy}, or begin a new run without the old state of the data."
                )

    def _locate(self, index: int) -> tuple[int, readers.RecordReader, int]:
        """Return the number of a record's file, its reader, and the record's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: got record {index}; wanted less than {len(self)}")
        file_number = bisect.bisect_right(self._cumulative_records, index)
        first_index = self._cumulative_records[file_number - 1] if file_number else 0
        return file_number, self._readers[file_number], index - first_index


def _read_record(reader: readers.RecordReader, record_number: int) -> dict[str, Any]:
    """Return a record of a file, see `RecordFiles.read`."""
    try:
        record = reader.read(record_number)
        if isinstance(record, bytes):
            record = strict_json.parse_json(record, reader.location(record_number))
    except strict_json.JsonError as error:  # it has the location
        raise data_errors.BadRecordError(str(error)) from None
    except data_errors.DataError:  # the file is gone or damaged
        raise
    except (ValueError, OSError, RuntimeError, OverflowError, pyarrow.ArrowException) as error:
        reason = data_errors.shorten_reason(error)
        # An error of the system has a number. pyarrow raises OSError for damaged pages, too.
        if isinstance(error, OSError) and error.errno is not None:
            raise data_errors.DataError(f"{reader.file}: {reason}") from None
        location = reader.location(record_number)
        raise data_errors.bad_record(location, f"cannot be read: {reason}") from None
    if not isinstance(record, dict):
        raise data_errors.bad_record(
            reader.location(record_number),
            f"got {record!r:.80}; wanted an object with text or messages",
        )
    return record


def _parse_column(text: str, name: str) -> Any:
    """Return the list that a column holds as JSON text. Other text stays as it is.

    Raises:
      BadRecordError: the text begins like a list and is none.
    """
    if not text.strip():
        return None
    try:
        return strict_json.parse_json(text, name) if text.lstrip().startswith("[") else text
    except strict_json.JsonError as error:
        raise data_errors.BadRecordError(str(error)) from None


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
