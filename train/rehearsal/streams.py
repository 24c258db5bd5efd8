"""Real streams of some hosts, from files, compared bit for bit with what the lanes gave.

Each window begins with a restart: from the states of all lanes, merged as a checkpoint has them. So
the hosts of a window go on from those of the window before, which had another mesh at a change of
stage. Further hosts, of a cluster with another number of them, go on from the same state.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from train.data import chat, document_refs, packing
from train.data import config as data_config
from train.data import stream as stream_lib
from train.rehearsal import documents as documents_lib
from train.rehearsal import hosts as hosts_lib
from train.rehearsal import lanes as lanes_lib

_SAMPLED_HOSTS = 3
_COMPARED_TOKENS = 2**20  # of a host in a window, unless one step has more
_OTHER_HOSTS = 3  # a cluster of so many hosts shares the rows in a further restart


@dataclasses.dataclass(frozen=True)
class StreamCheck:
    """What comparing streams gave.

    Attributes:
      num_streams: streams that were opened.
      num_rows: rows that were compared.
      errors: differences.
    """

    num_streams: int
    num_rows: int
    errors: list[str]


def check_streams(
    windows: Sequence[lanes_lib.StepWindow],
    stage_hosts: Sequence[hosts_lib.StageHosts],
    sources: Mapping[str, documents_lib.StandInSource],
    lane_run: lanes_lib.LaneRun,
    directory: pathlib.Path,
) -> StreamCheck:
    """Open the streams of some hosts in every window, and compare their first batches.

    Args:
      windows: what the lanes ran.
      stage_hosts: hosts of each stage.
      sources: records by source.
      lane_run: what the lanes gave.
      directory: directory for the files of records.
    """
    for name, source in sources.items():
        source.write(directory / f"{name}.jsonl")
    longest = max(int(source.lengths.max()) for source in sources.values())
    tokenizer = documents_lib.StandInTokenizer(longest)
    errors: list[str] = []
    num_streams = num_rows = 0
    for number, window in enumerate(windows):
        config = _replace_sources(window.config, directory)
        for label, rows in _choose_rows(stage_hosts[window.stage_index]):
            check = _HostCheck(config, tokenizer, sources, lane_run, number, rows)
            num_streams += 1
            num_rows += check.compare(window.steps)
            errors += [f"stage {window.stage_index}, {label}: {text}" for text in check.errors]
    return StreamCheck(num_streams, num_rows, errors)


def merge_states(
    lane_run: lanes_lib.LaneRun, window_number: int, step: int, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the state of all hosts before a window, as a checkpoint holds it.

    Args:
      lane_run: what the lanes gave.
      window_number: number of the window.
      step: first step of the window.
      state: a new stream's state, for all fields that are not lanes.
    """
    lanes = {str(lane): json.loads(text) for lane, text in lane_run.states[window_number].items()}
    return {**state, "step": step, **lanes}


def _replace_sources(
    config: data_config.StreamConfig, directory: pathlib.Path
) -> data_config.StreamConfig:
    """Return the config with files of stand-ins, tokenised in this process."""
    sources = tuple(
        dataclasses.replace(source, path=str(directory / f"{source.name}.jsonl"))
        for source in config.data.sources
    )
    data = dataclasses.replace(config.data, sources=sources, workers=0, prefetch=1)
    return dataclasses.replace(config, data=data)


def _choose_rows(stage: hosts_lib.StageHosts) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, rows) of some hosts of the stage, and of a host of another cluster."""
    for process in stage.choose_processes(_SAMPLED_HOSTS):
        yield f"host {process}", stage.rows_by_process[process]
    num_rows = stage.stream_config.rows
    if num_rows >= _OTHER_HOSTS:
        rows = np.array_split(np.arange(num_rows), _OTHER_HOSTS)[1]
        # Not all of them: hundreds of long rows would take minutes.
        yield f"host 1 of {_OTHER_HOSTS}", tuple(int(row) for row in rows[:4])


class _HostCheck:
    """One host's stream in one window."""

    def __init__(
        self,
        config: data_config.StreamConfig,
        tokenizer: documents_lib.StandInTokenizer,
        sources: Mapping[str, documents_lib.StandInSource],
        lane_run: lanes_lib.LaneRun,
        window_number: int,
        rows: tuple[int, ...],
    ):
        self._config, self._tokenizer, self._sources = config, tokenizer, sources
        self._lane_run, self._window_number, self._rows = lane_run, window_number, rows
        data = config.data
        self._encoder = chat.RecordEncoder(
            documents_lib.as_tokenizer(tokenizer),
            config.seq_len,
            data.overlong,
            data.thinking,
            data.profile,
            data.begin_token,
            data.end_token,
        )
        self.errors: list[str] = []

    def compare(self, steps: range) -> int:
        """Compare the first batches, and return the number of rows that were compared."""
        num_rows = 0
        tokenizer = documents_lib.as_tokenizer(self._tokenizer)
        with stream_lib.BatchStream(self._config, tokenizer, self._rows) as stream:
            state = merge_states(
                self._lane_run, self._window_number, steps.start, stream.get_state()
            )
            stream.set_state(json.loads(json.dumps(state)))
            step_tokens = len(self._rows) * self._config.seq_len
            num_steps = max(1, min(_COMPARED_TOKENS // step_tokens, lanes_lib.RECORDED_STEPS))
            for step in steps[:num_steps]:
                batch = next(stream)
                for i, row in enumerate(self._rows):
                    contents = self._lane_run.rows[self._window_number, step, row]
                    self._compare_row(batch, i, contents, f"step {step}, row {row}")
                    num_rows += 1
        return num_rows

    def _compare_row(
        self,
        batch: stream_lib.HostBatch,
        i: int,
        contents: lanes_lib.RowContents,
        place: str,
    ) -> None:
        wanted_ids = [document_refs.segment_to_text(name, start) for name, start, _ in contents]
        if batch.sample_ids[i] != wanted_ids:
            self.errors.append(
                f"{place}: got {batch.sample_ids[i]!r:.80}; wanted {wanted_ids!r:.80}"
            )
            return
        wanted = packing.write_row([self._encode(*part) for part in contents], self._config.seq_len)
        for field in dataclasses.fields(wanted.arrays):
            got = getattr(batch.arrays, field.name)[i]
            if not np.array_equal(got, getattr(wanted.arrays, field.name)):
                self.errors.append(f"{place}: other {field.name} than the lane's")

    def _encode(self, sample_id: str, start: int, length: int) -> packing.RowSegment:
        reference = document_refs.DocumentRef.from_text(sample_id)
        names = list(self._sources)
        document = self._encoder.encode(self._sources[reference.source].read(reference.index))
        return packing.RowSegment(sample_id, names.index(reference.source), document, start, length)
