"""What a step trains, and what it leaves alone: parameters marked `frozen` (`layers.make_param`)."""

from m1_jax import model as model_lib
from m1_jax import sharding


def partition(model: model_lib.MiniMaxM1) -> tuple[model_lib.MiniMaxM1, model_lib.MiniMaxM1]:
    """Return the model with its trained parameters alone, and with its frozen ones.

    The others are None, which to JAX is a tree without leaves: nothing to differentiate, and no
    moments to keep.
    """

    def part(frozen: bool):
        def one(param):
            return param if param.get_metadata()["frozen"] == frozen else param.replace(None)

        return sharding.map_params(one, model)

    return part(False), part(True)


def combine(trained: model_lib.MiniMaxM1, frozen: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
    """Undo `partition`."""

    def one(ours, theirs):
        return theirs if ours.get_metadata()["frozen"] else ours

    return sharding.map_params(one, trained, frozen)
