"""Runs lanes ahead of their reader, in a thread or in processes. The rows are the same either way.

Only rows and states pass between threads or processes. Each lane runs in one worker, in order. So
no lock is needed, and the number of workers changes no row.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import multiprocessing.process
import queue
import signal
import threading
from collections.abc import Iterator
from multiprocessing import connection

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, mixture, packing, records
from train.data import config as data_config

_POLL_SECS = 1.0  # how often a thread with a full queue asks whether to stop


@dataclasses.dataclass(frozen=True)
class PrefetchSpec:
    """All that decides which rows to make. A worker process gets it by pickle.

    Attributes:
      config: the stream's config.
      tokenizer: the model's tokenizer.
      records: the records of each source, by name. They are pickled without open files.
      num_lanes: number of the stream's lanes.
      row_numbers: numbers of the rows to make, in the global batch: all that their lanes serve,
        in ascending order.
      num_epochs: number of times to read every source. None reads for ever.
      step: step of the first batch to make.
      states: states of the lanes that serve these rows, by lane.
    """

    config: data_config.StreamConfig
    tokenizer: tokenizer_lib.Tokenizer
    records: dict[str, records.RecordFiles]
    num_lanes: int
    row_numbers: tuple[int, ...]
    num_epochs: int | None
    step: int
    states: dict[int, mixture.LaneState]


@dataclasses.dataclass
class LaneRow:
    """A row, and its lane's state after it.

    Attributes:
      row: the row.
      lane_number: number of the lane that made the row.
      state: state of that lane after the row.
      bad_records: errors of the records that the lane left out for the row.
    """

    row: packing.PackedRow
    lane_number: int
    state: mixture.LaneState
    bad_records: list[str]


def assign_lanes(spec: PrefetchSpec, step: int) -> dict[int, int]:
    """Return the lane of each row of a step."""
    num_rows = spec.config.rows
    return {row: mixture.find_lane(step, row, num_rows, spec.num_lanes) for row in spec.row_numbers}


def assign_workers(spec: PrefetchSpec, num_workers: int) -> dict[int, int]:
    """Return the worker that runs each lane of a spec.

    Workers take lanes by their place among this host's lanes, not by their number: on a torus a
    host's lanes are often 0, 8, 16 and so on, which are all the same modulo 8.
    """
    return {lane: place % num_workers for place, lane in enumerate(sorted(spec.states))}


def iterate_rows(
    spec: PrefetchSpec, worker_index: int = 0, num_workers: int = 1
) -> Iterator[dict[int, LaneRow]]:
    """Yield the rows of one step after another, by row number.

    A step for which this worker has no lane is left out. Rows are padding once a lane has ended.

    Args:
      spec: what to make, the same for all workers.
      worker_index: number of this worker. It runs the lanes that `assign_workers` gives it.
      num_workers: number of workers that share the lanes.
    """
    config = spec.config
    encoder = chat.RecordEncoder(
        spec.tokenizer,
        seq_len=config.seq_len,
        overlong=config.data.overlong,
        thinking=config.data.thinking,
        profile=config.data.profile,
        begin_token=config.data.begin_token,
        end_token=config.data.end_token,
    )

    # A lane is opened when it is first used, because opening tokenises its pending documents again.
    # Opening all lanes at once would delay the first batch of a resumed run.
    @functools.cache
    def open_lane(lane_number: int) -> mixture.DataLane:
        state = spec.states[lane_number]
        return mixture.DataLane(
            lane_number, spec.num_lanes, config, spec.records, encoder, spec.num_epochs, state
        )

    worker_by_lane = assign_workers(spec, num_workers)
    for step in itertools.count(spec.step):
        lane_rows = {}
        for row_number, lane_number in assign_lanes(spec, step).items():
            if worker_by_lane[lane_number] == worker_index:
                lane = open_lane(lane_number)
                row = lane.next_row(step) or packing.make_padding_row(config.seq_len)
                # The state after each row: a lane may serve several rows of a batch, and the reader
                # keeps the last state.
                state, errors = lane.get_state(), lane.take_errors()
                lane_rows[row_number] = LaneRow(row, lane_number, state, errors)
        if lane_rows:
            yield lane_rows


class RowPrefetcher:
    """Makes batches ahead. `next_rows` returns them in order.

    One thread makes all rows, or each worker process makes the rows of its lanes and a thread
    receives them. A worker holds nothing that must be saved or closed. So workers are killed at the
    end. When this process is killed, they end by themselves, with their pipe.
    """

    def __init__(self, spec: PrefetchSpec):
        """Start the threads and processes. They make batches from `spec.step` on."""
        self._spec, self._step = spec, spec.step
        self._stop_event = threading.Event()
        self._workers: list[multiprocessing.process.BaseProcess] = []
        # A stream that ends has one lane, and is short: starting a process would not pay.
        num_workers = 0
        if spec.num_epochs is None:
            num_workers = min(spec.config.data.workers, len(spec.states))
        iterators = [self._start_worker(i, num_workers) for i in range(num_workers)]
        iterators = iterators or [iterate_rows(spec)]
        # Bounded: a full queue is what stops a worker from running further ahead.
        self._queues = [queue.Queue(spec.config.data.prefetch) for _ in iterators]
        self._worker_by_lane = assign_workers(spec, len(self._queues))
        self._threads = [
            threading.Thread(
                target=_fill_queue, args=(iterator, row_queue, self._stop_event), daemon=True
            )
            for iterator, row_queue in zip(iterators, self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def next_rows(self) -> dict[int, LaneRow]:
        """Return the next batch's rows by row number. Do not call it again after an error.

        Raises:
          DataError: a lane of these rows raised it.
          RuntimeError: a worker died.
        """
        lane_rows: dict[int, LaneRow] = {}
        lanes = set(assign_lanes(self._spec, self._step).values())
        # Only workers with a lane in this step put something into their queue for it.
        for worker_index in sorted({self._worker_by_lane[lane] for lane in lanes}):
            item = self._queues[worker_index].get()
            if isinstance(item, Exception):
                raise item
            lane_rows |= item
        self._step += 1
        return lane_rows

    def close(self) -> None:
        """End the processes and the threads."""
        self._stop_event.set()
        for worker in self._workers:
            worker.kill()
        for thread, row_queue in zip(self._threads, self._queues, strict=True):
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    row_queue.get_nowait()  # frees a thread that waits to put something in
                thread.join(timeout=0.01)
        for worker in self._workers:
            worker.join()

    def _start_worker(self, worker_index: int, num_workers: int) -> Iterator[dict[int, LaneRow]]:
        """Start a worker, and return an iterator over the rows that it will make."""
        context = multiprocessing.get_context("spawn")  # threads and JAX do not survive a fork
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(
            target=_run_worker, args=(self._spec, worker_index, num_workers, sender), daemon=True
        )
        worker.start()
        self._workers.append(worker)
        sender.close()  # the worker's copy is then the only one: the pipe ends with the worker
        return _receive_rows(receiver, worker_index)


def _fill_queue(
    iterator: Iterator[dict[int, LaneRow]], row_queue: queue.Queue, stop_event: threading.Event
) -> None:
    """Put rows into a queue until the event is set. An error of the iterator comes last."""

    def put_unless_stopped(item: dict[int, LaneRow] | Exception) -> bool:
        # With a timeout: once the reader has gone, nobody empties the queue.
        while not stop_event.is_set():
            with contextlib.suppress(queue.Full):
                row_queue.put(item, timeout=_POLL_SECS)
                return True
        return False

    try:
        for lane_rows in iterator:
            if not put_unless_stopped(lane_rows):
                return
    except Exception as error:  # raised again by `next_rows`, in the trainer's thread
        put_unless_stopped(error)


def _run_worker(
    spec: PrefetchSpec, worker_index: int, num_workers: int, sender: connection.Connection
) -> None:
    """Run a worker process. It sends rows until nobody reads them, or until it sends an error."""
    # Both signals may go to the whole group of processes, as Ctrl-C does. The trainer still needs
    # rows then, for the steps up to its checkpoint. It kills its workers itself.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        try:
            for lane_rows in iterate_rows(spec, worker_index, num_workers):
                sender.send(lane_rows)
        except BrokenPipeError:  # the reader has gone, and nobody receives an error
            raise
        except Exception as error:
            sender.send(error)


def _receive_rows(
    receiver: connection.Connection, worker_index: int
) -> Iterator[dict[int, LaneRow]]:
    """Yield the rows that a worker sends, or raise the error that it sends."""
    with receiver:
        while True:
            try:
                item = receiver.recv()
            except (EOFError, OSError):
                raise RuntimeError(
                    f"data worker {worker_index} ended without an error; wanted its rows. Was it "
                    "killed because memory ran out? Then lower data.workers or data.prefetch."
                ) from None
            if isinstance(item, Exception):
                raise item
            yield item
