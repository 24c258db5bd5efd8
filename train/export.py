"""Command: a run's checkpoint as a converted directory, LoRA adapters merged; RL runs too.

python -m train.export --workdir=RUN --dst=DIR [--step=N] [--dtype=bfloat16]
python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR
"""

import json
import pathlib
import sys
from typing import Any

import jax.numpy as jnp
from absl import app, flags, logging

from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, loop, lora
from train import workdir as workdir_lib
from train.rl import loop as rl_loop


def run(workdir, dst, step: int | None = None, dtype: str = "") -> pathlib.Path:
    """Write the model of a run's checkpoint, by default the newest, to the new directory `dst`.

    dtype: of the parameters on disk; empty takes that of the computation. Routers stay float32.

    Raises:
      ResumeError: a directory without a run, or without this checkpoint.
      FileExistsError: `dst` exists.
    """
    session = _make_session(pathlib.Path(workdir))
    config = session.config
    with checkpoints.CheckpointStore(pathlib.Path(workdir), config.save) as saved:
        there = saved.all_steps()
        step = max(there, default=None) if step is None else step
        if step not in there:
            raise checkpoints.ResumeError(f"{workdir}: got step {step}; it has {there}")
        state = session.restore_state(saved, step)
    dtype = dtype or config.dtype
    save_lib.save(
        lora.merge_adapters(state.model), dst, config.checkpoint or None, jnp.dtype(dtype)
    )
    if not config.checkpoint:
        format_lib.copy_small_files(pathlib.Path(config.tokenizer), pathlib.Path(dst))
    return pathlib.Path(dst)


def _make_session(workdir: pathlib.Path) -> Any:
    """Return the run of a directory."""
    file = workdir / workdir_lib.CONFIG_FILE
    if file.exists() and "rollout" in json.loads(file.read_text()):
        return rl_loop.RlSession(rl_loop.resolve_rl_config(None, workdir), workdir)
    return loop.TrainSession(loop.resolve_train_config(None, workdir), workdir)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        run(given.workdir, given.dst, given.step, given.dtype)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))


def cli() -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("dst", None, "New directory.", required=True)
    flags.DEFINE_integer("step", None, "Of the checkpoint; by default the newest.")
    flags.DEFINE_enum("dtype", "", ["", "bfloat16", "float32"], "On disk; empty: the run's.")
    app.run(main)


if __name__ == "__main__":
    cli()
