"""Streams: the same rows again, from any batch, with any workers, on any number of hosts."""

import collections
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import records_support
import tokenizer_support

from m1_jax import testing
from train.data import config as data_config
from train.data import records as records_lib
from train.data import stream as stream_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

WORDS = ["lightning", "attention", "keeps", "one", "matrix", "for", "each", "head", "and", "cache"]


def texts(count, longest, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


def conversation(i):
    return {
        "messages": [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": WORDS[i % 9]},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources in three formats: short texts in two files, chats, texts longer than a row."""
    folder = tmp_path_factory.mktemp("corpus")
    short = [{"text": text} for text in texts(90, 12)]
    records_support.write_jsonl(folder / "short-0.jsonl", short[:50])
    records_support.write_jsonl(folder / "short-1.jsonl", short[50:])
    records_support.write_parquet(folder / "chat.parquet", [conversation(i) for i in range(40)])
    records_support.write_array_record(
        folder / "long.arrayrecord", [{"text": t} for t in texts(25, 90, seed=1)]
    )
    return folder


@pytest.fixture
def config(folder):
    sources = (
        data_config.DataSource("short", f"{folder}/short-*.jsonl"),
        data_config.DataSource("chat", f"{folder}/chat.parquet", kind="chat", weight=0.5),
        data_config.DataSource("long", f"{folder}/long.arrayrecord", kind="text"),
    )
    data = data_config.DataConfig(sources, lanes=8, lookahead=4)
    return data_config.StreamConfig(data, seq_len=64, rows=4, seed=3)


def change(config, **fields):
    """Return a config with other fields, of the stream or of its data."""
    names = {field.name for field in dataclasses.fields(config)}
    own = {name: value for name, value in fields.items() if name in names}
    data = {name: value for name, value in fields.items() if name not in names}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data), **own)


def arrays(rows):
    fields = [getattr(rows.arrays, f.name) for f in dataclasses.fields(rows.arrays)]
    return [*fields, rows.source_ids]


def assert_same(a, b):
    assert a.sample_ids == b.sample_ids
    for one, other in zip(arrays(a), arrays(b), strict=True):
        np.testing.assert_array_equal(one, other)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def merged(streams):
    state = {}
    for stream in streams:
        state |= stream.get_state()
    return json.loads(json.dumps(state))


def joined(parts):
    """Return the batch that several hosts' rows make together."""
    samples = [row for part in parts for row in part.sample_ids]
    fields = zip(*map(arrays, parts), strict=True)
    *batch, places = [np.concatenate(field) for field in fields]
    return dataclasses.replace(
        parts[0], arrays=type(parts[0].arrays)(*batch), source_ids=places, sample_ids=samples
    )


def test_rows_are_what_the_step_takes(config, tokenizer):
    with stream_lib.BatchStream(config, tokenizer) as stream:
        rows = next(stream)
    for array in arrays(rows):
        assert array.shape == (4, 64)
        assert array.dtype == (np.float32 if array is rows.arrays.weights else np.int32)
    assert rows.utilization == np.mean(rows.arrays.segment_ids > 0) > 0.5
    assert set(np.unique(rows.source_ids)) <= {0, 1, 2, 3}
    assert len(rows.sample_ids) == 4
    assert rows.wait_secs > 0


def test_a_seed_gives_the_same_rows_and_another_gives_others(config, tokenizer):
    with (
        stream_lib.BatchStream(config, tokenizer) as a,
        stream_lib.BatchStream(config, tokenizer) as b,
    ):
        first, again = take(a, 6), take(b, 6)
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    with stream_lib.BatchStream(change(config, seed=4), tokenizer) as stream:
        assert take(stream, 1)[0].sample_ids != first[0].sample_ids


@pytest.mark.parametrize("rows", [2, 8, 16])
def test_a_state_taken_after_any_batch_continues_exactly(config, tokenizer, rows):
    config = change(config, rows=rows)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        states, wanted = [merged([stream])], []
        for _ in range(7):
            wanted.append(next(stream))
            states.append(merged([stream]))
    for done, state in enumerate(states):
        with stream_lib.BatchStream(config, tokenizer) as stream:
            stream.set_state(state)
            assert merged([stream]) == state
            for one, other in zip(wanted[done:], take(stream, 7 - done), strict=True):
                assert_same(one, other)
            assert merged([stream]) == states[-1]


def test_set_state_turns_a_running_stream_back(config, tokenizer):
    with stream_lib.BatchStream(config, tokenizer) as stream:
        take(stream, 2)
        state = stream.get_state()
        first = take(stream, 3)
        stream.set_state(state)
        for one, other in zip(first, take(stream, 3), strict=True):
            assert_same(one, other)


def test_processes_give_the_rows_of_the_thread_and_take_over_from_it(config, tokenizer):
    with stream_lib.BatchStream(config, tokenizer) as stream:
        wanted = take(stream, 12)
    with stream_lib.BatchStream(change(config, workers=2), tokenizer) as stream:
        found, state = take(stream, 5), stream.get_state()
    with stream_lib.BatchStream(change(config, workers=1), tokenizer) as stream:
        stream.set_state(state)
        found, state = found + take(stream, 4), stream.get_state()
    with stream_lib.BatchStream(config, tokenizer) as stream:
        stream.set_state(state)
        found += take(stream, 3)
    for one, other in zip(wanted, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("rows", [4, 16])
def test_any_number_of_hosts_gives_the_rows_of_one_and_takes_over(config, tokenizer, rows):
    config = change(config, rows=rows)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        wanted = take(stream, 9)
    found, state = [], None
    for hosts in (4, 1, 2):
        streams = [
            stream_lib.BatchStream(config, tokenizer, row_numbers)
            for row_numbers in np.split(np.arange(rows), hosts)
        ]
        for stream in streams:
            if state is not None:
                stream.set_state(state)
        found += [joined([next(stream) for stream in streams]) for _ in range(3)]
        state = merged(streams)
        for stream in streams:
            stream.close()
    for one, other in zip(wanted, found, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("rows", "lanes"), [(8, 8), (8, 32), (16, 4), (16, 1)], ids=lambda number: str(number)
)
def test_hosts_may_hold_any_rows_and_have_some_in_common(config, tokenizer, rows, lanes):
    """As on a torus, where neighbours on the mesh lie on several hosts."""
    config = change(config, rows=rows, lanes=lanes)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        wanted = take(stream, 5)
    scattered = [(0, 1, 4, 5), (2, 3, 6, 7), tuple(range(8, rows)), (0, 5, rows - 1)]
    hosts = [stream_lib.BatchStream(config, tokenizer, numbers) for numbers in scattered if numbers]
    found = [take(stream, 3) for stream in hosts]
    state = merged(hosts)
    for stream in hosts:
        stream.close()
    resumed = stream_lib.BatchStream(config, tokenizer, scattered[3])
    resumed.set_state(state)
    found[-1] += take(resumed, 2)
    resumed.close()
    assert resumed.get_state() == merged([resumed])
    for numbers, batches in zip([n for n in scattered if n], found, strict=True):
        for whole, part in zip(wanted, batches, strict=False):
            assert part.sample_ids == [whole.sample_ids[row] for row in numbers]
            for one, other in zip(arrays(whole), arrays(part), strict=True):
                np.testing.assert_array_equal(one[list(numbers)], other)


def places(rows):
    """Yield (sample, place in its document) of all real tokens, and the token."""
    for r, samples in enumerate(rows.sample_ids):
        for i, name in enumerate(samples):
            sample, _, start = name.partition("@")
            here = rows.arrays.segment_ids[r] == i + 1
            for place, token in enumerate(rows.arrays.tokens[r][here]):
                yield (sample, int(start or 0) + place), token


def waiting(state):
    """Yield (sample, place) of what a state says is in no row yet."""
    for lane in range(state["lanes"]):
        for entry in state[str(lane)]["waiting"]:
            sample, _, span = entry.rpartition("@")
            start, end = map(int, span.split("/")[0].split("-"))
            yield from ((sample, place) for place in range(start, end))


def test_one_epoch_is_every_token_of_every_record_once(config, tokenizer):
    found = collections.Counter()
    batches = 0
    with stream_lib.BatchStream(config, tokenizer, num_epochs=1) as stream:
        for rows in stream:
            assert rows.arrays.tokens.shape == (4, 64)
            found.update(dict(places(rows)).keys())
            batches += 1
        with pytest.raises(StopIteration):
            next(stream)
    assert set(found.values()) == {1}
    assert {sample for sample, _ in found} == {
        f"{name}:{i}:0" for name, n in (("short", 90), ("chat", 40), ("long", 25)) for i in range(n)
    }
    assert len(found) / (batches * 4 * 64) > 0.9


def test_an_epoch_ends_on_all_hosts_at_once(config, tokenizer):
    with stream_lib.BatchStream(config, tokenizer, num_epochs=2) as stream:
        wanted = list(stream)
    hosts = [
        list(stream_lib.BatchStream(config, tokenizer, row_numbers, num_epochs=2))
        for row_numbers in ((0, 1), (2, 3))
    ]
    for one, *parts in zip(wanted, *hosts, strict=True):
        assert_same(one, joined(parts))


def test_stages_of_other_lengths_and_sizes_lose_nothing_and_repeat_nothing(config, tokenizer):
    found, state = collections.Counter(), None
    for seq_len, rows in ((32, 8), (128, 2), (48, 16), (64, 4)):
        stage = change(config, seq_len=seq_len, rows=rows)
        with stream_lib.BatchStream(stage, tokenizer) as stream:
            if state is not None:
                stream.set_state(state)
            for batch in take(stream, 5):
                found.update([place for place, _ in places(batch)])
            state = merged([stream])
    found.update(waiting(state))
    assert set(found.values()) == {1}
    lengths = collections.Counter(sample for sample, _ in found)
    last = dict.fromkeys(lengths, 0)
    for sample, place in found:
        last[sample] = max(last[sample], place)
    assert all(last[sample] + 1 == length for sample, length in lengths.items())
    # What was read of a source is the beginning of its order: nothing was passed over.
    read = {name: sum(state[str(i)]["read"][name] for i in range(8)) for name in ("short", "long")}
    for name, count in read.items():
        assert sum(sample.startswith(name + ":") for sample in lengths) == count > 0


def test_lanes_together_read_an_epoch_before_the_next(config, tokenizer):
    config = change(config, sources=config.data.sources[:1], lanes=4)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        seen = [name for rows in take(stream, 20) for row in rows.sample_ids for name in row]
        seen += [
            e.rpartition("@")[0] for i in range(4) for e in stream.get_state()[str(i)]["waiting"]
        ]
    first = {name for name in seen if name.endswith(":0")}
    assert first == {f"short:{i}:0" for i in range(90)}
    assert len({name for name in seen if name.endswith(":1")}) > 10


def shares(rows):
    counts = np.bincount(np.concatenate([r.source_ids.ravel() for r in rows]), minlength=4)[1:]
    return counts / counts.sum()


def test_weights_are_shares_of_tokens_and_change_with_the_step(config, tokenizer):
    weights = (
        (0, (("short", 1.0), ("long", 3.0))),
        (40, (("chat", 1.0),)),
    )
    config = change(config, weights=weights, lanes=4)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        before = take(stream, 40)
        state = stream.get_state()
        after = take(stream, 10)
        np.testing.assert_allclose(shares(before), [0.25, 0, 0.75], atol=0.06)
        # What waited at the switch is still handed out.
        np.testing.assert_allclose(shares(after[-4:]), [0, 1, 0], atol=0.05)
        stream.set_state(state)
        assert_same(next(stream), after[0])


def test_one_document_a_row_without_packing(config, tokenizer):
    with stream_lib.BatchStream(change(config, pack=False), tokenizer) as stream:
        rows = next(stream)
    assert [len(samples) for samples in rows.sample_ids] == [1] * 4


def test_left_out_conversations_are_counted(config, tokenizer, tmp_path):
    long = conversation(0)
    long["messages"][0]["content"] = "so " * 100
    records_support.write_jsonl(tmp_path / "a.jsonl", [conversation(1), long] * 3)
    config = change(config, sources=(data_config.DataSource("a", f"{tmp_path}/a.jsonl"),))
    with pytest.raises(
        records_lib.DataError, match=r"a\.jsonl:\d: got a conversation of \d+ tokens"
    ):
        next(stream_lib.BatchStream(config, tokenizer, num_epochs=1))
    config = change(config, overlong="drop")
    with stream_lib.BatchStream(config, tokenizer, num_epochs=1) as stream:
        (rows,) = list(stream)
    assert rows.num_dropped == 3
    records_support.write_jsonl(tmp_path / "a.jsonl", [long])
    with pytest.raises(records_lib.DataError, match="all longer than 64"):
        next(stream_lib.BatchStream(config, tokenizer))


def test_a_changed_file_is_named(config, tokenizer, tmp_path, folder):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = [
        dataclasses.replace(s, path=s.path.replace(str(folder), str(tmp_path)))
        for s in config.data.sources
    ]
    with stream_lib.BatchStream(config, tokenizer) as stream:
        next(stream)
        state = merged([stream])
    config = change(config, sources=tuple(moved))
    stream_lib.BatchStream(config, tokenizer).set_state(state)  # the same files elsewhere
    file = tmp_path / "short-1.jsonl"
    file.write_bytes(file.read_bytes().replace(b"matrix", b"Matrix", 1))
    with pytest.raises(records_lib.DataError, match=r"'short': short-1.jsonl changed since"):
        stream_lib.BatchStream(config, tokenizer).set_state(state)
    file.unlink()
    with pytest.raises(records_lib.DataError, match=r"short-1.jsonl is gone"):
        stream_lib.BatchStream(config, tokenizer).set_state(state)


def test_a_run_that_began_without_newer_kinds_of_files_goes_on_without_them(tokenizer, tmp_path):
    """Earlier versions left out these files of a folder, and so do the states of their runs."""
    records_support.write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts(9, 12)])
    source = data_config.DataSource("a", str(tmp_path))
    config = data_config.StreamConfig(data_config.DataConfig((source,), lanes=2), 32, 2)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        next(stream)
        state = merged([stream])
        wanted = take(stream, 3)
    (tmp_path / "inner").mkdir()
    for name in ("b.json", "c.ndjson", "D.JSONL", "inner/e.jsonl"):
        records_support.write_jsonl(tmp_path / name, [{"text": name}])
    for _ in range(2):
        with stream_lib.BatchStream(config, tokenizer) as stream:
            stream.set_state(state)
            for one, other in zip(wanted, take(stream, 3), strict=True):
                assert_same(one, other)
            stream.set_state(state)
            state = merged([stream])
    records_support.write_jsonl(tmp_path / "f.jsonl", [{"text": "f"}])
    with pytest.raises(records_lib.DataError, match=r"f\.jsonl is new since.*Move it to a folder"):
        stream_lib.BatchStream(config, tokenizer).set_state(state)


