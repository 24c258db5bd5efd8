"""The training loop: restore, read, step, log, evaluate, save, stop."""

import contextlib
import dataclasses
import itertools
import math
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1_jax import config as model_config_lib
from m1_jax import configlib, flops, sharding
from m1_jax import params as params_lib
from m1_jax import tokenizer as tokenizer_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import release
from train import checkpoints, evaluate, lora, metrics, optim
from train import config as config_lib
from train import step as step_lib
from train import workdir as workdir_lib
from train.data import placement
from train.data import stream as stream_lib

# What may change when a run goes on: where it computes and what it tells, never what it computes.
_CHANGEABLE_FIELDS = re.compile(
    r"(save|log|evaluation)\.|data\.(workers|prefetch)|compilation_cache|stages\.\d+\.mesh"
)


@dataclasses.dataclass(frozen=True)
class TrainSummary:
    """How a run ended. stopped_by: the signal that ended it, or None at its full length."""

    step: int
    loss: float
    stopped_by: int | None = None

    def __str__(self) -> str:
        return f"{self.step} steps, loss {self.loss:.4f}"


def run_training(config: config_lib.TrainConfig | None, workdir) -> TrainSummary:
    """Train, from the newest checkpoint in `workdir` if there is one.

    config: None goes on with the run that `workdir` holds. A run that was killed and started
    again makes the same steps, to the bit, as one that was not.

    Raises:
      ValueError, CheckpointError, ConfigError: anything that is wrong, before the first step.
    """
    workdir = pathlib.Path(workdir)
    config = resolve_train_config(config, workdir)
    workdir_lib.use_compilation_cache(config.compilation_cache)
    return workdir_lib.run_session(TrainSession(config, workdir), workdir)


def resolve_train_config(
    config: config_lib.TrainConfig | None, workdir: pathlib.Path
) -> config_lib.TrainConfig:
    """Return the config to run: the given one, if `workdir` does not hold another run."""
    return workdir_lib.resolve_config(config_lib.TrainConfig, config, workdir, _CHANGEABLE_FIELDS)


