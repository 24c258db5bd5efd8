"""Errors of data, each in one short line that names the file and, if it has one, the record."""

_MAX_REASON = 200  # characters of a reason. Values of records may be of any length
_MIN_READ = 1000  # records over which a share is judged at least, see `check_bad_share`


class DataError(ValueError):
    """Data cannot be trained on. The message names the file and the record."""


class BadRecordError(DataError):
    """One record cannot be used, and others can: what `bad_records="skip"` leaves out."""


def shorten_reason(reason: object) -> str:
    """Return a reason as one line of at most about 200 characters."""
    line = " ".join(str(reason).split())
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]}..."


def bad_record(location: str, reason: object) -> BadRecordError:
    """Return the error of a record. `location` is its file and line."""
    return BadRecordError(f"{location}: {shorten_reason(reason)}")


def check_bad_share(
    source: str, num_bad: int, num_read: int, num_records: int, max_share: float, last_error: str
) -> None:
    """Refuse to leave out more than a share of a source's records.

    The share is that of the records read so far. The first records are judged by the number that
    the source has, up to `_MIN_READ`, as one bad record among the first two says little.

    Args:
      source: the source's name.
      num_bad: records left out so far.
      num_read: records read so far, with those left out.
      num_records: records that the source has.
      max_share: largest share, 0 to 1.
      last_error: message of the last bad record.

    Raises:
      DataError: the share is larger.
    """
    num_judged = max(num_read, min(num_records, _MIN_READ))
    if num_bad > max_share * num_judged:
        raise DataError(
            f"source {source!r}: got {num_bad} bad records among {num_judged}; wanted at most the "
            f"share max_bad_share={max_share:g}. Mend them or raise it. The last one: {last_error}"
        )
