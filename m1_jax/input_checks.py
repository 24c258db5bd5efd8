"""Checks of what a caller passes to a model: shapes always, values where they are known.

Inside of jit an array has no values yet, so ids and lengths are checked outside of it only.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from m1_jax import state as state_lib


def check_token_ids(tokens: jax.Array | np.ndarray, vocab_size: int) -> None:
    """Refuse tokens of a wrong shape or dtype, and ids outside the vocabulary.

    Raises:
      ValueError: got, wanted, and what may be the cause.
    """
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: got shape {tokens.shape}; wanted [B >= 1, T >= 1]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: got dtype {tokens.dtype}; wanted int32")
    if isinstance(tokens, Tracer):  # inside of jit
        return
    # If several processes hold an array, each checks the shards that it can read.
    shards = getattr(tokens, "addressable_shards", None)
    for ids in [tokens] if shards is None else [shard.data for shard in shards]:
        values = np.asarray(ids)
        outside = values[(values < 0) | (values >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"token id {outside[0]} is outside of the vocabulary: wanted 0 to "
                f"{vocab_size - 1}. Does the tokenizer belong to this model?"
            )


def check_token_shape(
    name: str, array: jax.Array | np.ndarray | None, tokens: jax.Array | np.ndarray
) -> None:
    """Refuse an argument of one number per token whose shape is not that of the tokens."""
    if array is not None and array.shape != tokens.shape:
        raise ValueError(f"{name}: got shape {array.shape}; wanted that of tokens, {tokens.shape}")


def check_capacity(
    tokens: jax.Array | np.ndarray,
    state: state_lib.DecodeState,
    num_tokens: jax.typing.ArrayLike | None,
) -> None:
    """Refuse tokens that a decode state has no rows or no room for."""
    num_rows, length = state.length.shape[0], tokens.shape[1]
    if tokens.shape[0] != num_rows:
        raise ValueError(
            f"tokens: got shape {tokens.shape}; wanted [{num_rows}, T >= 1], as the state"
        )
    added = length if num_tokens is None else num_tokens
    if isinstance(state.length, Tracer) or isinstance(added, Tracer):
        return
    added = np.broadcast_to(np.asarray(added), (num_rows,))
    if added.min() < 0 or added.max() > length:
        raise ValueError(f"num_tokens: got {added.tolist()}; wanted 0 to {length} each")
    # If several processes hold the rows, each checks its own.
    # A shard's index is its slice of the rows.
    shards = [(shard.index, np.asarray(shard.data)) for shard in state.length.addressable_shards]
    capacity = state.max_length
    total = max(int(np.max(lengths + added[rows])) for rows, lengths in shards)
    if capacity is not None and total > capacity:
        raise ValueError(
            f"the cache holds {capacity} tokens per row; got {total}. "
            "Make it larger: init_state(max_length=...)."
        )