class TrainSession:
    """What one process keeps while it trains."""

    def __init__(self, config: config_lib.TrainConfig, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.model_config = load_model_config(config.checkpoint, config.model, config.remat)
        self.tokenizer = tokenizer_lib.Tokenizer.load(config.tokenizer or config.checkpoint)
        check_tokenizer(self.tokenizer, self.model_config)
        self.layouts = [_make_stage_layout(stage, self.model_config) for stage in config.stages]
        self.total_steps = sum(stage.num_steps for stage in config.stages)
        self.spike_detector = metrics.SpikeDetector(config.log.spike)
        self.num_skipped_in_row, self.loss = 0, math.nan
        self.stop_request = workdir_lib.StopRequest("saving after this step")

    def enter(self, stack: contextlib.ExitStack) -> None:
        """Open what must be closed again, and find where to start."""
        self.checkpoints = stack.enter_context(
            checkpoints.CheckpointStore(self.workdir, self.config.save)
        )
        latest = self.checkpoints.latest_step()
        self.checkpoint_info = None if latest is None else self.checkpoints.read_info(latest)
        self.step = latest or 0
        stack.enter_context(self.stop_request.handle_signals())
        # Opened here for all stages, so that bad data stops the run before its first step.
        for index in range(len(self.config.stages)):
            with self._open_stream(index) as stream:
                if self.checkpoint_info is not None:
                    stream.set_state(self.checkpoint_info.data)
        if self.config.evaluation.every_steps:
            self._open_stream(0, sources=self.config.evaluation.sources).close()
        self.writer = stack.enter_context(
            metrics.MetricsWriter(self.workdir, self.step, self.total_steps)
        )

    def run(self) -> TrainSummary:
        state, data_state, first = None, None, 0
        if self.checkpoint_info is not None:
            data_state = self.checkpoint_info.data
        for index, stage in enumerate(self.config.stages):
            last = first + stage.num_steps
            if self.step < last and self.stop_request.signal_number is None:
                state = self._stage_state(index, state)
                state, data_state = self._run_stage(index, first, state, data_state)
            first = last
        self.checkpoints.wait()
        return TrainSummary(self.step, self.loss, self.stop_request.signal_number)

    # ---- one stage

    def _run_stage(self, index: int, first_step: int, state, data_state):
        stage, layout = self.config.stages[index], self.layouts[index]
        last, settings = first_step + stage.num_steps, self._step_settings(index, first_step)
        place = placement.BatchPlacement(layout, stage.rows)
        waiting: list = []  # the step before: its numbers are fetched while this one computes
        with self._open_stream(index, place) as stream, self._profiler_trace() as trace:
            if data_state is not None:
                stream.set_state(data_state)
            self.interval_start_secs, self.interval_start_step = time.perf_counter(), self.step
            while self.step < last:
                trace(self.step)
                rows = next(stream)
                state, values = step_lib.train_step(state, place(rows.batch), settings=settings)
                self.step += 1
                waiting.append((self.step, values, rows))
                stop = self.stop_request.should_stop(self.step)
                pause = stop or self.step == last or self._is_due(self.config.save.every_steps)
                judge = self._is_due(self.config.evaluation.every_steps) or self.step == last
                while len(waiting) > (0 if pause or judge else 1):
                    self._log_step(index, *waiting.pop(0))
                if judge and self.config.evaluation.every_steps:
                    self._evaluate(index, state.model, place)
                if pause:
                    self._save_checkpoint(state, stream)
                if stop:
                    break
            return state, stream.get_state()

    def _is_due(self, every_steps: int) -> bool:
        return every_steps > 0 and self.step % every_steps == 0

    def _save_checkpoint(self, state, stream) -> None:
        self.writer.flush()
        config = configlib.to_json(self.config)
        self.checkpoints.save(state, stream.get_state(), config)

    def _log_step(
        self, index: int, step: int, values: dict, host_batch: stream_lib.HostBatch
    ) -> None:
        """Log one step, and judge it."""
        values = {name: np.asarray(value) for name, value in values.items()}
        load = values.pop("expert_load")
        record = {name: float(value) for name, value in values.items()}
        self.loss = record["loss"]
        self.writer.advance(step)
        if self.config.log.samples:
            self.writer.write_samples(step, host_batch.sample_ids)
        if record["skipped"] or not math.isfinite(self.loss):
            self.num_skipped_in_row += 1
            done = "skipped" if self.config.skip_nonfinite else "taken"
            event = {"not_finite": done, "loss": self.loss, "grad_norm": record["grad_norm"]}
            self.writer.write(step, "event", event)
            if self.num_skipped_in_row >= self.config.max_skipped:
                raise FloatingPointError(
                    f"step {step}: {self.num_skipped_in_row} steps in a row without a finite gradient; "
                    "lower the learning rate, or go on from an earlier checkpoint"
                )
        else:
            self.num_skipped_in_row = 0
            if self.spike_detector.is_spike(self.loss):
                event = {"loss_spike": self.loss, "grad_norm": record["grad_norm"]}
                self.writer.write(step, "event", event)
        if step % self.config.log.every_steps == 0 or step == self.total_steps:
            record |= metrics.summarize_expert_load(load) | self._measure_speed(index, step)
            record |= {
                "stage": index,
                "utilisation": host_batch.utilization,
                "data_secs": host_batch.wait_secs,
            }
            self.writer.write(step, "train", record)

    def _measure_speed(self, index: int, step: int) -> dict[str, float]:
        stage, now = self.config.stages[index], time.perf_counter()
        secs = (now - self.interval_start_secs) / max(step - self.interval_start_step, 1)
        self.interval_start_secs, self.interval_start_step = now, step
        needed = flops.count_train_flops(self.model_config, stage.rows, stage.seq_len).model
        speed = {"step_secs": secs, "tokens_per_sec": stage.rows * stage.seq_len / secs}
        peak = metrics.peak_flops()
        return speed if peak is None else speed | {"mfu": needed / secs / peak}

    def _evaluate(self, index: int, model, batch_placement: placement.BatchPlacement) -> None:
        config = self.config.evaluation
        names = [source.name for source in config.sources]
        totals, number = np.zeros((2, len(names), evaluate.NUM_BUCKETS)), 0
        with self._open_stream(index, batch_placement, config.sources) as stream:
            for rows in itertools.islice(stream, config.batches or None):
                batch, sources = batch_placement((rows.batch, rows.source_ids))
                totals += np.asarray(
                    evaluate.sum_losses(model, batch, sources, len(names)), np.float64
                )
                number += 1
        if not totals[1].any():
            raise stream_lib.DataError(f"evaluation: no token with weight in {number} batches")
        self.writer.write(self.step, "eval", evaluate.tabulate_losses(totals, names))
        self.interval_start_secs, self.interval_start_step = time.perf_counter(), self.step

    # ---- parts

    def _stage_state(self, index: int, state) -> step_lib.TrainState:
        """Return the state on a stage's mesh: the one before, the checkpoint's, or a new one."""
        if state is None and self.checkpoint_info is None:
            return step_lib.init_state(
                self._initial_model(index), self._step_settings(index, 0).optimizer
            )
        if state is None and self.checkpoint_info is not None:
            return self.restore_state(self.checkpoints, self.checkpoint_info.step, index)
        like = self._abstract_state(index)
        places = [leaf.sharding for leaf in jax.tree.leaves(like)]
        return jax.tree.unflatten(
            jax.tree.structure(like), jax.device_put(jax.tree.leaves(state), places)
        )

    def restore_state(
        self, checkpoint_store: checkpoints.CheckpointStore, step: int, index: int = -1
    ):
        """Return the state of a checkpoint on a stage's mesh, by default the last one's."""
        like = self._abstract_state(index)
        if self.config.lora is not None:  # frozen weights are the starting point's
            like = dataclasses.replace(like, model=self._initial_model(index))
        return checkpoint_store.restore(step, like)

    def _abstract_state(self, index: int) -> step_lib.TrainState:
        """Return the shapes of the state of a stage, where they lie on its mesh."""
        layout = self.layouts[index]
        model = params_lib.abstract_model(self.model_config, *self._dtypes(), layout)
        return step_lib.abstract_state(
            self._add_lora(model), self._step_settings(index, 0).optimizer
        )

    def _initial_model(self, index: int):
        layout, (dtype, param_dtype) = self.layouts[index], self._dtypes()
        if not self.config.checkpoint:
            key = jax.random.key(self.config.seed)
            return params_lib.random_model(self.model_config, key, dtype, param_dtype, layout)
        mesh = None if layout is None else layout.mesh
        model = load_lib.load(self.config.checkpoint, dtype, mesh, param_dtype=param_dtype)
        model.config = self.model_config
        return self._add_lora(model)

    def _dtypes(self) -> tuple[Any, Any]:
        """Return those of the computation and of parameters: float32, but for frozen ones."""
        dtype = jnp.dtype(self.config.dtype)
        return dtype, jnp.dtype(jnp.float32) if self.config.lora is None else dtype

    def _add_lora(self, model):
        if self.config.lora is None:
            return model
        return lora.add_adapters(model, self.config.lora, jax.random.key(self.config.seed))

    def _step_settings(self, index: int, first_step: int) -> step_lib.TrainStepSettings:
        stage, loss = self.config.stages[index], self.config.loss
        before = self.config.stages[:index]
        per_step = stage.rows * stage.seq_len
        rate = optim.make_stage_schedule(
            stage.shape,
            before[-1].learning_rate if before else 0.0,
            stage.learning_rate,
            stage.warmup_tokens,
            stage.tokens,
            per_step,
            first_step,
        )
        done = sum(stage.num_steps * stage.rows * stage.seq_len for stage in before)
        balance = (
            optim.make_piecewise_schedule(loss.balance, done, per_step, first_step)
            if loss.balance
            else None
        )
        optimizer = optim.AdamW(rate, **dataclasses.asdict(self.config.optimizer))
        skip = self.config.skip_nonfinite
        return step_lib.TrainStepSettings(optimizer, stage.accumulate, balance, loss.z, skip)

    def _open_stream(
        self, index: int, batch_placement: placement.BatchPlacement | None = None, sources=None
    ) -> stream_lib.BatchStream:
        """Open the stage's data, or all of `sources` once."""
        stage, given = self.config.stages[index], self.config.data
        batch_placement = batch_placement or placement.BatchPlacement(
            self.layouts[index], stage.rows
        )
        fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        if sources:
            fields |= {"sources": sources, "weights": ()}
        fields |= {"seq_len": stage.seq_len, "rows": stage.rows, "seed": self.config.seed}
        config = stream_lib.StreamConfig(**fields)
        epochs = 1 if sources else None
        return stream_lib.BatchStream(
            config,
            self.tokenizer,
            batch_placement.block_index,
            batch_placement.num_blocks,
            num_epochs=epochs,
        )

    @contextlib.contextmanager
    def _profiler_trace(self):
        """Give a function of the step that starts and ends the recording for xprof."""
        running = False

        def at(step: int) -> None:
            nonlocal running
            start, number = self.config.log.trace or (-1, 0)
            if step == start:
                jax.profiler.start_trace(str(self.workdir / "trace"))
                running = True
            elif running and step >= start + number:
                jax.profiler.stop_trace()
                running = False

        yield at
        if running:
            jax.profiler.stop_trace()


def _make_stage_layout(stage: config_lib.TrainStage, model_config) -> sharding.MeshLayout | None:
    """Return a stage's layout; None on one device. Everything that cannot work is told here."""
    mesh = None
    if stage.mesh or jax.device_count() > 1:
        mesh = sharding.make_mesh(dict(stage.mesh) or {"fsdp": -1})
    layout = sharding.make_layout(mesh, model_config, sharding.TRAIN)
    sharding.check_batch_rows(layout, stage.rows // stage.accumulate)
    if layout is not None and stage.seq_len % layout.axis_size("length"):
        raise ValueError(
            f"seq_len: got {stage.seq_len} over context={layout.axis_size('length')}; "
            f"wanted a multiple of {layout.axis_size('length')}"
        )
    return layout


def load_model_config(checkpoint_dir: str, config, remat: str) -> model_config_lib.ModelConfig:
    """Return the model of a run: the given one, or else its checkpoint's."""
    if config is None:
        path = pathlib.Path(checkpoint_dir) / "config.json"
        if not path.is_file():
            raise release.CheckpointError(f"checkpoint: {checkpoint_dir} has no config.json")
        config = model_config_lib.ModelConfig.from_file(path)
    return dataclasses.replace(config, remat=remat) if remat else config


def check_tokenizer(tokenizer, model_config) -> None:
    if tokenizer.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"tokenizer: its ids reach {tokenizer.vocab_size - 1}, but the model's vocabulary ends "
            f"at {model_config.vocab_size - 1}. Is it the tokenizer of another model?"
        )
