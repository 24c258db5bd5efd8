"""Checkpoints of a run with Orbax: state, position in the data and config in one atomic unit.

A checkpoint holds
    state/   trained parameters and moments by their paths, in float32
    data/    the position in every source, of all processes
    run/     the resolved config, a digest of the state, and one of the frozen weights' files
    columns/ in RL, the tokens of samples that wait for a batch

A state can be restored onto any mesh.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from m1_jax import local_path, multihost
from train import columns_file, trainable
from train import config as config_lib
from train import step as step_lib

# What Orbax and TensorStore raise for files that are damaged or missing.
_READ_ERRORS = (ValueError, OSError, KeyError, TypeError, AttributeError)


class ResumeError(ValueError):
    """This run cannot go on from a checkpoint. The message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds beside arrays."""

    step: int  # steps made before it
    data: dict[str, Any]  # `stream.BatchStream.get_state` of all processes, merged
    config: dict[str, Any]  # the run's config, as `configlib.to_json` gives it
    digest: int  # `digest_state` of the state
    # `base_digest.digest_weights` of the config's checkpoint where its weights stay in use, else ""
    base_digest: str = ""


def find_save_directory(workdir: pathlib.Path, save: config_lib.SaveConfig) -> epath.Path:
    """Return the directory whose folder `checkpoints` a run has: a local one, or a bucket's."""
    # Orbax wants absolute paths. A bucket's path is absolute, and epath cannot resolve it.
    if "://" in save.directory:
        return epath.Path(save.directory)
    local = local_path.resolve_path(save.directory or workdir, "save.directory")
    return epath.Path(local.resolve())


