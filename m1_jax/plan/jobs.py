"""The programs of each job that the planner compiles: those that run, and what lies beside them.

Each is traced from shapes by the function that owns it. That function is imported from `train` or
`infer` inside the function that needs it, because `m1_jax` depends on neither.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import config as config_lib
from m1_jax import flops, sharding
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from m1_jax.plan import estimate, shapes
from m1_jax.serving import state as serving_state

# Of the optimizers traced: a rate, and a stage's tokens, more than an int32 holds. A program
# depends on the kind of its schedule and not on these values.
LEARNING_RATE, STAGE_TOKENS, WARMUP_TOKENS = 1e-4, 5 * 10**12, 10**10


@dataclasses.dataclass(frozen=True)
class JobSetting:
    """A job on a mesh.

    Attributes:
      config: the model's config.
      job: the job, and the sizes of its rows.
      layout: where the model lies.
      model: the parameters, as sharded shapes on `layout`.
      serving_layout: where a sampler has its weights. Only in rl_update and reshard.
    """

    config: config_lib.ModelConfig
    job: estimate.PlanJob
    layout: sharding.MeshLayout
    model: model_lib.MiniMaxM1
    serving_layout: sharding.MeshLayout | None = None

    def estimate_resources(self) -> estimate.ResourceEstimate:
        return estimate_job(self.config, self.job, self.layout, self.model)

    def count_train_flops(self) -> tuple[float, float]:
        """Return FLOPs as in `TracedProgram.flops`."""
        count = flops.count_train_flops(self.config, self.job.batch, self.job.seq)
        return count.model, count.recomputed

    def count_forward_flops(self) -> tuple[float, float]:
        """Return FLOPs as in `TracedProgram.flops`, of one pass of prefill or decoding."""
        job = self.job
        context = job.seq - job.new_tokens  # a full cache: the most expensive pass
        count = flops.count_forward_flops(
            self.config, job.batch, job.new_tokens, context, num_logits=1
        )
        return count.total, 0.0


@dataclasses.dataclass(frozen=True)
class TracedProgram:
    """A traced program of a job.

    Attributes:
      name: the program's name, unique in its job.
      traced: what is compiled.
      arguments: pytrees of shapes by part, like parameters.
      resource_estimate: our own count, of everything but `co_resident`.
      flops: operations of all chips together: of the model, and computed again.
      results: pytrees by part of results that take memory of their own, not that of a donated
        argument.
      co_resident: pytrees by part of what else is in HBM while the program runs. The compiler does
        not know of it.
    """

    name: str
    traced: jax.stages.Traced
    arguments: Mapping[str, Any]
    resource_estimate: estimate.ResourceEstimate
    flops: tuple[float, float] = (0.0, 0.0)
    results: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    co_resident: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# ---- a job's own sizes


def state_and_kv_bytes(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, job: estimate.PlanJob
) -> tuple[float, float]:
    """Return the bytes on a chip of all rows' recurrent states and of their keys and values.

    The slot and the page of padding, which a chip has however many rows there are, do not count.
    """
    slot_share = page_share = 1.0
    if job.kind == "serve":
        from infer import config as engine_config

        engine = engine_config.EngineConfig(
            max_length=job.seq, max_rows=job.batch, num_snapshots=0
        ).split(layout.axis_size("batch"))
        state = serving_state.abstract_serving_state(
            config, engine.total_slots, engine.total_pages, engine.chunk_tokens, layout
        )
        slot_share, page_share = (n / (n + 1) for n in (engine.total_slots, engine.total_pages))
    else:
        state = shapes.abstract_decode_state(config, layout, job)
    caches = (state_lib.KVCache, serving_state.PagedKVCache)
    kv_bytes = shapes.local_bytes([part for part in state.group_states if isinstance(part, caches)])
    return (shapes.local_bytes(state) - kv_bytes) * slot_share, kv_bytes * page_share


def estimate_job(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    layout: sharding.MeshLayout,
    model: model_lib.MiniMaxM1,
) -> estimate.ResourceEstimate:
    """Return our own count of a job, by which meshes are ranked."""
    state_bytes = 0.0
    if job.mode != sharding.TRAIN:
        state_bytes = sum(state_and_kv_bytes(config, layout, job))
    params = estimate.list_param_shards(model, layout)
    return estimate.estimate_resources(config, job, layout, params, state_bytes)


def make_serving_layout(
    config: config_lib.ModelConfig, layout: sharding.MeshLayout, axis_sizes: Mapping[str, int]
) -> sharding.MeshLayout:
    """Return how a sampler's weights lie on the trainer's devices.

    Raises:
      ValueError: sizes that are not those of all devices, or that the model cannot lie on.
    """
    from train.rl import weight_sync

    serving_mesh = weight_sync.make_serving_mesh(layout.mesh, axis_sizes)
    serving_layout = sharding.make_layout(serving_mesh, config, sharding.DECODE)
    assert serving_layout is not None
    return serving_layout


def _make_optimizer(shape: str, tokens: int, warmup_tokens: int, tokens_per_step: int) -> Any:
    """Return AdamW with a stage's schedule, as runs have. A constant rate is a smaller program.

    Arguments are those of `optim.make_stage_schedule`.
    """
    from train import optim

    schedule = optim.make_stage_schedule(
        shape, LEARNING_RATE, LEARNING_RATE / 10, warmup_tokens, tokens, tokens_per_step
    )
    return optim.AdamW(schedule)


# ---- jobs: each returns its programs


def trace_train(setting: JobSetting) -> list[TracedProgram]:
    """Trace a whole optimizer step, with all of its microbatches."""
    from train import step as step_lib
    from train.data import batch as batch_lib

    job, layout = setting.job, setting.layout
    optimizer = _make_optimizer("cosine", STAGE_TOKENS, WARMUP_TOKENS, job.batch * job.seq)
    settings = step_lib.TrainStepSettings(optimizer, accumulate=job.accumulate)
    state = step_lib.abstract_state(setting.model, settings.optimizer)  # float32 moments
    # Tokens, segment ids, positions and targets are of one shape.
    ints = shapes.abstract_rows(layout, job.batch, job.seq)
    weights = shapes.abstract_rows(layout, job.batch, job.seq, jnp.float32)
    batch = batch_lib.TrainBatch(ints, ints, ints, ints, weights)
    return [
        TracedProgram(
            "update",
            step_lib.train_step.trace(state, batch, settings=settings),
            {"parameters": setting.model, "optimizer": state.moments, "batch": batch},
            setting.estimate_resources(),
            setting.count_train_flops(),
        )
    ]


def trace_extend(setting: JobSetting) -> list[TracedProgram]:
    """Trace the pass that appends tokens to a state: all of a prompt, or one of each row."""
    job = setting.job
    state = shapes.abstract_decode_state(setting.config, setting.layout, job)
    tokens = shapes.abstract_rows(setting.layout, job.batch, job.new_tokens)
    parts = state.group_states
    caches = [part for part in parts if isinstance(part, state_lib.KVCache)]
    recurrent = [part for part in parts if not isinstance(part, state_lib.KVCache)]

    # Logits of the last token alone: only it has a next token to choose.
    def extend(model, tokens, state):
        return model.extend(tokens, state, last_only=True)

    # The state is donated, as in serving: the new one takes its memory.
    return [
        TracedProgram(
            "extend",
            jax.jit(extend, donate_argnums=2).trace(setting.model, tokens, state),
            {"parameters": setting.model, "state": recurrent, "kv": caches, "batch": tokens},
            setting.estimate_resources(),
            setting.count_forward_flops(),
        )
    ]


def trace_serve(setting: JobSetting) -> list[TracedProgram]:
    """Trace what the engine dispatches to decode: several tokens of each row, and their choice."""
    from infer import config as engine_config
    from infer.execution import programs

    job = setting.job
    # Otherwise the engine's own defaults, exactness included.
    engine = engine_config.EngineConfig(max_length=job.seq, max_rows=job.batch).for_platform("tpu")
    state, arguments = programs.abstract_decode_inputs(setting.config, setting.layout, engine)
    pools = state.group_states
    pages = [pool for pool in pools if isinstance(pool, serving_state.PagedKVCache)]
    slots = [pool for pool in pools if isinstance(pool, serving_state.LightningSlots)]

    def decode(model, state, sampling_state, batch, steps):
        tiles = programs.EngineTiles.of_config(engine)
        return programs.decode_tokens(
            model, state, sampling_state, batch, steps, tiles, engine.decode_steps
        )

    traced = jax.jit(decode, donate_argnums=(1, 2)).trace(setting.model, state, *arguments)
    return [
        TracedProgram(
            "decode",
            traced,
            {"parameters": setting.model, "state": slots, "kv": pages, "batch": arguments},
            setting.estimate_resources(),
            setting.count_forward_flops(),
        )
    ]


def trace_rl_update(setting: JobSetting) -> list[TracedProgram]:
    """Trace the three programs of an update: scores, gradients added to sums, the step.

    Rows carry the sampler's routes. The sampler's weights stay beside each program, and the
    moments beside those that do not take them.
    """
    from train import step as step_lib
    from train.rl import objective
    from train.rl import step as rl_step

    job, model = setting.job, setting.model
    # As in `train.rl.loop.make_optimizer`, where a step counts as one token.
    optimizer = _make_optimizer("constant", 1000, 10, 1)
    settings = rl_step.RlStepSettings(optimizer, objective.PRESETS["cispo"])
    state = step_lib.abstract_state(model, settings.optimizer)
    rows = _abstract_rl_rows(setting)
    share = jax.ShapeDtypeStruct((), jnp.float32)  # share of the step's tokens that `rows` have
    # The sums of gradients and metrics have the shapes that the program itself returns.
    abstract_sums = jax.eval_shape(
        lambda *args: rl_step.accumulate_gradients(None, *args, None, settings), model, rows, share
    )
    sums = rl_step.MicrobatchSums(
        shapes.shard_like_model(abstract_sums.gradients, model),
        shapes.replicate_shapes(abstract_sums.metrics, setting.layout),
    )
    sampler = {"sampler": abstract_sampler_model(setting)}
    moments = {"optimizer": state.moments}
    parameters, batch = {"parameters": model}, {"batch": rows}
    resources = _estimate_rl_programs(setting)
    return [
        TracedProgram(
            "score",
            rl_step.score_logprobs.trace(model, rows, settings.temperature),
            parameters | batch,
            resources["score"],
            (flops.count_forward_flops(setting.config, job.batch, job.seq).total, 0.0),
            co_resident=moments | sampler,
        ),
        TracedProgram(
            "add",
            rl_step.accumulate_gradients.trace(sums, model, rows, share, None, settings),
            parameters | {"sums": sums} | batch,
            resources["add"],
            setting.count_train_flops(),
            co_resident=moments | sampler,
        ),
        TracedProgram(
            "update",  # it has the moments as arguments, so only the sampler lies beside it
            rl_step.apply_update.trace(state, sums.gradients, settings),
            parameters | moments | {"sums": sums.gradients},
            resources["update"],
            co_resident=sampler,
        ),
    ]


def trace_reshard(setting: JobSetting) -> list[TracedProgram]:
    """Trace the copy of a trainer's weights for the sampler, whose old ones still lie beside it."""
    from train import step as step_lib
    from train.rl import weight_sync

    assert setting.serving_layout is not None
    model = setting.model
    # The old weights of the sampler are not donated, so they are there until the swap.
    program = weight_sync.WeightSync(setting.config, jnp.bfloat16, setting.serving_layout)
    arguments, results = {"parameters": model}, {"new sampler": program.abstract_model}
    hbm_bytes = {n: float(shapes.local_bytes(tree)) for n, tree in (arguments | results).items()}
    # Other schedules have moments of the same shapes.
    optimizer = _make_optimizer("constant", 1000, 10, 1)
    moments = step_lib.abstract_state(model, optimizer).moments
    return [
        TracedProgram(
            "reshard",
            program.trace(model),
            arguments,
            estimate.ResourceEstimate(hbm_bytes | {"activations": 0.0}, {}),
            results=results,
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


# ---- parts of the jobs of RL


def abstract_sampler_model(setting: JobSetting) -> model_lib.MiniMaxM1:
    """Return the bfloat16 weights that the sampler keeps, as shapes."""
    assert setting.serving_layout is not None
    return params_lib.abstract_model(
        setting.config, jnp.bfloat16, jnp.bfloat16, setting.serving_layout
    )


# `Any`, because `rl_batch` is imported inside: a `PackedRows` of shapes.
def _abstract_rl_rows(setting: JobSetting) -> Any:
    """Return the shapes of a microbatch as `rl_batch.device_put_microbatch` makes it."""
    from train.rl import batch as rl_batch

    config, job, layout = setting.config, setting.job, setting.layout
    ints = shapes.abstract_rows(layout, job.batch, job.seq)
    floats = shapes.abstract_rows(layout, job.batch, job.seq, jnp.float32)
    int_fields = {"tokens": ints, "segment_ids": ints, "positions": ints, "targets": ints}
    fields = {
        field.name: int_fields.get(field.name, floats)
        for field in dataclasses.fields(rl_batch.PackedRows)
    }
    shape = (job.batch, job.seq, config.num_hidden_layers, config.num_experts_per_tok)
    expert_sharding = layout.activation_sharding("batch", "length", None, None)
    # One byte an id, since M1 has 32 experts in a layer.
    fields["expert_ids"] = jax.ShapeDtypeStruct(shape, jnp.int8, sharding=expert_sharding)
    return rl_batch.PackedRows(**fields)


def _estimate_rl_programs(setting: JobSetting) -> dict[str, estimate.ResourceEstimate]:
    """Return our own count of each program of an update."""
    job, config, layout = setting.job, setting.config, setting.layout
    params = estimate.list_param_shards(setting.model, layout)
    update = estimate.estimate_resources(config, job, layout, params)
    # Scoring is one forward pass on the trainer's layout, and a pass is what prefill counts.
    forward_job = dataclasses.replace(job, kind=sharding.PREFILL)
    parameters = {"parameters": update.hbm_bytes["parameters"]}
    sums = {"sums": update.hbm_bytes["gradients"]}
    # A microbatch's own gradients exist beside the sums that they are added to.
    backward = {name: update.hbm_bytes[name] for name in ("gradients", "activations")}
    step = {"optimizer": update.hbm_bytes["optimizer"], "activations": 0.0}
    return {
        "score": estimate.estimate_resources(config, forward_job, layout, params),
        "add": estimate.ResourceEstimate(parameters | sums | backward, update.collectives),
        "update": estimate.ResourceEstimate(parameters | sums | step, {}),
    }
