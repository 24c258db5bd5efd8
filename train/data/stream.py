"""Sources to batches: a stream that can stop after any batch and go on, on any number of hosts.

The state names what was read and what waits, never tokens: see `mixture.DataLane`. Each host keeps
the lanes that its rows come from. The states of all hosts together, as one dict, restore a stream
on any number of hosts.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int32

from m1_jax import tokenizer as tokenizer_lib
from train.data import batch as batch_lib
from train.data import mixture, packing, prefetch
from train.data import records as records_lib

DataSource = mixture.DataSource
StreamConfig = mixture.StreamConfig
DataError = records_lib.DataError


@dataclasses.dataclass
class HostBatch:
    """This host's rows of one batch, numpy.

    sources: number of the source from 1, 0 for padding. samples: see `packing.PackedRow`.
    utilisation: share of places that are no padding. wait_secs: how long the caller waited.
    dropped: conversations that this host's lanes left out so far.
    """

    batch: batch_lib.TrainBatch
    source_ids: Int32[np.ndarray, "B T"]
    sample_ids: list[list[str]]
    utilization: float
    wait_secs: float
    num_dropped: int


class BatchStream:
    """An iterator over `HostBatch`; its state is that of the last batch handed out.

    With `epochs` the stream ends, after rows of padding that fill up the last batch. It is then
    read as a single lane, by every host in full: it packs tightly and ends everywhere at once.
    That is meant for held-out data; train with `epochs=None`.
    """

    def __init__(
        self,
        config: StreamConfig,
        tokenizer: tokenizer_lib.Tokenizer,
        process_index: int = 0,
        process_count: int = 1,
        num_epochs: int | None = None,
    ):
        """Open the sources; nothing is made ahead before the first batch is asked for.

        Args:
          process_index, process_count: of the hosts that have different rows. Hosts that share
            rows, as under a split length, pass the same index.
          epochs: how often to read all, or None for ever.

        Raises:
          DataError: see `sources.RecordFiles`.
          ValueError: rows or lanes that the hosts cannot share, or a tokenizer without the
            config's control tokens.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}: wanted less than that")
        lanes = config.lanes if num_epochs is None else 1
        shared = {"rows": config.rows} | ({"lanes": lanes} if num_epochs is None else {})
        for what, many in shared.items():
            if many % process_count:
                raise ValueError(
                    f"{what}: got {many} for {process_count} hosts; wanted a multiple of the hosts"
                )
        for token in (config.begin_token, config.end_token):
            if token is not None:
                tokenizer.special_token_id(token)
        self.config = config
        self._num_lanes, self._num_epochs = lanes, num_epochs
        self._records = {s.name: records_lib.RecordFiles(s.name, s.path) for s in config.sources}
        local = config.rows // process_count
        self._row_numbers = range(process_index * local, (process_index + 1) * local)
        made = self._row_numbers if num_epochs is None else range(config.rows)
        self._prefetch_spec = prefetch.PrefetchSpec(
            config, tokenizer, self._records, lanes, made, num_epochs, step=0, states={}
        )
        owned = lanes // process_count if num_epochs is None else 1
        first = process_index * owned if num_epochs is None else 0
        self._owned_lanes = range(first, first + owned)
        self._step = 0
        self._lane_states: dict[int, dict] = {lane: {} for lane in self._owned_lanes}
        # Of the files as they were opened, should one change before the first state is taken.
        self._fingerprint = {name: one.fingerprint() for name, one in self._records.items()}
        self._prefetcher: prefetch.RowPrefetcher | None = None

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """Return this host's rows of the next batch.

        Raises:
          DataError: a record that cannot be used.
          StopIteration: after the last epoch.
        """
        started = time.perf_counter()
        if self._prefetcher is None:
            states = dict(self._lane_states)  # a lane begins with its own when it is first used
            work = dataclasses.replace(self._prefetch_spec, step=self._step, states=states)
            self._prefetcher = prefetch.RowPrefetcher(work)
        try:
            made = self._prefetcher.next_rows()
        except Exception:
            self.close()
            raise
        if not any(one.row.sample_ids for one in made.values()):
            self.close()
            raise StopIteration
        self._step += 1
        for one in made.values():
            self._lane_states[one.lane_number] = one.state
        rows = [made[number].row for number in self._row_numbers]
        return self._stack_rows(rows, time.perf_counter() - started)

    def get_state(self) -> dict[str, Any]:
        """Return this host's part of the state, JSON-able; merge all hosts' with dict.update."""
        return {
            "step": self._step,
            "lanes": self._num_lanes,
            "seed": self.config.seed,
            "fingerprint": self.fingerprint(),
            **{str(lane): copy.deepcopy(state) for lane, state in self._lane_states.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the batch that all hosts' merged `state` was taken at.

        Raises:
          DataError: a data file changed since, or a source is gone.
          ValueError: another seed or number of lanes, or a host's part is missing.
        """
        for what, have in (("seed", self.config.seed), ("lanes", self._num_lanes)):
            if state.get(what) != have:
                raise ValueError(
                    f"{what}: got {have}; wanted {state.get(what)}, as when the state was saved"
                )
        missing = [lane for lane in self._owned_lanes if str(lane) not in state]
        if missing:
            raise ValueError(
                f"state: got none of lane {missing[0]}; wanted the states of all hosts in one dict"
            )
        for name, saved in state["fingerprint"].items():
            if name not in self._records:
                raise DataError(
                    f"source {name!r}: the checkpoint has it and the config does not; wanted all "
                    "of its sources. Give it weight 0 to read no more of it."
                )
            self._records[name].check_fingerprint(saved)
        self.close()
        self._step = state["step"]
        self._lane_states = {lane: copy.deepcopy(state[str(lane)]) for lane in self._owned_lanes}

    def fingerprint(self) -> dict[str, list]:
        """Return what tells each source's files from changed ones; see `sources.RecordFiles`."""
        return copy.deepcopy(self._fingerprint)

    def close(self) -> None:
        """Stop what is made ahead and close the files; the next batch starts anew."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for records in self._records.values():
            records.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _stack_rows(self, rows: list[packing.PackedRow], wait_secs: float) -> HostBatch:
        names = [field.name for field in dataclasses.fields(batch_lib.TrainBatch)]
        stacked: dict[str, Any] = {
            name: np.stack([getattr(row, name) for row in rows]) for name in names
        }
        return HostBatch(
            batch=batch_lib.TrainBatch(**stacked),
            source_ids=np.stack([row.source_ids for row in rows]),
            sample_ids=[row.sample_ids for row in rows],
            utilization=float(np.mean(stacked["segment_ids"] != 0)),
            wait_secs=wait_secs,
            num_dropped=sum(state.get("dropped", 0) for state in self._lane_states.values()),
        )
