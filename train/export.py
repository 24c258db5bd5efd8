"""Command: write the model of a run's checkpoint as a converted directory.

    python -m train.export --workdir=RUN --dst=DIR [--step=N] [--dtype=bfloat16] [--mesh=fsdp=8]
    python -m m1_jax.convert --to=hf --src=DIR --dst=RELEASE_DIR

The run may be one of pretraining, fine-tuning or reinforcement learning. LoRA adapters are merged
into their weights, in float32. The sum is rounded to the dtype on disk, the run's own by default:
bfloat16 loses changes below half of its step, which --dtype=float32 keeps.
A checkpoint is restored onto the run's mesh, or onto that of --mesh. With --distributed the same
command runs on every host, and each writes the parts of its own devices.
The second command turns the result into a directory in the release's format.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
from absl import flags, logging

from m1_jax import (
    command_help,
    command_mesh,
    configlib,
    distributed,
    local_path,
    memory_check,
    sharding,
)
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import save as save_lib
from train import checkpoints, lora, optim, resume, run_model, run_setup
from train import config as config_lib
from train.rl import config as rl_config
from train.rl import loop as rl_loop


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A run whose checkpoints can be restored.

    Attributes:
      config: the run's config.
      model: the run's model, without weights so far.
      layout: where its parameters come to lie. None: on one device.
      optimizer: what decides which moments a state has.
    """

    config: config_lib.TrainConfig | rl_config.RlConfig
    model: run_model.RunModel
    layout: sharding.MeshLayout | None
    optimizer: optim.AdamW


def run(
    workdir, dst, step: int | None = None, dtype: str = "", mesh: str | None = None
) -> pathlib.Path:
    """Write the model of a run's checkpoint. With several processes, all of them call this.

    Args:
      workdir: directory of the run.
      dst: the directory to make.
      step: step of the checkpoint. None takes the newest.
      dtype: dtype of the parameters on disk. Empty takes that of the computation. Routers stay
        float32.
      mesh: axis=size,... of the devices that are here. None takes the run's mesh.

    Returns:
      The path of `dst`.

    Raises:
      ResumeError: the directory has no run, or the run has no such checkpoint.
      FileExistsError: `dst` exists.
      ValueError: a mesh of other devices, or a state that cannot fit.
    """
    workdir = local_path.resolve_path(workdir, "workdir")
    dst = local_path.resolve_path(dst, "dst")
    source = distributed.run_on_all(lambda: _open_run(workdir, dst, mesh))
    config = source.config
    base_digest = run_model.digest_base(source.model)
    with checkpoints.CheckpointStore(workdir, config.save, base_digest, read_only=True) as store:
        chosen_step = distributed.run_on_all(lambda: store.choose_step(step))
        # The checkpoint's own adapters: those of the run's config may have changed since.
        own = distributed.run_on_all(lambda: store.read_info(chosen_step)).config["lora"]
        own_lora = None if own is None else configlib.from_json(lora.LoraConfig, own)
        model = dataclasses.replace(source.model, lora=own_lora)
        # The moments are read, too: the digest covers them.
        state = distributed.run_on_all(
            lambda: model.restore_state(store, chosen_step, source.layout, source.optimizer)
        )
    stored_dtype = jnp.dtype(dtype or config.dtype)
    distributed.run_on_all(
        lambda: save_lib.save(
            # Rounded once, to what is stored.
            lora.merge_adapters(state.model, stored_dtype),
            dst,
            config.checkpoint or None,
            stored_dtype,
        )
    )
    # `save` copies the small files of the first checkpoint. A run from random weights has none.
    if not config.checkpoint:
        distributed.run_on_first(
            lambda: format_lib.copy_small_files(
                local_path.resolve_path(config.tokenizer, "tokenizer"), dst
            )
        )
    return dst


def _open_run(workdir: pathlib.Path, dst: pathlib.Path, mesh: str | None) -> ExportSource:
    """Open a directory's run. No weights are read."""
    if dst.exists():
        raise FileExistsError(f"{dst} exists; wanted a new directory. Remove it or choose another.")
    file = workdir / resume.CONFIG_FILE
    # Only the config of an RL run has a field `rollout`.
    if file.exists() and "rollout" in json.loads(file.read_text()):
        config = resume.read_config(rl_config.RlConfig, workdir)
        model = run_model.make_run_model(config)
        # The trainer's mesh. The sampler's is not needed.
        layout = _make_layout(mesh, dict(config.mesh), model)
        source = ExportSource(config, model, layout, rl_loop.make_optimizer(config))
        rows, tokens = config.update.rows, config.rollout.max_sample_tokens
    else:
        config = resume.read_config(config_lib.TrainConfig, workdir)
        model = run_model.make_run_model(config, config.model)
        last_stage = config.stages[-1]
        layout = _make_layout(mesh, dict(last_stage.mesh), model)
        setup = run_setup.TrainSetup(config, model, (layout,) * len(config.stages))
        source = ExportSource(config, model, layout, setup.step_settings(-1).optimizer)
        rows, tokens = last_stage.rows, last_stage.seq_len
    job = _make_memory_job(source, rows, tokens)
    memory_check.check_memory(job, layout, model.param_dtype.name)
    return source


def _make_layout(
    mesh: str | None, run_axes: dict[str, int], model: run_model.RunModel
) -> sharding.MeshLayout | None:
    axes = command_mesh.parse_axis_sizes(mesh) if mesh else run_axes
    try:
        device_mesh = run_model.make_train_mesh(axes)
    except ValueError as error:
        if mesh:
            raise
        raise ValueError(f"{error} It is the run's mesh: give --mesh for others.") from None
    return sharding.make_layout(device_mesh, model.config, sharding.TRAIN)


def _make_memory_job(source: ExportSource, rows: int, tokens: int) -> memory_check.MemoryJob:
    """Return what a restored state needs memory for, adapters left out."""
    model, dtype = source.model, source.model.param_dtype
    abstract_model = params_lib.abstract_model(model.config, dtype)

    # A state has one dtype wherever it lies.
    def count_parts(layout: sharding.MeshLayout | None, _: str) -> dict[str, int]:
        parameters = memory_check.local_param_bytes(abstract_model, layout)
        # AdamW's two moments have the shape of what is trained.
        moments = {"moments": 2 * parameters} if model.lora is None else {}
        return {"parameters": parameters, **moments}

    return memory_check.MemoryJob(
        "train",
        sharding.TRAIN,
        model.config,
        # A run from random weights has no directory of a model: the planner's own name is the
        # release's sizes.
        model.checkpoint or "m1",
        rows,
        tokens,
        None,
        count_parts,
    )


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)
    distributed.run_to_exit(_run_command)


def _run_command() -> int:
    values = flags.FLAGS
    with distributed.join_processes(values.distributed):
        run(values.workdir, values.dst, values.step, values.dtype, values.mesh)
    return 0


def cli() -> None:
    with command_help.flag_group("What to export"):
        flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
        flags.DEFINE_string("dst", None, "Directory to make; must not exist.", required=True)
        flags.DEFINE_integer("step", None, "Step of the checkpoint. Default: the newest.")
        flags.DEFINE_enum(
            "dtype",
            "",
            ["", "bfloat16", "float32"],
            "Dtype of parameters on disk, to which merged adapters are rounded. Default: that of "
            "the run.",
        )
    with command_help.flag_group("Devices"):
        text = "Devices along each axis, such as fsdp=2,expert=4. Default: the run's mesh."
        flags.DEFINE_string("mesh", None, text)
        flags.DEFINE_bool("distributed", False, distributed.DISTRIBUTED_HELP)
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