def test_states_that_do_not_fit_are_refused(config, tokenizer):
    stream = stream_lib.BatchStream(config, tokenizer)
    state = stream.get_state()
    with pytest.raises(ValueError, match="seed: got 4; wanted 3"):
        stream_lib.BatchStream(change(config, seed=4), tokenizer).set_state(state)
    with pytest.raises(ValueError, match="lanes: got 16; wanted 8"):
        stream_lib.BatchStream(change(config, lanes=16), tokenizer).set_state(state)
    with pytest.raises(ValueError, match="the states of all hosts"):
        stream.set_state(stream_lib.BatchStream(config, tokenizer, (0, 1)).get_state())
    fewer = change(config, sources=config.data.sources[:2])
    with pytest.raises(records_lib.DataError, match="'long'.*Give it weight 0"):
        stream_lib.BatchStream(fewer, tokenizer).set_state(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "sources: got"),
        ({"seq_len": 1}, "seq_len: got 1; wanted at least 2"),
        ({"rows": 3}, "lanes: got 8 with 3 rows; .* such as 9"),
        ({"overlong": "cut"}, "overlong: got 'cut'; wanted one of error"),
        ({"thinking": "no"}, "thinking: got 'no'"),
        ({"profile": "no"}, "profile: got 'no'"),
        ({"weights": ((1, (("short", 1.0),)),)}, "ascending ones from 0"),
        ({"weights": ((0, (("books", 1.0),)),)}, "got 'books'"),
        ({"weights": ((0, (("short", 0.0),)),)}, "got none above 0"),
        ({"weights": ((0, (("short", float("nan")),)),)}, "got 'short': nan"),
    ],
)
def test_configs_that_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        change(config, **changes)


