"""The schema of a training batch: numpy arrays on the host, and jax arrays that the step takes."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows of T tokens on the devices.

    A batch is [B, T]. A step that accumulates gradients splits it into
    [microbatches, B / microbatches, T].

    Attributes:
      tokens: input token ids. Padding has any valid id.
      segment_ids: equal within a document, different in the next one. Padding has 0.
      positions: position of each token in its part of a document, from 0.
      targets: the token that each position predicts. Any valid id where the weight is 0.
      weights: weight of each position's loss, at least 0. It is 0 where nothing is learnt: prompts,
        padding, last tokens of documents.
    """

    tokens: Int[Array, "*B T"]
    segment_ids: Int[Array, "*B T"]
    positions: Int[Array, "*B T"]
    targets: Int[Array, "*B T"]
    weights: Float[Array, "*B T"]


# eq=False: the default comparison of arrays would raise.
@dataclasses.dataclass(eq=False)
class HostTrainBatch:
    """Rows of T tokens on the host: the fields of `TrainBatch` as numpy arrays.

    The packer writes single rows [T] in place. A batch is [B, T].
    `placement.BatchPlacement.device_put_batch` makes a `TrainBatch` of it.
    """

    tokens: Int32[np.ndarray, "*B T"]
    segment_ids: Int32[np.ndarray, "*B T"]
    positions: Int32[np.ndarray, "*B T"]
    targets: Int32[np.ndarray, "*B T"]
    weights: Float32[np.ndarray, "*B T"]


def make_padding(*shape: int) -> HostTrainBatch:
    """Return rows of padding."""
    tokens, segment_ids, positions, targets = (np.zeros(shape, np.int32) for _ in range(4))
    return HostTrainBatch(tokens, segment_ids, positions, targets, np.zeros(shape, np.float32))


def stack_rows(rows: list[HostTrainBatch]) -> HostTrainBatch:
    """Return rows [T] as a batch [B, T]."""
    names = [field.name for field in dataclasses.fields(HostTrainBatch)]
    return HostTrainBatch(*(np.stack([getattr(row, name) for row in rows]) for name in names))
