"""Named numpy arrays of the host as an item of a checkpoint, in numpy's own format (npz).

Orbax writes arrays of devices, and JSON. What a run keeps of its samples is neither. It has numbers
for every token, of which JSON would need a multiple of the space and of the time.
"""

import dataclasses
import io
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
        # In memory first, because a file in a bucket cannot be written at any position.
        buffer = io.BytesIO()
        np.savez(buffer, **args.columns)  # type: ignore[arg-type]
        (directory / _FILE).write_bytes(buffer.getvalue())

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
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return {name: arrays[name] for name in arrays.files}
