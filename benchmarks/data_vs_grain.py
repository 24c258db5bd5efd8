"""Compares `train.data` with pipelines of grain's own parts, on the same documents.

    python benchmarks/data_vs_grain.py [--bins=8,64] [--lanes=16] [--repeats=3]

The script writes 6,000 texts of mixed lengths in two sources. All pipelines read them by
`records.RecordFiles`, tokenise them by `chat.RecordEncoder`, and make rows with segment ids,
positions, targets and loss weights. They differ in the order of documents, the packing, the
prefetch and the saved state:

  train.data   `stream.BatchStream`
  grain N      per lane: shuffle, repeat, slice, map, MixedIterDataset, FlatMapIterDataset,
               BestFitPackIterDataset of N rows; over the lanes: InterleaveIterDataset
  concat       the same with ConcatThenSplitIterDataset, which cuts documents at every row's end

Grain mixes by documents, so it gets proportions that make the shares of tokens the same.

Columns of the table:
  state      bytes of JSON of the saved state, of all lanes
  padding    share of the positions of all rows
  docs/s     documents tokenised in a second of the clock, and of CPU time: medians of the
             repeats, with the pipelines in turn
  resume     seconds to the first batch of a restored pipeline
  same       whether the rows after a resume on the same hosts are those of the run without it
  2 to 4     the same on four hosts, after a stop on two: after an even, after an odd batch
  unread     share of the tokens that one pass over both sources does not hand out
"""

import argparse
import copy
import dataclasses
import itertools
import json
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

# By path, the script's own directory comes first; the packages lie above it.
sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))

import grain
import numpy as np
from grain import experimental as grain_experimental

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, packing, records, stream
from train.data import config as data_config

REPO = pathlib.Path(__file__).resolve().parents[1]
SEQ_LEN, ROWS = 2048, 8
# name: (documents, median words, share of the tokens)
SOURCES = {"books": (2000, 160, 0.7), "pages": (4000, 30, 0.3)}
COLUMNS = ("state", "padding", "docs/s, clock", "docs/s, CPU", "resume", "same", "2 to 4", "unread")


def write_documents(directory: pathlib.Path) -> None:
    """Write the sources; lengths are log-normal, so some documents are longer than a row."""
    corpus = (REPO / "demo" / "data" / "text.jsonl").read_text().splitlines()
    words = sorted({word for line in corpus for word in json.loads(line)["text"].split()})
    rng = random.Random(0)
    for name, (num_documents, median, _) in SOURCES.items():
        with (directory / f"{name}.jsonl").open("w") as file:
            for _ in range(num_documents):
                num_words = max(1, round(median * rng.lognormvariate(0, 1)))
                file.write(json.dumps({"text": " ".join(rng.choices(words, k=num_words))}) + "\n")


class Corpus:
    """The documents, and how many of them were tokenised so far."""

    def __init__(self, directory: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer):
        self.directory, self.tokenizer = directory, tokenizer
        self.files = {name: records.RecordFiles(name, self.path(name)) for name in SOURCES}
        self.encoder = chat.RecordEncoder(tokenizer, seq_len=SEQ_LEN)
        self.num_encoded, self._lock = 0, threading.Lock()
        self.num_tokens = {
            name: sum(len(self.encode(files, i).tokens) for i in range(len(files)))
            for name, files in self.files.items()
        }

    def path(self, name: str) -> str:
        return str(self.directory / f"{name}.jsonl")

    def encode(self, files: records.RecordFiles, index: int) -> packing.TokenizedDocument:
        with self._lock:
            self.num_encoded += 1
        return self.encoder.encode(files.read(index))


class OurPipeline:
    """`train.data`, with the same methods as `GrainPipeline`."""

    name = "train.data"

    def __init__(self, corpus: Corpus, num_lanes: int):
        self._corpus, self._num_lanes = corpus, num_lanes

    def open_hosts(self, num_hosts: int, state: dict | None, num_epochs: int | None = None):
        """Return one iterator a host."""
        sources = tuple(
            data_config.DataSource(name, self._corpus.path(name), "text", share)
            for name, (_, _, share) in SOURCES.items()
        )
        data = data_config.DataConfig(sources, lanes=self._num_lanes)
        config = data_config.StreamConfig(data, SEQ_LEN, ROWS)
        hosts = [
            stream.BatchStream(config, self._corpus.tokenizer, row_numbers, num_epochs)
            for row_numbers in np.split(np.arange(ROWS), num_hosts)
        ]
        if state is not None:
            for host in hosts:
                host.set_state(state)
        return hosts

    def next_tokens(self, host, num_rows: int) -> np.ndarray:
        """Return the host's rows of the next batch, 0 in padding and ids + 1 elsewhere."""
        del num_rows  # the stream knows its hosts
        arrays = next(host).arrays
        return np.where(arrays.segment_ids > 0, arrays.tokens + 1, 0)

    def merge_states(self, hosts) -> dict:
        merged: dict[str, Any] = {}
        for host in hosts:
            merged |= host.get_state()
        return merged

    def count_documents(self, hosts) -> int:
        """Return the number of documents drawn, of those that are known from the states."""
        state = self.merge_states(hosts)
        return sum(
            sum(state[str(lane)].get("read", {}).values()) for lane in range(self._num_lanes)
        )


