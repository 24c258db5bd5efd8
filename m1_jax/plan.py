"""Command: compile a full-size program ahead of time for a TPU slice, and say what it needs.

    python -m m1_jax.plan --topology=v5p:8x8x8 --job=train|prefill|decode|serve
        [--config=m1|DIR|FILE] [--mesh=fsdp=16,expert=32] [--seq=4096 --batch=512] [--json=FILE]

No TPU is needed, and weights are shapes only. Prints HBM by part, operations and collectives, each
as the compiler has it beside our own count; the exit status is 1 if the program does not fit.
Without --mesh, arithmetic ranks the sensible meshes and the best few are compiled. "A chip" is a
device: on tpu7x half a chip, of which each has two.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from jax.sharding import NamedSharding

from m1_jax import aot, budget, checkpoint, chips, flops, hlo, plan_text, quantize, sharding
from m1_jax import config as config_lib
from m1_jax import state as state_lib
from pallas_kernels.lightning_attention import tiling

PRESETS = {"m1": config_lib.ModelConfig.m1, "tiny": config_lib.ModelConfig.tiny}
LATER = ("rl_update", "reshard")  # their programs come with the code that runs them
LENGTHS = (8_192, 131_072, 1_048_576)  # of which a plan says how many rows fit
TOKENS = 4096  # a chip, where --batch is not given for training


class PlanError(ValueError):
    """A plan that cannot be made; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile, and for what.

    Args:
      topology: a slice, like v5p:8x8x8. slices: how many of them.
      job: train (a whole optimizer step), prefill (seq tokens into an empty state), decode (one
        token each, with room for seq in the cache), serve (the engine's decoding of batch
        requests of seq tokens); rl_update and reshard join later.
      config: m1, tiny, a config.json or a directory that holds one.
      mesh: axis=size, comma separated; empty: search, compiling at most `tries` meshes.
      seq, batch: tokens a row, and rows of all chips; batch 0: 4,096 tokens a chip in training,
        else one row a chip.
      accumulate, remat: of training; see `train.step.Settings` and `ModelConfig`.
      lightning: chunked (XLA) or tpu (the Pallas kernels).
      weights: None (bfloat16) or, where nothing is trained, one of `quantize.RECIPES`.
    """

    topology: str
    job: str
    config: str = "m1"
    mesh: str = ""
    seq: int = 4096
    batch: int = 0
    slices: int = 1
    accumulate: int = 1
    remat: str = "layer"
    lightning: str = "chunked"
    weights: str | None = None
    tries: int = 3
    json: str = ""

    def __post_init__(self):
        if self.job in LATER:
            raise PlanError(
                f"job {self.job}: its program does not exist yet; it joins this command"
            )
        if self.job not in JOBS:
            raise PlanError(f"job: got {self.job!r}; wanted one of {', '.join(JOBS)}")
        if min(self.seq, self.accumulate, self.tries) < 1 or self.batch < 0:
            raise PlanError("seq, batch, accumulate, tries: wanted at least 1 of each")
        quantize.check(self.weights)
        if self.job == "train" and self.weights is not None:
            raise PlanError(f"weights: {self.weights} cannot be trained; leave --weights out")
        if self.lightning not in ("chunked", "tpu"):
            raise PlanError(f"lightning: got {self.lightning!r}; wanted chunked or tpu")


# ---- how a model and its inputs lie on a mesh


def make_layout(config: config_lib.ModelConfig, shape, devices, job: budget.Job):
    """Return the layout of a job on a mesh; raises ValueError where it cannot lie on it."""
    found = sharding.layout(sharding.make_mesh(shape, devices), config, job.mode)
    assert found is not None
    budget.check(job, found)
    return found


def abstract_model(
    config: config_lib.ModelConfig,
    job: str,
    layout: sharding.Layout | None = None,
    weights: str | None = None,
):
    """Return a bfloat16 model of sharded shapes; its parameters are float32 in training."""
    param_dtype = jnp.float32 if job == "train" else jnp.bfloat16
    return checkpoint.abstract_model(config, jnp.bfloat16, param_dtype, layout, weights)


def abstract_rows(layout: sharding.Layout, rows: int, length: int, dtype=jnp.int32) -> Any:
    """Return an array [rows, length] that lies as tokens do; one token has no length to split."""
    where = layout.array("batch", "length" if length > 1 else None)
    return jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)


def abstract_state(config: config_lib.ModelConfig, layout: sharding.Layout, job: budget.Job):
    state = jax.eval_shape(lambda: state_lib.init_state(config, job.batch, job.seq))

    def place(shape, spec):
        where = NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(place, state, state_lib.specs(state, layout))


# ---- jobs: each returns the traced program and its arguments by part


def trace_train(config: config_lib.ModelConfig, model, layout, job: budget.Job):
    from train import optim, step

    settings = step.Settings(optim.AdamW(1e-4), accumulate=job.accumulate)
    state = step.abstract(model, settings.optimizer)
    ints = abstract_rows(layout, job.batch, job.seq)
    weights = abstract_rows(layout, job.batch, job.seq, jnp.float32)
    batch = step.Batch(ints, ints, ints, ints, weights)
    parts = {"parameters": model, "optimizer": state.moments, "batch": batch}
    return step.update.trace(state, batch, settings=settings), parts


def trace_extend(config: config_lib.ModelConfig, model, layout, job: budget.Job):
    """Trace the pass that appends tokens to a state: all of a prompt, or one of each row."""
    state = abstract_state(config, layout, job)
    tokens = abstract_rows(layout, job.batch, job.new_tokens)
    caches = [layer for layer in state.layers if isinstance(layer, state_lib.KVCache)]
    others = [layer for layer in state.layers if not isinstance(layer, state_lib.KVCache)]
    parts = {"parameters": model, "state": others, "kv": caches, "batch": tokens}

    def extend(model, tokens, state):
        return model.extend(tokens, state, last_only=True)

    return jax.jit(extend, donate_argnums=2).trace(model, tokens, state), parts


def trace_serve(config: config_lib.ModelConfig, model, layout, job: budget.Job):
    """Trace what the engine dispatches to decode: several tokens of each row, and their choice."""
    from infer import config as sizes
    from infer import programs

    engine = sizes.Config(max_length=job.seq, max_rows=job.batch, tile_rows=16, row_tile=0)
    state, arguments = programs.abstract_decode(config, layout, engine)
    pools = state.layers
    pages = [pool for pool in pools if isinstance(pool, state_lib.Pages)]
    slots = [pool for pool in pools if isinstance(pool, state_lib.Slots)]
    parts = {"parameters": model, "state": slots, "kv": pages, "batch": arguments}

    def decode(model, state, rows, batch, steps):
        recipe = programs.Recipe(engine.tile_rows, engine.row_tile)
        return programs.decode(model, state, rows, batch, steps, recipe, engine.decode_steps)

    return jax.jit(decode, donate_argnums=(1, 2)).trace(model, state, *arguments), parts


JOBS: dict[str, Callable] = {
    "train": trace_train,
    "prefill": trace_extend,
    "decode": trace_extend,
    "serve": trace_serve,
}


# ---- the command


def run(config: Config) -> dict[str, Any]:
    """Compile, and return the record that --json writes; progress goes to the log.

    Raises:
      PlanError, TopologyError, ConfigError: arguments that no program can be made of.
    """
    where = chips.parse(config.topology, config.slices)
    model_config = read_model_config(config)
    devices = chips.devices(where)
    limit = aot.hbm_limit_bytes(devices[0])
    tokens = TOKENS if config.job == "train" else config.seq  # of a chip
    batch = config.batch or max(len(devices) * tokens // config.seq, 1)
    job = budget.Job(config.job, config.seq, batch, config.accumulate)
    if job.batch % job.accumulate:
        raise PlanError(f"batch {job.batch} does not divide into {job.accumulate} microbatches")
    if config.mesh:
        ranked = [parse_mesh(config.mesh, len(devices))]
    else:
        shapes = abstract_model(model_config, job.kind, weights=config.weights)
        ranked = rank(model_config, job, devices, config.slices, limit, shapes)[: config.tries]
    records = []
    for mesh in ranked:
        logging.info("compiling %s on %s", config.job, mesh)
        records.append(plan_mesh(config, model_config, job, mesh, devices, limit, where))
        if records[-1]["fits"]:
            break
    best = min(records, key=lambda r: (not r["fits"], r["hbm_bytes_per_chip"]))
    tried = ("mesh", "fits", "hbm_bytes_per_chip", "compile_secs")
    best["tried"] = [{key: record[key] for key in tried} for record in records]
    best["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if config.json:
        pathlib.Path(config.json).write_text(json.dumps(best, indent=1) + "\n")
    return best


def rank(model_config, job: budget.Job, devices, num_slices: int, limit: float, model):
    """Return the meshes that should fit by hand, cheapest first; if none does, the nearest one.

    Raises:
      PlanError: there are none.
    """
    found: list[tuple[tuple[bool, float], dict[str, int]]] = []
    for shape in budget.meshes(model_config, job, devices, num_slices):
        layout = make_layout(model_config, shape, devices, job)
        guess = estimate(model_config, job, layout, model)
        over = guess.total_bytes > limit
        found.append(((over, guess.total_bytes if over else guess.cost(job)), shape))
    if not found:
        raise PlanError(
            f"no mesh of {len(devices)} devices divides {job.batch} rows of {job.seq} tokens "
            f"in {job.accumulate} microbatches; choose another --batch, or give --mesh"
        )
    found.sort(key=lambda pair: pair[0])
    return [shape for (over, _), shape in found if not over] or [found[0][1]]


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Read axis=size,axis=size.

    Raises:
      PlanError: an unknown axis, a size that is none, or sizes that do not make all devices.
    """
    shape = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in sharding.AXES or axis in shape or not size.isdecimal() or int(size) < 1:
            raise PlanError(
                f"mesh: got {part!r}; wanted axis=size, the axis once and one of "
                f"{', '.join(sharding.AXES)}"
            )
        shape[axis] = int(size)
    if math.prod(shape.values()) != num_devices:
        raise PlanError(
            f"mesh: {text} makes {math.prod(shape.values())} devices; wanted {num_devices}, "
            "all of the topology"
        )
    return shape


