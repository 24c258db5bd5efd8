"""Command: write the model of a run's checkpoint as a converted directory.

    python -m train.export --workdir=RUN --dst=DIR [--step=N] [--dtype=bfloat16]
    python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR

The run may be one of pretraining, fine-tuning or reinforcement learning. LoRA adapters are merged.
The second command turns the result into a directory in the release's format.
"""

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from absl import app, flags, logging

from m1_jax import command_help
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, loop, lora, run_model, run_setup
from train import step as step_lib
from train import workdir as workdir_lib
from train.rl import config as rl_config
from train.rl import loop as rl_loop

RestoreState = Callable[[checkpoints.CheckpointStore, int], step_lib.TrainState]


def run(workdir, dst, step: int | None = None, dtype: str = "") -> pathlib.Path:
    """Write the model of a run's checkpoint.

    Args:
      workdir: directory of the run.
      dst: the directory to make.
      step: step of the checkpoint. None takes the newest.
      dtype: dtype of the parameters on disk. Empty takes that of the computation. Routers stay
        float32.

    Returns:
      The path of `dst`.

    Raises:
      ResumeError: the directory has no run, or the run has no such checkpoint.
      FileExistsError: `dst` exists.
    """
    config, restore_state = _open_run(pathlib.Path(workdir))
    with checkpoints.CheckpointStore(pathlib.Path(workdir), config.save) as store:
        steps = store.all_steps()
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise checkpoints.ResumeError(f"{workdir}: got step {step}; wanted one of {steps}")
        # The moments are read, too: the digest covers them.
        state = restore_state(store, step)
    dtype = dtype or config.dtype
    save_lib.save(
        lora.merge_adapters(state.model), dst, config.checkpoint or None, jnp.dtype(dtype)
    )
    # `save` copies the small files of the first checkpoint. A run from random weights has none.
    if not config.checkpoint:
        format_lib.copy_small_files(pathlib.Path(config.tokenizer), pathlib.Path(dst))
    return pathlib.Path(dst)


def _open_run(workdir: pathlib.Path) -> tuple[Any, RestoreState]:
    """Return the config of a directory's run, and the function that restores its states."""
    file = workdir / workdir_lib.CONFIG_FILE
    # Only the config of an RL run has a field `rollout`.
    if file.exists() and "rollout" in json.loads(file.read_text()):
        return _open_rl_run(rl_loop.resolve_rl_config(None, workdir))
    setup = run_setup.make_train_setup(loop.resolve_train_config(None, workdir))
    return setup.config, setup.restore_state


def _open_rl_run(config: rl_config.RlConfig) -> tuple[rl_config.RlConfig, RestoreState]:
    model = run_model.make_run_model(config)
    # The trainer's layout. The sampler's is not needed.
    layout, _ = rl_loop.make_layouts(config, model.config)
    optimizer = rl_loop.make_optimizer(config)
    return config, lambda store, step: model.restore_state(store, step, layout, optimizer)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    try:
        run(values.workdir, values.dst, values.step, values.dtype)
    except (ValueError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))


def cli() -> None:
    flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
    flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
    flags.DEFINE_integer("step", None, "Step of the checkpoint. The default is the newest.")
    flags.DEFINE_enum(
        "dtype", "", ["", "bfloat16", "float32"], "Dtype of parameters on disk. Empty: the run's."
    )
    command_help.prepare_help(__doc__, __name__)
    app.run(main)


if __name__ == "__main__":
    cli()
