"""Records of JSONL, Parquet and ArrayRecord files, in folders and buckets, whole and damaged."""

import json
import os
import pickle
import random
from typing import ClassVar

import fsspec
import pytest
import records_support
from fsspec.implementations import memory

from train.data import records as records_lib


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n \n", "got no records"),
        ("a.parquet", b"PAR1", "not a Parquet file"),
        ("a.arrayrecord", b"RAR" * 9999, "not a whole ArrayRecord file"),
        ("a.arrayrecord", b"", "not a whole ArrayRecord file"),
        ("a.txt", b"", "a file of another kind"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(records_lib.DataError, match=f"{name}: .*{message}"):
        records_lib.RecordFiles("s", str(tmp_path / "a.*"))


def test_no_file_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(records_lib.DataError, match="there is no file; wanted files ending in"):
            records_lib.RecordFiles("s", str(path))


def test_records_of_all_formats_are_the_same(tmp_path):
    records = [{"text": f"number {i}"} for i in range(20)]
    records_support.write_jsonl(tmp_path / "a.jsonl", records[:9])
    records_support.write_array_record(tmp_path / "b.arrayrecord", records[9:13])
    records_support.write_parquet(tmp_path / "c.parquet", records[13:], rows=1)
    found = pickle.loads(pickle.dumps(records_lib.RecordFiles("s", str(tmp_path))))
    assert len(found) == 20
    for i in random.Random(0).sample(range(20), 20):
        assert found.read(i) == records[i]
    assert found.location(8).endswith("a.jsonl:9")
    assert found.location(19).endswith("c.parquet, record 6")
    found.close()


def test_parquet_adds_no_keys_to_conversations(tmp_path):
    call = {"name": "f", "arguments": {"a": 1}}
    tools = [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": {"c": 2}}}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": [call]}]
    records_support.write_parquet(tmp_path / "a.parquet", [{"messages": turns, "tools": tools}])
    found = records_lib.RecordFiles("s", str(tmp_path / "a.parquet"))
    record = found.read(0)
    assert (record["messages"], record["tools"]) == (turns, tools)
    found.close()


def test_parquet_may_hold_conversations_as_strings(tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}]}
    records_support.write_parquet(
        tmp_path / "a.parquet", [{"messages": json.dumps(record["messages"])}]
    )
    found = records_lib.RecordFiles("s", str(tmp_path / "a.parquet"))
    assert found.read(0) == record
    found.close()


class _Bucket(memory.MemoryFileSystem):
    """Stands in for gs:// without a network."""

    protocol = "gs"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


def test_files_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: _Bucket())
    records_support.write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    records_support.write_parquet(tmp_path / "b.parquet", [{"text": "c"}])
    for folder, name in (("one", "a.jsonl"), ("two", "b.parquet")):
        _Bucket().pipe(f"gs://bucket/{folder}/{name}", (tmp_path / name).read_bytes())
    records = records_lib.RecordFiles("s", "gs://bucket/*/*")
    assert [records.read(i)["text"] for i in range(3)] == ["a", "b", "c"]
    assert records.location(1) == "gs://bucket/one/a.jsonl:2"
    assert [name for name, *_ in records.fingerprint()] == ["one/a.jsonl", "two/b.parquet"]
    records.close()


def test_few_files_are_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(records_lib, "_MAX_OPEN_FILES", 2)
    for i in range(5):
        records_support.write_jsonl(tmp_path / f"{i}.jsonl", [{"text": str(i)}])
    records = records_lib.RecordFiles("s", str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    assert [records.read(i)["text"] for i in (0, 1, 2, 3, 4, 0)] == list("012340")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before + 2
    records.close()
