"""Bad records: an error that says where, or left out, counted, listed, and at most a share."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import records_support
import tokenizer_support

from m1_jax import testing
from train import prepare
from train.data import config as data_config
from train.data import data_errors, find_files, mixture
from train.data import records as records_lib
from train.data import stream as stream_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

BAD_LINES = ('{"text": ""}', '{"text": "a', '{"txt": "a"}', '{"text": "\\ud800"}', "[]")
GOOD = '{"text": "lightning attention keeps one matrix"}'


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def make_config(path, **changes):
    source = data_config.DataSource("a", str(path))
    settings = {"lanes": 4, "lookahead": 2, "bad_records": "skip", "max_bad_share": 0.1}
    data = data_config.DataConfig((source,), **{**settings, **changes})
    return data_config.StreamConfig(data, seq_len=32, rows=2, seed=1)


@pytest.fixture
def damaged(tmp_path):
    """Return a file of 60 records, of which those of lines 10, 20, 30, 40 and 50 are bad."""
    lines = [GOOD] * 60
    for number, line in zip(range(9, 50, 10), BAD_LINES, strict=True):
        lines[number] = line
    write_lines(tmp_path / "a.jsonl", lines)
    return tmp_path / "a.jsonl"


def list_bad_lines(errors):
    """Return the numbers of the lines that errors name."""
    return sorted(int(error.split("a.jsonl:")[1].split(":")[0]) for error in errors)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_the_first_bad_record_is_an_error_by_default(damaged, tokenizer):
    with (
        stream_lib.BatchStream(make_config(damaged, bad_records="error"), tokenizer) as stream,
        pytest.raises(data_errors.BadRecordError, match=r"a\.jsonl:\d+: "),
    ):
        take(stream, 60)


def test_bad_records_are_left_out_counted_and_listed(damaged, tokenizer):
    config = make_config(damaged)
    with stream_lib.BatchStream(config, tokenizer, num_epochs=1) as stream:
        batches = list(stream)
    assert list_bad_lines(e for batch in batches for e in batch.bad_records) == [10, 20, 30, 40, 50]
    assert batches[-1].num_bad == 5
    assert batches[-1].num_dropped == 0
    read = {name.partition("@")[0] for b in batches for row in b.sample_ids for name in row}
    assert len(read) == 55
    whole = [
        line for i, line in enumerate(damaged.read_text().splitlines()) if i % 10 != 9 or i > 50
    ]
    write_lines(damaged.with_name("b.jsonl"), whole)
    config = make_config(damaged.with_name("b.jsonl"))
    with stream_lib.BatchStream(config, tokenizer, num_epochs=1) as stream:
        num_tokens = sum((batch.arrays.segment_ids > 0).sum() for batch in stream)
    assert sum((batch.arrays.segment_ids > 0).sum() for batch in batches) == num_tokens


def test_each_is_printed_once(damaged, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr(find_files, "_printed_lines", set())
    for _ in range(2):
        with stream_lib.BatchStream(make_config(damaged), tokenizer, num_epochs=1) as stream:
            list(stream)
    printed = capsys.readouterr().err
    assert printed.count("left out: ") == 5
    assert "a.jsonl:10: text: got ''; wanted a string that is not empty" in printed
    assert printed.count("source 'a': reads text\n") == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_state_goes_on_exactly_and_counts_on(damaged, tokenizer, workers):
    config = make_config(damaged, workers=workers)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        first = take(stream, 6)
        state = json.loads(json.dumps(stream.get_state()))
        rest = take(stream, 6)
    assert first[-1].num_bad > 0
    with stream_lib.BatchStream(config, tokenizer) as stream:
        stream.set_state(state)
        resumed = take(stream, 6)
    for one, other in zip(rest, resumed, strict=True):
        assert (one.sample_ids, one.num_bad) == (other.sample_ids, other.num_bad)
        assert one.bad_records == other.bad_records
        np.testing.assert_array_equal(one.arrays.tokens, other.arrays.tokens)


def test_hosts_leave_out_the_same(damaged, tokenizer):
    config = make_config(damaged, max_bad_share=0.3)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        wanted = take(stream, 5)
    hosts = [stream_lib.BatchStream(config, tokenizer, (row,)) for row in (0, 1)]
    found = [take(stream, 5) for stream in hosts]
    for stream in hosts:
        stream.close()
    for whole, *parts in zip(wanted, *found, strict=True):
        assert whole.sample_ids == [part.sample_ids[0] for part in parts]
        assert whole.num_bad == sum(part.num_bad for part in parts)


def test_a_run_that_a_bad_record_ended_goes_on_with_skip(damaged, tokenizer):
    """A state is that of the last batch, also after the error."""
    config = make_config(damaged, bad_records="error")
    with stream_lib.BatchStream(config, tokenizer) as stream:
        batches = []
        with pytest.raises(data_errors.BadRecordError):
            batches.extend(stream)
        state = stream.get_state()
    assert state["step"] == len(batches)
    assert not any("bad" in state[str(lane)] for lane in range(4))
    with stream_lib.BatchStream(make_config(damaged), tokenizer) as stream:
        stream.set_state(state)
        assert take(stream, 20)[-1].num_bad > 0
    with stream_lib.BatchStream(make_config(damaged), tokenizer) as stream:
        skipped = take(stream, len(batches))
    for one, other in zip(batches, skipped, strict=True):
        assert one.sample_ids == other.sample_ids


def test_states_without_bad_records_are_as_they_were(tmp_path, tokenizer):
    write_lines(tmp_path / "a.jsonl", [GOOD] * 9)
    with stream_lib.BatchStream(make_config(tmp_path), tokenizer) as stream:
        take(stream, 3)
        state = stream.get_state()
    assert list(state["0"]) == ["read", "tokens", "dropped", "waiting"]
    counted = mixture.LaneState({"a": 4}, {"a": 9}, 0, {"a": 2})
    assert mixture.LaneState.from_json(json.loads(json.dumps(counted.to_json()))) == counted


@pytest.mark.parametrize("share", [0.0, 0.05])
@pytest.mark.parametrize("epochs", [None, 1])
def test_more_than_the_share_is_an_error(damaged, tokenizer, share, epochs):
    config = make_config(damaged, max_bad_share=share)
    with (
        stream_lib.BatchStream(config, tokenizer, num_epochs=epochs) as stream,
        pytest.raises(records_lib.DataError, match=r"source 'a': got \d bad among") as caught,
    ):
        take(stream, 60)
    assert "max_bad_share=" in str(caught.value)
    assert not isinstance(caught.value, data_errors.BadRecordError)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_source_of_bad_records_alone_ends(tmp_path, tokenizer, share):
    write_lines(tmp_path / "a.jsonl", BAD_LINES)
    with (
        stream_lib.BatchStream(make_config(tmp_path, max_bad_share=share), tokenizer) as stream,
        pytest.raises(records_lib.DataError, match="source 'a': got"),
    ):
        next(stream)


def test_long_conversations_are_no_bad_records(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "so " * 99}, {"role": "assistant", "content": "a"}]
    records_support.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with (
        stream_lib.BatchStream(make_config(tmp_path), tokenizer) as stream,
        pytest.raises(records_lib.DataError, match="got a conversation of") as caught,
    ):
        next(stream)
    assert not isinstance(caught.value, data_errors.BadRecordError)


def test_a_file_that_is_gone_is_no_bad_record(damaged, tokenizer):
    with stream_lib.BatchStream(make_config(damaged), tokenizer) as stream:
        damaged.unlink()
        with pytest.raises(records_lib.DataError, match=r"a\.jsonl.*No such file") as caught:
            next(stream)
    assert not isinstance(caught.value, data_errors.BadRecordError)


def test_held_out_data_is_read_before_the_first_step(damaged, tokenizer):
    config = make_config(damaged, bad_records="error")
    with pytest.raises(data_errors.BadRecordError, match=r"a\.jsonl:\d0: "):
        stream_lib.check_held_out(stream_lib.BatchStream(config, tokenizer, num_epochs=1), 0)
    stream_lib.check_held_out(
        stream_lib.BatchStream(make_config(damaged), tokenizer, num_epochs=1), 8
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bad_records": "ignore"}, "bad_records: got 'ignore'; wanted one of error, skip"),
        ({"max_bad_share": 1.5}, "max_bad_share: got 1.5; wanted a share"),
        ({"max_bad_share": float("nan")}, "max_bad_share: got nan"),
    ],
)
def test_settings_that_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **changes)


def prepare_config(damaged, **changes):
    settings = {"src": str(damaged), "dst": str(damaged.parent / "out"), "progress": False}
    return prepare.PrepareConfig(**{**settings, "max_bad_share": 0.1, **changes})


def test_prepare_leaves_out_bad_records_and_lists_them(damaged, tokenizer, tmp_path):
    testing.write_tiny_tokenizer(tmp_path / "tokenizer")
    folder = prepare.run(
        prepare_config(damaged, bad="skip", checkpoint=str(tmp_path / "tokenizer"))
    )
    manifest = json.loads((folder / prepare.MANIFEST_FILE).read_text())
    assert list_bad_lines(manifest["bad_records"]) == [10, 20, 30, 40, 50]
    assert sum(counts["records"] for counts in manifest["shards"].values()) == 55
    assert len(manifest["shards"]) == 16
    assert len(records_lib.RecordFiles("s", str(folder))) == 55


def test_prepare_goes_on_with_skip_after_an_error(damaged):
    with pytest.raises(data_errors.BadRecordError, match=r"a\.jsonl:10: "):
        prepare.run(prepare_config(damaged, shards=10))
    whole = damaged.parent / "out.partial" / "00000-of-00010.arrayrecord"
    written = whole.stat().st_mtime_ns
    folder = prepare.run(prepare_config(damaged, shards=10, bad="skip"))
    assert (folder / whole.name).stat().st_mtime_ns == written
    assert len(records_lib.RecordFiles("s", str(folder))) == 55


def test_prepare_refuses_more_than_the_share(damaged):
    with pytest.raises(records_lib.DataError, match="'--src': got 4 bad among 60 records"):
        prepare.run(prepare_config(damaged, bad="skip", max_bad_share=0.05))
    with pytest.raises(FileExistsError, match="left out 3 bad records. Go on with --bad=skip"):
        prepare.run(prepare_config(damaged))


def test_prepare_writes_no_empty_shard(tmp_path):
    write_lines(tmp_path / "a.jsonl", [GOOD, BAD_LINES[0], GOOD])
    config = prepare_config(tmp_path / "a.jsonl", bad="skip", max_bad_share=0.5)
    folder = prepare.run(config)
    assert len(records_lib.RecordFiles("s", str(folder))) == 2
    write_lines(tmp_path / "a.jsonl", BAD_LINES)
    with pytest.raises(records_lib.DataError, match="all 5 records are bad"):
        prepare.run(dataclasses.replace(config, dst=f"{tmp_path}/none", max_bad_share=1.0))


def test_prepare_keeps_weights_and_changes_columns_to_messages(tmp_path):
    turns = [
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": "A", "weight": 0},
        {"from": "gpt", "value": "B"},
    ]
    records_support.write_parquet(tmp_path / "a.parquet", [{"conversations": turns, "id": 3}])
    folder = prepare.run(prepare_config(tmp_path / "a.parquet"))
    records = records_lib.RecordFiles("s", str(folder))
    assert records.read(0) == {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "A", "weight": 0},
            {"role": "assistant", "content": "B"},
        ]
    }
    records.close()


@pytest.mark.slow
def test_the_commands_flags(damaged):
    command = [sys.executable, "-m", "train.prepare", f"--src={damaged}", "--max_bad_share=0.2"]
    done = subprocess.run(
        [*command, f"--dst={damaged.parent}/out", "--bad=skip"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"wrote {damaged.parent}/out\n"
    assert "--src: reads text\n" in done.stderr
    assert "left out 5 of 60 records; prepare.json lists them\n" in done.stderr
