"""What a run consists of before any file is open: its model, and each stage's mesh, rates and data.

`train.loop` runs a setup. `train.export` takes a setup to read the checkpoints of a run.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from m1_jax import config as model_config_lib
from m1_jax import sharding
from train import config as config_lib
from train import optim, run_model
from train import step as step_lib
from train.data import config as data_config
from train.data import placement
from train.data import stream as stream_lib


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """A run whose model, tokenizer and meshes fit together.

    Attributes:
      config: the run's config.
      model: the run's model, without weights so far.
      layouts: layout of each stage's mesh. None stands for a single device.
    """

    config: config_lib.TrainConfig
    model: run_model.RunModel
    layouts: tuple[sharding.MeshLayout | None, ...]

    @property
    def total_steps(self) -> int:
        """Return the steps of all stages together."""
        return self.first_step(len(self.config.stages))

    def first_step(self, stage_index: int) -> int:
        """Return the number of steps before a stage."""
        return sum(stage.num_steps for stage in self.config.stages[:stage_index])

    def step_settings(self, stage_index: int) -> step_lib.TrainStepSettings:
        """Return what a stage's step is compiled for. Its schedules take the step of the run."""
        config, first_step = self.config, self.first_step(stage_index)
        # Both also for stage_index = -1, the last stage.
        stage, earlier = config.stages[stage_index], config.stages[:stage_index]
        tokens_per_step = stage.rows * stage.seq_len
        rate = optim.make_stage_schedule(
            stage.shape,
            earlier[-1].learning_rate if earlier else 0.0,  # where the stage before ended
            stage.learning_rate,
            stage.warmup_tokens,
            stage.tokens,
            tokens_per_step,
            first_step,
        )
        # In whole batches, as steps count: a stage's last batch may pass its `tokens`.
        tokens_before = sum(s.num_steps * s.rows * s.seq_len for s in earlier)
        balance = (
            optim.make_piecewise_schedule(
                config.loss.balance, tokens_before, tokens_per_step, first_step
            )
            if config.loss.balance
            else None  # the model's own coefficient
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
        """Open a stage's data.

        Args:
          stage_index: number of the stage, whose rows the stream has.
          batch_placement: the stage's placement. It knows which rows this process reads.
          held_out_sources: read once instead of the run's own sources, if there are any.
        """
        stage, data = self.config.stages[stage_index], self.config.data
        if held_out_sources:
            # Weights by step name the run's own sources.
            data = dataclasses.replace(data, sources=held_out_sources, weights=())
        return stream_lib.BatchStream(
            data_config.StreamConfig(data, stage.seq_len, stage.rows, self.config.seed),
            self.model.tokenizer,
            batch_placement.row_numbers,
            num_epochs=1 if held_out_sources else None,  # None reads for ever
        )

    def check_data(self, data_state: dict[str, Any] | None) -> None:
        """Open and close each stage's data, so that bad data stops the run before step 1.

        Args:
          data_state: the state of the data to go on from. None begins.

        Raises:
          DataError, ValueError: see `stream.BatchStream`.
        """
        for index in range(len(self.config.stages)):
            with self.open_stream(index, self.place_batches(index)) as stream:
                if data_state is not None:
                    stream.set_state(data_state)
        evaluation = self.config.evaluation
        if evaluation.every_steps:
            stream = self.open_stream(0, self.place_batches(0), evaluation.sources)
            stream_lib.check_held_out(stream, evaluation.batches)

    def place_batches(self, stage_index: int) -> placement.BatchPlacement:
        """Return what puts a stage's rows onto its devices."""
        return placement.BatchPlacement(
            self.layouts[stage_index], self.config.stages[stage_index].rows
        )


def make_train_setup(config: config_lib.TrainConfig) -> TrainSetup:
    """Return the setup of a run. It reads the checkpoint's config and tokenizer, and no weights.

    Raises:
      ValueError, CheckpointError, ConfigError: the parts do not fit together.
    """
    model = run_model.make_run_model(config, config.model)
    layouts = tuple(make_stage_layout(stage, model.config) for stage in config.stages)
    return TrainSetup(config, model, layouts)


def make_stage_layout(
    stage: config_lib.TrainStage,
    model_config: model_config_lib.ModelConfig,
    devices: Sequence[Any] | None = None,
) -> sharding.MeshLayout | None:
    """Return a stage's layout on these devices (None: all), or None for a single device.

    Raises:
      ValueError: the devices, the model, the rows or their length do not fit the mesh.
    """
    mesh = run_model.make_train_mesh(dict(stage.mesh), devices)
    layout = sharding.make_layout(mesh, model_config, sharding.TRAIN)
    # The rows of a microbatch are what the devices share.
    sharding.check_batch_rows(layout, stage.rows // stage.accumulate)
    if layout is not None and stage.seq_len % layout.axis_size("length"):
        raise ValueError(
            f"seq_len: got {stage.seq_len} over context={layout.axis_size('length')}; "
            f"wanted a multiple of {layout.axis_size('length')}"
        )
    return layout