@dataclasses.dataclass(frozen=True)
class SplitDocument(grain_experimental.FlatMapTransform):
    """Cuts a document into pieces of at most a row, as grain's packing takes no longer ones."""

    max_fan_out: int = 1000

    def flat_map(self, element) -> list[dict[str, np.ndarray]]:
        starts = range(0, len(element["tokens"]), SEQ_LEN)
        return [
            {field: array[start : start + SEQ_LEN] for field, array in element.items()}
            for start in starts
        ]


class GrainPipeline:
    """Lanes of grain datasets, interleaved on each host."""

    def __init__(self, corpus: Corpus, num_lanes: int, num_bins: int):
        """Choose the packing: best fit into `num_bins` rows, or concatenation for 0."""
        self.name = f"grain {num_bins}" if num_bins else "concat"
        self._corpus, self._num_lanes, self._num_bins = corpus, num_lanes, num_bins

    def open_hosts(self, num_hosts: int, state: list | None, num_epochs: int | None = None):
        hosts = []
        for host in range(num_hosts):
            # Strided, so that a batch has the same rows for any number of hosts.
            lanes = range(host, self._num_lanes, num_hosts) if num_epochs is None else [None]
            datasets = [self._make_lane(lane, num_epochs) for lane in lanes]
            interleaved = grain_experimental.InterleaveIterDataset(
                datasets, cycle_length=len(datasets)
            )
            iterator = iter(interleaved)
            if state is not None:
                iterator.set_shard_states([state[lane] for lane in lanes])
            hosts.append(iterator)
        return hosts

    def _make_lane(self, lane: int | None, num_epochs: int | None):
        """Return the rows of one lane, or of all lanes in one for None."""
        parents, proportions = [], []
        for name, (num_documents, _, share) in SOURCES.items():
            documents = grain.MapDataset.range(num_documents).shuffle(seed=1).repeat(num_epochs)
            if lane is not None:
                documents = documents[lane :: self._num_lanes]
            # A copy a lane: lanes run in threads, and an open file has one position.
            files = copy.deepcopy(self._corpus.files[name])
            encoded = documents.map(lambda index, files=files: self._encode(files, index))
            # In the lane's own thread: InterleaveIterDataset gives each lane one.
            parents.append(encoded.to_iter_dataset(grain.ReadOptions(num_threads=0)))
            proportions.append(share / self._corpus.num_tokens[name] * num_documents)
        mixed = grain_experimental.FlatMapIterDataset(
            grain.IterDataset.mix(parents, proportions), SplitDocument()
        )
        lengths = dict.fromkeys(("tokens", "targets", "weights"), SEQ_LEN)
        if not self._num_bins:
            return grain_experimental.ConcatThenSplitIterDataset(mixed, length_struct=lengths)
        return grain_experimental.BestFitPackIterDataset(
            mixed, length_struct=lengths, num_packing_bins=self._num_bins
        )

    def _encode(self, files: records.RecordFiles, index: int) -> dict[str, np.ndarray]:
        document = self._corpus.encode(files, int(index))
        return {
            "tokens": document.tokens,
            "targets": np.append(document.tokens[1:], 0).astype(np.int32),
            "weights": np.append(document.loss_mask[1:], 0).astype(np.float32),
        }

    def next_tokens(self, host, num_rows: int) -> np.ndarray:
        rows = [next(host) for _ in range(num_rows)]
        return np.stack([np.where(r["tokens_segment_ids"] > 0, r["tokens"] + 1, 0) for r in rows])

    def merge_states(self, hosts) -> list:
        states: list = [None] * self._num_lanes
        for host_number, host in enumerate(hosts):
            states[host_number :: len(hosts)] = host.get_shard_states()
        return states

    def count_documents(self, hosts) -> int:
        return self._corpus.num_encoded


def close_hosts(hosts) -> None:
    for host in hosts:
        host.close()


