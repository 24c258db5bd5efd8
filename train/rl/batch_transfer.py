"""A generation batch from process 0, which samples it, to all processes, which train on it."""

from m1_jax import multihost
from train.rl import group_columns, sample_groups


def broadcast_batch(
    batch: sample_groups.GenerationBatch | None,
) -> sample_groups.GenerationBatch | None:
    """Return process 0's batch on every process, or None where process 0 has none.

    Samples of the other processes have no text and no task but its id. Their columns go over the
    devices' links (`multihost.broadcast_arrays`), the rest over the hosts' network.
    """
    # First, whether there is one. The arrays take collectives of the devices.
    if not multihost.broadcast_object(batch is not None):
        return None
    table, columns = ({}, {}) if batch is None else group_columns.batch_to_columns(batch)
    table, columns = multihost.broadcast_object(table), multihost.broadcast_arrays(columns)
    return group_columns.batch_from_columns(table, columns) if batch is None else batch
