"""The training loop of pretraining and fine-tuning: restore, read, step, log, evaluate, save, stop.

A run goes through its stages in order. Each stage has its own row length, batch size, mesh and
learning rate. The state of one stage is the beginning of the next, moved onto the next mesh.
"""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import configlib, flops, sharding
from m1_jax import model as model_lib
from train import checkpoints, evaluate, metrics, optim, run_model
from train import config as config_lib
from train import step as step_lib
from train import workdir as workdir_lib
from train.data import config as data_config
from train.data import placement, records
from train.data import stream as stream_lib

# What may change when a run goes on: where it computes and what it logs, never what it computes.
_CHANGEABLE_FIELDS = re.compile(
    r"(save|log|evaluation)\.|data\.(workers|prefetch)|compilation_cache|stages\.\d+\.mesh"
)


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """How a run ended.

    Attributes:
      step: steps made.
      loss: of the last step; NaN where none was made.
      stopped_by: number of the signal that ended the run, or None at its full length.
    """

    step: int
    loss: float
    stopped_by: int | None = None

    def __str__(self) -> str:
        return f"{self.step} steps, loss {self.loss:.4f}"


def run_training(
    config: config_lib.TrainConfig | None, workdir: str | pathlib.Path
) -> TrainSummary:
    """Train, from the newest checkpoint in `workdir` if there is one.

    A run that was killed and started again makes bit-exact the steps of one that was not.

    Args:
      config: of the run; None goes on with the run that `workdir` holds.
      workdir: local directory of the run.

    Raises:
      ValueError, CheckpointError, ConfigError: anything that is wrong, before the first step.
    """
    workdir = pathlib.Path(workdir)
    return workdir_lib.open_and_run(open_session, resolve_train_config(config, workdir), workdir)


def resolve_train_config(
    config: config_lib.TrainConfig | None, workdir: pathlib.Path
) -> config_lib.TrainConfig:
    """Return the config to run: `config`, if `workdir` does not hold another run."""
    return workdir_lib.resolve_config(config_lib.TrainConfig, config, workdir, _CHANGEABLE_FIELDS)


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A run whose model, tokenizer and meshes fit together; no file is open yet.

    Attributes:
      config: of the run.
      model: of the run.
      layouts: of each stage; None on a single device.
    """

    config: config_lib.TrainConfig
    model: run_model.RunModel
    layouts: tuple[sharding.MeshLayout | None, ...]

    @property
    def total_steps(self) -> int:
        return self.first_step(len(self.config.stages))

    def first_step(self, stage_index: int) -> int:
        """Return how many steps the run has made when a stage begins."""
        return sum(stage.num_steps for stage in self.config.stages[:stage_index])

    def step_settings(self, stage_index: int) -> step_lib.TrainStepSettings:
        """Return what a stage's step is compiled for; its schedules know the run's step."""
        config, first_step = self.config, self.first_step(stage_index)
        stage, earlier = config.stages[stage_index], config.stages[:stage_index]
        tokens_per_step = stage.rows * stage.seq_len
        rate = optim.make_stage_schedule(
            stage.shape,
            earlier[-1].learning_rate if earlier else 0.0,
            stage.learning_rate,
            stage.warmup_tokens,
            stage.tokens,
            tokens_per_step,
            first_step,
        )
        tokens_before = sum(s.num_steps * s.rows * s.seq_len for s in earlier)
        balance = (
            optim.make_piecewise_schedule(
                config.loss.balance, tokens_before, tokens_per_step, first_step
            )
            if config.loss.balance
            else None
        )
        optimizer = optim.AdamW(rate, **dataclasses.asdict(config.optimizer))
        return step_lib.TrainStepSettings(
            optimizer, stage.accumulate, balance, config.loss.z, config.skip_nonfinite
        )

    def open_stream(
        self,
        stage_index: int,
        batch_placement: placement.BatchPlacement,
        held_out_sources: tuple[config_lib.DataSource, ...] = (),
    ) -> stream_lib.BatchStream:
        """Open a stage's data; or held-out data, read once, in the stage's rows."""
        stage, data = self.config.stages[stage_index], self.config.data
        if held_out_sources:
            data = dataclasses.replace(data, sources=held_out_sources, weights=())
        return stream_lib.BatchStream(
            data_config.StreamConfig(data, stage.seq_len, stage.rows, self.config.seed),
            self.model.tokenizer,
            batch_placement.block_index,
            batch_placement.num_blocks,
            num_epochs=1 if held_out_sources else None,
        )

    def place_batches(self, stage_index: int) -> placement.BatchPlacement:
        """Return what puts a stage's rows onto its devices."""
        return placement.BatchPlacement(
            self.layouts[stage_index], self.config.stages[stage_index].rows
        )

    def restore_state(
        self, store: checkpoints.CheckpointStore, step: int, stage_index: int = -1
    ) -> step_lib.TrainState:
        """Return the state of a checkpoint on a stage's mesh, by default the last stage's."""
        optimizer = self.step_settings(stage_index).optimizer
        return self.model.restore_state(store, step, self.layouts[stage_index], optimizer)


