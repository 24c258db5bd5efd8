"""Held-out loss, by source and by position in the document.

Positions show what a long context is worth: the loss should fall with them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m1_jax import compiler_options, distributed, logprobs
from m1_jax import model as model_lib
from train.data import batch as batch_lib
from train.data import placement, records
from train.data import stream as stream_lib

# Buckets of positions double in length: 0 to 1023, 1024 to 2047, 2048 to 4095, and so on. The last
# one begins at 1M.
FIRST_BUCKET_TOKENS, NUM_BUCKETS = 1024, 12


@functools.partial(compiler_options.jit_for_device, static_argnames="num_sources")
def sum_losses(
    model: model_lib.MiniMaxM1,
    batch: batch_lib.TrainBatch,
    source_ids: Int[Array, "B T"],
    num_sources: int,
) -> Float[Array, "2 S K"]:
    """Return sums of weight * -logp and of weight, by source and bucket of positions.

    Args:
      model: the model to evaluate.
      batch: rows on the devices.
      source_ids: number of each token's source from 1. Padding has 0, and weight 0.
      num_sources: S. K is `NUM_BUCKETS`.
    """
    hidden, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    logps = logprobs.token_logprobs(model, hidden, batch.targets).logp
    bucket = jnp.searchsorted(_bucket_edges(), batch.positions.reshape(-1), side="right")
    # One index for the pair (source, bucket), as segment sums have one axis of segments.
    cell_ids = (source_ids.reshape(-1) - 1) * NUM_BUCKETS + bucket
    weights = batch.weights.reshape(-1)
    # Padding may have any log-probability, infinite ones too: 0 * inf would be NaN.
    losses = jnp.where(weights != 0, -weights * logps.reshape(-1), 0.0)
    # Tokens without weight go into a last cell, which is dropped.
    cells = jnp.where(weights != 0, cell_ids, num_sources * NUM_BUCKETS)
    sum_cells = functools.partial(jax.ops.segment_sum, num_segments=num_sources * NUM_BUCKETS + 1)
    shape = (num_sources, NUM_BUCKETS)
    return jnp.stack([sum_cells(x, cells)[:-1].reshape(shape) for x in (losses, weights)])


def measure_losses(
    model: model_lib.MiniMaxM1,
    stream: stream_lib.BatchStream,
    batch_placement: placement.BatchPlacement,
    names: list[str],
    num_batches: int | None,
) -> dict[str, float]:
    """Return the losses of a stream's batches, see `tabulate_losses`. All processes call this.

    Args:
      model: the model to evaluate.
      stream: rows of the sources.
      batch_placement: puts the rows onto the devices.
      names: names of the stream's sources.
      num_batches: number of batches to read. None reads to the end.

    Raises:
      DataError: a record cannot be used, or no token of the batches has a weight.
      AgreedError: with several processes, one of them could not read a batch.
    """
    # [losses and weights, sources, buckets]. In float64 on the host, because a float32 sum over
    # many batches would lose small terms.
    totals, num_read = np.zeros((2, len(names), NUM_BUCKETS)), 0
    # Together, so that what one process cannot read ends all.
    read_next = functools.partial(distributed.run_on_all, lambda: next(stream, None))
    for host_batch in itertools.islice(iter(read_next, None), num_batches):
        batch = batch_placement.device_put_batch(host_batch.arrays)
        source_ids = batch_placement.device_put_array(host_batch.source_ids)
        totals += np.asarray(sum_losses(model, batch, source_ids, len(names)), np.float64)
        num_read += 1
    if not totals[1].any():
        raise records.DataError(
            f"evaluation: got no token to predict in {num_read} batches; wanted some. Raise "
            "evaluation.batches, or change evaluation.sources."
        )
    return tabulate_losses(totals, names)


def tabulate_losses(totals: np.ndarray, names: list[str]) -> dict[str, float]:
    """Return mean losses: "loss" of all, "loss/SOURCE", and "loss_from/POSITION" by bucket.

    A source or bucket without weight has no entry.

    Args:
      totals: [2, S, K], sums over all batches of `sum_losses`.
      names: names of the S sources.
    """
    loss, weight = np.asarray(totals, np.float64)
    means = {"loss": loss.sum() / weight.sum()}
    for name, part, count in zip(names, loss.sum(1), weight.sum(1), strict=True):
        if count:
            means[f"loss/{name}"] = part / count
    starts = [0, *map(int, _bucket_edges())]
    for start, part, count in zip(starts, loss.sum(0), weight.sum(0), strict=True):
        if count:
            means[f"loss_from/{start}"] = part / count
    return {name: float(value) for name, value in means.items()}


def _bucket_edges() -> np.ndarray:
    """Return the first position of every bucket but the first one."""
    return FIRST_BUCKET_TOKENS * 2 ** np.arange(NUM_BUCKETS - 1, dtype=np.int32)
