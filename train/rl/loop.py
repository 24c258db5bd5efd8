"""The loop of reinforcement learning: sample, score, update, hand over; exact resume.

Everything that decides what comes next is in the checkpoint of a batch: weights, moments, the
version of the weights, the tasks' cursor, finished and open groups, window, curriculum, monitors.
Samples are functions of weights and seeds, so a run that was killed anywhere goes on from its last
checkpoint to the very batches, rewards and weights that it would have had.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from infer import prompt
from m1_jax import configlib, multihost, sharding
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from train import checkpoints, loop, lora, metrics, optim
from train import step as step_lib
from train import workdir as workdir_lib
from train.rl import config as rl_config
from train.rl import episodes, groups, length_schedule, rollout, slime_flags, tasks, weight_sync
from train.rl import update as rl_update
from train.rl.environments import catalog
from train.rl.rewards import compose

_CHANGEABLE_FIELDS = re.compile(
    r"(save|log|evaluation)\.|compilation_cache|mesh|serving_mesh|batches|length_bias\.|rewards\.(workers|limit)"
)


@dataclasses.dataclass(frozen=True)
class RlSummary:
    """How a run ended. step: batches made. stopped_by: the signal that ended it, or None."""

    step: int
    reward: float
    stopped_by: int | None = None

    def __str__(self) -> str:
        return f"{self.step} batches, reward {self.reward:.4f}"


def run_rl_training(config: rl_config.RlConfig | None, workdir) -> RlSummary:
    """Train, from the newest checkpoint in `workdir` if there is one; None goes on as before.

    Raises:
      ValueError, CheckpointError, ConfigError: anything that is wrong, before the first batch.
    """
    workdir = pathlib.Path(workdir)
    config = resolve_rl_config(config, workdir)
    workdir_lib.use_compilation_cache(config.compilation_cache)
    return workdir_lib.run_session(RlSession(config, workdir), workdir)


def resolve_rl_config(
    config: rl_config.RlConfig | None, workdir: pathlib.Path
) -> rl_config.RlConfig:
    """Return the config to run: the given one, if `workdir` does not hold another run."""
    return workdir_lib.resolve_config(rl_config.RlConfig, config, workdir, _CHANGEABLE_FIELDS)


class RlSession:
    """What one process keeps while it trains."""

    def __init__(self, config: rl_config.RlConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.model_config = loop.load_model_config(config.checkpoint, None, config.remat)
        self.tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer or config.checkpoint)
        loop.check_tokenizer(self.tokenizer, self.model_config)
        self.layout, self.serving_layout = make_layouts(config, self.model_config)
        sharding.check_batch_rows(self.layout, config.update.rows)
        self.length_stage = length_schedule.LengthStage(config.rollout.windows)
        self.stop_request = workdir_lib.StopRequest("ending this batch")

    def enter(self, stack: contextlib.ExitStack) -> None:
        """Open what must be closed again, and find where to start."""
        config = self.config
        self.tasks = self._open_tasks(config.sources, stack)
        self.held_out_tasks = self._open_tasks(config.evaluation.sources, stack)
        self.rewards = None
        if config.rewards is not None and jax.process_index() == 0:
            self.rewards = compose.GroupScorer(config.rewards)
            stack.callback(self.rewards.close)
        self.checkpoints = stack.enter_context(
            checkpoints.CheckpointStore(self.workdir, config.save)
        )
        self.batch_number = self.checkpoints.latest_step() or 0
        self.last_saved_batch = self.batch_number
        kept: dict[str, Any] = {}
        if self.batch_number:
            kept = self.checkpoints.read_info(self.batch_number).data
            for name, saved in kept["fingerprints"].items():
                self.tasks[name].check_fingerprint(saved)
            self.length_stage.restore(kept["window"])
        self.collector = groups.GroupCollector(
            config, self.tasks, self._make_episode, self.rewards, kept.get("collector")
        )
        self.weight_version = kept.get("version", 0)
        stack.enter_context(self.stop_request.handle_signals())
        self.writer = stack.enter_context(
            metrics.MetricsWriter(
                self.workdir, self.batch_number, config.batches, terminal_metrics=_PROGRESS_METRICS
            )
        )
        # Told before there is a sampler, which tells the others when to listen to what.
        self.last_evaluated_batch = multihost.broadcast_object(self.writer.last_steps.get("eval"))
        self.state = self._initial_state()
        self.weight_sync = weight_sync.WeightSync(
            self.model_config, jnp.dtype(config.dtype), self.serving_layout
        )
        self.sampler = rollout.RolloutSampler(
            self.weight_sync(self.state.model),
            self.tokenizer,
            self._engine_config(),
            self._rollout_sampling(),
        )
        stack.callback(self.sampler.close)
        self.sampler.continue_from(self.weight_version)
        self.updater = rl_update.PolicyUpdater(
            config, self.model_config, self.layout, make_optimizer(config), self._load_reference()
        )

    def run(self) -> RlSummary:
        config, reward = self.config, math.nan
        if self.batch_number == 0:
            self.writer.write(
                0, "event", {"objective": slime_flags.describe_objective(config.objective)}
            )
        # Also where the run was stopped within an evaluation.
        if self._is_evaluation_due() and self.last_evaluated_batch != self.batch_number:
            self._evaluate()
        while self.batch_number < config.batches and not self.stop_request.should_stop(
            self.batch_number
        ):
            began = time.perf_counter()
            try:
                batch = self._sample_batch()
            except rollout.RolloutStopped:
                break
            # From here on the state is in pieces until the batch is over.
            values = self.updater(self.state, batch.groups, self.batch_number, self.weight_version)
            self.state = self.updater.state
            since = time.perf_counter()
            self.weight_version += 1
            self.sampler.update_weights(self.weight_sync(self.state.model), self.weight_version)
            jax.block_until_ready(jax.tree.leaves(self.state.model))
            values |= {"resharding_secs": time.perf_counter() - since}
            self.batch_number += 1
            reward = batch.metrics["reward_sampled"]
            self._log_batch(batch, values, time.perf_counter() - began)
            if self.length_stage.push(values.get("length_p99", 0.0), values.get("nll", 0.0)):
                self.writer.write(
                    self.batch_number, "event", {"window_tokens": self.length_stage.window_tokens}
                )
            if self._is_evaluation_due():
                self._evaluate()
            last = self.batch_number == config.batches
            if (
                last
                or self.batch_number % config.save.every_steps == 0
                or self.stop_request.signal_number is not None
            ):
                self._save_checkpoint()
        if (
            self.stop_request.signal_number is not None
            and self.last_saved_batch != self.batch_number
        ):
            self._save_checkpoint()
        self.checkpoints.wait()
        return RlSummary(self.batch_number, reward, self.stop_request.signal_number)

    # ---- parts of a batch

    def _sample_batch(self) -> groups.GenerationBatch:
        """Sample and score; what process 0 has, all have."""
        batch = None
        if jax.process_index() == 0:
            batch = self.collector.collect(
                self.sampler,
                self.batch_number,
                self.length_stage.window_tokens,
                lambda: self.stop_request.signal_number is not None,
            )
            self.sampler.dismiss()
        else:
            self.sampler.follow()
        return multihost.broadcast_object(batch)

    def _log_batch(self, batch: groups.GenerationBatch, values: dict, secs: float) -> None:
        self.writer.advance(self.batch_number)
        record = batch.metrics | values
        known = ("sampling_secs", "waiting_secs", "training_secs", "resharding_secs")
        record["batch_secs"] = secs
        record["other_secs"] = secs - sum(record.get(name, 0.0) for name in known)
        record |= {"window_tokens": self.length_stage.window_tokens, "version": self.weight_version}
        if record.get("pearson", 1.0) < self.config.pearson_min:
            event = {"alarm": "sampler and trainer disagree", "pearson": record["pearson"]}
            self.writer.write(self.batch_number, "event", event)
        if self.config.log.samples:
            rows = [
                [f"{group.group_id}/{i}", sample.task.id, str(sample.reward), str(sample.valid)]
                for group in batch.groups
                for i, sample in enumerate(groups.finished_samples(group))
            ]
            self.writer.write_samples(self.batch_number, rows)
        if (
            self.batch_number % self.config.log.every_steps == 0
            or self.batch_number == self.config.batches
        ):
            self.writer.write(self.batch_number, "train", record)

    def _is_evaluation_due(self) -> bool:
        """Return whether held-out tasks are looked at now."""
        every = self.config.evaluation.every_batches
        return every > 0 and (
            self.batch_number % every == 0 or self.batch_number == self.config.batches
        )

    def _evaluate(self) -> None:
        """Log the mean reward of held-out tasks, by source."""
        if jax.process_index():
            self.sampler.follow()
            return
        config, samples, jobs = self.config.evaluation, {}, []
        for name, some in self.held_out_tasks.items():
            for i in range(len(some)):
                for n in range(config.samples):
                    seed = groups.sample_seed(self.config.seed, i, n)
                    episode = self._make_episode(some[i], self.length_stage.window_tokens)
                    jobs.append(rollout.EpisodeJob((name, i, n), episode, seed))

        def take(key, sample):
            future = None if self.rewards is None else self.rewards.submit([sample])
            samples[key] = (sample, future)
            return ()

        sampling = dataclasses.replace(self._rollout_sampling(), temperature=config.temperature)
        stopping = lambda: self.stop_request.signal_number is not None  # noqa: E731
        with contextlib.suppress(rollout.RolloutStopped):
            self.sampler.run(lambda: jobs, take, sampling, stopping)
            self.sampler.dismiss()
            scored: dict[str, list[float]] = {}
            for (name, _, _), (sample, future) in samples.items():
                if future is not None:
                    groups.apply_score(sample, future.result()[0])
                if sample.valid and sample.reward is not None:
                    scored.setdefault(name, []).append(sample.reward)
            values: dict[str, Any] = {f"reward/{k}": float(np.mean(v)) for k, v in scored.items()}
            number = sum(map(len, scored.values()))
            values |= {
                "samples": number,
                "failed": len(samples) - number,
                "version": self.weight_version,
            }
            values["reward"] = float(np.mean([x for v in scored.values() for x in v] or [math.nan]))
            self.writer.write(self.batch_number, "eval", values)

    def _save_checkpoint(self) -> None:
        self.writer.flush()
        kept = {}
        if jax.process_index() == 0:
            prints = {name: some.fingerprint() for name, some in self.tasks.items()}
            kept = {
                "collector": self.collector.state(),
                "version": self.weight_version,
                "window": self.length_stage.state(),
                "fingerprints": prints,
            }
        kept = multihost.broadcast_object(kept)
        config = configlib.to_json(self.config)
        self.checkpoints.save(self.state, kept, config, self.batch_number)
        self.last_saved_batch = self.batch_number

    # ---- what a run is made of

    def _make_episode(self, task, window: int):
        config, given = self.config.rollout, self.config.agent
        if given is None:
            return episodes.single_turn_episode(task, self.tokenizer, window)
        limits = episodes.EpisodeLimits(
            given.max_turns, config.max_prompt_tokens + window, min(given.turn_tokens, window)
        )
        return episodes.multi_turn_episode(
            task, catalog.make_environment(given.environment), self.tokenizer, limits
        )

    def _open_tasks(
        self, sources, stack: contextlib.ExitStack
    ) -> dict[str, tasks.FileTasks | tasks.GeneratedTasks]:
        """Return tasks by source.

        Raises:
          ValueError: one whose prompt is too long.
        """
        most, opened = self.config.rollout.max_prompt_tokens, {}
        for one in sources:
            some = opened[one.name] = tasks.open_tasks(one)
            stack.callback(some.close)
            # Minutes, where there are many.
            for i in tqdm.tqdm(range(len(some)), f"prompts of {one.name}", disable=None):
                task = some[i]
                tools = task.tools or None
                length = len(prompt.encode_prompt(self.tokenizer, task.messages, tools))
                if length > most:
                    raise ValueError(
                        f"task {task.id}: got a prompt of {length} tokens; wanted at most {most} "
                        "(rollout.max_prompt_tokens). Raise that, or leave the task out."
                    )
        return opened

    def _engine_config(self):
        config = self.config.rollout
        sizes: dict[str, Any] = {"record_routes": config.replay_routes, **dict(config.engine)}
        held_out = sum(map(len, self.held_out_tasks.values())) * self.config.evaluation.samples
        most = round(config.groups * config.oversample) * config.group_size
        return rollout.make_engine_config(sizes, config.max_sample_tokens, max(most, held_out, 1))

    def _rollout_sampling(self) -> rollout.RolloutSampling:
        names = [field.name for field in dataclasses.fields(rollout.RolloutSampling)]
        return rollout.RolloutSampling(
            **{name: getattr(self.config.rollout, name) for name in names}
        )

    def _initial_state(self) -> step_lib.TrainState:
        """Return the newest checkpoint's state, or that of the first batch."""
        return (
            self.restore_state(self.checkpoints, self.batch_number)
            if self.batch_number
            else self._fresh_state()
        )

    def restore_state(
        self, checkpoint_store: checkpoints.CheckpointStore, batch: int
    ) -> step_lib.TrainState:
        """Return the state of a checkpoint."""
        like = self._fresh_state() if self.config.lora is not None else self._abstract_state()
        return checkpoint_store.restore(batch, like)

    def _fresh_state(self) -> step_lib.TrainState:
        return step_lib.init_state(
            self._add_lora(self._load_model(*self._dtypes())), make_optimizer(self.config)
        )

    def _abstract_state(self) -> step_lib.TrainState:
        model = params_lib.abstract_model(self.model_config, *self._dtypes(), self.layout)
        return step_lib.abstract_state(model, make_optimizer(self.config))

    def _load_reference(self):
        """Return the model that the KL term compares with, where there is one."""
        objective = self.config.objective
        if not objective.kl_coef and not objective.reward_kl_coef:
            return None
        dtype = jnp.dtype(self.config.dtype)
        return self._load_model(dtype, dtype)

    def _load_model(self, dtype, param_dtype):
        mesh = None if self.layout is None else self.layout.mesh
        model = load_lib.load(self.config.checkpoint, dtype, mesh, param_dtype=param_dtype)
        model.config = self.model_config
        return model

    def _dtypes(self) -> tuple[Any, Any]:
        dtype = jnp.dtype(self.config.dtype)
        return dtype, jnp.dtype(jnp.float32) if self.config.lora is None else dtype

    def _add_lora(self, model):
        if self.config.lora is None:
            return model
        return lora.add_adapters(model, self.config.lora, jax.random.key(self.config.seed))


_PROGRESS_METRICS = ("reward_sampled", "length_mean", "pearson", "batch_secs")


def make_layouts(config: rl_config.RlConfig, model_config: Any) -> tuple[Any, Any]:
    """Return the trainer's and the sampler's layout of the same devices; None on one device."""
    mesh = None
    if config.mesh or jax.device_count() > 1:
        mesh = sharding.make_mesh(dict(config.mesh) or {"fsdp": -1})
    serving = weight_sync.make_serving_mesh(mesh, config.serving_mesh)
    return (
        sharding.make_layout(mesh, model_config, sharding.TRAIN),
        sharding.make_layout(serving, model_config, sharding.DECODE),
    )


def make_optimizer(config: rl_config.RlConfig) -> optim.AdamW:
    """Return AdamW at a rate that stays, after its warm-up."""
    update = config.update
    number = max(config.batches * update.minibatches * update.epochs, 1)
    rate = optim.make_stage_schedule(
        "constant", 0.0, update.learning_rate, update.warmup_steps, number, 1, 0
    )
    return optim.AdamW(rate, **dataclasses.asdict(config.optimizer))
