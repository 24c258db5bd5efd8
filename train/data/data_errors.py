"""Errors of data, each in one short line that names the file and, if it has one, the record."""

import math

_MAX_REASON = 180  # characters of a reason. Values of records may be of any length
_MAX_QUOTED_ERROR = 150  # characters of an error within another one
_MAX_BLOCK = 1000  # records to which `check_bad_share` rounds up


class DataError(ValueError):
    """Data cannot be trained on. The message names the file and the record."""


class NoFilesError(DataError):
    """A path has no files, or the storage that it names is out of reach."""


class BadRecordError(DataError):
    """One record cannot be used, and others can: what `bad_records="skip"` leaves out."""


def shorten_reason(reason: object, max_chars: int = _MAX_REASON) -> str:
    """Return a reason as one line of at most `max_chars` characters, and dots."""
    line = " ".join(str(reason).split())
    return line if len(line) <= max_chars else f"{line[:max_chars]}..."


def bad_record(location: str, reason: object) -> BadRecordError:
    """Return the error of a record. `location` is its file and line."""
    return BadRecordError(f"{location}: {shorten_reason(reason)}")


def check_bad_share(
    source: str, num_bad: int, num_read: int, num_records: int, max_share: float, last_error: str
) -> None:
    """Refuse to leave out more than a share of a source's records.

    The share is that of the records read so far, rounded up to whole epochs or to thousands,
    because one bad record among the first two says little.

    Args:
      source: the source's name.
      num_bad: records left out so far.
      num_read: records read so far, with those left out, at least 1.
      num_records: records that the source has.
      max_share: largest share, 0 to 1.
      last_error: message of the last bad record.

    Raises:
      DataError: the share is larger.
    """
    block = min(num_records, _MAX_BLOCK)
    num_judged = math.ceil(num_read / block) * block
    if num_bad > max_share * num_judged:
        raise DataError(
            f"source {source!r}: got {num_bad} bad among {num_judged} records; wanted at most the "
            f"share max_bad_share={max_share:g}. Mend them or raise it. The last one: "
            f"{shorten_reason(last_error, _MAX_QUOTED_ERROR)}"
        )
