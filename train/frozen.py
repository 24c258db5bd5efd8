"""What a step trains, and what it leaves alone: parameters marked `frozen` (`layers.param`)."""

import jax
from flax import nnx

from m1_jax import model as model_lib


def split(model: model_lib.MiniMaxM1) -> tuple[model_lib.MiniMaxM1, model_lib.MiniMaxM1]:
    """Return the model with its trained parameters alone, and with its frozen ones.

    The others are None, which to JAX is a tree without leaves: nothing to differentiate, and no
    moments to keep.
    """

    def part(frozen: bool):
        def one(param):
            return param if param.get_metadata()["frozen"] == frozen else param.replace(None)

        return jax.tree.map(one, model, is_leaf=_is_param)

    return part(False), part(True)


def join(trained: model_lib.MiniMaxM1, frozen: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
    """Undo `split`."""

    def one(a, b):
        return b if a.get_metadata()["frozen"] else a

    return jax.tree.map(one, trained, frozen, is_leaf=_is_param)


def _is_param(node) -> bool:
    return isinstance(node, nnx.Param)
