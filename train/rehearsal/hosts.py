"""Which rows and lanes each host of a stage has, by the placement and the streams that run."""

import collections
import dataclasses
from collections.abc import Mapping

from m1_jax import sharding
from train import config as config_lib
from train.data import config as data_config
from train.data import mixture, placement


@dataclasses.dataclass(frozen=True)
class StageHosts:
    """The hosts of one stage.

    Attributes:
      stream_config: config of the stage's stream.
      layout: layout of the stage's mesh, None for a single device.
      rows_by_process: numbers of the rows that each process reads.
      first_step: number of the run's steps before the stage.
      num_steps: steps of the stage.
    """

    stream_config: data_config.StreamConfig
    layout: sharding.MeshLayout | None
    rows_by_process: Mapping[int, tuple[int, ...]]
    first_step: int
    num_steps: int

    def lanes_of(self, process: int) -> tuple[int, ...]:
        """Return the lanes that a process runs, ascending."""
        config = self.stream_config
        return tuple(
            sorted(
                {
                    lane
                    for row in self.rows_by_process[process]
                    for lane in mixture.find_lanes(row, config.rows, config.data.lanes)
                }
            )
        )

    def count_made_rows(self, process: int) -> int:
        """Return the rows that a process makes a step: all rows of its lanes, see `BatchStream`."""
        config = self.stream_config
        num_lanes, rows_of_lane = len(self.lanes_of(process)), config.rows / config.data.lanes
        # A lane of several rows makes all of them, and lanes that share a row take turns.
        return round(num_lanes * rows_of_lane)

    def choose_processes(self, number: int) -> list[int]:
        """Return some processes: the first, the last and others, spread over all."""
        processes = sorted(self.rows_by_process)
        places = {round(i * (len(processes) - 1) / max(number - 1, 1)) for i in range(number)}
        return [processes[place] for place in sorted(places)]


def find_stage_hosts(
    config: config_lib.TrainConfig,
    stage_index: int,
    layout: sharding.MeshLayout | None,
    first_step: int,
) -> StageHosts:
    """Return the hosts of a stage.

    Raises:
      ValueError: the lanes do not fit the rows, or a row that no host holds.
    """
    stage = config.stages[stage_index]
    stream_config = data_config.StreamConfig(config.data, stage.seq_len, stage.rows, config.seed)
    rows: Mapping[int, tuple[int, ...]] = {0: tuple(range(stage.rows))}
    if layout is not None:
        rows = placement.find_rows_by_process(layout, stage.rows)
    stage_hosts = StageHosts(stream_config, layout, rows, first_step, stage.num_steps)
    _check_all_held(stage_hosts)
    return stage_hosts


def _check_all_held(stage_hosts: StageHosts) -> None:
    config, processes = stage_hosts.stream_config, stage_hosts.rows_by_process
    held_rows = {row for rows in processes.values() for row in rows}
    missing_rows = sorted(set(range(config.rows)) - held_rows)
    if missing_rows:
        raise ValueError(f"placement: no host holds row {missing_rows[0]}; wanted one for each row")
    run_lanes = {lane for process in processes for lane in stage_hosts.lanes_of(process)}
    missing_lanes = sorted(set(range(config.data.lanes)) - run_lanes)
    if missing_lanes:
        raise ValueError(
            f"lanes: no host runs lane {missing_lanes[0]}; wanted one for each, or its documents "
            "would never be read"
        )


def count_sharing_hosts(stage_hosts: StageHosts) -> tuple[int, int]:
    """Return the fewest and the most hosts that hold one row."""
    holders = collections.Counter(
        row for rows in stage_hosts.rows_by_process.values() for row in rows
    )
    return min(holders.values()), max(holders.values())