class CheckpointStore:
    """The checkpoints below a run's directory.

    As a context, it waits at the end until the last checkpoint is written.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        save: config_lib.SaveConfig,
        base_digest: str = "",
        read_only: bool = False,
    ):
        """Open the store.

        Args:
          directory: directory of the run. The checkpoints lie below it, unless `save` names
            another place.
          save: number of checkpoints that stay, and their place.
          base_digest: see `CheckpointInfo`.
          read_only: whether the checkpoints are another process's, which may be writing some now.
        """
        self.base_digest = base_digest
        self._save_config, self._read_only = save, read_only
        if read_only:
            options = ocp.CheckpointManagerOptions(
                save_interval_steps=0, create=False, read_only=True
            )
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=save.keep,
                keep_period=save.keep_every or None,
                cleanup_tmp_directories=True,  # what a killed process left half written
                enable_async_checkpointing=True,  # files are written while training goes on
            )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
            "columns": columns_file.ColumnsHandler(),
        }
        parent = find_save_directory(directory, save)
        self._manager = ocp.CheckpointManager(
            parent / "checkpoints", item_handlers=handlers, options=options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.close()

    @property
    def directory(self) -> epath.Path:
        """Return where the checkpoints lie."""
        return epath.Path(self._manager.directory)

    def wait(self) -> None:
        """Wait until all saved checkpoints are on the disk."""
        self._manager.wait_until_finished()

    def latest_step(self) -> int | None:
        """Return the step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Return the steps of all checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def choose_step(self, step: int | None) -> int:
        """Return the step of a checkpoint that is there. None takes the newest.

        Raises:
          ResumeError: there is none, or not of this step.
        """
        steps = self.all_steps()
        chosen = max(steps, default=None) if step is None else step
        if chosen is None or chosen not in steps:
            raise ResumeError(f"{self.directory}: got step {chosen}; wanted one of {steps}")
        return chosen

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps. Every process calls this."""
        for later in reversed(self.all_steps()):  # the newest first: what remains has no gap
            if later > step:
                self._manager.delete(later)

    def save(
        self,
        state: step_lib.TrainState,
        data: dict,
        config: dict,
        step: int | None = None,
        columns: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Write a checkpoint. Arrays are copied before this returns, and files are written later.

        Every process calls this. Process 0 alone writes `data`, `config` and `columns`, so those of
        the other processes are ignored.

        Args:
          state: the run's state.
          data: the position in the data, of all processes.
          config: the run's config, as JSON.
          step: number of the checkpoint. None takes the state's step.
          columns: arrays of the host that belong to `data`. None writes no such item.
        """
        run = {
            "config": config,
            "digest": int(digest_state(state)),
            "base_digest": self.base_digest,
        }
        items: dict[str, ocp.args.CheckpointArgs] = {
            "state": ocp.args.PyTreeSave(flatten_state(state)),
            "data": ocp.args.JsonSave(data),
            "run": ocp.args.JsonSave(run),
        }
        if columns is not None:
            items["columns"] = columns_file.ColumnsSave(columns)
        step = int(state.step) if step is None else step
        # force: the caller decides when to save, not the manager's own policy.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def read_info(self, step: int) -> CheckpointInfo:
        """Return what a checkpoint holds beside arrays.

        Raises:
          ResumeError: it is damaged, or was trained beside other frozen weights than the run has.
        """
        items = ocp.args.Composite(data=ocp.args.JsonRestore(), run=ocp.args.JsonRestore())
        with self._name_damage(step):
            restored = self._manager.restore(step, args=items)
            info = CheckpointInfo(step=step, data=restored["data"], **restored["run"])
        # Checkpoints of earlier versions have no such digest.
        if self.base_digest and info.base_digest not in ("", self.base_digest):
            raise ResumeError(
                f"{self.directory}: the checkpoint of step {step} was trained beside other weights "
                f"(digest {info.base_digest}) than those in the config's checkpoint "
                f"({self.base_digest}). Put the old files back, or begin a new run in a new "
                "--workdir."
            )
        return info

    def read_columns(self, step: int) -> dict[str, np.ndarray]:
        """Return the columns of a checkpoint, {} if it has none."""
        directory = epath.Path(self._manager.directory) / str(step)
        return columns_file.read_columns(directory / "columns")

    def restore(self, step: int, like: step_lib.TrainState) -> step_lib.TrainState:
        """Read a state onto the shapes and shardings of `like`.

        Raises:
          ResumeError: the checkpoint is of another model, its arrays are not what was saved, or
            it was trained beside other frozen weights.
        """
        expected = self.read_info(step).digest
        with self._name_damage(step):
            saved = self._manager.item_metadata(step)["state"].tree
            shapes = {name: tuple(meta.shape) for name, meta in saved.items()}
        saved_names = {name: _find_saved_name(name, shapes) for name in flatten_state(like)}
        abstract_leaves = {saved_names[name]: leaf for name, leaf in flatten_state(like).items()}
        for name, leaf in abstract_leaves.items():
            if shapes.get(name) != leaf.shape:
                raise ResumeError(
                    f"{self.directory}: the checkpoint of step {step} has {name} of shape "
                    f"{shapes.get(name)}; the model wants {leaf.shape}. Is it another model's, or "
                    "one with other adapters? Give a new --workdir, and as the config's checkpoint "
                    "what m1-export makes of it."
                )
        restore_args = {
            name: ocp.ArrayRestoreArgs(
                dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape
            )
            for name, leaf in abstract_leaves.items()
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(abstract_leaves, restore_args=restore_args)
        )
        with self._name_damage(step):
            leaves = self._manager.restore(step, args=items)["state"]
        state = unflatten_state({name: leaves[saved_names[name]] for name in saved_names}, like)
        actual = int(digest_state(state))
        if actual != expected:
            reason = f"its digest is {actual}, but {expected} was saved"
            raise self._make_damage_error(step, reason)
        return state

    @contextlib.contextmanager
    def _name_damage(self, step: int) -> Iterator[None]:
        """Raise ResumeError where reading a checkpoint within the context fails."""
        try:
            yield
        except Exception as error:
            # Orbax itself raises a bare Exception, whose cause is TensorStore's error.
            if not isinstance(error, _READ_ERRORS) and type(error) is not Exception:
                raise
            raise self._make_damage_error(step, error.__cause__ or error) from None

    def _make_damage_error(self, step: int, reason: object) -> ResumeError:
        if self._read_only and self._was_deleted(step):
            save = self._save_config
            return ResumeError(
                f"{self.directory}: the checkpoint of step {step} was deleted while it was read: "
                f"its run goes on, and keeps save.keep={save.keep} of them. Read the newest of "
                f"{self._list_steps()}, or give the run a larger save.keep or a save.keep_every."
            )
        others = [other for other in self.all_steps() if other != step]
        remedy = f"Go on from another one (--from_step, of {others})"
        return ResumeError(
            f"{self.directory}: the checkpoint of step {step} is damaged "
            f"({' '.join(str(reason).split()):.200}). {remedy if others else 'Begin a new run'}."
        )

    def _list_steps(self) -> list[int]:
        """Return the steps that lie there now. `all_steps` are those when the store was opened."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def _was_deleted(self, step: int) -> bool:
        """Return whether the checkpoints' own run has deleted one, or is about to."""
        steps, save = self._list_steps(), self._save_config
        if step not in steps:
            return True
        if save.keep_every and step % save.keep_every == 0:
            return False
        # Files go one by one, so a part of it may still be there.
        return sum(other > step for other in steps) >= save.keep


