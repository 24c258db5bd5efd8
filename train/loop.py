"""The training loop of pretraining and fine-tuning: restore, read, step, log, evaluate, save, stop.

A run goes through its stages in order. Each stage has its own row length, batch size, mesh and
learning rate. The state at the end of a stage moves onto the mesh of the next one.
"""

import contextlib
import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from m1_jax import configlib, distributed, flops, local_path, process_watch
from m1_jax import model as model_lib
from train import checkpoints, evaluate, metrics, resume, run_model, run_setup, step_trace
from train import config as config_lib
from train import step as step_lib
from train import workdir as workdir_lib
from train.data import placement, records
from train.data import stream as stream_lib

# Paths of fields that may change when a run goes on. They decide where it computes and what it
# logs, never what it computes.
_CHANGEABLE_FIELDS = re.compile(
    r"(save|log|evaluation)\.|data\.(workers|prefetch|bad_records|max_bad)|compilation_cache"
    r"|stages\.\d+\.mesh|max_skipped"
)
# What reading data may raise: its own errors, those of the disk and of a worker process.
_DATA_ERRORS = (ValueError, OSError, RuntimeError)
# Errors that no process has alone. Another one must not save, as the others would not.
_AGREED_ERRORS = (records.DataError, process_watch.AgreedError)
_SKIPPED_KEY = "skipped_in_row"  # in a checkpoint's data: `TrainSession.num_skipped_in_row`


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """How a run ended.

    Attributes:
      step: number of steps made.
      loss: loss of the last step. NaN where no step was made.
      stopped_by: number of the signal that ended the run. None where the run is complete.
      num_skipped: number of steps without a finite gradient or without a token to learn.
      num_made: number of steps that this start of the run made.
    """

    step: int
    loss: float
    stopped_by: int | None = None
    num_skipped: int = 0
    num_made: int = 0

    def __str__(self) -> str:
        if not self.num_made:
            return f"the run is finished: all {self.step} steps were made before"
        skipped = f", {self.num_skipped} of them skipped" if self.num_skipped else ""
        return f"{self.step} steps{skipped}, loss {self.loss:.4f}"


def run_training(
    config: config_lib.TrainConfig | None,
    workdir: str | pathlib.Path,
    options: resume.ResumeOptions = resume.NO_OPTIONS,
) -> TrainSummary:
    """Train, from the newest checkpoint in `workdir` if there is one.

    A run that was killed and started again makes bit-exact the steps of one that was not.

    Args:
      config: the run's config. None goes on with the run that `workdir` holds.
      workdir: local directory of the run.
      options: how the run begins or goes on, where it does so otherwise.

    Raises:
      ValueError, CheckpointError, ConfigError: something is wrong. All of it is checked before the
        first step.
    """
    return workdir_lib.open_and_run(
        open_session,
        config_lib.TrainConfig,
        config,
        local_path.resolve_path(workdir, "workdir"),
        _CHANGEABLE_FIELDS,
        options,
    )


def open_session(start: resume.RunStart, stack: contextlib.ExitStack) -> "TrainSession":
    """Return a session that begins where its checkpoint ends. `stack` closes its files."""
    config = start.config
    setup = run_setup.make_train_setup(config)
    store = stack.enter_context(run_model.open_store(start, setup.model))
    position = resume.find_position(start, store)
    stop_request = workdir_lib.StopRequest("saving after this step")
    stack.enter_context(stop_request.handle_signals())
    setup.check_data(None if position.info is None else position.info.data)
    writer = stack.enter_context(
        metrics.MetricsWriter(start.workdir, position.step, setup.total_steps)
    )
    return TrainSession(
        config=config,
        setup=setup,
        workdir=start.workdir,
        store=store,
        position=position,
        stop_request=stop_request,
        writer=writer,
        spike_detector=metrics.SpikeDetector(config.log.spike),
        timer=metrics.StepTimer(position.step),
        step=position.step,
    )


