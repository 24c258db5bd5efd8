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
from train import chat, mixture, packing, sources

_POLL_SECS = 1.0  # between looks at whether to stop


@dataclasses.dataclass(frozen=True)
class Work:
    """Everything that decides the rows to make.

    rows: numbers in the global batch. states: by lane, of the lanes that serve these rows.
    """

    config: mixture.DataConfig
    tokenizer: tokenizer_lib.Tokenizer
    records: dict[str, sources.Records]
    lanes: int
    rows: range
    epochs: int | None
    step: int
    states: dict[int, dict[str, Any]]


@dataclasses.dataclass
class Made:
    """A row, and its lane's state after it."""

    row: packing.Row
    lane: int
    state: dict[str, Any]


def serving(work: Work, step: int) -> dict[int, int]:
    """Return the lane of each row of a step."""
    return {r: mixture.lane_of(step, r, work.config.rows, work.lanes) for r in work.rows}


def batches(work: Work, part: int = 0, parts: int = 1) -> Iterator[dict[int, Made]]:
    """Yield rows by their number, of the lanes that are worker `part` of `parts`'s.

    Steps to which these lanes give nothing are left out. Rows are padding once a lane has ended.
    """
    config = work.config
    encoder = chat.Encoder(
        work.tokenizer,
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(chat.Encoder)[1:]},
    )

    @functools.cache  # when first used: what waits in a lane is tokenised again after a restart
    def lane(number: int) -> mixture.Lane:
        state = work.states[number]
        return mixture.Lane(number, work.lanes, config, work.records, encoder, work.epochs, state)

    for step in itertools.count(work.step):
        made = {}
        for row_number, number in serving(work, step).items():
            if number % parts == part:
                row = lane(number).row(step) or packing.empty_row(config.seq_len)
                made[row_number] = Made(row, number, lane(number).state())
        if made:
            yield made


class Producer:
    """Makes batches ahead; `next` returns them in order.

    A thread makes them, or one for each worker process receives them. Processes hold nothing that
    must be put in order: they are killed, or end with their pipe when this process is killed.
    """

    def __init__(self, work: Work):
        self._work, self._step = work, work.step
        self._stop = threading.Event()
        self._workers: list[Any] = []
        parts = min(work.config.workers, len(work.states)) if work.epochs is None else 0
        rows = [self._start(part, parts) for part in range(parts)] or [batches(work)]
        self._queues = [queue.Queue(work.config.prefetch) for _ in rows]
        self._threads = [
            threading.Thread(target=_fill, args=(*pair, self._stop), daemon=True)
            for pair in zip(rows, self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> dict[int, Made]:
        """Return the next batch's rows by their number; not to be called again after an error.

        Raises:
          DataError: as the maker of these rows met it.
          RuntimeError: a worker died.
        """
        made: dict[int, Made] = {}
        lanes = set(serving(self._work, self._step).values())
        for part in sorted({lane % len(self._queues) for lane in lanes}):
            item = self._queues[part].get()
            if isinstance(item, Exception):
                raise item
            made |= item
        self._step += 1
        return made

    def close(self) -> None:
        """End the processes and the threads."""
        self._stop.set()
        for worker in self._workers:
            worker.kill()
        for thread, rows in zip(self._threads, self._queues, strict=True):
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):
                    rows.get_nowait()  # makes room for one that waits
                thread.join(timeout=0.01)
        for worker in self._workers:
            worker.join()

    def _start(self, part: int, parts: int) -> Iterator[dict[int, Made]]:
        """Start a worker and return what it will make."""
        context = multiprocessing.get_context("spawn")  # threads and JAX do not survive a fork
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(self._work, part, parts, sender), daemon=True)
        worker.start()
        self._workers.append(worker)
        sender.close()  # the worker's copy is then the only one: the pipe ends with the worker
        return _received(receiver, part)


def _fill(rows: Iterator[dict[int, Made]], out: queue.Queue, stop: threading.Event) -> None:
    """Put rows into a queue until told to stop; an error is the last thing in it."""

    def put(item) -> bool:
        while not stop.is_set():
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


def _work(work: Work, part: int, parts: int, sender) -> None:
    """Be a worker: send rows, or at last an error, until nobody listens."""
    for name in (signal.SIGINT, signal.SIGTERM):  # to the whole group; the trainer ends in order
        signal.signal(name, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        try:
            for made in batches(work, part, parts):
                sender.send(made)
        except BrokenPipeError:
            raise
        except Exception as error:
            sender.send(error)


def _received(receiver, part: int) -> Iterator[dict[int, Made]]:
    """Yield what a worker sends; raise the error that it sends."""
    with receiver:
        while True:
            try:
                item = receiver.recv()
            except (EOFError, OSError):
                raise RuntimeError(
                    f"data worker {part} ended without a word; wanted rows. Was it killed, for "
                    "memory perhaps?"
                ) from None
            if isinstance(item, Exception):
                raise item
            yield item
