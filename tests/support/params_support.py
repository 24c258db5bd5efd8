"""Values of a model's parameters, for tests that compare models."""

import numpy as np

from m1_jax import params as params_lib


def param_values(model):
    """Return every parameter of a model as a numpy array, by path."""
    return {name: np.asarray(p.get_value()) for name, p in params_lib.params_by_path(model).items()}
