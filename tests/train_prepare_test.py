"""The prepare command: what it writes and refuses; a half is never taken for a whole."""

import json
import subprocess
import sys

import pytest

from m1_jax import testing
from train import prepare
from train.data import records as records_lib

RECORDS = [{"text": f"number {i}"} for i in range(9)] + [
    {
        "messages": [{"role": "user", "content": "ä?"}, {"role": "assistant", "content": "ö"}],
        "tools": [{"name": "add", "parameters": {}}],
    }
]


@pytest.fixture
def src(tmp_path):
    lines = [json.dumps({**record, "id": 7}) + "\n" for record in RECORDS]
    (tmp_path / "a.jsonl").write_text("".join(lines[:4]))
    (tmp_path / "b.jsonl").write_text("".join(lines[4:]))
    return tmp_path


def config(folder, **changes):
    settings = {"src": f"{folder}/*.jsonl", "dst": f"{folder}/out", "shards": 3, "progress": False}
    return prepare.PrepareConfig(**{**settings, **changes})


def read(folder):
    records = records_lib.RecordFiles("s", str(folder))
    found = [records.read(i) for i in range(len(records))]
    records.close()
    return found


def test_shards_hold_the_records_in_order(src):
    done = prepare.run(config(src))
    assert sorted(file.name for file in done.iterdir()) == [
        *(f"0000{i}-of-00003.arrayrecord" for i in range(3)),
        prepare.MANIFEST_FILE,
    ]
    assert read(done) == RECORDS
    assert not (src / "out.partial").exists()
    again = prepare.run(config(src, src=str(done), dst=f"{src}/again", shards=1))
    assert read(again) == RECORDS


def test_tokens_are_counted_with_a_tokenizer(src):
    testing.write_tiny_tokenizer(src / "tokenizer")
    done = prepare.run(config(src, checkpoint=f"{src}/tokenizer"))
    counts = json.loads((done / prepare.MANIFEST_FILE).read_text())["shards"].values()
    assert sum(count["records"] for count in counts) == 10
    assert all(0 < count["longest_tokens"] < count["tokens"] for count in counts)


def test_an_interrupted_run_goes_on_and_is_no_result_before(src, monkeypatch):
    whole = prepare.run(config(src, dst=f"{src}/whole"))
    write, written = prepare._ShardWriter.write, []

    def interrupted(writer, *rest):
        written.append(writer._path.name)
        if len(written) == 2:
            writer._path.write_bytes(b"half")
            raise KeyboardInterrupt
        return write(writer, *rest)

    monkeypatch.setattr(prepare._ShardWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare.run(config(src))
    assert not (src / "out").exists()
    done = prepare.run(config(src))
    assert written == [f"0000{i}-of-00003.arrayrecord.tmp" for i in (0, 1, 1, 2)]
    for file in whole.iterdir():
        assert (done / file.name).read_bytes() == file.read_bytes()
    assert len(list(done.iterdir())) == len(list(whole.iterdir()))


def test_an_interrupted_run_of_other_data_is_not_continued(src, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(prepare._ShardWriter, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            prepare.run(config(src))
    (src / "a.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(FileExistsError, match="out.partial is an interrupted preparation of other"):
        prepare.run(config(src))


def test_a_bad_record_is_named_and_leaves_no_result(src):
    for line, message in (
        ('{"text": ""}', "not empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"text": "a', "no valid JSON"),
        ('{"text": "\\ud800"}', "surrogate"),
    ):
        (src / "b.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(records_lib.DataError, match=rf"b\.jsonl:2: .*{message}"):
            prepare.run(config(src, shards=1, dst=f"{src}/{message}"))
        assert not (src / message).exists()


def test_settings_that_are_refused(src):
    with pytest.raises(ValueError, match="--shards is 11; wanted at most the 10 records"):
        prepare.run(config(src, shards=11))
    with pytest.raises(ValueError, match="--shards is -1"):
        config(src, shards=-1)
    with pytest.raises(ValueError, match="wanted a local path"):
        config(src, dst="gs://bucket/out")
    with pytest.raises(ValueError, match="both --src and --dst"):
        config(src, src="")
    (src / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        prepare.run(config(src))
    with pytest.raises(records_lib.DataError, match="where there is no file"):
        prepare.run(config(src, src=f"{src}/*.parquet", dst=f"{src}/new"))


def test_the_command(src):
    command = [sys.executable, "-m", "train.prepare", f"--src={src}/*.jsonl", f"--dst={src}/out"]
    done = subprocess.run([*command, "--shards=2"], capture_output=True, text=True, check=True)
    assert done.stdout == f"wrote {src}/out\n"
    assert "10 of 10" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
