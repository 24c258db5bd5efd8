"""Files of records in each of the three formats, for tests of training data."""

import json

import pyarrow
import pyarrow.parquet
from array_record.python import array_record_module


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


def write_parquet(path, records, rows=7):
    """Write a Parquet file with `rows` records to a row group."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=rows)
