"""The programs of each job that `plan.py` compiles: those that run, and what lies beside them.

Each is traced from shapes by the function that owns it, so it is imported from `trace_train` or
`infer` inside the function that needs it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from m1_jax import config as config_lib
from m1_jax import flops, sharding
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from m1_jax.plan import estimate
from m1_jax.serving import state as serving_state


@dataclasses.dataclass(frozen=True)
class JobSetting:
    """model: of sharded shapes on `layout`. serving: where a sampler has its weights, in RL."""

    config: config_lib.ModelConfig
    job: estimate.PlanJob
    layout: sharding.MeshLayout
    model: Any
    serving_layout: sharding.MeshLayout | None = None


@dataclasses.dataclass(frozen=True)
class TracedProgram:
    """A traced program of a job.

    arguments: pytrees of shapes by part. results: those that take memory of their own, not that of
    a donated argument. beside: what else is in the memory of its chips while it runs, which the
    compiler does not know of. guess: our count of all of it, without `beside`.
    flops: of all chips together, of the model and computed again.
    """

    name: str
    traced: Any
    arguments: Mapping[str, Any]
    resource_estimate: estimate.ResourceEstimate
    flops: tuple[float, float] = (0.0, 0.0)
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    co_resident: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ---- how a model and its inputs lie on a mesh


def abstract_job_model(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    layout: sharding.MeshLayout | None = None,
    weights: str | None = None,
):
    """Return a bfloat16 model of sharded shapes; a trainer's parameters are float32."""
    param_dtype = jnp.float32 if job.mode == sharding.TRAIN else jnp.bfloat16
    return params_lib.abstract_model(config, jnp.bfloat16, param_dtype, layout, weights)


def make_serving_layout(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, axis_sizes: Mapping[str, int]
) -> sharding.MeshLayout:
    """Return how a sampler's weights lie on the trainer's devices, cut along `sizes`.

    Raises:
      ValueError: sizes that are not those of all devices, or that the model cannot lie on.
    """
    from train.rl import weight_sync

    found = sharding.make_layout(
        weight_sync.make_serving_mesh(layout.mesh, axis_sizes), config, sharding.DECODE
    )
    assert found is not None
    return found


def abstract_rows(layout: sharding.MeshLayout, num_rows: int, length: int, dtype=jnp.int32) -> Any:
    """Return an array [rows, length] that lies as tokens do; one token has no length to split."""
    where = layout.activation_sharding("batch", "length" if length > 1 else None)
    return jax.ShapeDtypeStruct((num_rows, length), dtype, sharding=where)


def abstract_state(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, job: estimate.PlanJob
):
    state = jax.eval_shape(lambda: state_lib.init_decode_state(config, job.batch, job.seq))

    def place(shape, spec):
        where = NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return jax.tree.map(place, state, state_lib.decode_state_specs(state, layout))


