"""Damaged files of training data: each is read as it should be, or refused in one short line.

    python benchmarks/damage_data.py [--cases=400] [--seed=0] [--only=CASE]

Each case makes a small file in one of the containers, damages its bytes or one value of its records
with a fixed seed (the first file of each container stays whole), and reads it four times in a
process of its own: by `train.prepare` and by a stream, each of which stops at a bad record, or
leaves bad records out. Each must end within 60 s, in records or in an error of the data: one line
of at most 300 characters that names the file, and the line or the record where the damage has one.
Records of lines that were not damaged must come out as they were. The exit status is 1 where
anything else happens.
"""

import argparse
import collections
import copy
import dataclasses
import gzip
import json
import multiprocessing
import pathlib
import random
import re
import sys
import tempfile
import traceback
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from array_record.python import array_record_module

from m1_jax import testing
from m1_jax import tokenizer as tokenizer_lib
from train import prepare
from train.data import columns, records
from train.data import config as data_config
from train.data import stream as stream_lib

LIMIT_SECS = 60
MAX_CHARS = 300
CONTAINERS = (
    "lines.jsonl",
    "LINES.NDJSON",
    "list.json",
    "spread.json",
    "lines.json",
    "lines.jsonl.gz",
    "lines.jsonl.zst",
    "nested.parquet",
    "text.parquet",
    "lines.arrayrecord",
)
# Those in which a damaged byte is within one record, so that the others must still be read.
LINE_CONTAINERS = ("lines.jsonl", "LINES.NDJSON", "lines.json")
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": 1}}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "One and one?"}]},
    {"role": "assistant", "content": "I add.", "reasoning": "Sums", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "2"},
    {"role": "assistant", "content": "It is zwei: \U0001f600", "weight": 1},
]
SHAREGPT = [
    {"from": "human", "value": "Good day"},
    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    {"from": "observation", "value": "1"},
    {"from": "gpt", "value": "One."},
]
RECORDS = (
    {"text": "Eins, zwei, drei: a first text. " * 3},
    {"messages": CHAT, "tools": TOOLS},
    {"conversations": SHAREGPT, "system": "Be kind."},
    {"prompt": "Count", "completion": "1 2 3"},
    {"prompt": CHAT[:2], "completion": [{"role": "assistant", "content": "Two."}]},
    {"instruction": "Say hello", "input": "in German", "output": "Hallo", "history": [["a", "b"]]},
    {"text": "A last text.", "id": 7},
)
VALUES = (
    None,
    True,
    0,
    -1.5,
    10**19,
    "",
    " ",
    "x",
    "[",
    '[{"role": 1}]',
    "\ud800",
    "\x00",
    "\ufeff",
    "long " * 20_000,
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [1, "b"],
    [{"role": ["user"], "content": {}}],
    [{"from": {}, "value": []}],
    [{"role": "assistant", "tool_calls": [{"id": [], "function": {"name": "f"}}]}],
    [{"role": "tool", "tool_call_id": {}, "content": "x"}],
)
# JSON that Python does not write, in place of a value.
RAW_VALUES = (
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"\\ud83d"',
    '{"role": 1, "role": 2}',
    "01",
    "'x'",
    "",
)
RAW_MARK = "raw-value-goes-here"


@dataclasses.dataclass(frozen=True)
class DamageCase:
    """One damaged file.

    Attributes:
      number: the case's number.
      container: name of the file, one of `CONTAINERS`.
      damage: what was done, for reports.
      content: bytes of the file.
      damaged: number of the only damaged record, -1 for none, or None where the damage may be
        anywhere.
    """

    number: int
    container: str
    damage: str
    content: bytes
    damaged: int | None


def make_case(number: int, seed: int) -> DamageCase:
    """Return a case. Cases of one number and seed are the same."""
    rng = random.Random(f"{seed} {number}")
    container = CONTAINERS[number % len(CONTAINERS)]
    if number < len(CONTAINERS):
        texts = [json.dumps(value) for value in RECORDS]
        content = _write(container, list(RECORDS), texts)
        return DamageCase(number, container, "none", content, -1)
    if rng.random() < 0.45:
        return _damage_bytes(number, container, rng)
    return _damage_value(number, container, rng)


def _damage_value(number: int, container: str, rng: random.Random) -> DamageCase:
    values = [copy.deepcopy(record) for record in RECORDS]
    index = rng.randrange(len(values))
    parent, key = _choose_place(values[index], rng)
    is_raw = not container.endswith("parquet") and rng.random() < 0.35
    raw = rng.choice(RAW_VALUES)
    value = RAW_MARK if is_raw else rng.choice(VALUES)
    damage = f"record {index}: {key!r} is {(raw if is_raw else value)!r:.40}"
    if isinstance(parent, dict) and rng.random() < 0.1:
        parent[f"{key}\u00e9"] = parent.pop(key)
        damage = f"record {index}: {key!r} has another name"
    else:
        parent[key] = copy.deepcopy(value)
    texts = [json.dumps(record).replace(f'"{RAW_MARK}"', raw) for record in values]
    return DamageCase(number, container, damage, _write(container, values, texts), index)