def flatten_state(state: step_lib.TrainState) -> dict[str, Any]:
    """Return all leaves of a state but frozen parameters, by path."""
    trained_state = dataclasses.replace(state, model=trainable.partition(state.model)[0])
    leaves = jax.tree_util.tree_leaves_with_path(trained_state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _find_saved_name(name: str, saved: Collection[str]) -> str:
    """Return the name that a checkpoint has for a leaf, or the leaf's own where it has none.

    optax nests the moments one level deeper where there is weight decay.
    """
    if name in saved or not name.startswith("moments."):
        return name
    rest = name.removeprefix("moments.")
    other = f"moments.{rest.removeprefix('0.')}" if rest.startswith("0.") else f"moments.0.{rest}"
    return other if other in saved else name


def unflatten_state(leaves: dict[str, Any], like: step_lib.TrainState) -> step_lib.TrainState:
    """Return `like` with the leaves of `flatten_state` in place of its own.

    Frozen parameters stay those of `like`.
    """
    trained, frozen = trainable.partition(like.model)
    structure = jax.tree.structure(dataclasses.replace(like, model=trained))
    # `flatten_state` has the order of the tree. `leaves` may have another one.
    state = jax.tree.unflatten(structure, [leaves[name] for name in flatten_state(like)])
    return dataclasses.replace(state, model=trainable.combine(state.model, frozen))


@jax.jit
def digest_state(state: step_lib.TrainState) -> jax.Array:
    """Return a number that depends on all bits of `flatten_state`. It is the same on any mesh."""
    digest = jnp.zeros((), jnp.uint32)
    for leaf in flatten_state(state).values():
        # A polynomial, so that swapped leaves do not cancel.
        digest = digest * jnp.uint32(31) + _sum_bits(leaf)
    return digest


def _sum_bits(leaf: jax.Array) -> jax.Array:
    """Return the sum of a float32 or int32 leaf's words, modulo 2^32.

    Integers add up in any order, so the sum does not depend on how the leaf is sharded. Each word
    is multiplied by an odd number of its position, so that swapped values do not cancel.
    """
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    for dim in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        # 2654435761 is 2^32 over the golden ratio, Knuth's multiplicative hash. `| 1` makes the
        # factor odd, hence invertible modulo 2^32: no bit of a word is lost.
        words = words * (index * jnp.uint32(2654435761) + jnp.uint32(2 * dim + 1) | 1)
    return jnp.sum(words, dtype=jnp.uint32)


def merge_on_first(data: dict) -> dict:
    """Return the dicts of all processes, merged, on process 0. The others get {}.

    Every process calls this. Values go over the hosts' network to process 0 alone.
    """
    merged: dict = {}
    for part in multihost.gather_objects(data):
        merged = _merge_dicts(merged, part)
    return merged


def merge_across_processes(data: dict) -> dict:
    """Return the dicts of all processes, merged, on every process."""
    return multihost.broadcast_object(merge_on_first(data))


def _merge_dicts(left: dict, right: dict) -> dict:
    """Return both dicts, with nested dicts merged and other values taken from the right one."""
    merged = dict(left)
    for key, value in right.items():
        nested = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = _merge_dicts(merged[key], value) if nested else value
    return merged
