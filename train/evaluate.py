"""Held-out loss, by source and by place in the document."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m1_jax import logprobs
from m1_jax import model as model_lib
from train.data import batch as batch_lib

# Places in a document, as powers of two: 0 to 1023, 1024 to 2047, and so on to 1M and more.
FIRST_BUCKET_TOKENS, NUM_BUCKETS = 1024, 12


@functools.partial(jax.jit, static_argnames="num_sources")
def sum_losses(
    model: model_lib.MiniMaxM1,
    batch: batch_lib.TrainBatch,
    source_ids: Int[Array, "B T"],
    num_sources: int,
) -> Float[Array, "2 S K"]:
    """Return sums of weight * -logp and of weight, by source (1 is the first) and bucket."""
    hidden, _ = model.hidden(batch.tokens, batch.segment_ids, batch.positions)
    logps = logprobs.token_logprobs(model, hidden, batch.targets)
    bucket = jnp.searchsorted(_bucket_edges(), batch.positions.reshape(-1), side="right")
    place = (source_ids.reshape(-1) - 1) * NUM_BUCKETS + bucket
    weights = batch.weights.reshape(-1)
    losses = jnp.where(weights != 0, -weights * logps.reshape(-1), 0.0)
    cells = jnp.where(weights != 0, place, num_sources * NUM_BUCKETS)  # the last: dropped
    total = functools.partial(jax.ops.segment_sum, num_segments=num_sources * NUM_BUCKETS + 1)
    shape = (num_sources, NUM_BUCKETS)
    return jnp.stack([total(x, cells)[:-1].reshape(shape) for x in (losses, weights)])


def tabulate_losses(totals: np.ndarray, names: list[str]) -> dict[str, float]:
    """Return mean losses: "loss" of all, "loss/SOURCE", and "loss_from/POSITION" by bucket."""
    loss, weight = np.asarray(totals, np.float64)
    out = {"loss": loss.sum() / weight.sum()}
    for name, part, count in zip(names, loss.sum(1), weight.sum(1), strict=True):
        if count:
            out[f"loss/{name}"] = part / count
    starts = [0, *map(int, _bucket_edges())]
    for start, part, count in zip(starts, loss.sum(0), weight.sum(0), strict=True):
        if count:
            out[f"loss_from/{start}"] = part / count
    return {name: float(value) for name, value in out.items()}


def _bucket_edges() -> np.ndarray:
    return FIRST_BUCKET_TOKENS * 2 ** np.arange(NUM_BUCKETS - 1, dtype=np.int32)