def state_and_kv_bytes(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, job: estimate.PlanJob
) -> tuple[float, float]:
    """Return the bytes on a chip of all rows' recurrent states and of their keys and values."""
    if job.kind == "serve":
        from infer import config as sizes

        chunk = sizes.EngineConfig().chunk_tokens
        pages = job.batch * -(-job.seq // chunk)
        state = serving_state.abstract_serving_state(config, job.batch, pages, chunk, layout)
    else:
        state = abstract_state(config, layout, job)
    caches = (state_lib.KVCache, serving_state.PagedKVCache)
    kv = [layer for layer in state.layers if isinstance(layer, caches)]
    total = estimate.local_bytes(state)
    return total - estimate.local_bytes(kv), estimate.local_bytes(kv)


def estimate_job(
    config: config_lib.ModelConfig, job: estimate.PlanJob, layout: sharding.MeshLayout, model
) -> estimate.ResourceEstimate:
    """Return our own count of a job, by which meshes are ranked."""
    state = 0.0 if job.mode == sharding.TRAIN else sum(state_and_kv_bytes(config, layout, job))
    return estimate.estimate_resources(
        config, job, layout, estimate.list_param_shards(model, layout), state
    )


# ---- jobs: each returns its programs


def trace_train(setting: JobSetting) -> list[TracedProgram]:
    from train import optim
    from train import step as step_lib
    from train.data import batch as batch_lib

    job, layout = setting.job, setting.layout
    settings = step_lib.TrainStepSettings(optim.AdamW(1e-4), accumulate=job.accumulate)
    state = step_lib.abstract_state(setting.model, settings.optimizer)
    ints = abstract_rows(layout, job.batch, job.seq)
    weights = abstract_rows(layout, job.batch, job.seq, jnp.float32)
    batch = batch_lib.TrainBatch(ints, ints, ints, ints, weights)
    parts = {"parameters": setting.model, "optimizer": state.moments, "batch": batch}
    traced = step_lib.train_step.trace(state, batch, settings=settings)
    return [
        TracedProgram(
            "update", traced, parts, _estimate_setting(setting), _count_train_flops(setting)
        )
    ]


def trace_extend(setting: JobSetting) -> list[TracedProgram]:
    """Trace the pass that appends tokens to a state: all of a prompt, or one of each row."""
    job = setting.job
    state = abstract_state(setting.config, setting.layout, job)
    tokens = abstract_rows(setting.layout, job.batch, job.new_tokens)
    caches = [layer for layer in state.layers if isinstance(layer, state_lib.KVCache)]
    others = [layer for layer in state.layers if not isinstance(layer, state_lib.KVCache)]
    parts = {"parameters": setting.model, "state": others, "kv": caches, "batch": tokens}

    def extend(model, tokens, state):
        return model.extend(tokens, state, last_only=True)

    traced = jax.jit(extend, donate_argnums=2).trace(setting.model, tokens, state)
    return [
        TracedProgram(
            "extend", traced, parts, _estimate_setting(setting), _count_forward_flops(setting)
        )
    ]


def trace_serve(setting: JobSetting) -> list[TracedProgram]:
    """Trace what the engine dispatches to decode: several tokens of each row, and their choice."""
    from infer import config as sizes
    from infer.execution import programs

    job = setting.job
    engine = sizes.EngineConfig(
        max_length=job.seq, max_rows=job.batch, attention_tile=16, matmul_tile=0
    )
    state, arguments = programs.abstract_decode_inputs(setting.config, setting.layout, engine)
    pools = state.layers
    pages = [pool for pool in pools if isinstance(pool, serving_state.PagedKVCache)]
    slots = [pool for pool in pools if isinstance(pool, serving_state.LightningSlots)]
    parts = {"parameters": setting.model, "state": slots, "kv": pages, "batch": arguments}

    def decode(model, state, rows, batch, steps):
        recipe = programs.Tiling(engine.attention_tile, engine.matmul_tile)
        return programs.decode_tokens(model, state, rows, batch, steps, recipe, engine.decode_steps)

    traced = jax.jit(decode, donate_argnums=(1, 2)).trace(setting.model, state, *arguments)
    return [
        TracedProgram(
            "decode", traced, parts, _estimate_setting(setting), _count_forward_flops(setting)
        )
    ]


def trace_rl_update(setting: JobSetting) -> list[TracedProgram]:
    """Trace the three programs of an update: scores, gradients added to sums, the step.

    Rows carry the sampler's routes. The sampler's weights stay beside each program, and the
    moments beside those that do not take them.
    """
    from train import optim
    from train import step as step_lib
    from train.rl import objective
    from train.rl import step as rl_step

    job, model = setting.job, setting.model
    settings = rl_step.RlStepSettings(optim.AdamW(1e-4), objective.PRESETS["cispo"])
    state = step_lib.abstract_state(model, settings.optimizer)
    rows = _abstract_rl_rows(setting)
    share = jax.ShapeDtypeStruct((), jnp.float32)
    shapes = jax.eval_shape(
        lambda *args: rl_step.accumulate_gradients(None, *args, None, settings), model, rows, share
    )
    sums = (_shard_like_model(shapes[0], model), _replicate_shapes(shapes[1], setting.layout))
    sampler = {"sampler": abstract_sampler_model(setting)}
    moments = {"optimizer": state.moments}
    parameters, batch = {"parameters": model}, {"batch": rows}
    params = estimate.list_param_shards(model, setting.layout)
    whole = estimate.estimate_resources(setting.config, job, setting.layout, params)
    once = dataclasses.replace(job, kind=sharding.PREFILL)  # one forward pass
    held = {"parameters": whole.hbm_bytes["parameters"]}
    added = {"sums": whole.hbm_bytes["gradients"]}
    work = {name: whole.hbm_bytes[name] for name in ("gradients", "activations")}
    step = {"optimizer": whole.hbm_bytes["optimizer"], "activations": 0.0}
    return [
        TracedProgram(
            "score",
            rl_step.score_logprobs.trace(model, rows, settings.temperature),
            parameters | batch,
            estimate.estimate_resources(setting.config, once, setting.layout, params),
            (flops.count_forward_flops(setting.config, job.batch, job.seq).total, 0.0),
            co_resident=moments | sampler,
        ),
        TracedProgram(
            "add",
            rl_step.accumulate_gradients.trace(sums, model, rows, share, None, settings),
            parameters | {"sums": sums} | batch,
            estimate.ResourceEstimate(held | added | work, whole.collectives),
            _count_train_flops(setting),
            co_resident=moments | sampler,
        ),
        TracedProgram(
            "update",
            rl_step.apply_update.trace(state, sums[0], settings),
            parameters | moments | {"sums": sums[0]},
            estimate.ResourceEstimate(held | added | step, {}),
            co_resident=sampler,
        ),
    ]


def trace_reshard(setting: JobSetting) -> list[TracedProgram]:
    """Trace the copy of a trainer's weights for the sampler, whose old ones still lie beside it."""
    from train import optim
    from train import step as step_lib
    from train.rl import weight_sync

    assert setting.serving_layout is not None
    model = setting.model
    program = weight_sync.WeightSync(setting.config, jnp.bfloat16, setting.serving_layout)
    values = {n: p.get_value() for n, p in params_lib.params_by_path(model).items()}
    parts, made = {"parameters": model}, {"new sampler": program.abstract_model}
    guess = {name: float(estimate.local_bytes(tree)) for name, tree in (parts | made).items()}
    moments = step_lib.abstract_state(model, optim.AdamW(1e-4)).moments
    return [
        TracedProgram(
            "reshard",
            program.program.trace(values),
            parts,
            estimate.ResourceEstimate(guess | {"activations": 0.0}, {}),
            results=made,
            co_resident={"optimizer": moments, "sampler": program.abstract_model},
        )
    ]


JOB_TRACERS: dict[str, Callable[[JobSetting], list[TracedProgram]]] = {
    "train": trace_train,
    "prefill": trace_extend,
    "decode": trace_extend,
    "serve": trace_serve,
    "rl_update": trace_rl_update,
    "reshard": trace_reshard,
}


# ---- parts of them


def abstract_sampler_model(setting: JobSetting) -> Any:
    """Return the bfloat16 weights that the sampler keeps, as shapes."""
    assert setting.serving_layout is not None
    return params_lib.abstract_model(
        setting.config, jnp.bfloat16, jnp.bfloat16, setting.serving_layout
    )


def _abstract_rl_rows(setting: JobSetting) -> Any:
    """Return a microbatch as `rl_batch.device_put_rows` puts it on the devices."""
    from train.rl import batch as rl_batch

    config, job, layout = setting.config, setting.job, setting.layout
    ints = abstract_rows(layout, job.batch, job.seq)
    floats = abstract_rows(layout, job.batch, job.seq, jnp.float32)
    kinds = {"tokens": ints, "segment_ids": ints, "positions": ints, "targets": ints}
    fields = {
        field.name: kinds.get(field.name, floats)
        for field in dataclasses.fields(rl_batch.PackedRows)
    }
    shape = (job.batch, job.seq, config.num_hidden_layers, config.num_experts_per_tok)
    where = layout.activation_sharding("batch", "length", None, None)
    fields["expert_ids"] = jax.ShapeDtypeStruct(shape, jnp.int8, sharding=where)
    return rl_batch.PackedRows(**fields)


def _shard_like_model(shapes: Any, model: Any) -> Any:
    def place(shape, like):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=like.sharding)

    return jax.tree.map(place, shapes, model)


def _replicate_shapes(shapes: Any, layout: sharding.MeshLayout) -> Any:
    where = layout.activation_sharding()
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


def _estimate_setting(setting: JobSetting) -> estimate.ResourceEstimate:
    return estimate_job(setting.config, setting.job, setting.layout, setting.model)


def _count_train_flops(setting: JobSetting) -> tuple[float, float]:
    count = flops.count_train_flops(setting.config, setting.job.batch, setting.job.seq)
    return count.model, count.recomputed


def _count_forward_flops(setting: JobSetting) -> tuple[float, float]:
    job = setting.job
    context = job.seq - job.new_tokens
    once = flops.count_forward_flops(
        setting.config, job.batch, job.new_tokens, context, num_logits=1
    )
    return once.total, 0.0