def plan_mesh(config: Config, model_config, job, shape, devices, limit, where) -> dict[str, Any]:
    """Compile one job on one mesh and return its record."""
    layout = make_layout(model_config, shape, devices, job)
    model = abstract_model(model_config, job.kind, layout, config.weights)
    guess = estimate(model_config, job, layout, model)
    started = time.perf_counter()
    kernels = config.lightning == "tpu"
    chip = tiling.compile_for(where.generation) if kernels else contextlib.nullcontext()
    with chip:
        traced, arguments = JOBS[job.kind](model_config, model, layout, job)
        traced_secs = time.perf_counter() - started
        compiled = aot.compile_program(traced, limit)
    parts: dict[str, float] = {name: budget.local_bytes(tree) for name, tree in arguments.items()}
    held = compiled.argument_bytes or sum(parts.values())
    parts["activations"] = compiled.needed - sum(parts.values())
    counted, unknown = hlo.collectives(compiled.text) if compiled.text else ({}, 0)
    model_flops, again = _flops(model_config, job)
    return {
        **dataclasses.asdict(config),
        "mesh": dict(shape),
        "batch": job.batch,
        "devices": len(devices),
        "devices_per_chip": len(devices) // where.num_chips,
        "fits": compiled.fits,
        "hbm_bytes_per_chip": compiled.needed,
        "hbm_limit_bytes": compiled.limit,
        "hbm_parts": parts,
        "hbm_estimate": dict(guess.hbm_bytes),
        "argument_bytes": held,
        "temp_bytes": compiled.temp_bytes or compiled.needed - held,
        "flops_per_chip": (model_flops + again) / len(devices),
        "flops_again_per_chip": again / len(devices),
        "flops_compiler_per_chip": compiled.flops,
        "collectives": _traffic(counted),
        "collectives_estimate": _traffic(guess.collectives),
        "unknown_loops": unknown,
        "capacity": {}
        if job.training
        else capacity(model_config, layout, job, compiled.limit - compiled.needed),
        "trace_secs": traced_secs,
        "compile_secs": compiled.secs,
        "compile_cpu_secs": compiled.cpu_secs,
        "versions": {name: _version(name) for name in ("jax", "libtpu")},
    }


