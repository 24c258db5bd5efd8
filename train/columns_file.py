"""Named numpy arrays of the host as an item of a checkpoint, in numpy's own format (npz).

Orbax writes arrays of devices, and JSON. What a run keeps of its samples is neither. It has numbers
for every token, of which JSON would need a multiple of the space and of the time.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_FILE = "columns.npz"


class ColumnsHandler(ocp.CheckpointHandler):
    """Writes `ColumnsSave`, on process 0 alone."""

    def save(self, directory: epath.Path, args: "ColumnsSave") -> None:
        """Write the arrays below a directory that exists."""
        if jax.process_index():
            return
        with (directory / _FILE).open("wb") as file:
            np.savez(file, **args.columns)  # type: ignore[arg-type]

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, np.ndarray]:
        """Return the arrays that `save` wrote."""
        del args
        return read_columns(directory)


@ocp.args.register_with_handler(ColumnsHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class ColumnsSave(ocp.args.CheckpointArgs):
    """The arrays to write, by name."""

    columns: Mapping[str, np.ndarray]


def read_columns(directory: epath.Path) -> dict[str, np.ndarray]:
    """Return the arrays of an item, {} if there is none."""
    path = directory / _FILE
    if not path.exists():
        return {}
    with path.open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}