def _choose_place(record: Any, rng: random.Random) -> tuple[Any, Any]:
    """Return a container within a record and a key of it."""
    places, queue = [], [record]
    while queue:
        parent = queue.pop()
        for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
            places.append((parent, key))
            if isinstance(parent[key], dict | list):
                queue.append(parent[key])
    return rng.choice(places)


def _write(container: str, values: list[dict], texts: list[str]) -> bytes:
    """Return a file of these records, which are given as objects and as JSON."""
    lines = "".join(f"{text}\n" for text in texts).encode("utf-8", "surrogatepass")
    if container == "list.json":
        return b"[" + b",\n ".join(text.encode() for text in texts) + b"]\n"
    if container == "spread.json":
        return "\n".join(text.replace("{", "{\n", 1) for text in texts).encode()
    if container.endswith(".gz"):
        return gzip.compress(lines, mtime=0)
    if container.endswith(".zst"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(lines)
        return sink.getvalue().to_pybytes()
    if container.endswith(".parquet"):
        return _write_parquet(container, values)
    if container.endswith(".arrayrecord"):
        return _write_array_record(texts)
    return lines


def _write_parquet(container: str, values: list[dict]) -> bytes:
    """Return a Parquet file, with a column as JSON text where the table takes no other form."""
    names = sorted({name for value in values for name in value})
    arrays = []
    for name in names:
        column = [value.get(name) for value in values]
        try:
            if container == "text.parquet":
                raise TypeError("as text")
            arrays.append(pyarrow.array(column))
        except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
            texts = [item if isinstance(item, str | None) else json.dumps(item) for item in column]
            arrays.append(
                pyarrow.array(
                    [t if t is None else t.encode("utf-8", "replace").decode() for t in texts]
                )
            )
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table(arrays, names=names)
    try:
        pyarrow.parquet.write_table(table, sink, row_group_size=3)
    except pyarrow.ArrowNotImplementedError:  # an object without keys
        return _write_parquet("text.parquet", values)
    return sink.getvalue().to_pybytes()


def _write_array_record(texts: list[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "a.arrayrecord"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(text.encode("utf-8", "surrogatepass"))
        writer.close()
        return path.read_bytes()


def _damage_bytes(number: int, container: str, rng: random.Random) -> DamageCase:
    values = list(RECORDS)
    content = bytearray(_write(container, values, [json.dumps(value) for value in values]))
    position = rng.randrange(len(content))
    kind = rng.choice(("cut", "flip", "insert", "remove", "repeat", "mark", "zero", "line"))
    amount = rng.choice((1, 2, 7, 64))
    if kind == "cut":
        del content[position:]
    elif kind == "flip":
        content[position] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        content[position:position] = rng.randbytes(amount)
    elif kind == "remove":
        del content[position : position + amount]
    elif kind == "repeat":
        content[position:position] = content[position : position + amount]
    elif kind == "mark":
        position = 0
        mark = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff"))
        content[0:0] = mark
    elif kind == "zero":
        content[position : position + amount] = bytes(len(content[position : position + amount]))
    else:
        content[position:position] = rng.choice((b"\n", b"\r\n", b"\r", b"\xe2\x80\xa8"))
    damaged = None
    if (
        container in LINE_CONTAINERS
        and kind in ("flip", "zero")
        and b"\n" not in content[position : position + amount]
    ):
        original = _write(container, values, [json.dumps(value) for value in values])
        if original.count(b"\n") == content.count(b"\n"):
            damaged = bytes(content[:position]).count(b"\n")
            end = min(position + amount, len(content))
            if bytes(original[:end]).count(b"\n") != damaged:
                damaged = None
    damage = f"{kind} {amount} at byte {position}"
    return DamageCase(number, container, damage, bytes(content), damaged)


def _read_all(folder: pathlib.Path) -> list[dict]:
    files = records.RecordFiles("prepared", str(folder))
    read = [files.read(index) for index in range(len(files))]
    files.close()
    return read


def _prepare(path: pathlib.Path, folder: pathlib.Path, bad: str) -> list[dict]:
    """Return what `train.prepare` makes of a file."""
    config = prepare.PrepareConfig(
        src=str(path),
        dst=str(folder / f"prepared-{bad}"),
        checkpoint=str(folder / "tokenizer"),
        bad=bad,
        max_bad_share=0.9,
        progress=False,
    )
    return _read_all(prepare.run(config))


def _stream(path: pathlib.Path, folder: pathlib.Path, bad: str) -> list[dict]:
    """Read a file once as a trainer does. Return nothing to compare."""
    source = data_config.DataSource("damaged", str(path))
    data = data_config.DataConfig((source,), bad_records=bad, max_bad_share=0.9, lanes=1)
    config = data_config.StreamConfig(data, seq_len=2**17, rows=1)
    tokenizer = tokenizer_lib.Tokenizer.load(folder / "tokenizer")
    with stream_lib.BatchStream(config, tokenizer, num_epochs=1) as stream:
        for batch in stream:
            assert np.isfinite(batch.arrays.weights).all()
    return []


def _list_faults(case: DamageCase, path: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Return what went wrong in reading a case's file, as lines."""
    faults = []
    for name, read in (
        ("prepare", lambda: _prepare(path, folder, "error")),
        ("prepare --bad=skip", lambda: _prepare(path, folder, "skip")),
        ("stream", lambda: _stream(path, folder, "error")),
        ("stream, skip", lambda: _stream(path, folder, "skip")),
    ):
        try:
            contents = read()
        except records.DataError as error:
            faults += [f"{name}: {fault}" for fault in _judge_message(str(error), path)]
            outcome = f"{name}: {error}"
            if case.damaged == -1 or (
                case.damaged is not None
                and name.endswith("skip")
                and case.container in LINE_CONTAINERS
            ):
                faults.append(f"{name}: other records were lost: {error}")
        except Exception:
            faults.append(f"{name}: {traceback.format_exc()}")
        else:
            outcome = f"{name}: read {len(contents)}"
            if name.startswith("prepare"):
                faults += [f"{name}: {fault}" for fault in _judge_contents(case, contents)]
        if faults:
            break
        _OUTCOMES.append(outcome)
    return faults


_OUTCOMES: list[str] = []


def _judge_message(message: str, path: pathlib.Path) -> list[str]:
    faults = []
    if len(message) > MAX_CHARS or "\n" in message:
        faults.append(f"{len(message)} characters: {message}")
    if path.name not in message:
        faults.append(f"does not name the file: {message}")
    has_place = re.search(rf"{re.escape(path.name)}(:\d+|, record \d+)", message)
    is_whole_file = re.search(r"not a (whole )?\w+ file|got no records|got the columns", message)
    if not has_place and not is_whole_file:
        faults.append(f"names no line: {message}")
    return faults


def _judge_contents(case: DamageCase, contents: list[dict]) -> list[str]:
    """Return a fault where a record that was not damaged did not come out as it was."""
    if case.damaged is None or case.container.endswith("parquet"):
        return []
    wanted = [
        json.loads(json.dumps(columns.to_training_record(record)))
        for index, record in enumerate(RECORDS)
        if index != case.damaged
    ]
    missing = [record for record in wanted if record not in contents]
    return [f"lost {missing[0]!r:.100}"] if missing else []


@dataclasses.dataclass
class CaseReport:
    """How a case ended.

    Attributes:
      title: the case in words.
      faults: what went wrong.
      outcomes: how each reading ended.
    """

    title: str
    faults: list[str]
    outcomes: list[str]


def _run_case(number: int, seed: int, folder: pathlib.Path, sender) -> None:
    case = make_case(number, seed)
    path = folder / case.container
    path.write_bytes(case.content)
    (folder / "tokenizer").mkdir()
    testing.write_tiny_tokenizer(folder / "tokenizer")
    with open("/dev/null", "w") as null:
        sys.stderr = null
        faults = _list_faults(case, path, folder)
    sender.send(CaseReport(f"{case.container}, {case.damage}", faults, _OUTCOMES))


def check_case(number: int, seed: int) -> CaseReport:
    """Return how a case ended. All of it runs in another process, which may die."""
    # A fork imports nothing anew. This process has no threads: the libraries of data start theirs
    # when they first read or write.
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (number, seed, pathlib.Path(name), sender)
        process = context.Process(target=_run_case, args=arguments)
        process.start()
        sender.close()
        try:
            if not receiver.poll(LIMIT_SECS):
                return CaseReport("", [f"not done after {LIMIT_SECS} s"], [])
            return receiver.recv()
        except EOFError:
            process.join()
            return CaseReport("", [f"ended with status {process.exitcode}"], [])
        finally:
            process.kill()
            process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case alone, with its outcomes")
    args = parser.parse_args()
    numbers = range(args.cases) if args.only is None else [args.only]
    counts: collections.Counter = collections.Counter()
    failed = 0
    for number in tqdm.tqdm(numbers, disable=None):
        report = check_case(number, args.seed)
        # By the first reading, which stops at a bad record.
        refused = any(": read " not in outcome for outcome in report.outcomes[:1])
        container = CONTAINERS[number % len(CONTAINERS)]
        counts[f"{container}: {'refused' if refused else 'read'}"] += 1
        if report.faults or args.only is not None:
            print(f"case {number}, {report.title}")
            print("\n".join(f"  {line}" for line in report.faults or report.outcomes))
        failed += bool(report.faults)
    print("\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    print(f"{len(numbers)} cases, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