def estimate(model_config, job: budget.Job, layout, model) -> budget.Estimate:
    state = sum(_state_bytes(model_config, layout, job)) if not job.training else 0
    return budget.estimate(model_config, job, layout, budget.params(model, layout), state)


def _state_bytes(model_config, layout, job: budget.Job) -> tuple[float, float]:
    """Return the bytes on a chip of all rows' recurrent states and of their keys and values."""
    if job.kind == "serve":
        from infer import config as sizes

        chunk = sizes.Config().chunk_tokens
        pages = job.batch * -(-job.seq // chunk)
        state = state_lib.abstract_serving(model_config, job.batch, pages, chunk, layout)
    else:
        state = abstract_state(model_config, layout, job)
    caches = (state_lib.KVCache, state_lib.Pages)
    kv = [layer for layer in state.layers if isinstance(layer, caches)]
    total = budget.local_bytes(state)
    return total - budget.local_bytes(kv), budget.local_bytes(kv)


def capacity(model_config, layout, job: budget.Job, free_bytes: float) -> dict[int, int]:
    """Return by length in tokens how many rows fit, if what is free now and held by rows is theirs.

    free_bytes: on a chip beside the program of `job`.
    """
    state, kv = (size / job.batch for size in _state_bytes(model_config, layout, job))
    spread = 1 if job.kind == "serve" else layout.size("batch")
    found = {}
    for length in LENGTHS:
        each = state + kv * length / job.seq
        found[length] = int(((state + kv) * job.batch + free_bytes) / each) // spread * spread
    return found


def _flops(model_config, job: budget.Job) -> tuple[float, float]:
    """Return operations of all chips together: of the model, and computed again."""
    if job.training:
        count = flops.train(model_config, job.batch, job.seq)
        return count.model, count.again
    context = job.seq - job.new_tokens
    once = flops.forward(model_config, job.batch, job.new_tokens, context, logits=1)
    return once.total, 0.0


def read_model_config(config: Config) -> config_lib.ModelConfig:
    if config.config in PRESETS:
        read = PRESETS[config.config]()
    else:
        path = pathlib.Path(config.config)
        if not path.exists():
            raise PlanError(
                f"config: got {config.config!r}; wanted {' or '.join(PRESETS)}, a config.json or "
                "the directory of one"
            )
        read = config_lib.ModelConfig.from_file(path / "config.json" if path.is_dir() else path)
    remat = config.remat if config.job == "train" else "none"
    return dataclasses.replace(read, remat=remat, lightning_implementation=config.lightning)


def _traffic(collectives: Mapping[str, hlo.Traffic]) -> dict[str, dict[str, float]]:
    return {kind: dataclasses.asdict(traffic) for kind, traffic in collectives.items()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there stays free
    try:
        config = Config(
            **{f.name: getattr(flags.FLAGS, f.name) for f in dataclasses.fields(Config)}
        )
        record = run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(plan_text.report(record))
    sys.exit(0 if record["fits"] else 1)


def _define_flags() -> None:
    flags.DEFINE_string("topology", None, "slice, like v5p:8x8x8", required=True)
    flags.DEFINE_enum("job", None, [*JOBS, *LATER], "program to compile", required=True)
    flags.DEFINE_string("config", "m1", "m1, tiny, a config.json or the directory of one")
    flags.DEFINE_string("mesh", "", "axis=size,... ; empty: search for one")
    flags.DEFINE_integer("seq", 4096, "tokens a row; decode: room in the cache")
    flags.DEFINE_integer("batch", 0, "rows on all chips; 0: 4,096 tokens a chip, or one row")
    flags.DEFINE_integer("slices", 1, "number of slices")
    flags.DEFINE_integer("accumulate", 1, "microbatches of a training step")
    flags.DEFINE_enum("remat", "layer", list(config_lib.REMAT), "what training computes again")
    flags.DEFINE_enum("lightning", "chunked", ["chunked", "tpu"], "XLA or the Pallas kernels")
    recipes = list(quantize.RECIPES)
    flags.DEFINE_enum("weights", None, recipes, "int8 weights of decode and prefill; else bfloat16")
    flags.DEFINE_integer("tries", 3, "meshes to compile at most")
    flags.DEFINE_string("json", "", "file for the record")


def cli() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    cli()
