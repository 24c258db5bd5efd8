"""What all layers of a forward pass over whole rows share, made from the caller's arguments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from m1_jax import sharding
from pallas_kernels.lightning_attention import documents as documents_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What every layer of one forward pass shares.

    Attributes:
      positions: position of each token, from 0. RoPE rotates by it, and it is the token's place in
        the cache.
      segment_ids: number of each token's document in its row. The numbers never fall along a row,
        and 0 is padding. None: each row is one document without padding.
      expert_ids: experts that each layer sends a token to, -1 where the router chooses. None: the
        router chooses everywhere.
      length_sharded: whether each device of the context axis has its own part of the tokens.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None
    expert_ids: Int[Array, "B T L A"] | None = None
    length_sharded: bool = dataclasses.field(kw_only=True, metadata={"static": True})

    @property
    def token_mask(self) -> Float[Array, "B T"] | None:
        """Return 1.0 for real tokens and 0.0 for padding; None where all tokens are real."""
        return None if self.segment_ids is None else (self.segment_ids > 0).astype(jnp.float32)

    def layer_expert_ids(self, layer_index: Int[Array, ""] | int) -> Int[Array, "B T A"] | None:
        """Return the expert ids of one layer."""
        return None if self.expert_ids is None else jnp.take(self.expert_ids, layer_index, axis=2)


def prepare_inputs(
    layout: sharding.MeshLayout | None,
    tokens: Any,
    segment_ids: Any,
    positions: Int[Array, "B T"] | None,
    expert_ids: Int[Array, "B T L A"] | None,
) -> tuple[Any, ForwardContext]:
    """Return tokens and their context. On a mesh both are padded to a length that it divides.

    The context axis, where there is one, always splits whole rows.

    Arguments are those of `MiniMaxM1.hidden`.
    """
    if layout is not None:
        sharding.check_batch_rows(layout, tokens.shape[0])
        padding = -tokens.shape[1] % layout.axis_size("length")
        # Only segment ids tell padding from tokens, so from here on there must be some.
        if padding and segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        tokens, segment_ids, positions = (
            None if x is None else jnp.pad(x, ((0, 0), (0, padding)))
            for x in (tokens, segment_ids, positions)
        )
        if expert_ids is not None:
            # -1 leaves the choice to the router; 0 would send all padding to expert 0.
            expert_ids = jnp.pad(
                expert_ids, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=-1
            )
    if segment_ids is None:
        if positions is None:
            # One row for all: [1, T] broadcasts, and a mesh need not split it by rows.
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32).reshape(1, -1)
        return tokens, ForwardContext(positions, expert_ids=expert_ids, length_sharded=True)
    if layout is not None:
        # Documents are counted along a whole row. Gathering the rows costs a few bytes a token.
        rows = layout.activation_sharding("batch", None)
        segment_ids = jax.lax.with_sharding_constraint(segment_ids, rows)
    if positions is None:
        positions = documents_lib.document_positions(segment_ids)
    # A caller's ids only need to change between documents. Layers want numbers that never fall.
    document_numbers = documents_lib.document_numbers(segment_ids)
    return tokens, ForwardContext(positions, document_numbers, expert_ids, length_sharded=True)
