"""The schema of a training batch, which the data pipeline makes and the step takes."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows of T tokens.

    The packer makes single rows [T]. A batch is [B, T]. A step that accumulates gradients splits a
    batch into [microbatches, B / microbatches, T].

    Attributes:
      tokens: input token ids. Padding has any valid id.
      segment_ids: equal within a document, different in the next one. Padding has 0.
      positions: of each token in its part of a document, from 0.
      targets: the token that each position predicts. Any valid id where the weight is 0.
      weights: of each position's loss, at least 0. It is 0 where nothing is learnt: prompts,
        padding, last tokens of documents.
    """

    tokens: Int[Array, "*B T"]
    segment_ids: Int[Array, "*B T"]
    positions: Int[Array, "*B T"]
    targets: Int[Array, "*B T"]
    weights: Float[Array, "*B T"]


def make_padding(*shape: int) -> TrainBatch:
    """Return a batch of padding, as numpy arrays that may be written in place."""
    tokens, segment_ids, positions, targets = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    # A list without element types: the schema's are jax arrays, and these are numpy.
    fields: list = [tokens, segment_ids, positions, targets, weights]
    return TrainBatch(*fields)


def stack_rows(rows: list[TrainBatch]) -> TrainBatch:
    """Return rows [T] as a batch [B, T], numpy."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