def make_train_setup(config: config_lib.TrainConfig) -> TrainSetup:
    """Return the parts of a run that need no files but the checkpoint's config and tokenizer.

    Raises:
      ValueError, CheckpointError, ConfigError: parts that do not fit together.
    """
    model = run_model.make_run_model(config, config.model)
    layouts = tuple(_make_stage_layout(stage, model.config) for stage in config.stages)
    return TrainSetup(config, model, layouts)


def open_session(
    config: config_lib.TrainConfig, workdir: pathlib.Path, stack: contextlib.ExitStack
) -> "TrainSession":
    """Return a session that begins where the newest checkpoint ends; `stack` closes its files."""
    setup = make_train_setup(config)
    store = stack.enter_context(checkpoints.CheckpointStore(workdir, config.save))
    latest = store.latest_step()
    checkpoint_info = None if latest is None else store.read_info(latest)
    stop_request = workdir_lib.StopRequest("saving after this step")
    stack.enter_context(stop_request.handle_signals())
    # Every stage's data is opened and closed here, so that bad data stops the run before step 1.
    for index in range(len(config.stages)):
        with setup.open_stream(index, setup.place_batches(index)) as stream:
            if checkpoint_info is not None:
                stream.set_state(checkpoint_info.data)
    if config.evaluation.every_steps:
        setup.open_stream(0, setup.place_batches(0), config.evaluation.sources).close()
    writer = stack.enter_context(metrics.MetricsWriter(workdir, latest or 0, setup.total_steps))
    return TrainSession(setup, workdir, store, checkpoint_info, stop_request, writer)


