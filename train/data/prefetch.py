"""Runs lanes ahead of their reader, in a thread or in processes, which changes nothing in rows."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

from m1_jax import tokenizer as tokenizer_lib
from train.data import chat, mixture, packing, records

_POLL_SECS = 1.0  # between looks at whether to stop


@dataclasses.dataclass(frozen=True)
class PrefetchSpec:
    """Everything that decides the rows to make.

    rows: numbers in the global batch. states: by lane, of the lanes that serve these rows.
    """

    config: mixture.StreamConfig
    tokenizer: tokenizer_lib.Tokenizer
    records: dict[str, records.RecordFiles]
    num_lanes: int
    row_numbers: range
    num_epochs: int | None
    step: int
    states: dict[int, dict[str, Any]]


@dataclasses.dataclass
class LaneRow:
    """A row, and its lane's state after it."""

    row: packing.PackedRow
    lane_number: int
    state: dict[str, Any]


def assign_lanes(spec: PrefetchSpec, step: int) -> dict[int, int]:
    """Return the lane of each row of a step."""
    return {
        r: mixture.find_lane(step, r, spec.config.rows, spec.num_lanes) for r in spec.row_numbers
    }


def iterate_rows(
    spec: PrefetchSpec, worker_index: int = 0, num_workers: int = 1
) -> Iterator[dict[int, LaneRow]]:
    """Yield rows by their number, of the lanes that are worker `part` of `parts`'s.

    Steps to which these lanes give nothing are left out. Rows are padding once a lane has ended.
    """
    config = spec.config
    encoder = chat.RecordEncoder(
        spec.tokenizer,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(chat.RecordEncoder)[1:]},
    )

    @functools.cache  # when first used: what waits in a lane is tokenised again after a restart
    def lane(number: int) -> mixture.DataLane:
        state = spec.states[number]
        return mixture.DataLane(
            number, spec.num_lanes, config, spec.records, encoder, spec.num_epochs, state
        )

    for step in itertools.count(spec.step):
        made = {}
        for row_number, number in assign_lanes(spec, step).items():
            if number % num_workers == worker_index:
                row = lane(number).next_row(step) or packing.make_padding_row(config.seq_len)
                made[row_number] = LaneRow(row, number, lane(number).get_state())
        if made:
            yield made


class RowPrefetcher:
    """Makes batches ahead; `next` returns them in order.

    A thread makes them, or one for each worker process receives them. Processes hold nothing that
    must be put in order: they are killed, or end with their pipe when this process is killed.
    """

    def __init__(self, spec: PrefetchSpec):
        self._spec, self._step = spec, spec.step
        self._stop_event = threading.Event()
        self._workers: list[Any] = []
        parts = min(spec.config.workers, len(spec.states)) if spec.num_epochs is None else 0
        rows = [self._start_worker(part, parts) for part in range(parts)] or [iterate_rows(spec)]
        self._queues = [queue.Queue(spec.config.prefetch) for _ in rows]
        self._threads = [
            threading.Thread(target=_fill_queue, args=(*pair, self._stop_event), daemon=True)
            for pair in zip(rows, self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def next_rows(self) -> dict[int, LaneRow]:
        """Return the next batch's rows by their number; not to be called again after an error.

        Raises:
          DataError: as the maker of these rows met it.
          RuntimeError: a worker died.
        """
        made: dict[int, LaneRow] = {}
        lanes = set(assign_lanes(self._spec, self._step).values())
        for part in sorted({lane % len(self._queues) for lane in lanes}):
            item = self._queues[part].get()
            if isinstance(item, Exception):
                raise item
            made |= item
        self._step += 1
        return made

    def close(self) -> None:
        """End the processes and the threads."""
        self._stop_event.set()
        for worker in self._workers:
            worker.kill()
        for thread, rows in zip(self._threads, self._queues, strict=True):
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    rows.get_nowait()  # makes room for one that waits
                thread.join(timeout=0.01)
        for worker in self._workers:
            worker.join()

    def _start_worker(self, worker_index: int, num_workers: int) -> Iterator[dict[int, LaneRow]]:
        """Start a worker and return what it will make."""
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
    rows: Iterator[dict[int, LaneRow]], out: queue.Queue, stop_event: threading.Event
) -> None:
    """Put rows into a queue until told to stop; an error is the last thing in it."""

    def put(item) -> bool:
        while not stop_event.is_set():
            with contextlib.suppress(queue.Full):
                out.put(item, timeout=_POLL_SECS)
                return True
        return False

    try:
        for made in rows:
            if not put(made):
                return
    except Exception as error:  # raised again where the batch is asked for
        put(error)


def _run_worker(spec: PrefetchSpec, worker_index: int, num_workers: int, sender) -> None:
    """Be a worker: send rows, or at last an error, until nobody listens."""
    for name in (signal.SIGINT, signal.SIGTERM):  # to the whole group; the trainer ends in order
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        try:
            for made in iterate_rows(spec, worker_index, num_workers):
                sender.send(made)
        except BrokenPipeError:
            raise
        except Exception as error:
            sender.send(error)


def _receive_rows(receiver, worker_index: int) -> Iterator[dict[int, LaneRow]]:
    """Yield what a worker sends; raise the error that it sends."""
    with receiver:
        while True:
            try:
                item = receiver.recv()
            except (EOFError, OSError):
                raise RuntimeError(
                    f"data worker {worker_index} ended without a word; wanted rows. Was "
                    "it killed, for "
                    "memory perhaps?"
                ) from None
            if isinstance(item, Exception):
                raise item
            yield item
