"""All lanes of a run over thousands of steps: stages, restarts and a change of hosts between them.

A lane is the same on every host that runs it. So each lane runs once here, and `streams` compares
real hosts with what the lanes gave.
"""

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import tqdm

from train.data import config as data_config
from train.data import mixture, packing
from train.data import records as records_lib
from train.rehearsal import documents as documents_lib
from train.rehearsal import ledger as ledger_lib

RECORDED_STEPS = 3  # steps at the start of a window whose rows `streams` compares
_COMPARED_ROWS = 4  # rows after a restart that are compared with those of a lane that went on
# (source, start, length) of a row's segments: what decides all of its arrays.
RowContents = tuple[tuple[str, int, int], ...]


@dataclasses.dataclass(frozen=True)
class StepWindow:
    """Steps of one stage that are run one after another. A restart comes before each window.

    Attributes:
      stage_index: number of the stage.
      config: config of its stream.
      steps: steps of the run.
    """

    stage_index: int
    config: data_config.StreamConfig
    steps: range


@dataclasses.dataclass
class LaneRun:
    """What running one lane, or several of them together, gave.

    Attributes:
      documents: (source, index, epoch) of the documents that were drawn [n, 3].
      num_read: documents drawn of each source, one row a lane [lanes, sources].
      num_dropped: conversations left out as too long.
      num_rows, num_places, num_tokens: rows made, their places and the tokens in these, by stage.
      states: JSON of each lane's state before each window: window, lane -> text.
      state_bytes: longest JSON of a lane's state, by stage.
      pending_tokens: most tokens that a restart of a lane encodes again, by stage.
      rows: contents of the rows of the first steps of each window: (window, step, row) -> contents.
      errors: what went wrong.
      secs: seconds of one core.
    """

    documents: np.ndarray
    num_read: np.ndarray
    num_dropped: int = 0
    num_rows: dict[int, int] = dataclasses.field(default_factory=dict)
    num_places: dict[int, int] = dataclasses.field(default_factory=dict)
    num_tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    states: dict[int, dict[int, str]] = dataclasses.field(default_factory=dict)
    state_bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    pending_tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    rows: dict[tuple[int, int, int], RowContents] = dataclasses.field(default_factory=dict)
    errors: list[str] = dataclasses.field(default_factory=list)
    secs: float = 0.0


