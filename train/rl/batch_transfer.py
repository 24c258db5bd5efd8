"""A generation batch from process 0, which samples it, to all processes, which train on it."""

from collections.abc import Callable

from m1_jax import multihost
from train.rl import group_columns, groups, rollout, sample_groups
from train.rl.rewards import length_bias


def sample_batch(
    collector: groups.GroupCollector | None,
    sampler: rollout.RolloutSampler,
    batch_number: int,
    window_tokens: int,
    should_stop: Callable[[], bool],
) -> tuple[sample_groups.GenerationBatch | None, ValueError | None]:
    """Return (a sampled and scored batch, why there is none) on every process.

    Both are None where a signal ended the sampling. The collector is then, and after a failure, as
    it was before.

    Args:
      collector: on process 0, which makes the batch. None on the other processes.
      sampler: of this process.
      batch_number, window_tokens, should_stop: see `GroupCollector.collect`.
    """
    batch, failure = None, None
    if collector is not None:
        try:
            batch = collector.collect(sampler, batch_number, window_tokens, should_stop)
        except rollout.RolloutStopped:
            pass
        except (groups.NothingToTrainOn, length_bias.LengthBiasPause) as error:
            failure = error
        # The other processes leave `follow` now, and wait in the broadcasts below.
        sampler.dismiss()
    else:
        sampler.follow()
    # Told to all processes, so that all of them save before the run ends.
    failure = multihost.broadcast_object(failure)
    return broadcast_batch(batch), failure


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
