"""The schema of a training batch: what the data pipeline makes and the step takes."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """Rows of T tokens. The packer makes single rows [T], a batch is [B, T].

    A step that accumulates gradients splits a batch into [microbatches, B / microbatches, T].

    Attributes:
      tokens: input token ids; any valid id where padding is.
      segment_ids: 0 is padding. A change starts a new document.
      positions: of each token in its piece of a document, from 0.
      targets: the token that each position predicts; any valid id where its weight is 0.
      weights: weight of each position's loss. It is 0 where nothing is to be learnt: prompts,
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
    fields: list = [tokens, segment_ids, positions, targets, weights]
    return TrainBatch(*fields)


def stack_rows(rows: list[TrainBatch]) -> TrainBatch:
    """Return rows [T] as a batch [B, T], numpy."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *rows)