def plan_windows(
    stage_configs: Sequence[tuple[data_config.StreamConfig, int, int]], num_steps: int
) -> list[StepWindow]:
    """Return the windows: the first and the last steps of each stage.

    Args:
      stage_configs: config of the stream, first step and number of steps of each stage.
      num_steps: steps of all windows together, unless the run has fewer.
    """
    windows = []
    per_stage = max(num_steps // len(stage_configs), 2)
    for index, (config, first_step, stage_steps) in enumerate(stage_configs):
        end = first_step + stage_steps
        head = min(per_stage // 2, stage_steps - stage_steps // 2)
        tail = min(per_stage // 2, stage_steps // 2)
        windows.append(StepWindow(index, config, range(first_step, first_step + head)))
        if tail:
            windows.append(StepWindow(index, config, range(end - tail, end)))
    return windows


def list_row_numbers(lane: int, config: data_config.StreamConfig) -> list[int]:
    """Return the rows that a lane serves, ascending."""
    num_lanes = config.data.lanes
    if num_lanes >= config.rows:
        return [lane // (num_lanes // config.rows)]
    block = config.rows // num_lanes
    return list(range(lane * block, (lane + 1) * block))


class _LaneRunner:
    """Runs one lane through all windows."""

    def __init__(
        self,
        lane_number: int,
        windows: Sequence[StepWindow],
        sources: Mapping[str, documents_lib.StandInSource],
    ):
        self._lane_number, self._windows = lane_number, windows
        self._records = cast(dict[str, records_lib.RecordFiles], sources)
        self._ledger = ledger_lib.DocumentLedger(list(sources))
        self.result = LaneRun(np.zeros((0, 3), np.int64), np.zeros((1, len(sources)), np.int64))

    def run(self) -> LaneRun:
        """Run all windows. A restart before each takes the state through JSON."""
        started, state, previous = time.process_time(), mixture.LaneState(), None
        for number, window in enumerate(self._windows):
            text = json.dumps(state.to_json())
            self.result.states[number] = {self._lane_number: text}
            lane = self._open(window.config, mixture.LaneState.from_json(json.loads(text)))
            self._measure_state(window.stage_index, text, lane)
            if previous is not None and self._windows[number - 1].config == window.config:
                self._compare_restart(previous, self._open(window.config, lane.get_state()), window)
            self._run_window(number, window, lane)
            state, previous = lane.get_state(), lane
        self.result.documents = self._ledger.close(state)
        self.result.num_read[0] = [state.documents_read.get(name, 0) for name in self._records]
        self.result.num_dropped = state.num_dropped
        label = f"lane {self._lane_number}: "
        self.result.errors += [label + error for error in self._ledger.errors]
        self.result.secs = time.process_time() - started
        return self.result

    def _open(self, config: data_config.StreamConfig, state: mixture.LaneState) -> mixture.DataLane:
        data = config.data
        encoder = documents_lib.LengthEncoder(
            tokenizer=documents_lib.as_tokenizer(documents_lib.StandInTokenizer(64)),
            seq_len=config.seq_len,
            overlong=data.overlong,
            thinking=data.thinking,
            profile=data.profile,
            begin_token=data.begin_token,
            end_token=data.end_token,
        )
        return mixture.DataLane(
            self._lane_number, data.lanes, config, self._records, encoder, None, state
        )

    def _run_window(self, number: int, window: StepWindow, lane: mixture.DataLane) -> None:
        config, result, stage = window.config, self.result, window.stage_index
        row_numbers = list_row_numbers(self._lane_number, config)
        for step in window.steps:
            for row in row_numbers:
                served_by = mixture.find_lane(step, row, config.rows, config.data.lanes)
                if served_by != self._lane_number:
                    continue
                segments = lane.next_segments(step) or []
                num_tokens = self._ledger.num_tokens
                self._ledger.add_row(segments)
                result.num_rows[stage] = result.num_rows.get(stage, 0) + 1
                result.num_places[stage] = result.num_places.get(stage, 0) + config.seq_len
                num_new = self._ledger.num_tokens - num_tokens
                result.num_tokens[stage] = result.num_tokens.get(stage, 0) + num_new
                if step < window.steps.start + RECORDED_STEPS:
                    result.rows[number, step, row] = _describe_row(segments)

    def _measure_state(self, stage: int, text: str, lane: mixture.DataLane) -> None:
        pending = lane.get_state().pending
        # A document with several pieces is encoded once, all of it.
        num_tokens = sum({piece.sample_id: piece.length for piece in pending}.values())
        result = self.result
        result.state_bytes[stage] = max(result.state_bytes.get(stage, 0), len(text))
        result.pending_tokens[stage] = max(result.pending_tokens.get(stage, 0), num_tokens)

    def _compare_restart(
        self, went_on: mixture.DataLane, restarted: mixture.DataLane, window: StepWindow
    ) -> None:
        for i in range(_COMPARED_ROWS):
            step = window.steps.start + i
            rows = [_describe_row(lane.next_segments(step) or []) for lane in (went_on, restarted)]
            if rows[0] != rows[1]:
                self.result.errors.append(
                    f"lane {self._lane_number}, step {step}: a restarted lane made {rows[1]!r:.80};"
                    f" one that went on {rows[0]!r:.80}"
                )


def _describe_row(segments: Sequence[packing.RowSegment]) -> RowContents:
    return tuple((segment.sample_id, segment.start, segment.length) for segment in segments)


def _run_chunk(
    lane_numbers: Sequence[int],
    windows: Sequence[StepWindow],
    sources: Mapping[str, documents_lib.StandInSource],
) -> LaneRun:
    """Run some lanes. A worker process calls it."""
    return merge_runs([_LaneRunner(lane, windows, sources).run() for lane in lane_numbers])


def run_lanes(
    windows: Sequence[StepWindow],
    sources: Mapping[str, documents_lib.StandInSource],
    num_workers: int = 0,
) -> LaneRun:
    """Run all lanes in processes, with a bar of progress.

    Args:
      windows: what to run, in order.
      sources: records by source.
      num_workers: processes. 0 is one for each core.
    """
    num_lanes = windows[0].config.data.lanes
    num_workers = num_workers or os.cpu_count() or 1
    # Several chunks a process, so that they end at about the same time.
    num_chunks = min(num_lanes, 8 * num_workers)
    chunks = [list(range(i, num_lanes, num_chunks)) for i in range(num_chunks)]
    bar = tqdm.tqdm(total=num_lanes, desc="lanes", unit="lane", disable=None, leave=False)
    runs: list[LaneRun] = []
    with bar:
        if num_workers == 1 or num_chunks == 1:
            for chunk in chunks:
                runs.append(_run_chunk(chunk, windows, sources))
                bar.update(len(chunk))
        else:
            runs = _run_in_processes(chunks, windows, sources, num_workers, bar)
    merged = merge_runs(runs)
    num_records = [len(source) for source in sources.values()]
    merged.errors += ledger_lib.check_documents(
        merged.documents, merged.num_read, num_records, merged.num_dropped
    )
    return merged


def _run_in_processes(
    chunks: list[list[int]],
    windows: Sequence[StepWindow],
    sources: Mapping[str, documents_lib.StandInSource],
    num_workers: int,
    bar: tqdm.tqdm,
) -> list[LaneRun]:
    context = multiprocessing.get_context("spawn")  # threads and JAX do not survive a fork
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context)
    try:
        futures = {pool.submit(_run_chunk, chunk, windows, sources): chunk for chunk in chunks}
        runs = []
        for future in concurrent.futures.as_completed(futures):
            runs.append(future.result())
            bar.update(len(futures[future]))
        return runs
    finally:  # also at Ctrl-C: chunks that were not begun are not begun
        pool.shutdown(cancel_futures=True)


def merge_runs(runs: Sequence[LaneRun]) -> LaneRun:
    """Return what several runs of different lanes gave together. Lanes are in no order."""
    merged = LaneRun(
        np.concatenate([run.documents for run in runs]),
        np.concatenate([run.num_read for run in runs]),
    )
    for run in runs:
        merged.num_dropped += run.num_dropped
        merged.secs += run.secs
        merged.errors += run.errors
        merged.rows |= run.rows
        for window, states in run.states.items():
            merged.states.setdefault(window, {}).update(states)
        for name in ("num_rows", "num_places", "num_tokens"):
            _merge_counts(getattr(merged, name), getattr(run, name), lambda a, b: a + b)
        for name in ("state_bytes", "pending_tokens"):
            _merge_counts(getattr(merged, name), getattr(run, name), max)
    return merged


def _merge_counts(into: dict[int, int], counts: Mapping[int, int], merge: Any) -> None:
    for key, count in counts.items():
        into[key] = merge(into.get(key, 0), count)
