"""Runs lanes ahead of their reader, in a thread or in processes, which changes nothing in rows."""

import dataclasses
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any

from m1_jax import tokenizer as tokenizer_lib
from train import chat, mixture, packing, sources

_POLL_SECS = 1.0  # between looks at whether the other side still lives


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
    lanes = {
        number: mixture.Lane(number, work.lanes, config, work.records, encoder, work.epochs, state)
        for number, state in work.states.items()
        if number % parts == part
    }
    step = work.step
    while True:
        made = {}
        for row_number, number in serving(work, step).items():
            if number in lanes:
                row = lanes[number].row(step) or packing.empty_row(config.seq_len)
                made[row_number] = Made(row, number, lanes[number].state())
        if made:
            yield made
        step += 1


class Producer:
    """Makes batches ahead; `next` returns them in order."""

    def __init__(self, work: Work):
        self._work, self._step = work, work.step
        self._parts = max(1, min(work.config.workers, len(work.states)))
        depth = work.config.prefetch
        if work.config.workers and work.epochs is None:
            context = multiprocessing.get_context("spawn")
            queues = [context.Queue(depth) for _ in range(self._parts)]
            self._stop = context.Event()
            make, target = context.Process, _run_process
        else:
            self._parts = 1
            queues = [queue.Queue(depth)]
            self._stop = threading.Event()
            make, target = threading.Thread, _run
        self._queues: list[Any] = queues
        self._runners: list[Any] = []
        for part, out in enumerate(queues):
            runner = make(
                target=target, args=(work, part, self._parts, out, self._stop), daemon=True
            )
            runner.start()
            self._runners.append(runner)

    def next(self) -> dict[int, Made]:
        """Return the next batch's rows by their number.

        Raises:
          DataError: as the maker of these rows met it.
          RuntimeError: a worker died.
        """
        made: dict[int, Made] = {}
        lanes = set(serving(self._work, self._step).values())
        for part in sorted({lane % self._parts for lane in lanes}):
            made |= self._take(part)
        self._step += 1
        return made

    def close(self) -> None:
        """End the thread or the processes."""
        self._stop.set()
        for runner, out in zip(self._runners, self._queues, strict=True):
            while runner.is_alive():
                _drain(out)  # wakes one that waits for room
                runner.join(timeout=0.05)
        for out in self._queues:
            if not isinstance(out, queue.Queue):
                out.cancel_join_thread()
                out.close()

    def _take(self, part: int) -> dict[int, Made]:
        while True:
            try:
                item = self._queues[part].get(timeout=_POLL_SECS)
                break
            except queue.Empty:
                if not self._runners[part].is_alive() and self._queues[part].empty():
                    raise RuntimeError(
                        f"data worker {part} ended without a word; wanted rows. Was it killed, "
                        "for memory perhaps?"
                    ) from None
        if isinstance(item, Exception):
            raise item
        return item


def _run(work: Work, part: int, parts: int, out, stop) -> bool:
    """Fill a queue until told to stop; an error is the last thing in it.

    Returns whether what is in the queue is still wanted.
    """
    try:
        for made in batches(work, part, parts):
            if not _put(out, made, stop):
                return False
    except Exception as error:  # raised again where the batch is asked for
        return _put(out, error, stop)
    return True


def _run_process(work: Work, part: int, parts: int, out, stop) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the trainer to end in order
    if not _run(work, part, parts, out, stop):
        out.cancel_join_thread()  # nobody reads any more


def _put(out, item, stop) -> bool:
    """Wait for room; False once told to stop, or once the reader was killed."""
    parent = multiprocessing.parent_process()
    while not stop.is_set():
        try:
            out.put(item, timeout=_POLL_SECS)
            return True
        except queue.Full:
            # A thread lives and dies with its reader, whatever the reader's own parent does.
            if not isinstance(out, queue.Queue) and parent and not parent.is_alive():
                return False
    return False


def _drain(out) -> None:
    try:
        while True:
            out.get_nowait()
    except (queue.Empty, OSError, EOFError):
        return
