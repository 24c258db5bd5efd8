"""Which parameters a step trains: all but those marked `frozen` (`layers.make_param`)."""

from m1_jax import model as model_lib
from m1_jax import sharding


def partition(model: model_lib.MiniMaxM1) -> tuple[model_lib.MiniMaxM1, model_lib.MiniMaxM1]:
    """Return the model with its trained parameters alone, and with its frozen ones alone.

    The values of the other parameters are None, which to JAX is a tree without leaves. So there is
    nothing to differentiate, and there are no moments to keep.
    """

    def select(frozen: bool):
        def select_param(param):
            return param if param.get_metadata()["frozen"] == frozen else param.replace(None)

        return sharding.map_params(select_param, model)

    return select(False), select(True)


def combine(trained: model_lib.MiniMaxM1, frozen: model_lib.MiniMaxM1) -> model_lib.MiniMaxM1:
    """Undo `partition`."""

    def choose_param(trained_param, frozen_param):
        # Both have the metadata. Only one of them has a value.
        return frozen_param if trained_param.get_metadata()["frozen"] else trained_param

    return sharding.map_params(choose_param, trained, frozen)
