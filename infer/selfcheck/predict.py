"""Command: predict the times of m1-selfcheck's programs for every TPU generation. No TPU is needed.

    python -m infer.selfcheck.predict [--generations=v5e,v5p,v6e,tpu7x] [--out=FILE]

It compiles each program ahead of time, as m1-plan does, and writes what m1_jax/plan predicts of it
to `predicted_times.json`, which the wheel has. Run it where kernels, programs or the model of time
have changed.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import tqdm

from infer.selfcheck import predictions, programs
from m1_jax import compiler_options, durable, measured_choices
from m1_jax.plan import aot, chip_specs, time_prediction, topology
from pallas_kernels.lightning_attention import tiling

# One chip of each generation.
SLICES = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


def get_device(generation: str) -> Any:
    """Return a device to compile for.

    Raises:
      TopologyError: libtpu is missing, or does not know the generation.
    """
    return topology.get_slice_devices(topology.parse_slice(SLICES[generation]))[0]


def trace_program(program: programs.TimedProgram, generation: str, device: Any) -> Any:
    """Trace a program for a device of a generation, from shapes."""
    where = jax.sharding.SingleDeviceSharding(device)

    def add_sharding(shape):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    shapes = jax.eval_shape(program.make_arguments, jax.random.key(0))
    with tiling.compile_for(generation):
        return program.jit_step().trace(*jax.tree.map(add_sharding, shapes))


def predict_program(
    program: programs.TimedProgram, generation: str, device: Any, limit_bytes: float
) -> dict[str, float]:
    """Return the predicted seconds of one call, by model.

    Raises:
      ValueError: a program that does not fit, or of which the compiler told nothing.
    """
    traced = trace_program(program, generation, device)
    options = compiler_options.options_for(device)
    with tiling.compile_for(generation):
        result = aot.compile_program(traced, limit_bytes, options)
    if not result.fits or not result.codegen_text:
        raise ValueError(
            f"{program.name} on {generation}: needs {result.needed_bytes / 1e9:.1f} GB of "
            f"{result.limit_bytes / 1e9:.1f}; wanted a program that fits, and its schedule"
        )
    chip = chip_specs.CHIP_SPECS[generation]
    times = time_prediction.predict_time(result.codegen_text, chip, program.assumptions)
    uncovered = times[time_prediction.LOW].uncovered_loops
    if uncovered:
        raise ValueError(f"{program.name}: loops of unknown length: {uncovered}")
    # Three digits are more than a prediction has.
    return {model: float(f"{time.secs:.3g}") for model, time in times.items()}


def list_device_programs(limit_bytes: float) -> list[programs.TimedProgram]:
    """Return the programs that m1-selfcheck times on a TPU of so much memory."""
    return programs.list_programs(programs.make_sizes(False, limit_bytes), "tpu")


def update_file(path: pathlib.Path, generations: list[str]) -> None:
    """Write the figures of some generations, program after program.

    Other figures in the file stay, if versions are the same.
    """
    versions = {name: measured_choices.package_version(name) for name in ("jax", "libtpu")}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    by_generation = known["programs"] if known.get("versions") == versions else {}
    for generation in generations:
        device = get_device(generation)
        limit_bytes = aot.probe_hbm_limit_bytes(device)
        figures: dict[str, dict[str, float]] = {}
        for program in tqdm.tqdm(list_device_programs(limit_bytes), generation):
            figures[program.name] = predict_program(program, generation, device, limit_bytes)
            by_generation[generation] = figures
            ordered = {name: by_generation[name] for name in SLICES if name in by_generation}
            content = {"versions": versions, "programs": ordered}
            durable.write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generations", default=",".join(SLICES))
    parser.add_argument("--out", type=pathlib.Path, default=predictions.DATA_FILE)
    arguments = parser.parse_args()
    generations = arguments.generations.split(",")
    if unknown := sorted(set(generations) - SLICES.keys()):
        parser.error(f"--generations: got {unknown}; wanted some of {', '.join(SLICES)}")
    update_file(arguments.out, generations)


if __name__ == "__main__":
    main()