@dataclasses.dataclass
class TrainSession:
    """One process's part of a run: the loop over stages and steps.

    Attributes:
      config: the run's settings.
      setup: the run's model, tokenizer and meshes.
      workdir: local directory of the run.
      store: the run's checkpoints.
      position: where the session began.
      stop_request: knows whether a signal asked for the end.
      writer: writes metrics and events.
      spike_detector: finds losses that jump.
      timer: measures the time of steps between two lines of metrics.
      step: number of steps made.
      loss: loss of the last step that was logged, NaN before the first.
      num_skipped_in_row: number of steps up to now without a finite gradient or without a signal.
      num_skipped: number of such steps in this session.
    """

    config: config_lib.TrainConfig
    setup: run_setup.TrainSetup
    workdir: pathlib.Path
    store: checkpoints.CheckpointStore
    position: resume.RunPosition
    stop_request: workdir_lib.StopRequest
    writer: metrics.MetricsWriter
    spike_detector: metrics.SpikeDetector
    timer: metrics.StepTimer
    step: int
    loss: float = math.nan
    num_skipped_in_row: int = 0
    num_skipped: int = 0

    def run(self) -> TrainSummary:
        """Make all remaining steps, or those until a signal."""
        state = None
        # The first stage that runs takes the checkpoint's position in the data, and each further
        # one that of the stage before.
        data_state = None if self.position.info is None else self.position.info.data
        self.num_skipped_in_row = (data_state or {}).get(_SKIPPED_KEY, 0)
        for index in range(len(self.config.stages)):
            unfinished = self.step < self.setup.first_step(index + 1)
            if unfinished and not self.stop_request.should_stop():
                state = self._enter_stage(index, state)
                state, data_state = self._run_stage(index, state, data_state)
        self.store.wait()
        return TrainSummary(
            self.step,
            self.loss,
            self.stop_request.signal_number,
            self.num_skipped,
            self.step - self.position.step,
        )

    def _enter_stage(self, index: int, state: step_lib.TrainState | None) -> step_lib.TrainState:
        """Return the state on a stage's mesh.

        Args:
          index: number of the stage.
          state: state at the end of the stage before. None takes that of the session's position.
        """
        model, layout = self.setup.model, self.setup.layouts[index]
        optimizer = self.setup.step_settings(index).optimizer
        if state is None:
            return model.open_state(self.position, self.store, layout, optimizer)
        # The tree is rebuilt from `like`, because a model's layout is part of its structure.
        like = model.abstract_state(layout, optimizer)
        shardings = [leaf.sharding for leaf in jax.tree.leaves(like)]
        return jax.tree.unflatten(
            jax.tree.structure(like), jax.device_put(jax.tree.leaves(state), shardings)
        )

    def _run_stage(
        self, index: int, state: step_lib.TrainState, data_state: dict | None
    ) -> tuple[step_lib.TrainState, dict]:
        """Make a stage's steps.

        Returns:
          The state after the steps, and the state of the data on all processes.

        Raises:
          DataError, OSError: a batch could not be read. The steps before it are saved.
        """
        last_step = self.setup.first_step(index + 1)
        settings = self.setup.step_settings(index)
        batch_placement = self.setup.place_batches(index)
        # Steps whose metrics are still on the devices. Fetching metrics waits for their step, so it
        # happens one step late. The devices then have the next step to compute meanwhile.
        unlogged: list[tuple[int, dict[str, jax.Array], stream_lib.HostBatch]] = []
        with (
            self.setup.open_stream(index, batch_placement) as stream,
            step_trace.record_trace(self.config.log.trace, self.workdir / "trace") as trace_step,
        ):
            if data_state is not None:
                stream.set_state(data_state)
            self.timer.restart(self.step)
            while self.step < last_step:
                trace_step(self.step)
                host_batch = self._read_batch(index, state, stream, unlogged)
                batch = batch_placement.device_put_batch(host_batch.arrays)
                # The old state is donated. Its buffers hold the new one after this line.
                state, values = step_lib.train_step(state, batch, settings=settings)
                self.step += 1
                unlogged.append((self.step, values, host_batch))
                is_last = self.step == last_step
                # Asked after every step, as all processes must ask together. The devices have the
                # step to compute meanwhile.
                stop = self.stop_request.should_stop()
                save = stop or is_last or self._is_due(self.config.save.every_steps)
                evaluate_now = is_last or self._is_due(self.config.evaluation.every_steps)
                # The lines of all steps come before a checkpoint or an evaluation after them.
                while len(unlogged) > (0 if save or evaluate_now else 1):
                    self._log_step(index, *unlogged.pop(0))
                if evaluate_now and self.config.evaluation.every_steps:
                    try:
                        self._evaluate(index, state.model, batch_placement)
                    except _AGREED_ERRORS as error:
                        self._save_before_error(error, state, stream.get_state())
                        raise
                if save:
                    self._save_checkpoint(state, stream.get_state())
                if stop:
                    break
            # Merged: the next stage may give this process rows, and so lanes, of other processes.
            return state, checkpoints.merge_across_processes(stream.get_state())

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def _read_batch(
        self,
        index: int,
        state: step_lib.TrainState,
        stream: stream_lib.BatchStream,
        unlogged: list[tuple[int, dict[str, jax.Array], stream_lib.HostBatch]],
    ) -> stream_lib.HostBatch:
        """Return this process's part of the next batch. All processes call this together.

        Raises:
          DataError, OSError: the batch could not be read, here or on another process. The steps
            before it are saved.
        """
        # The other processes may read what this one cannot, and their streams are then a batch too
        # far.
        make_data_state = stream.remember_state()
        try:
            # Before the step, as no process can leave it out alone. The devices compute the step
            # before meanwhile.
            return distributed.run_on_all(lambda: next(stream))
        except _DATA_ERRORS as error:
            while unlogged:
                self._log_step(index, *unlogged.pop(0))
            self._save_before_error(error, state, make_data_state())
            raise

    def _save_before_error(
        self, error: Exception, state: step_lib.TrainState, data_state: dict[str, Any]
    ) -> None:
        """Save the steps made so far, as an error that all processes have is about to end them."""
        self.writer.write(self.step, "event", {"data_error": str(error)})
        if self.step and self.store.latest_step() != self.step:
            self._save_checkpoint(state, data_state)
        self.store.wait()

    def _save_checkpoint(self, state: step_lib.TrainState, data_state: dict[str, Any]) -> None:
        """Save a checkpoint. `data_state` is this process's part of the state of the data."""
        # Lines first: a restart cuts the lines after its checkpoint. It cannot write lines that are
        # missing before it.
        self.writer.flush()
        merged_state = checkpoints.merge_on_first(data_state)
        merged_state[_SKIPPED_KEY] = self.num_skipped_in_row
        self.store.save(state, merged_state, configlib.to_json(self.config))

    def _log_step(
        self,
        index: int,
        step: int,
        values: dict[str, jax.Array],
        host_batch: stream_lib.HostBatch,
    ) -> None:
        """Write a step's lines.

        Raises:
          FloatingPointError, DataError: see `_watch_step`.
        """
        host_values = {name: np.asarray(value) for name, value in values.items()}
        expert_load = host_values.pop("expert_load")
        record = {name: float(value) for name, value in host_values.items()}
        if record["no_signal"]:
            # Means over no token. In the log they would look like a loss of 0.
            del record["loss"], record["z_loss"]
        else:
            self.loss = record["loss"]
        self.writer.advance(step)
        if self.config.log.samples:
            self.writer.write_samples(step, host_batch.sample_ids)
        for error in host_batch.bad_records:
            self.writer.write(step, "event", {"bad_record": error})
        self._watch_step(index, step, record)
        if step % self.config.log.every_steps == 0 or step == self.setup.total_steps:
            record |= metrics.summarize_expert_load(expert_load) | self._measure_speed(index, step)
            record |= {"stage": index, "utilisation": host_batch.utilization}
            record |= {"data_secs": host_batch.wait_secs, "bad_records": host_batch.num_bad}
            self.writer.write(step, "train", record)

    def _watch_step(self, index: int, step: int, record: dict[str, float]) -> None:
        """Write an event for a step that taught nothing, and for a loss that jumps.

        Raises:
          FloatingPointError: too many steps in a row taught nothing, this one for want of a finite
            gradient.
          DataError: the same, and this one had no token to learn.
        """
        if record["no_signal"]:
            self._note_skipped(step, {"no_signal": "skipped", "tokens": record["tokens"]})
            if self.num_skipped_in_row >= self.config.max_skipped:
                raise records.DataError(
                    f"step {step}: {self.num_skipped_in_row} steps in a row without a token to "
                    "learn or a finite gradient. Are user turns longer than many rows? Give the "
                    "same command with longer rows, data.overlong='drop' or a larger max_skipped, "
                    "and with --allow_change=FIELD."
                )
            return
        if record["skipped"] or not math.isfinite(self.loss):
            action = "skipped" if self.config.skip_nonfinite else "taken"
            event = {"not_finite": action, "loss": self.loss, "grad_norm": record["grad_norm"]}
            self._note_skipped(step, event)
            if self.num_skipped_in_row >= self.config.max_skipped:
                raise FloatingPointError(
                    f"step {step}: {self.num_skipped_in_row} steps in a row without a finite "
                    "gradient. Give the same command with a lower rate, and allow it: "
                    f"--set=stages.{index}.learning_rate=RATE --allow_change=stages. --from_step=N "
                    "goes back to an earlier checkpoint."
                )
            return
        self.num_skipped_in_row = 0
        if self.spike_detector.is_spike(self.loss):
            event = {"loss_spike": self.loss, "grad_norm": record["grad_norm"]}
            self.writer.write(step, "event", event)

    def _note_skipped(self, step: int, event: dict[str, Any]) -> None:
        self.num_skipped += 1
        self.num_skipped_in_row += 1
        self.writer.write(step, "event", event)

    def _measure_speed(self, index: int, step: int) -> dict[str, float]:
        """Return seconds a step, tokens a second and, where the peak is known, MFU (0 to 1)."""
        stage, secs = self.config.stages[index], self.timer.secs_per_step(step)
        speed = {"step_secs": secs, "tokens_per_sec": stage.rows * stage.seq_len / secs}
        peak_flops = metrics.peak_flops()
        if peak_flops is None:  # a CPU, or a device that is not in the table
            return speed
        step_flops = flops.count_train_flops(
            self.setup.model.config, stage.rows, stage.seq_len
        ).model
        return speed | {"mfu": step_flops / secs / peak_flops}

    def _evaluate(
        self, index: int, model: model_lib.MiniMaxM1, batch_placement: placement.BatchPlacement
    ) -> None:
        """Write the loss of held-out data. The batches are the same in every evaluation.

        Raises:
          DataError: a record cannot be used, or no token of the batches has a weight.
          AgreedError: some process could not read a batch.
        """
        config = self.config.evaluation
        # Together, so that what one process cannot open ends all.
        stream = distributed.run_on_all(
            lambda: self.setup.open_stream(index, batch_placement, config.sources)
        )
        with stream:
            losses = evaluate.measure_losses(
                model,
                stream,
                batch_placement,
                [source.name for source in config.sources],
                config.batches or None,
            )
        self.writer.write(self.step, "eval", losses)
        self.timer.restart(self.step)  # so that no step is charged for the evaluation
