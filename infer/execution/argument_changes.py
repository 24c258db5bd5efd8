"""Arguments of a program as what changed since its last call.

The pages of 512 rows of 86K tokens are 2.75 MB in every call, and process 0 sends them to every
host. Between two calls a few hundred numbers change.

    sender, receiver = ArgumentChanges(), ArgumentChanges()
    message = sender.encode(("decode", 512), arguments)
    arguments = receiver.decode(("decode", 512), message)

Both sides keep the last arguments of each program, so every message must be decoded, in order.
"""

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

_WHOLE_BYTES = 1024  # smaller arrays are sent as they are


@dataclasses.dataclass(frozen=True)
class ChangedElements:
    """What an array has that the one before it had not.

    Attributes:
      indices: which elements, counted in C order, ascending.
      values: the elements.
    """

    indices: np.ndarray
    values: np.ndarray


class ArgumentChanges:
    """One side's memory of the last arguments of each program."""

    def __init__(self):
        self._last_leaves: dict[Hashable, list[Any]] = {}

    def encode(self, program: Hashable, arguments: Any) -> tuple[Any, list[Any]]:
        """Return (structure, leaves) of arguments, with `ChangedElements` where these are smaller.

        Args:
          program: name of the program. Its last arguments are compared with these.
          arguments: a tree of numpy arrays and scalars.
        """
        leaves, structure = jax.tree.flatten(arguments)
        last_leaves = self._last_leaves.get(program, [None] * len(leaves))
        # No copies: `host_batch` never fills an array a second time.
        self._last_leaves[program] = [np.asarray(leaf) for leaf in leaves]
        sent = [_changes(last, leaf) for last, leaf in zip(last_leaves, leaves, strict=True)]
        return structure, sent

    def decode(self, program: Hashable, message: tuple[Any, list[Any]]) -> Any:
        """Return the arguments that `encode` was given, in fresh arrays."""
        structure, sent = message
        last_leaves = self._last_leaves.get(program, [None] * len(sent))
        leaves = [_apply_changes(last, leaf) for last, leaf in zip(last_leaves, sent, strict=True)]
        self._last_leaves[program] = leaves
        return jax.tree.unflatten(structure, leaves)


def _changes(last: np.ndarray | None, leaf: Any) -> Any:
    """Return what changed from `last` to `leaf`, or `leaf` where that is not larger."""
    if last is None or leaf.nbytes < _WHOLE_BYTES or leaf.shape != last.shape:
        return leaf
    # Bits are compared: -0.0 and 0.0 are equal, and NaN is not equal to itself.
    word = np.dtype(f"u{leaf.dtype.itemsize}")
    indices = np.flatnonzero(leaf.reshape(-1).view(word) != last.reshape(-1).view(word))
    # An index has 4 bytes in a message.
    if len(indices) * (4 + leaf.dtype.itemsize) >= leaf.nbytes:
        return leaf
    return ChangedElements(indices.astype(np.uint32), leaf.reshape(-1)[indices])


def _apply_changes(last: np.ndarray | None, sent: Any) -> Any:
    if not isinstance(sent, ChangedElements):
        return sent
    assert last is not None, "changes are sent after a whole array"
    # A copy: a program under way may still read the last array.
    leaf = last.copy()
    leaf.reshape(-1)[sent.indices] = sent.values
    return leaf
