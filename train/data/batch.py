"""The schema of a training batch: what the data pipeline makes and the step takes."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainBatch:
    """B packed rows of T tokens, after A microbatches where a step accumulates gradients.

    Attributes:
      tokens: input token ids; any valid id where padding is.
      segment_ids: 0 is padding. A change starts a new document.
      positions: of each token in its document, from 0.
      targets: the token that each position predicts; any valid id where its weight is 0.
      weights: weight of each position's loss. It is 0 where nothing is to be learnt: prompts,
        padding, last tokens of documents.
    """

    tokens: Int[Array, "*A B T"]
    segment_ids: Int[Array, "*A B T"]
    positions: Int[Array, "*A B T"]
    targets: Int[Array, "*A B T"]
    weights: Float[Array, "*A B T"]