class TrainSession:
    """One process's part of a run: the loop over stages and steps."""

    def __init__(
        self,
        setup: TrainSetup,
        workdir: pathlib.Path,
        store: checkpoints.CheckpointStore,
        checkpoint_info: checkpoints.CheckpointInfo | None,
        stop_request: workdir_lib.StopRequest,
        writer: metrics.MetricsWriter,
    ):
        """Begin after `checkpoint_info`'s step, or at step 0 where it is None."""
        self.setup, self.config, self.workdir = setup, setup.config, workdir
        self.store, self.checkpoint_info = store, checkpoint_info
        self.stop_request, self.writer = stop_request, writer
        self.step = 0 if checkpoint_info is None else checkpoint_info.step
        self.loss = math.nan
        self.num_skipped_in_row = 0
        self.spike_detector = metrics.SpikeDetector(setup.config.log.spike)
        self.timer = metrics.StepTimer(self.step)

    def run(self) -> TrainSummary:
        """Make all steps that are left, or those before a signal."""
        state = None
        data_state = None if self.checkpoint_info is None else self.checkpoint_info.data
        for index in range(len(self.config.stages)):
            unfinished = self.step < self.setup.first_step(index + 1)
            if unfinished and self.stop_request.signal_number is None:
                state = self._enter_stage(index, state)
                state, data_state = self._run_stage(index, state, data_state)
        self.store.wait()
        return TrainSummary(self.step, self.loss, self.stop_request.signal_number)

    def _enter_stage(self, index: int, state: step_lib.TrainState | None) -> step_lib.TrainState:
        """Return the state on a stage's mesh: the stage before's, a checkpoint's, or a new one."""
        model, layout = self.setup.model, self.setup.layouts[index]
        optimizer = self.setup.step_settings(index).optimizer
        if state is None and self.checkpoint_info is None:
            return model.init_state(layout, optimizer)
        if state is None and self.checkpoint_info is not None:
            return self.setup.restore_state(self.store, self.checkpoint_info.step, index)
        # The tree is rebuilt from `like`, because a model's layout is part of its structure.
        like = model.abstract_state(layout, optimizer)
        shardings = [leaf.sharding for leaf in jax.tree.leaves(like)]
        return jax.tree.unflatten(
            jax.tree.structure(like), jax.device_put(jax.tree.leaves(state), shardings)
        )

    def _run_stage(
        self, index: int, state: step_lib.TrainState, data_state: dict | None
    ) -> tuple[step_lib.TrainState, dict]:
        """Make a stage's steps; return the state after them, and that of the data."""
        last_step = self.setup.first_step(index + 1)
        settings = self.setup.step_settings(index)
        batch_placement = self.setup.place_batches(index)
        # Steps whose metrics are still on the devices. Fetching them waits for the step, so it is
        # done one step late: the devices then have the next step to compute meanwhile.
        unlogged: list[tuple[int, dict[str, jax.Array], stream_lib.HostBatch]] = []
        with (
            self.setup.open_stream(index, batch_placement) as stream,
            _record_trace(self.config.log.trace, self.workdir / "trace") as trace_step,
        ):
            if data_state is not None:
                stream.set_state(data_state)
            self.timer.restart(self.step)
            while self.step < last_step:
                trace_step(self.step)
                host_batch = next(stream)
                batch = batch_placement(host_batch.batch)
                # `state` is donated: from here on only the new one exists.
                state, values = step_lib.train_step(state, batch, settings=settings)
                self.step += 1
                unlogged.append((self.step, values, host_batch))
                is_last = self.step == last_step
                # Asked after every step, as all processes must ask about the same steps.
                stop = self.stop_request.should_stop(self.step)
                save = stop or is_last or self._is_due(self.config.save.every_steps)
                evaluate_now = is_last or self._is_due(self.config.evaluation.every_steps)
                # A checkpoint and an evaluation come after the lines of all steps before them.
                while len(unlogged) > (0 if save or evaluate_now else 1):
                    self._log_step(index, *unlogged.pop(0))
                if evaluate_now and self.config.evaluation.every_steps:
                    self._evaluate(index, state.model, batch_placement)
                if save:
                    self._save_checkpoint(state, stream)
                if stop:
                    break
            return state, stream.get_state()

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def _save_checkpoint(self, state: step_lib.TrainState, stream: stream_lib.BatchStream) -> None:
        # Lines first: a restart cuts the lines after its checkpoint, but could not write lines that
        # are missing before it.
        self.writer.flush()
        self.store.save(state, stream.get_state(), configlib.to_json(self.config))

    def _log_step(
        self,
        index: int,
        step: int,
        values: dict[str, jax.Array],
        host_batch: stream_lib.HostBatch,
    ) -> None:
        """Write a step's lines, and stop the run where training is broken."""
        host_values = {name: np.asarray(value) for name, value in values.items()}
        expert_load = host_values.pop("expert_load")
        record = {name: float(value) for name, value in host_values.items()}
        self.loss = record["loss"]
        self.writer.advance(step)
        if self.config.log.samples:
            self.writer.write_samples(step, host_batch.sample_ids)
        self._watch_loss(step, record)
        if step % self.config.log.every_steps == 0 or step == self.setup.total_steps:
            record |= metrics.summarize_expert_load(expert_load) | self._measure_speed(index, step)
            record |= {
                "stage": index,
                "utilisation": host_batch.utilization,
                "data_secs": host_batch.wait_secs,
            }
            self.writer.write(step, "train", record)

    def _watch_loss(self, step: int, record: dict[str, float]) -> None:
        """Report a step without a finite gradient, and a loss that jumps.

        Raises:
          FloatingPointError: too many steps in a row without a finite gradient.
        """
        if record["skipped"] or not math.isfinite(self.loss):
            self.num_skipped_in_row += 1
            action = "skipped" if self.config.skip_nonfinite else "taken"
            event = {"not_finite": action, "loss": self.loss, "grad_norm": record["grad_norm"]}
            self.writer.write(step, "event", event)
            if self.num_skipped_in_row >= self.config.max_skipped:
                raise FloatingPointError(
                    f"step {step}: {self.num_skipped_in_row} steps in a row without a finite "
                    "gradient; lower the learning rate, or go on from an earlier checkpoint"
                )
            return
        self.num_skipped_in_row = 0
        if self.spike_detector.is_spike(self.loss):
            event = {"loss_spike": self.loss, "grad_norm": record["grad_norm"]}
            self.writer.write(step, "event", event)

    def _measure_speed(self, index: int, step: int) -> dict[str, float]:
        stage, secs = self.config.stages[index], self.timer.secs_per_step(step)
        speed = {"step_secs": secs, "tokens_per_sec": stage.rows * stage.seq_len / secs}
        peak_flops = metrics.peak_flops()
        if peak_flops is None:
            return speed
        step_flops = flops.count_train_flops(
            self.setup.model.config, stage.rows, stage.seq_len
        ).model
        return speed | {"mfu": step_flops / secs / peak_flops}

    def _evaluate(
        self, index: int, model: model_lib.MiniMaxM1, batch_placement: placement.BatchPlacement
    ) -> None:
        """Write the loss of held-out data, always of the same batches."""
        config = self.config.evaluation
        names = [source.name for source in config.sources]
        # Sums over batches are kept in float64 on the host: float32 would lose small ones.
        totals = np.zeros((2, len(names), evaluate.NUM_BUCKETS))
        num_batches = 0
        with self.setup.open_stream(index, batch_placement, config.sources) as stream:
            for host_batch in itertools.islice(stream, config.batches or None):
                batch, source_ids = batch_placement((host_batch.batch, host_batch.source_ids))
                sums = evaluate.sum_losses(model, batch, source_ids, len(names))
                totals += np.asarray(sums, np.float64)
                num_batches += 1
        if not totals[1].any():
            raise records.DataError(f"evaluation: no token with weight in {num_batches} batches")
        self.writer.write(self.step, "eval", evaluate.tabulate_losses(totals, names))
        self.timer.restart(self.step)  # the time of an evaluation is no step's


