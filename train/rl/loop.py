"""The loop of reinforcement learning: sample, score, update, sync weights.

A batch's checkpoint has everything that decides what comes next: weights, moments, the version of
the weights, the tasks' cursor, finished and open groups, window, curriculum and monitors. Samples
are functions of weights and seeds. So a run that was killed at any point goes on from its last
checkpoint, and its batches, rewards and weights are bit-exact those of a run that was not.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from m1_jax import config as model_config_lib
from m1_jax import configlib, local_path, multihost, sharding
from m1_jax import model as model_lib
from train import checkpoints, metrics, optim, resume, run_model
from train import step as step_lib
from train import workdir as workdir_lib
from train.data import records
from train.rl import batch_metrics as batch_metrics_lib
from train.rl import (
    batch_transfer,
    evaluate,
    groups,
    length_schedule,
    rollout,
    rollout_setup,
    slime_flags,
)
from train.rl import config as rl_config
from train.rl import saved_state as saved_state_lib
from train.rl import update as rl_update
from train.rl import weight_sync as weight_sync_lib

# What may change when a run goes on: where and how long it runs, what it logs, and what it does
# about judges and tools that fail or cheat. The other fields decide what is trained on.
_CHANGEABLE_FIELDS = re.compile(
    r"max_skipped|"
    r"(save|log|evaluation)\.|compilation_cache|mesh|serving_mesh|batches"
    r"|length_bias\.|rewards\.(workers|limit)|agent\.tool_"
)
# What the terminal shows of each batch.
_PROGRESS_METRICS = ("reward_sampled", "length_mean", "pearson", "batch_secs")


@dataclasses.dataclass(frozen=True)
class RlSummary:
    """How a run ended.

    Attributes:
      step: batches made.
      reward: mean over the last batch's samples, before penalties. NaN where none was made.
      stopped_by: number of the signal that ended the run, or None at its full length.
    """

    step: int
    reward: float
    stopped_by: int | None = None

    def __str__(self) -> str:
        if math.isnan(self.reward):
            return f"the run is finished: all {self.step} batches were made before"
        return f"{self.step} batches, reward {self.reward:.4f}"


def run_rl_training(
    config: rl_config.RlConfig | None,
    workdir: str | pathlib.Path,
    options: resume.ResumeOptions = resume.NO_OPTIONS,
) -> RlSummary:
    """Train, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: config of the run. None goes on with the run that `workdir` holds.
      workdir: local directory of the run.
      options: how the run begins or goes on, where it does so otherwise.

    Raises:
      ValueError, CheckpointError, ConfigError: anything that is wrong, before the first batch.
    """
    path = local_path.resolve_path(workdir, "workdir")
    return workdir_lib.open_and_run(
        open_rl_session, rl_config.RlConfig, config, path, _CHANGEABLE_FIELDS, options
    )


def make_layouts(
    config: rl_config.RlConfig, model_config: model_config_lib.ModelConfig, devices=None
) -> tuple[sharding.MeshLayout | None, sharding.MeshLayout | None]:
    """Return the trainer's and the sampler's layout of the same devices, or None on one device."""
    mesh = run_model.make_train_mesh(dict(config.mesh), devices)
    serving_mesh = weight_sync_lib.make_serving_mesh(mesh, config.serving_mesh)
    return (
        sharding.make_layout(mesh, model_config, sharding.TRAIN),
        sharding.make_layout(serving_mesh, model_config, sharding.DECODE),
    )


def make_optimizer(config: rl_config.RlConfig) -> optim.AdamW:
    """Return AdamW whose learning rate is constant after its warm-up."""
    update = config.update
    # The schedule counts tokens. A step counts as one token here.
    num_steps = max(config.batches * update.minibatches * update.epochs, 1)
    rate = optim.make_stage_schedule(
        "constant", 0.0, update.learning_rate, update.warmup_steps, num_steps, 1, 0
    )
    return optim.AdamW(rate, **dataclasses.asdict(config.optimizer))


def open_rl_session(start: resume.RunStart, stack: contextlib.ExitStack) -> "RlSession":
    """Return a session that begins where its checkpoint ends.

    `stack` closes its parts. All processes open them in the same order, because some of them talk
    to other processes.
    """
    config, workdir = start.config, start.workdir
    model = run_model.make_run_model(config)
    layout, serving_layout = make_layouts(config, model.config)
    sharding.check_batch_rows(layout, config.update.rows)
    stop_request = workdir_lib.StopRequest("ending this batch")
    tasks, held_out_tasks = rollout_setup.open_run_tasks(config, model.tokenizer, workdir, stack)
    rewards = rollout_setup.open_rewards(config, stack)
    store = stack.enter_context(run_model.open_store(start, model, _has_reference(config)))
    position = resume.find_position(start, store)
    saved_state = saved_state_lib.read_saved_state(store, position.step, tasks)
    make_episode = rollout_setup.make_episode_factory(config, model.tokenizer)
    collector = None
    if jax.process_index() == 0:  # which alone has tasks
        collector = groups.GroupCollector(
            config, tasks, make_episode, rewards, saved_state.collector, saved_state.columns
        )
    stack.enter_context(stop_request.handle_signals())
    writer = stack.enter_context(
        metrics.MetricsWriter(workdir, position.step, config.batches, _PROGRESS_METRICS)
    )
    # Process 0 alone reads the metrics file. This broadcast comes before the engine is made: from
    # then on the other processes take part only in the engine's own broadcasts.
    last_evaluated_batch = multihost.broadcast_object(writer.last_steps.get("eval"))
    optimizer = make_optimizer(config)
    state = model.open_state(position, store, layout, optimizer)
    weight_sync = weight_sync_lib.WeightSync(model.config, model.dtype, serving_layout)
    sampler = rollout_setup.make_sampler(
        config, weight_sync(state.model), model.tokenizer, held_out_tasks
    )
    stack.callback(sampler.close)
    sampler.continue_from(saved_state.weight_version)
    reference = _load_reference(config, model, layout)
    return RlSession(
        config=config,
        tasks=tasks,
        position=position,
        store=store,
        writer=writer,
        stop_request=stop_request,
        collector=collector,
        sampler=sampler,
        weight_sync=weight_sync,
        updater=rl_update.PolicyUpdater(config, model.config, layout, optimizer, reference),
        evaluator=evaluate.HeldOutEvaluator(config, held_out_tasks, make_episode, sampler, rewards),
        length_stage=length_schedule.LengthStage(config.rollout.windows, saved_state.length_stage),
        state=state,
        batch_number=position.step,
        weight_version=saved_state.weight_version,
        last_evaluated_batch=last_evaluated_batch,
        last_saved_batch=position.step,
        num_skipped_in_row=saved_state.num_skipped_in_row,
    )


def _has_reference(config: rl_config.RlConfig) -> bool:
    """Return whether the objective has a KL term that compares with the checkpoint's model."""
    return bool(config.objective.kl_coef or config.objective.reward_kl_coef)


