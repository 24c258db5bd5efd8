"""Values of models and pytrees as numpy arrays, for tests that compare them."""

import jax
import numpy as np

from m1_jax import params as params_lib


def param_values(model):
    """Return every parameter of a model as a numpy array, by path."""
    return {name: np.asarray(p.get_value()) for name, p in params_lib.params_by_path(model).items()}


def tree_leaves(tree):
    """Return every array of a pytree as a numpy array."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
