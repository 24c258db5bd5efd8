"""Checkpoints of a run with Orbax: state, data position and config in one atomic unit.

A checkpoint holds
    state/   parameters and moments by their paths, in float32; restored onto any mesh
    data/    where every source stands, of all processes
    run/     the resolved config, and a digest of the state
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from m1_jax import multihost
from train import config as config_lib
from train import step as step_lib
from train import trainable


class ResumeError(ValueError):
    """A checkpoint that this run cannot go on from; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint knows beside arrays. data: of `data.BatchStream.get_state`, all processes'."""

    step: int
    data: dict[str, Any]
    config: dict[str, Any]
    digest: int


class CheckpointStore:
    """The checkpoints below a run's directory; a context that waits for the last one to land."""

    def __init__(self, directory: pathlib.Path, save: config_lib.SaveConfig):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=save.keep,
            keep_period=save.keep_every or None,
            cleanup_tmp_directories=True,  # what a killed process left half written
            enable_async_checkpointing=True,
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        place = epath.Path(save.directory) if save.directory else epath.Path(directory.resolve())
        self._manager = ocp.CheckpointManager(
            place / "checkpoints", item_handlers=handlers, options=options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, state: step_lib.TrainState, data: dict, config: dict, step: int | None = None
    ) -> None:
        """Write a checkpoint; arrays are copied before this returns, files land behind it.

        number: that it goes by; None takes the state's step.
        """
        run = {"config": config, "digest": int(digest_state(state))}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flatten_state(state)),
            data=ocp.args.JsonSave(_merge_across_processes(data)),
            run=ocp.args.JsonSave(run),
        )
        step = int(state.step) if step is None else step
        self._manager.save(step, args=items, force=True)

    def read_info(self, step: int) -> CheckpointInfo:
        """Return what a checkpoint says of itself, without its arrays."""
        items = ocp.args.Composite(data=ocp.args.JsonRestore(), run=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return CheckpointInfo(step=step, data=found["data"], **found["run"])

    def restore(self, step: int, like: step_lib.TrainState) -> step_lib.TrainState:
        """Read a state onto the shapes and shardings of `like`.

        Raises:
          ResumeError: a checkpoint of another model, or one whose arrays are not what was saved.
        """
        wanted = flatten_state(like)
        saved = self._manager.item_metadata(step)["state"].tree
        shapes = {name: tuple(meta.shape) for name, meta in saved.items()}
        for name, leaf in wanted.items():
            if shapes.get(name) != leaf.shape:
                raise ResumeError(
                    f"checkpoint of step {step}: {name} has shape {shapes.get(name)}; the model "
                    f"wants {leaf.shape}. Is it another model's? Give a new --workdir."
                )
        places = {
            name: ocp.ArrayRestoreArgs(
                dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape
            )
            for name, leaf in wanted.items()
        }
        items = ocp.args.Composite(state=ocp.args.PyTreeRestore(wanted, restore_args=places))
        state = unflatten_state(self._manager.restore(step, args=items)["state"], like)
        expected, got = self.read_info(step).digest, int(digest_state(state))
        if got != expected:
            raise ResumeError(
                f"checkpoint of step {step} is damaged: its digest is {got}, but {expected} was "
                "saved. Delete it to go on from the one before."
            )
        return state


def flatten_state(state: step_lib.TrainState) -> dict[str, Any]:
    """Return what a run changes of a state, by path: all leaves but frozen parameters."""
    own = dataclasses.replace(state, model=trainable.partition(state.model)[0])
    leaves = jax.tree_util.tree_leaves_with_path(own)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def unflatten_state(leaves: dict[str, Any], like: step_lib.TrainState) -> step_lib.TrainState:
    """Return another state with the leaves that `flatten_state` gave in place of its own."""
    own, rest = trainable.partition(like.model)
    shape = jax.tree.structure(dataclasses.replace(like, model=own))
    state = jax.tree.unflatten(shape, [leaves[name] for name in flatten_state(like)])
    return dataclasses.replace(state, model=trainable.combine(state.model, rest))


@jax.jit
def digest_state(state: step_lib.TrainState) -> jax.Array:
    """Return one number of all bits of `flatten_state`, the same on any mesh."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in flatten_state(state).values():
        total = total * jnp.uint32(31) + _sum_bits(leaf)
    return total


def _sum_bits(leaf: jax.Array) -> jax.Array:
    """Return the sum of a float32 or int32 leaf's words, modulo 2^32.

    Integers add up in any order, so the sum does not depend on how the leaf is sharded. Each word
    is multiplied by an odd number of its position, so that swapped values do not cancel.
    """
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    for dim in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        words = words * (index * jnp.uint32(2654435761) + jnp.uint32(2 * dim + 1) | 1)
    return jnp.sum(words, dtype=jnp.uint32)


def _merge_across_processes(data: dict) -> dict:
    """Merge every process's dict; a small JSON of each goes over the network."""
    if jax.process_count() == 1:
        return data
    merged: dict = {}
    for text in multihost.allgather_bytes(json.dumps(data).encode()):
        merged = _merge_dicts(merged, json.loads(text))
    return merged


def _merge_dicts(left: dict, right: dict) -> dict:
    both = dict(left)
    for key, value in right.items():
        nested = isinstance(both.get(key), dict) and isinstance(value, dict)
        both[key] = _merge_dicts(both[key], value) if nested else value
    return both