@pytest.mark.parametrize("row_numbers", [(), (4,), (-1, 0), (1, 1)])
def test_rows_that_the_batch_does_not_have_are_refused(config, tokenizer, row_numbers):
    with pytest.raises(ValueError, match="row_numbers: got .* from 0 to 3"):
        stream_lib.BatchStream(config, tokenizer, row_numbers)


def test_tokens_that_the_tokenizer_lacks_are_refused(config, tokenizer):
    with pytest.raises(ValueError, match="special token: got '<eod>'"):
        stream_lib.BatchStream(change(config, end_token="<eod>"), tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"txt": "b"}\n', r"a.jsonl:3: got the keys"),
        (b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: got no valid JSON"),
        (b'{"text": "a"}\n[1]\n', r"a.jsonl:2: got \[1\]; wanted an object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a.jsonl:2: got no valid JSON"),
        (b'{"text": "\\ud800"}\n', r"a.jsonl:1: text: got a lone surrogate"),
    ],
)
@pytest.mark.parametrize("epochs", [None, 1])
def test_a_bad_record_is_named(tokenizer, tmp_path, content, message, epochs):
    (tmp_path / "a.jsonl").write_bytes(content)
    source = data_config.DataSource("a", f"{tmp_path}/a.jsonl")
    config = data_config.StreamConfig(data_config.DataConfig((source,), lanes=1), 16, 1)
    with (
        stream_lib.BatchStream(config, tokenizer, num_epochs=epochs) as stream,
        pytest.raises(records_lib.DataError, match=message),
    ):
        take(stream, 9)


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_not_a_wait(config, tokenizer):
    with stream_lib.BatchStream(change(config, workers=2), tokenizer) as stream:
        next(stream)
        multiprocessing.active_children()[0].kill()
        with pytest.raises(RuntimeError, match=r"data worker \d ended without an error"):
            take(stream, 5_000)  # more than a pipe holds


