"""JSON files in the directory of a run: what it was told, and what it decided."""

import json
import pathlib
from typing import Any

from train import checkpoints


def read_run_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the object in a file of a run.

    Raises:
      ResumeError: the file is damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        value, reason = None, str(error) or type(error).__name__
    else:
        reason = f"got {value!r:.80}; wanted an object"
    if not isinstance(value, dict):
        raise checkpoints.ResumeError(
            f"{file} is damaged ({reason}). Put it back, or delete it and give --config: the "
            "newest checkpoint has the config as well."
        )
    return value