def read_batches(pipeline, hosts, num_batches: int) -> list[list[bytes]]:
    """Return the rows of each global batch, sorted: hosts may order them differently."""
    return [
        sorted(
            row.tobytes()
            for host in hosts
            for row in pipeline.next_tokens(host, ROWS // len(hosts))
        )
        for _ in range(num_batches)
    ]


def restore_rows(pipeline, num_before: int, hosts_before: int, hosts_after: int):
    """Stop after some batches; return the next six and the state's bytes and seconds to resume."""
    hosts = pipeline.open_hosts(hosts_before, None)
    read_batches(pipeline, hosts, num_before)
    # Through JSON, as a checkpoint holds it.
    text = json.dumps(pipeline.merge_states(hosts))
    close_hosts(hosts)
    started = time.perf_counter()
    hosts = pipeline.open_hosts(hosts_after, json.loads(text))
    rows = read_batches(pipeline, hosts, 1)
    resume_secs = time.perf_counter() - started
    rows += read_batches(pipeline, hosts, 5)
    close_hosts(hosts)
    return rows, len(text), resume_secs


def time_batches(pipeline, num_batches: int) -> tuple[float, float, float]:
    """Return documents a second of the clock and of CPU time, and the share of padding."""
    hosts = pipeline.open_hosts(1, None)
    num_padding, first = 0, pipeline.count_documents(hosts)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(num_batches):
        num_padding += int((pipeline.next_tokens(hosts[0], ROWS) == 0).sum())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    num_documents = pipeline.count_documents(hosts) - first
    close_hosts(hosts)
    padding = num_padding / (num_batches * ROWS * SEQ_LEN)
    return num_documents / seconds, num_documents / cpu_seconds, padding


def measure_unread_share(pipeline, corpus: Corpus) -> float:
    """Return the share of the tokens that one epoch of both sources leaves out."""
    (host,) = pipeline.open_hosts(1, None, num_epochs=1)
    num_read = 0
    while True:
        try:
            num_read += int((pipeline.next_tokens(host, 1) > 0).sum())
        except StopIteration:
            return 1 - num_read / sum(corpus.num_tokens.values())


def try_elastic_iterator() -> str:
    """Return what grain's ElasticIterator says to rows that were packed."""
    lengths = {"tokens": 2}
    documents = grain.MapDataset.range(8).map(lambda _: {"tokens": np.ones(1, np.int32)})
    packed: Any = grain_experimental.BestFitPackIterDataset(
        documents.to_iter_dataset(), length_struct=lengths, num_packing_bins=2
    )
    shards = grain.sharding.ShardOptions(shard_index=0, shard_count=1)
    try:
        next(grain_experimental.ElasticIterator(packed, ROWS, shards))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def say_whether(condition: bool) -> str:
    return "yes" if condition else "no"


def measure_pipelines(
    pipelines, corpus: Corpus, num_lanes: int, num_batches: int, repeats: int
) -> Iterator[tuple]:
    """Yield each pipeline's name and its columns."""
    timings: dict[str, list] = {pipeline.name: [] for pipeline in pipelines}
    for _, pipeline in itertools.product(range(repeats), pipelines):
        timings[pipeline.name].append(time_batches(pipeline, num_batches))
    for pipeline in pipelines:
        hosts = pipeline.open_hosts(1, None)
        whole = read_batches(pipeline, hosts, 20)
        close_hosts(hosts)
        same, num_bytes, resume_secs = restore_rows(pipeline, 8, 1, 1)
        moved = "-"
        if num_lanes % 4 == 0:
            even, _, _ = restore_rows(pipeline, 8, 2, 4)
            odd, _, _ = restore_rows(pipeline, 9, 2, 4)
            moved = f"{say_whether(even == whole[8:14])}, {say_whether(odd == whole[9:15])}"
        yield (
            pipeline.name,
            f"{num_bytes:,}",
            f"{timings[pipeline.name][0][2]:.2%}",
            *(f"{statistics.median(t[i] for t in timings[pipeline.name]):,.0f}" for i in (0, 1)),
            f"{resume_secs:.2f}",
            say_whether(same == whole[8:14]),
            moved,
            f"{measure_unread_share(pipeline, corpus):.1%}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--batches", type=int, default=150, help="batches that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bins", default="8,64", help="rows that grain packs at a time")
    arguments = parser.parse_args()
    tokenizer = tokenizer_lib.Tokenizer.load(REPO / "demo" / "data" / "tokenizer")
    with tempfile.TemporaryDirectory() as directory:
        write_documents(pathlib.Path(directory))
        started, cpu_started = time.perf_counter(), time.process_time()
        corpus = Corpus(pathlib.Path(directory), tokenizer)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        print(
            f"{corpus.num_encoded:,} documents, {sum(corpus.num_tokens.values()):,} tokens; reading"
            f" and tokenising alone: {corpus.num_encoded / seconds:,.0f} documents a second of the"
            f" clock, {corpus.num_encoded / cpu_seconds:,.0f} of CPU time"
        )
        print(f"ElasticIterator over packed rows: {try_elastic_iterator()}")
        pipelines: list[Any] = [OurPipeline(corpus, arguments.lanes)]
        pipelines += [
            GrainPipeline(corpus, arguments.lanes, int(bins))
            for bins in (*arguments.bins.split(","), 0)
        ]
        print(f"\n| {' | '.join(('pipeline', *COLUMNS))} |\n|{'---|' * (len(COLUMNS) + 1)}")
        for cells in measure_pipelines(
            pipelines, corpus, arguments.lanes, arguments.batches, arguments.repeats
        ):
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