def test_errors_of_workers_are_those_of_the_thread(tokenizer, tmp_path):
    records_support.write_jsonl(tmp_path / "a.jsonl", [{"txt": "a"}])
    source = data_config.DataSource("a", f"{tmp_path}/a.jsonl")
    config = data_config.StreamConfig(data_config.DataConfig((source,), workers=1), 16, 1)
    with (
        stream_lib.BatchStream(config, tokenizer) as stream,
        pytest.raises(records_lib.DataError, match=r"a.jsonl:1: got the keys"),
    ):
        next(stream)


def test_another_tokenisation_of_what_was_half_handed_out_is_refused(config, tokenizer):
    config = change(config, sources=config.data.sources[2:], rows=8)
    with stream_lib.BatchStream(config, tokenizer) as stream:
        take(stream, 2)
        state = merged([stream])
    with stream_lib.BatchStream(change(config, end_token=None), tokenizer) as stream:
        stream.set_state(state)
        with pytest.raises(
            records_lib.DataError, match="of which the checkpoint had handed out some"
        ):
            next(stream)


def test_a_source_may_be_added_at_a_checkpoint(config, tokenizer):
    fewer = change(config, sources=config.data.sources[:2])
    with stream_lib.BatchStream(fewer, tokenizer) as stream:
        take(stream, 3)
        state = merged([stream])
    with stream_lib.BatchStream(config, tokenizer) as stream:
        stream.set_state(state)
        assert any((rows.source_ids == 3).any() for rows in take(stream, 6))


_KILLED = """
import multiprocessing, pathlib, sys, time
from m1_jax import tokenizer
from train.data import config as data_config, stream as stream_lib
if __name__ == "__main__":
    source = data_config.DataSource("short", sys.argv[1])
    data = data_config.DataConfig((source,), lanes=4, workers=1)
    config = data_config.StreamConfig(data, 64, 4)
    stream = stream_lib.BatchStream(config, tokenizer.Tokenizer.load(sys.argv[2]))
    next(stream)
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_when_their_trainer_is_killed(folder, tokenizer, tmp_path):
    testing.write_tiny_tokenizer(tmp_path)
    script = tmp_path / "trainer.py"
    script.write_text(_KILLED)
    trainer = subprocess.Popen(
        [sys.executable, script, folder / "short-0.jsonl", tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    with trainer:
        worker = int(trainer.stdout.readline())
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(worker)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return not status.stdout.startswith("Z") and status.returncode == 0
