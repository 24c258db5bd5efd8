"""Sources to batches: a stream that can stop after any batch and go on, on any number of hosts.

A state counts what was read and lists what is pending. It holds no tokens (`mixture.LaneState`).
Each host runs the lanes that its rows come from, and has the states of these lanes. A lane whose
rows lie on several hosts runs on each of them, and is in the same state there. The states of all
hosts together, as one dict, restore a stream on any number of hosts.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from m1_jax import tokenizer as tokenizer_lib
from train.data import batch as batch_lib
from train.data import columns, data_errors, find_files, mixture, packing, prefetch
from train.data import config as data_config
from train.data import records as records_lib


@dataclasses.dataclass
class HostBatch:
    """This host's B rows of one batch.

    Attributes:
      arrays: the rows' tokens, targets and weights [B, T].
      source_ids: number of each token's source from 1, 0 for padding.
      sample_ids: names of each row's segments, see `packing.PackedRow`.
      utilization: share of the tokens that are no padding, 0 to 1.
      wait_secs: seconds that the caller waited for the batch.
      num_dropped: number of conversations that this host's lanes left out so far as too long.
      num_bad: number of records that this host's lanes left out so far as bad.
      bad_records: errors of those left out for this batch, each with its file and line.
    """

    arrays: batch_lib.HostTrainBatch
    source_ids: Int32[np.ndarray, "B T"]
    sample_ids: list[list[str]]
    utilization: float
    wait_secs: float
    num_dropped: int
    num_bad: int = 0
    bad_records: list[str] = dataclasses.field(default_factory=list)


class BatchStream:
    """An iterator over `HostBatch`. Its state is that after the last batch that it handed out.

    Training takes `num_epochs=None`, a stream without end. With `num_epochs` the stream ends, which
    is meant for held-out data. Such a stream has a single lane, which every host reads in full. So
    it packs tightly and ends on all hosts at once. Rows of padding fill up its last batch.
    """

    def __init__(
        self,
        config: data_config.StreamConfig,
        tokenizer: tokenizer_lib.Tokenizer,
        row_numbers: Sequence[int] | None = None,
        num_epochs: int | None = None,
    ):
        """Open the sources. The first row is made when the first batch is asked for.

        Args:
          config: the stream's config.
          tokenizer: the model's tokenizer.
          row_numbers: numbers of this host's rows in the global batch, any of them. Hosts may have
            rows in common. None: all rows.
          num_epochs: number of times to read all sources, or None for ever.

        Raises:
          DataError: see `records.RecordFiles`.
          ValueError: a row that the batch does not have, or that is given twice, or the tokenizer
            lacks a control token of the config.
        """
        data, endless = config.data, num_epochs is None
        self._row_numbers = tuple(range(config.rows) if row_numbers is None else row_numbers)
        _check_row_numbers(self._row_numbers, config.rows)
        for token in (data.begin_token, data.end_token):
            if token is not None:
                tokenizer.special_token_id(token)
        self.config = config
        self._num_lanes = data.lanes if endless else 1
        self._records = {s.name: records_lib.RecordFiles(s.name, s.path) for s in data.sources}
        for source in data.sources:
            _print_columns(source, self._records[source.name])
        all_rows = range(config.rows)
        row_lanes = [mixture.find_lanes(row, config.rows, self._num_lanes) for row in all_rows]
        # A lane makes its rows in order, so a host makes all rows of its lanes and hands out its
        # own. The only lane of a stream that ends has all rows.
        self._owned_lanes = {lane for row in self._row_numbers for lane in row_lanes[row]}
        made_rows = tuple(row for row in all_rows if row_lanes[row][0] in self._owned_lanes)
        self._prefetch_spec = prefetch.PrefetchSpec(
            config=config,
            tokenizer=tokenizer,
            records=self._records,
            num_lanes=self._num_lanes,
            row_numbers=made_rows,
            num_epochs=num_epochs,
            step=0,
            states={},
        )
        self._step = 0
        self._lane_states = {lane: mixture.LaneState() for lane in self._owned_lanes}
        # Now and not with a state: the files may change in between.
        self._fingerprint = {name: files.fingerprint() for name, files in self._records.items()}
        self._prefetcher: prefetch.RowPrefetcher | None = None

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """Return this host's rows of the next batch.

        Raises:
          DataError: a record cannot be used, or more are left out than `max_bad_share` allows.
          StopIteration: after the last epoch.
        """
        started = time.perf_counter()
        if self._prefetcher is None:
            # A copy: each lane reads its state when it makes its first row, and `_lane_states` may
            # have changed by then.
            spec = dataclasses.replace(
                self._prefetch_spec, step=self._step, states=dict(self._lane_states)
            )
            self._prefetcher = prefetch.RowPrefetcher(spec)
        try:
            lane_rows = self._prefetcher.next_rows()
            self._check_bad_records(lane_rows)
        except Exception:
            # Nobody reads on after an error, so the workers stop.
            self.close()
            raise
        # A batch of padding alone: the only lane of a stream that ends has nothing left.
        if not any(lane_row.row.sample_ids for lane_row in lane_rows.values()):
            self.close()
            raise StopIteration
        # Lanes are ahead of the caller, and the stream's state is that of the rows handed out. So
        # each row comes with the state of its lane after it.
        self._step += 1
        for lane_row in lane_rows.values():
            self._lane_states[lane_row.lane_number] = lane_row.state
        errors = [error for lane_row in lane_rows.values() for error in lane_row.bad_records]
        for error in errors:
            find_files.print_once(f"left out: {error}")
        rows = [lane_rows[row_number].row for row_number in self._row_numbers]
        return self._stack_rows(rows, time.perf_counter() - started, errors)

    def get_state(self) -> dict[str, Any]:
        """Return this host's part of the state, JSON-able. `dict.update` merges all parts."""
        return self.remember_state()()

    def remember_state(self) -> Callable[[], dict[str, Any]]:
        """Return a function that makes the state of now, whenever it is called.

        To remember costs next to nothing, so that a loop can do it at every step.
        """
        # States of lanes are never changed, only replaced.
        step, lane_states = self._step, dict(self._lane_states)
        return lambda: {
            "step": step,
            "lanes": self._num_lanes,
            "seed": self.config.seed,
            "fingerprint": self.fingerprint(),
            # JSON has strings as keys. Hosts that share a lane have the same state of it, so that
            # merging loses none.
            **{str(lane): state.to_json() for lane, state in lane_states.items()},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which the state was taken.

        Args:
          state: the states of all hosts, merged.

        Raises:
          DataError: a data file has changed since, or the config lacks a source of the state.
          ValueError: the seed or the number of lanes differs, or a host's part is missing.
        """
        for field, value in (("seed", self.config.seed), ("lanes", self._num_lanes)):
            if state.get(field) != value:
                raise ValueError(
                    f"{field}: got {value}; wanted {state.get(field)}, as when the state was saved"
                )
        missing = [lane for lane in sorted(self._owned_lanes) if str(lane) not in state]
        if missing:
            raise ValueError(
                f"state: got none of lane {missing[0]}; wanted the states of all hosts in one dict"
            )
        for name, saved in state["fingerprint"].items():
            if name not in self._records:
                field = "weights" if self.config.data.weights else "sources"
                raise records_lib.DataError(
                    f"source {name!r}: the checkpoint has it and the config does not; wanted all "
                    "of its sources. Give it weight 0 to read no more of it, and "
                    f"--allow_change=data.{field} to the command."
                )
            if self._records[name].leave_out_added_kinds(saved):
                self._fingerprint[name] = self._records[name].fingerprint()
            self._records[name].check_fingerprint(saved)
        self.close()
        self._step = state["step"]
        self._lane_states = {
            lane: mixture.LaneState.from_json(state[str(lane)]) for lane in self._owned_lanes
        }

    def fingerprint(self) -> dict[str, list]:
        """Return the fingerprints of all sources, see `records.RecordFiles.fingerprint`."""
        return copy.deepcopy(self._fingerprint)

    def close(self) -> None:
        """Stop the lanes and close the files. The next batch starts both anew."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for records in self._records.values():
            records.close()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _check_bad_records(self, lane_rows: dict[int, prefetch.LaneRow]) -> None:
        """Judge the bad records of this host's lanes, with these rows that are not handed out yet.

        Raises:
          DataError: they are too large a share of a source.
        """
        errors = [error for lane_row in lane_rows.values() for error in lane_row.bad_records]
        if not errors:
            return
        new_states = {lane_row.lane_number: lane_row.state for lane_row in lane_rows.values()}
        states = list((self._lane_states | new_states).values())
        for name, records in self._records.items():
            data_errors.check_bad_share(
                name,
                sum(state.bad_records.get(name, 0) for state in states),
                sum(state.documents_read.get(name, 0) for state in states),
                len(records),
                self.config.data.max_bad_share,
                errors[-1],
            )

    def _stack_rows(
        self, rows: list[packing.PackedRow], wait_secs: float, errors: list[str]
    ) -> HostBatch:
        arrays = batch_lib.stack_rows([row.arrays for row in rows])
        return HostBatch(
            arrays=arrays,
            source_ids=np.stack([row.source_ids for row in rows]),
            sample_ids=[row.sample_ids for row in rows],
            utilization=float(np.mean(arrays.segment_ids != 0)),
            wait_secs=wait_secs,
            num_dropped=sum(state.num_dropped for state in self._lane_states.values()),
            num_bad=sum(
                count
                for state in self._lane_states.values()
                for count in state.bad_records.values()
            ),
            bad_records=errors,
        )


def check_held_out(stream: BatchStream, num_batches: int) -> None:
    """Read what an evaluation will read, so that bad held-out data is found before the first step.

    Args:
      stream: a stream that ends. It is closed.
      num_batches: batches of an evaluation. 0 takes all.

    Raises:
      DataError: a record cannot be used.
    """
    with stream:
        for _ in itertools.islice(stream, num_batches or None):
            pass  # this host's rows, which may be padding alone


_described_sources: set[tuple[str, str, str]] = set()


def _print_columns(source: data_config.DataSource, records: records_lib.RecordFiles) -> None:
    """Print which columns of a source's first record are read, the first time in this process."""
    if (source.name, source.path, source.kind) in _described_sources:
        return
    _described_sources.add((source.name, source.path, source.kind))
    try:
        description = columns.describe_columns(records.read(0), source.kind)
    except ValueError:  # told when a lane reads the record
        return
    finally:
        records.close()
    find_files.print_once(f"source {source.name!r}: {description}")


def _check_row_numbers(row_numbers: tuple[int, ...], num_rows: int) -> None:
    """Refuse rows that the batch does not have, a row that is given twice, and no rows at all."""
    is_valid = all(0 <= row < num_rows for row in row_numbers)
    if not row_numbers or not is_valid or len(set(row_numbers)) < len(row_numbers):
        raise ValueError(
            f"row_numbers: got {list(row_numbers)!r:.80}; wanted at least one, each of them once "
            f"and from 0 to {num_rows - 1}"
        )
