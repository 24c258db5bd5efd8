"""Command: recompute a golden file's numbers from a checkpoint and compare.

    python -m m1_jax.verify --checkpoint=DIR --golden=FILE.npz [--mesh=expert=8,tensor=8]

Prints one row per quantity. The exit status is 0 if all are within tolerance, else 1.
With --distributed the same command runs on every host: process 0 reads the golden file and prints,
and all compute. Each device holds its part of the weights alone.

Whatever the dtype of the parameters, all is computed in float32: the release's weights are bfloat16
numbers, which lose nothing in half of the memory, while results in bfloat16 would verify nothing.

`golden_file.py` lists the keys of a golden file. A quantity whose key is absent is not compared.
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import flags, logging

from m1_jax import (
    command_help,
    command_mesh,
    distributed,
    golden_comparison,
    memory_check,
    multihost,
    sharding,
)
from m1_jax import config as config_lib
from m1_jax import golden_file as golden_lib
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from m1_jax.checkpoints import load as load_lib


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """What to compare with what."""

    checkpoint: str  # directory that `m1_jax.load` reads
    golden: str  # path of the .npz file
    progress: bool = True  # whether to show a progress bar
    dtype: str | None = None  # of parameters. None: float32 on CPU, bfloat16 elsewhere
    mesh: str | None = None  # axis=size,... None: the default of all commands
    lightning: str | None = None  # as `ModelConfig.lightning_implementation`

    def __post_init__(self):
        command_mesh.check_model_flags(self.dtype, self.mesh, self.lightning)


def run(config: VerifyConfig) -> list[golden_comparison.ComparisonRow]:
    """Return a row per quantity of the golden file.

    With several processes, all of them call this, and process 0 alone reads the golden file.

    Raises:
      ValueError: a golden file that is damaged, empty, or made with another model, or a model that
        cannot fit.
      CheckpointError, ConfigError: a directory that is not a complete checkpoint.
    """
    dtype = command_mesh.resolve_dtype(config.dtype)
    inputs = distributed.run_on_first(
        lambda: (
            load_lib.read_config(config.checkpoint),
            golden_lib.read_golden_arrays(config.golden),
        )
    )
    model_config, arrays = multihost.broadcast_object(inputs)

    def plan() -> tuple[sharding.MeshLayout | None, golden_lib.GoldenFile]:
        layout = command_mesh.make_command_layout(config.mesh, model_config, sharding.PREFILL)
        golden = golden_lib.GoldenFile(config.golden, arrays, model_config, layout)
        memory_check.check_memory(_make_memory_job(config, model_config, golden), layout, dtype)
        return layout, golden

    layout, golden = distributed.run_on_all(plan)
    model = distributed.run_on_all(
        lambda: load_lib.load(
            config.checkpoint,
            jnp.float32,
            mesh=layout,
            param_dtype=command_mesh.DTYPES[dtype],
            lightning=config.lightning,
        )
    )
    shows_progress = config.progress and distributed.is_first_process()
    return golden_comparison.compare_golden(model, golden, shows_progress)


def _make_memory_job(
    config: VerifyConfig, model_config: config_lib.ModelConfig, golden: golden_lib.GoldenFile
) -> memory_check.MemoryJob:
    """Return what the comparisons need memory for."""
    models = {
        name: params_lib.abstract_model(model_config, dtype)
        for name, dtype in command_mesh.DTYPES.items()
    }
    has_gradients = any(key == "loss" or key.startswith("grad/") for key in golden.arrays)
    num_rows, length = golden["input_ids"].shape

    def count_parts(layout: sharding.MeshLayout | None, dtype: str) -> dict[str, int]:
        parameters = memory_check.local_param_bytes(models[dtype], layout)
        gradient_bytes = memory_check.local_param_bytes(models["float32"], layout)
        if dtype != "float32":  # the parameters are there in float32, too
            gradient_bytes *= 2
        gradients = {"gradients": gradient_bytes} if has_gradients else {}
        all_rows = num_rows * golden_lib.count_row_copies(layout, num_rows)
        state = jax.eval_shape(
            lambda: state_lib.init_decode_state(model_config, all_rows, length, jnp.float32)
        )
        mesh_layout = memory_check.as_mesh_layout(layout, sharding.PREFILL)
        shapes = memory_check.shard_shapes(
            state, state_lib.decode_state_specs(state, mesh_layout), mesh_layout
        )
        return {"parameters": parameters, **gradients, "states": memory_check.local_bytes(shapes)}

    weights = None
    sizes = (num_rows, length, weights, count_parts)
    mode, checkpoint = sharding.PREFILL, config.checkpoint
    return memory_check.MemoryJob("prefill", mode, model_config, checkpoint, *sizes)


def format_table(rows: list[golden_comparison.ComparisonRow]) -> str:
    """Return the rows as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'quantity':{width}}  difference  tolerance  measure"]
    for row in rows:
        mark = "ok" if row.passed else "FAILED"
        lines.append(
            f"{row.name:{width}}  {row.difference:10.2e}  {row.tolerance:9.0e}  "
            f"{row.measure:18}  {mark}"
        )
    return "\n".join(lines)


def main(_) -> None:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # nothing but the table, unless asked for more
    distributed.run_to_exit(_run_command, one_line=False)


def _run_command() -> int:
    """Run with the flags, and return the exit status, which all processes share."""
    values = flags.FLAGS
    fields = dataclasses.fields(VerifyConfig)
    config = VerifyConfig(**{field.name: getattr(values, field.name) for field in fields})
    with distributed.join_processes(values.distributed):
        rows = run(config)
    failed = sum(not row.passed for row in rows)
    if distributed.is_first_process():
        print(format_table(rows))
        print(f"{len(rows) - failed} of {len(rows)} within tolerance")
    return 1 if failed else 0


def _define_flags() -> None:
    with command_help.flag_group("What to compare"):
        flags.DEFINE_string("checkpoint", None, "Directory of the checkpoint.", required=True)
        flags.DEFINE_string("golden", None, "The .npz file to compare with.", required=True)
        flags.DEFINE_bool("progress", True, "Show a progress bar.")
    with command_help.flag_group("Model and devices"):
        flags.DEFINE_string("dtype", None, f"Of the parameters. {command_mesh.DTYPE_HELP}")
        flags.DEFINE_string("mesh", None, command_mesh.MESH_HELP)
        flags.DEFINE_string("lightning", None, command_mesh.LIGHTNING_HELP)
        flags.DEFINE_bool("distributed", False, distributed.DISTRIBUTED_HELP)


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
