"""A function compiled ahead of time, and how its host arguments get onto the devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from m1_jax import compiler_options


class CompiledProgram:
    """A function compiled for arguments of given shapes, some of which it consumes.

    Host arrays are put where the shape given for them says.

    Args:
      function: takes the arguments.
      donated: numbers of the arguments whose memory it reuses.
      *arguments: arrays or shapes, with the shardings that calls will have.
      output_shardings: shardings of its outputs, None for one device or XLA's choice.
    """

    def __init__(
        self,
        function: Callable,
        donated: Sequence[int],
        *arguments: Any,
        output_shardings: Any = None,
    ):
        # Leaves go in one by one: lowering puts descriptions of arrays into the classes of its
        # arguments, and shape checks of those classes, on in tests, refuse them.
        ends = np.cumsum([0, *(len(jax.tree.leaves(argument)) for argument in arguments)])
        leaves, tree = jax.tree.flatten(arguments)
        donated_leaves = [leaf for arg in donated for leaf in range(ends[arg], ends[arg + 1])]
        flat = jax.jit(
            lambda *leaves: function(*jax.tree.unflatten(tree, leaves)),
            donate_argnums=donated_leaves,
            out_shardings=output_shardings,
        )
        self._shardings = [
            leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None for leaf in leaves
        ]
        # Compiled here and never again: a call with other shapes is an error, not a compilation.
        self._compiled = flat.lower(*leaves).compile(
            compiler_options=compiler_options.options_of_arguments(leaves) or None
        )

    @property
    def output_shapes(self) -> Any:
        """Shapes and shardings of what it returns."""
        return jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            self._compiled.out_info,
            self._compiled.output_shardings,
        )

    def __call__(self, *arguments: Any) -> Any:
        leaves = jax.tree.leaves(arguments)
        return self._compiled(*map(_put_host_array, leaves, self._shardings))


def _put_host_array(leaf: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Return a host array as one on the devices that are to have parts of it."""
    if not isinstance(leaf, np.ndarray) or sharding is None or sharding.is_fully_replicated:
        return leaf
    # Every process has the whole array, and puts the parts of its own devices there. `device_put`
    # would ask the other processes whether theirs is equal, in a collective for each array.
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
