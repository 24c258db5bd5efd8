"""How fast a host makes rows: measured on one core here, for the slowest host of each stage."""

import contextlib
import dataclasses
import pathlib
import pickle
import time
from collections.abc import Mapping, Sequence

import numpy as np

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, data_errors, packing
from train.data import config as data_config
from train.data import records as records_lib
from train.rehearsal import hosts as hosts_lib

# Stand-ins for a run's own tokenizer and texts, where the checkout is the working directory.
_DEMO_TOKENIZER = pathlib.Path("demo/data/tokenizer")
_DEMO_TEXTS = pathlib.Path("demo/data/text.jsonl")
# Used without any text to measure. Byte-level tokenizers of this library make about as many tokens
# a second on one core (docs/rehearse.md).
ASSUMED_TOKENS_PER_SEC = 400_000.0
_MEASURED_SECS = 1.5
_MAX_SAMPLED_RECORDS = 400


@dataclasses.dataclass(frozen=True)
class EncodingSpeed:
    """What one core does.

    Attributes:
      tokens_per_sec: tokens of records that are read, encoded and masked.
      lengths: tokens of the records that were encoded, by source. Sources without files are absent.
      origin: what was measured, for the page.
      bad_records: errors of the records that a run leaves out, by source. Sources without any are
        absent.
    """

    tokens_per_sec: float
    lengths: Mapping[str, np.ndarray]
    origin: str
    bad_records: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)


def measure_encoding(
    data: data_config.DataConfig,
    seq_len: int,
    records: Mapping[str, records_lib.RecordFiles],
    tokenizer: tokenizer_lib.Tokenizer | None,
) -> EncodingSpeed:
    """Encode a sample of the config's own records, or else of the demo's, for a second or two.

    Args:
      data: config of the data.
      seq_len: tokens in the longest row.
      records: the config's files that are on this machine, by source.
      tokenizer: the run's tokenizer, or None where it is not on this machine.

    Raises:
      DataError: a sampled record that cannot be trained on, or more of them than a run leaves out.
    """
    own_tokenizer = tokenizer is not None
    if tokenizer is None and _DEMO_TOKENIZER.is_dir():
        tokenizer = tokenizer_lib.Tokenizer.load(_DEMO_TOKENIZER)
    if tokenizer is None or not (records or _DEMO_TEXTS.is_file()):
        return EncodingSpeed(ASSUMED_TOKENS_PER_SEC, {}, "assumed, nothing is here to measure")
    is_stand_in = not records
    if is_stand_in:
        records = {"demo": records_lib.RecordFiles("demo", str(_DEMO_TEXTS))}
    kinds = {source.name: source.kind for source in data.sources}
    encoder = chat.RecordEncoder(
        tokenizer,
        seq_len,
        data.overlong,
        data.thinking,
        data.profile,
        data.begin_token if own_tokenizer else None,
        data.end_token if own_tokenizer else None,
    )
    lengths, bad_records, num_tokens, secs = {}, {}, 0, 0.0
    for name, files in records.items():
        with contextlib.closing(files):
            sample = _encode_sample(encoder, files, kinds.get(name, "auto"), data)
        lengths[name] = sample.lengths
        num_tokens, secs = num_tokens + int(sample.lengths.sum()), secs + sample.secs
        if sample.errors:
            bad_records[name] = sample.errors
    texts = "the demo's texts" if is_stand_in else f"records of {', '.join(records)}"
    names = "the run's tokenizer" if own_tokenizer else "the demo's tokenizer, a stand-in"
    origin = f"measured on {texts} with {names}"
    return EncodingSpeed(num_tokens / secs, {} if is_stand_in else lengths, origin, bad_records)


@dataclasses.dataclass(frozen=True)
class _EncodedSample:
    """Some records of a source.

    Attributes:
      lengths: tokens of each record, at least one.
      errors: those of the records that are left out as bad.
      secs: how long reading and encoding took.
    """

    lengths: np.ndarray
    errors: list[str]
    secs: float


def _encode_sample(
    encoder: chat.RecordEncoder,
    files: records_lib.RecordFiles,
    kind: str,
    data: data_config.DataConfig,
) -> _EncodedSample:
    """Encode a sample of records, evenly spread. Bad ones are left out as a run leaves them out.

    Raises:
      DataError: a bad record where none is left out, too large a share of them, or all of them.
    """
    lengths, errors, started = [], [], time.perf_counter()
    for index in np.linspace(0, len(files) - 1, min(len(files), _MAX_SAMPLED_RECORDS), dtype=int):
        try:
            lengths.append(len(_encode_record(encoder, files, int(index), kind).tokens))
        except data_errors.BadRecordError as error:
            if data.bad_records == "error":
                raise
            errors.append(str(error))
            num_read, max_share = len(lengths) + len(errors), data.max_bad_share
            data_errors.check_bad_share(
                files.name, len(errors), num_read, len(files), max_share, errors[-1]
            )
        if time.perf_counter() - started > _MEASURED_SECS:
            break
    if not lengths:
        raise records_lib.DataError(
            f"source {files.name!r}: got {len(errors)} bad records of {len(errors)} sampled ones; "
            f"wanted some that are not. The last one: {errors[-1]}"
        )
    return _EncodedSample(np.array(lengths), errors, time.perf_counter() - started)


