"""Programs on a mesh: each device runs them on its own partition of rows, slots and pages.

The devices of one place on the mesh's batch axes are a group, and have a partition
(`serving/state.py`). Arrays by row have the rows of a partition one after another.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from infer.execution import sampling, slot_sampling
from m1_jax import collectives, sharding
from m1_jax import model as model_lib
from m1_jax.serving import state as state_lib


def run_on_partitions(
    function: Callable,
    row_dim: int,
    model: model_lib.MiniMaxM1,
    state: state_lib.ServingState,
    sampling_state: slot_sampling.SlotSamplingState,
    batch: slot_sampling.SequenceBatch,
    *arguments: Any,
) -> tuple[state_lib.ServingState, slot_sampling.SlotSamplingState, sampling.ChosenTokens]:
    """Return function(model, state, sampling_state, batch, *arguments), run on each partition.

    Args:
      function: returns both states, and what it chose.
      row_dim: the dimension of rows in what it chose.
      *arguments: numbers that are the same everywhere, and arrays by row, which are split.
    """
    layout = model.layout
    if layout is None:
        return function(model, state, sampling_state, batch, *arguments)

    def run_local(model, state, sampling_state, batch, *arguments):
        batch = slot_sampling.localize_batch(batch, state, sampling_state)
        *states, chosen = function(model, state, sampling_state, batch, *arguments)
        chosen = jax.tree.map(lambda a: collectives.all_gather(a, "batch", row_dim), chosen)
        return *states, chosen

    state_specs = (
        state_lib.serving_state_specs(state, layout),
        slot_sampling.sampling_state_specs(sampling_state, layout),
    )
    row_specs = jax.tree.map(lambda a: _row_spec(layout, a), (batch, *arguments))
    program = sharding.run_sharded(
        layout,
        run_local,
        (sharding.param_specs(layout, model), *state_specs, *row_specs),
        (*state_specs, PartitionSpec()),
    )
    return program(model, state, sampling_state, batch, *arguments)


def shard_rows(arguments: Any, layout: sharding.MeshLayout) -> Any:
    """Return what programs take beside weights and state, arrays or shapes, as sharded shapes."""

    def add_sharding(a):
        spec = _row_spec(layout, a)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(layout.mesh, spec))

    return jax.tree.map(add_sharding, arguments)


def _row_spec(layout: sharding.MeshLayout, array: Any) -> PartitionSpec:
    return layout.activation_spec("batch") if array.ndim else PartitionSpec()
