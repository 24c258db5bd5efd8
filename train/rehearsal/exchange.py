"""What hosts tell each other in a step and at a save, in bytes of a host and of a chip."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from train.rehearsal import hosts as hosts_lib
from train.rehearsal import lanes as lanes_lib


@dataclasses.dataclass(frozen=True)
class GatheredBytes:
    """What hosts tell each other of their position in the data, over their network alone.

    Attributes:
      sent: the most that one host sends to process 0 at a save.
      received: what process 0 gets of all others.
      merged: what they make together. It lies in the checkpoint, and every host gets it at a change
        of stage.
    """

    sent: int
    received: int
    merged: int


def count_gather(sizes: Sequence[int], merged_bytes: int) -> GatheredBytes:
    """Return the bytes of `checkpoints.merge_on_first` for parts of these sizes, one a host."""
    return GatheredBytes(max(sizes[1:], default=0), sum(sizes[1:]), merged_bytes)


def count_data_state(
    stage: hosts_lib.StageHosts,
    lane_run: lanes_lib.LaneRun,
    window_number: int,
    fingerprint: Mapping[str, list],
) -> GatheredBytes:
    """Return what the position in the data takes at a save, from the states that the lanes had.

    Args:
      stage: the hosts.
      lane_run: what the lanes gave.
      window_number: number of the window whose states are taken.
      fingerprint: fingerprints of the sources' files, which are in every host's part.
    """
    head = json.dumps({"step": 0, "lanes": 0, "seed": 0, "fingerprint": dict(fingerprint)})
    # A lane's entry has its number as the key, with quotes, colon and comma.
    lane_bytes = {
        lane: len(text) + len(str(lane)) + 6
        for lane, text in lane_run.states[window_number].items()
    }
    sizes = [
        len(head) + sum(lane_bytes[lane] for lane in stage.lanes_of(process))
        for process in stage.rows_by_process
    ]
    return count_gather(sizes, len(head) + sum(lane_bytes.values()))