def _load_reference(
    config: rl_config.RlConfig, model: run_model.RunModel, layout: sharding.MeshLayout | None
) -> model_lib.MiniMaxM1 | None:
    """Return the checkpoint's model where the objective compares with it."""
    if not _has_reference(config):
        return None
    # Its parameters never train, so they need no more than the dtype of the computation.
    return model.load_weights(layout, model.dtype)


@dataclasses.dataclass
class RlSession:
    """One process's part of a run: the loop over batches.

    Attributes:
      config: config of the run.
      tasks: tasks to train on, by source, on process 0.
      position: where the session began.
      store: writes and reads checkpoints.
      writer: writes metrics, on process 0.
      stop_request: notes the signal that asks the run to end.
      collector: makes generation batches, on process 0. None on the others.
      sampler: draws samples from the weights of `weight_version`.
      weight_sync: copies the trainer's weights to the sampler.
      updater: makes the optimizer steps of a batch.
      evaluator: evaluates held-out tasks.
      length_stage: how long answers may be at present.
      state: weights and moments after batch `batch_number`.
      batch_number: batches made.
      weight_version: counts the weights that the sampler got. 0 is the first weights.
      last_evaluated_batch: batch after which held-out tasks were last evaluated. None for never.
      last_saved_batch: batch of the newest checkpoint. 0 without one.
      reward: mean reward of the last batch, before penalties.
      num_skipped_in_row: number of batches up to now that changed no weight.
    """

    config: rl_config.RlConfig
    tasks: rollout_setup.TasksBySource
    position: resume.RunPosition
    store: checkpoints.CheckpointStore
    writer: metrics.MetricsWriter
    stop_request: workdir_lib.StopRequest
    collector: groups.GroupCollector | None
    sampler: rollout.RolloutSampler
    weight_sync: weight_sync_lib.WeightSync
    updater: rl_update.PolicyUpdater
    evaluator: evaluate.HeldOutEvaluator
    length_stage: length_schedule.LengthStage
    state: step_lib.TrainState
    batch_number: int
    weight_version: int
    last_evaluated_batch: int | None
    last_saved_batch: int
    reward: float = math.nan
    num_skipped_in_row: int = 0

    def run(self) -> RlSummary:
        """Make all batches that are left, or those before a signal."""
        if self.batch_number == 0:
            objective = slime_flags.describe_objective(self.config.objective)
            self.writer.write(0, "event", {"objective": objective})
        # A run that was stopped within an evaluation has saved its batch, but not evaluated it.
        if self._is_evaluation_due() and self.last_evaluated_batch != self.batch_number:
            self._evaluate()
        while self.batch_number < self.config.batches and not self.stop_request.should_stop():
            start_secs = time.perf_counter()
            batch = self._sample_batch()
            if batch is None:
                break
            self._train_on_batch(batch, start_secs)
            if self._is_evaluation_due():
                self._evaluate()
            if (
                self.batch_number == self.config.batches
                or self.batch_number % self.config.save.every_steps == 0
                or self.stop_request.should_stop()
            ):
                self._save_checkpoint()
        # The signal may have come while the next batch was sampled, after one without a checkpoint.
        if self.stop_request.should_stop() and self.last_saved_batch != self.batch_number:
            self._save_checkpoint()
        self.store.wait()
        return RlSummary(self.batch_number, self.reward, self.stop_request.signal_number)

    # ---- parts of a batch

    def _sample_batch(self) -> groups.GenerationBatch | None:
        """Return a sampled and scored batch: process 0 makes it, and all processes get it.

        None where a signal came to any process. The collector is then as it was before.

        Raises:
          ValueError: no batch can be made, see `GroupCollector.collect`. The batches made so far
            are saved, so that the next start goes on with this one.
        """
        batch, failure = batch_transfer.sample_batch(
            self.collector,
            self.sampler,
            self.batch_number,
            self.length_stage.window_tokens,
            self.stop_request.is_requested,
        )
        if failure is not None:
            if self.last_saved_batch != self.batch_number:
                self._save_checkpoint()
            self.store.wait()
            raise failure
        return batch

    def _train_on_batch(self, batch: groups.GenerationBatch, start_secs: float) -> None:
        """Update the weights, sync them to the sampler, and log the batch.

        Args:
          batch: the sampled and scored batch.
          start_secs: clock's time at which its sampling began.
        """
        # The old state is donated: there is nothing to save until the batch is over.
        self.state, report = self.updater(
            self.state, batch.groups, self.batch_number, self.weight_version
        )
        sync_start_secs = time.perf_counter()
        # A batch that trained nothing leaves the weights, and so the ages of tokens, as they are.
        if report.metrics["updates"]:
            self.weight_version += 1
            self.sampler.update_weights(self.weight_sync(self.state.model), self.weight_version)
            # Dispatch is asynchronous: without this wait the time would count as the next batch's.
            # The sampler swaps its weights in the next `run`.
            jax.block_until_ready(jax.tree.leaves(self.state.model))
        report.metrics["resharding_secs"] = time.perf_counter() - sync_start_secs
        report.metrics |= self.weight_sync.metrics
        self.batch_number += 1
        self.reward = batch.mean_reward
        self._log_batch(batch, report, time.perf_counter() - start_secs)
        self._watch_updates(report.metrics)
        if self.length_stage.push(report.length_p99, report.nll):
            event = {"window_tokens": self.length_stage.window_tokens}
            self.writer.write(self.batch_number, "event", event)

    def _log_batch(
        self,
        batch: groups.GenerationBatch,
        report: batch_metrics_lib.BatchReport,
        batch_secs: float,
    ) -> None:
        self.writer.advance(self.batch_number)
        record = batch.metrics | report.metrics
        # Parts that do not overlap: scoring_secs is in waiting_secs already.
        timed = ("sampling_secs", "waiting_secs", "training_secs", "resharding_secs")
        record["batch_secs"] = batch_secs
        record["other_secs"] = batch_secs - sum(record[name] for name in timed)
        record |= {"window_tokens": self.length_stage.window_tokens, "version": self.weight_version}
        alarms = batch_metrics_lib.list_alarms(report, self.config.pearson_min)
        for event in (*batch.events, *alarms):
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

    def _watch_updates(self, values: Mapping[str, Any]) -> None:
        """Write an event for updates that taught nothing. A batch without any has an alarm.

        Raises:
          DataError: too many batches in a row changed no weight.
        """
        num_updates, num_idle = values["updates"], values.get("no_signal", 0.0)
        if num_idle:
            event = {"no_signal": "skipped", "updates": num_updates, "updates_skipped": num_idle}
            self.writer.write(self.batch_number, "event", event)
        is_idle = num_updates == num_idle + values.get("skipped", 0.0)
        self.num_skipped_in_row = self.num_skipped_in_row + 1 if is_idle else 0
        if self.num_skipped_in_row >= self.config.max_skipped:
            raise records.DataError(
                f"batch {self.batch_number}: {self.num_skipped_in_row} batches in a row changed no "
                "weight, as no token had an advantage and a coefficient. Are the tasks too easy or "
                "too hard? Give the same command with other sources, rollout.dynamic=True or a "
                "larger max_skipped, and with --allow_change=FIELD."
            )

    def _is_evaluation_due(self) -> bool:
        """Return whether held-out tasks are evaluated after this batch."""
        every_batches = self.config.evaluation.every_batches
        return every_batches > 0 and (
            self.batch_number % every_batches == 0 or self.batch_number == self.config.batches
        )

    def _evaluate(self) -> None:
        """Log the mean reward of held-out tasks, unless a signal stops the evaluation."""
        values = self.evaluator(
            self.length_stage.window_tokens, self.weight_version, self.stop_request.is_requested
        )
        if values is not None:
            self.writer.write(self.batch_number, "eval", values)

    def _save_checkpoint(self) -> None:
        # Lines first: a restart cuts the lines after its checkpoint, but could not write lines that
        # are missing before it.
        self.writer.flush()
        saved_state = saved_state_lib.RlSavedState()
        # Process 0 alone has the collector's state, and writes it.
        if self.collector is not None:
            saved_state = saved_state_lib.collect_state(
                self.collector,
                self.tasks,
                self.weight_version,
                self.length_stage,
                self.num_skipped_in_row,
            )
        data, config = saved_state.to_json(), configlib.to_json(self.config)
        self.store.save(self.state, data, config, self.batch_number, saved_state.columns)
        self.last_saved_batch = self.batch_number
