"""Which files a path stands for: folders, patterns, names; and containers that are read alike."""

import ast
import errno
import gzip
import json
import os
import pickle
import subprocess
import sys
import tempfile

import pyarrow
import pytest
import records_support

from train.data import decompress, find_files
from train.data import records as records_lib

RECORDS = [{"text": "one"}, {"text": "zwei: ä\u2028"}, {"text": "three"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def read(path, **settings):
    files = records_lib.RecordFiles("s", str(path), **settings)
    try:
        return [files.read(index) for index in range(len(files))]
    finally:
        files.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", b"\xef\xbb\xbf" + LINES),
        ("a.ndjson", LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.json", LINES),
        ("a.Json", json.dumps(RECORDS).encode()),
        ("b.json", b"\xef\xbb\xbf\n" + json.dumps(RECORDS, indent=2).encode() + b"\n\n"),
        ("c.json", "\n".join(json.dumps(r, indent=1) for r in RECORDS).encode()),
        ("a.jsonl", json.dumps(RECORDS, indent=2).encode()),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("b.jsonl.gz", gzip.compress(LINES[:20], mtime=0) + gzip.compress(LINES[20:], mtime=0)),
        ("a.json.GZ", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("a.ndjson.zst", zstd(LINES)),
        ("b.json.zst", zstd(json.dumps(RECORDS).encode())),
    ],
)
def test_containers_of_json_are_read_alike(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == RECORDS
    assert read(tmp_path) == RECORDS


def test_records_are_found_by_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=2))
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n', mtime=0)
    )
    files = records_lib.RecordFiles("s", str(tmp_path))
    found = [files.location(index).rpartition("/")[2] for index in range(4)]
    assert found == ["a.json:2", "a.json:5", "b.jsonl.gz:1", "b.jsonl.gz:3"]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Return a folder in which files are decompressed."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(decompress, "_ranges", {})
    with tempfile.TemporaryFile(dir=tmp_path / "temporary") as shared_file:
        monkeypatch.setattr(decompress, "_open_shared_file", lambda process: shared_file)
        yield tmp_path / "temporary"


@pytest.mark.slow
def test_a_file_is_decompressed_once_and_leaves_no_copy(tmp_path, temporary, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES.rstrip(), mtime=0))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(LINES))
    files = records_lib.RecordFiles("s", str(tmp_path))
    monkeypatch.setattr(decompress, "_decompress", None)
    again = records_lib.RecordFiles("s", str(tmp_path))
    wanted = RECORDS + RECORDS
    assert [again.read(index) for index in range(6)] == wanted
    assert [files.location(index)[-1] for index in range(6)] == list("123123")
    assert not os.listdir(temporary)
    (tmp_path / "files").write_bytes(pickle.dumps(files))
    code = (
        "import pickle, sys; files = pickle.load(open(sys.argv[1], 'rb')); "
        "print(ascii([files.read(index) for index in range(6)]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "files")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == wanted
    again.close()
    files.close()


def test_a_full_disk_is_told_with_its_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decompress.shutil, "copyfileobj", refuse)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    with pytest.raises(records_lib.DataError, match=r"a\.jsonl\.gz: no space in .*Set TMPDIR"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": }]', r"a\.json:2: not a whole JSON file"),
        ("a.json", b'[{"text": "a"}\n', r"a\.json:2: not a whole JSON file: wanted a comma"),
        ("a.json", b'[{"text": "a"},\n', r"a\.json:2: .*the list does not end"),
        ("a.json", b"[" * 99_999, r"a\.json:1: not a whole JSON file: too many"),
        ("a.json", b'[{"text": "a"}]\n{}', r"a\.json:\d: .*got more after the list's end"),
        ("a.json", b"[]", "got no records"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.zst", zstd(LINES)[:-3], r"a\.jsonl\.zst: not a whole zstd file"),
        ("a.parquet.gz", b"", "a file of another kind"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(records_lib.DataError, match=message) as caught:
        read(tmp_path / name)
    assert len(str(caught.value)) < 300


def test_a_folder_is_read_whole_and_what_it_leaves_out_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(find_files, "_printed_lines", set())
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "data" / ".cache").mkdir()
    for name in ("b.jsonl", "inner/c.NDJSON", "a.json", ".hidden.jsonl", ".cache/d.jsonl"):
        (tmp_path / "data" / name).write_text(f'{{"text": "{name}"}}\n')
    records_support.write_parquet(tmp_path / "data" / "d.PARQUET", [{"text": "d.PARQUET"}])
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0))
    for name in ("README.md", "inner/notes.txt", "prepare.json", "dataset_info.json"):
        (tmp_path / "data" / name).write_text("{}")
    (tmp_path / "data" / "inner" / "loop").symlink_to(tmp_path / "data")
    for _ in range(2):
        texts = [record["text"] for record in read(tmp_path / "data")]
        assert texts == ["a.json", "b.jsonl", "d.PARQUET", "inner/c.NDJSON"]
    assert capsys.readouterr().err == (
        "source 's': leaves out .cache, .hidden.jsonl, README.md, b.jsonl.gz, dataset_info.json, "
        "inner/notes.txt, prepare.json\n"
    )