def _encode_record(
    encoder: chat.RecordEncoder, files: records_lib.RecordFiles, index: int, kind: str
) -> packing.TokenizedDocument:
    """Return a record's document.

    Raises:
      BadRecordError: the record cannot be used.
      DataError: the file cannot be read.
    """
    record = files.read(index)
    try:
        return encoder.encode(record, kind)
    except ValueError as error:
        raise data_errors.bad_record(files.location(index), error) from None


@dataclasses.dataclass(frozen=True)
class HostCost:
    """What a stage's batch costs its slowest host.

    Attributes:
      process: the host.
      made_rows, held_rows: rows that it makes a step, and those of them that it hands out.
      num_lanes: lanes that it runs.
      num_workers: workers that share them.
      core_secs: seconds of one core for a step's rows.
      step_secs: seconds a step, with all workers.
      batch_bytes: arrays of its rows of one batch.
      ahead_bytes: arrays of all rows that workers and queues hold at most.
    """

    process: int
    made_rows: int
    held_rows: int
    num_lanes: int
    num_workers: int
    core_secs: float
    step_secs: float
    batch_bytes: int
    ahead_bytes: int


def measure_packing(seq_len: int) -> tuple[float, int]:
    """Return the seconds to write, send and receive a row of this length, and its bytes."""
    document = packing.TokenizedDocument(np.zeros(seq_len, np.int32), np.ones(seq_len, bool))
    repeats = max(1, 2**20 // seq_len)
    started = time.perf_counter()
    for _ in range(repeats):
        row = packing.write_row([packing.RowSegment("a:0:0", 0, document, 0, seq_len)], seq_len)
        pickle.loads(pickle.dumps(row))
    secs = (time.perf_counter() - started) / repeats
    arrays = [getattr(row.arrays, f.name) for f in dataclasses.fields(row.arrays)]
    return secs, sum(array.nbytes for array in (*arrays, row.source_ids))


def find_slowest_host(stage: hosts_lib.StageHosts, speed: EncodingSpeed) -> HostCost:
    """Return the cost of a step's rows on the host that needs longest for them."""
    config = stage.stream_config
    row_secs, row_bytes = measure_packing(config.seq_len)
    row_secs += config.seq_len / speed.tokens_per_sec
    costs = []
    for process, rows in stage.rows_by_process.items():
        lanes, made_rows = stage.lanes_of(process), stage.count_made_rows(process)
        num_workers = min(config.data.workers, len(lanes)) or 1
        # A lane stays with its worker. The worker with most lanes sets the pace.
        most_lanes = -(-len(lanes) // num_workers)
        secs = made_rows * row_secs * most_lanes / len(lanes)
        # Each worker has a row in hand, one in its pipe, and whole steps in its queue.
        rows_ahead = (config.data.prefetch + 1) * made_rows * _count_steps_ahead(
            config, num_workers
        ) + 2 * num_workers
        costs.append(
            HostCost(
                process=process,
                made_rows=made_rows,
                held_rows=len(rows),
                num_lanes=len(lanes),
                num_workers=num_workers,
                core_secs=made_rows * row_secs,
                step_secs=secs,
                batch_bytes=len(rows) * row_bytes,
                ahead_bytes=rows_ahead * row_bytes,
            )
        )
    return max(costs, key=lambda cost: (cost.step_secs, cost.batch_bytes))


def _count_steps_ahead(config: data_config.StreamConfig, num_workers: int) -> int:
    """Return how many steps' rows the workers make side by side: lanes of a row take turns."""
    turns = max(config.data.lanes // config.rows, 1)
    return min(turns, num_workers)


def count_restart_tokens(stage: hosts_lib.StageHosts, pending_tokens: int) -> tuple[int, int]:
    """Return the tokens that the host with most lanes encodes again, and the lanes of a worker.

    Args:
      stage: the hosts.
      pending_tokens: most tokens that one lane encodes again.
    """
    num_lanes = max(len(stage.lanes_of(process)) for process in stage.rows_by_process)
    num_workers = min(stage.stream_config.data.workers, num_lanes) or 1
    return num_lanes * pending_tokens, -(-num_lanes // num_workers)


def describe_sharing(stages: Sequence[hosts_lib.StageHosts]) -> str:
    """Return in words how many hosts hold a row in each stage."""
    return ", ".join("{}-{}".format(*hosts_lib.count_sharing_hosts(stage)) for stage in stages)