@contextlib.contextmanager
def _record_trace(
    trace: tuple[int, int] | None, directory: pathlib.Path
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call before each step: it starts and ends the recording for xprof.

    Args:
      trace: first step and number of steps to record; None records nothing.
      directory: of the recording.
    """
    first_step, num_steps = trace or (-1, 0)
    recording = False

    def trace_step(step: int) -> None:
        nonlocal recording
        if step == first_step:
            jax.profiler.start_trace(str(directory))
            recording = True
        elif recording and step >= first_step + num_steps:
            jax.profiler.stop_trace()
            recording = False

    yield trace_step
    if recording:
        jax.profiler.stop_trace()


def _make_stage_layout(
    stage: config_lib.TrainStage, model_config: model_config_lib.ModelConfig
) -> sharding.MeshLayout | None:
    """Return a stage's layout; None on a single device.

    Raises:
      ValueError: a mesh that the devices, the model, the rows or their length do not fit.
    """
    mesh = run_model.make_train_mesh(dict(stage.mesh))
    layout = sharding.make_layout(mesh, model_config, sharding.TRAIN)
    sharding.check_batch_rows(layout, stage.rows // stage.accumulate)
    if layout is not None and stage.seq_len % layout.axis_size("length"):
        raise ValueError(
            f"seq_len: got {stage.seq_len} over context={layout.axis_size('length')}; "
            f"wanted a multiple of {layout.axis_size('length')}"
        )
    return layout