def test_patterns_go_through_folders_and_names_may_have_brackets(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x.jsonl", "a/y.jsonl", "a/b/z[1].jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert [r["text"] for r in read(tmp_path / "**" / "*.jsonl")] == [
        "a/b/z[1].jsonl",
        "a/y.jsonl",
        "x.jsonl",
    ]
    assert read(tmp_path / "a" / "b" / "z[1].jsonl") == [{"text": "a/b/z[1].jsonl"}]
    assert len(read(tmp_path / "*")) == len(read(tmp_path / "**")) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/x.jsonl") == [{"text": "x.jsonl"}]


def test_a_first_line_that_is_damaged_to_a_bracket_is_one_bad_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"[" + LINES[1:])
    files = records_lib.RecordFiles("s", str(tmp_path))
    assert len(files) == 3
    assert files.read(1) == RECORDS[1]
    with pytest.raises(records_lib.data_errors.BadRecordError, match=r"a\.jsonl:1: "):
        files.read(0)
    files.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://example.org/a.jsonl", "wanted a local path or one of gs://.*Download"),
        ("s4://bucket/a.jsonl", "wanted a local path"),
        ("gs://bucket/**/a.jsonl", "ImportError|no .. in a remote path|m1-jax.gcs."),
        ("/nowhere/**/a.jsonl", "there is no file; wanted files ending in .jsonl"),
    ],
)
def test_paths_that_are_refused_in_one_line(path, message):
    with pytest.raises(records_lib.DataError, match=message) as caught:
        find_files.find_files("s", path)
    assert "\n" not in str(caught.value)


def test_a_bucket_without_its_package_names_the_extra(monkeypatch):
    def refuse(*_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(find_files, "_list_files", refuse)
    with pytest.raises(records_lib.DataError, match=r"pip install 'm1-jax\[gcs\]'"):
        find_files.find_files("s", "gs://bucket/a.jsonl")


def test_a_folder_without_records_names_what_is_there(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").touch()
    with pytest.raises(records_lib.DataError, match="there is no file.*and not data-00000-of"):
        read(tmp_path)


def test_columns_of_json_text_are_parsed_in_every_container(tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    text = {key: json.dumps(value) for key, value in record.items()}
    records_support.write_jsonl(tmp_path / "a.jsonl", [text])
    records_support.write_parquet(tmp_path / "b.parquet", [text])
    records_support.write_array_record(tmp_path / "c.arrayrecord", [text])
    assert read(tmp_path) == [record] * 3
    records_support.write_jsonl(tmp_path / "d.jsonl", [{"text": "a", "tools": ""}])
    assert read(tmp_path / "d.jsonl") == [{"text": "a", "tools": None}]
    records_support.write_jsonl(tmp_path / "e.jsonl", [{"messages": "[1"}])
    with pytest.raises(records_lib.DataError, match=r"e\.jsonl:1: messages: got no valid JSON"):
        read(tmp_path / "e.jsonl")


def test_a_table_without_columns_of_records_names_its_own(tmp_path):
    records_support.write_parquet(tmp_path / "a.parquet", [{"body": "a", "url": "b"}])
    with pytest.raises(records_lib.DataError, match="got the columns 'body, url'; wanted one of"):
        read(tmp_path)
    assert read(tmp_path, columns=None) == [{"body": "a", "url": "b"}]


@pytest.mark.parametrize(
    "line",
    [
        '{"text": NaN}',
        '{"text": "a", "text": "b"}',
        '{"text": 1e999}',
        "[" * 9999,
        '{"text": "a\\ud8',
        "\x00",
        '["text"]',
        "[",
    ],
)
def test_a_bad_line_is_a_bad_record_in_one_short_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(records_lib.data_errors.BadRecordError, match=r"a\.jsonl:2: ") as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
