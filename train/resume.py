"""How a run begins or goes on, where its command says more than its config.

    --allow_change=FIELD   this field may differ from the run so far
    --from_step=N          the run goes back to an earlier checkpoint; later ones are deleted
    --init_from=RUN        the run begins with the weights of another run's checkpoint

Process 0 compares the config with `config.json` and with the checkpoint's own config, and tells the
other processes. What a command was allowed is kept in `resume.json`. So the same command, or one
without these options, goes on when it is started again.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax

from m1_jax import configlib, distributed, durable, local_path, multihost
from train import checkpoints, metrics, run_json
from train import config as config_lib

CONFIG_FILE = "config.json"
RECORD_FILE = "resume.json"


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
    """What a command says of the run's beginning.

    Attributes:
      allow_change: paths of fields that may differ from the run so far. A path allows all fields
        below it.
      from_step: step of the checkpoint to go on from. With `init_from`, that of the other run. None
        takes the newest.
      init_from: directory of a run whose weights a new run begins with. Empty begins as the config
        says.
      init_moments: whether the new run begins with the other run's moments, too.
    """

    allow_change: tuple[str, ...] = ()
    from_step: int | None = None
    init_from: str = ""
    init_moments: bool = False

    def __post_init__(self):
        if self.init_from:
            local_path.resolve_path(self.init_from, "init_from")  # raises for a bucket
        is_valid = bool(self.init_from) or not self.init_moments
        configlib.check_field(is_valid, "init_moments", True, "--init_from, too")

    @property
    def init_directory(self) -> pathlib.Path:
        """Return `init_from` as an absolute path."""
        return local_path.resolve_path(self.init_from, "init_from").resolve()


NO_OPTIONS = ResumeOptions()  # begins as the config says, and goes on from the newest checkpoint


@dataclasses.dataclass(frozen=True)
class FirstWeights:
    """The checkpoint of another run that a run begins with.

    Attributes:
      directory: directory of the other run.
      step: step of its checkpoint.
      with_moments: whether its moments are taken as well.
      save: where its checkpoints lie.
    """

    directory: str
    step: int
    with_moments: bool
    save: config_lib.SaveConfig


@dataclasses.dataclass(frozen=True)
class ResumeRecord:
    """What `resume.json` holds.

    Attributes:
      step: step of the checkpoint that the changes begin at. 0 is the beginning of the run.
      changes: lines of `configlib.list_differences` from that checkpoint's config to the run's.
      from_step: the last step that the run went back to, None for none.
      first_weights: checkpoint of another run that the run began with, None for none.
    """

    step: int = 0
    changes: tuple[str, ...] = ()
    from_step: int | None = None
    first_weights: FirstWeights | None = None


@dataclasses.dataclass(frozen=True)
class RunStart:
    """A run that is about to begin or to go on. It is the same on all processes.

    Attributes:
      config: the config to run.
      workdir: directory of the run.
      changeable: matches the paths of the fields that may differ without being named.
      options: what the command says.
      record: what `resume.json` held.
      changes: lines in which `config` differs from config.json, without those of `changeable`.
    """

    config: Any
    workdir: pathlib.Path
    changeable: re.Pattern
    options: ResumeOptions
    record: ResumeRecord
    changes: tuple[str, ...] = ()

    @property
    def from_step(self) -> int | None:
        """Return the step to go back to, None for the newest checkpoint.

        A command that is started again does not go back again. With another config it does.
        """
        from_step = None if self.options.init_from else self.options.from_step
        return None if from_step == self.record.from_step and not self.changes else from_step


@dataclasses.dataclass(frozen=True)
class RunPosition:
    """Where a run begins or goes on.

    Attributes:
      info: what the checkpoint to go on from holds beside arrays. None begins with the first step.
      first_weights: the other run's checkpoint to begin with. None where there is none, or where
        there is a checkpoint of the run's own.
      record: what `resume.json` will hold.
      events: what the log gets.
    """

    info: checkpoints.CheckpointInfo | None
    first_weights: FirstWeights | None
    record: ResumeRecord
    events: tuple[dict[str, Any], ...]

    @property
    def step(self) -> int:
        """Return the number of steps made."""
        return 0 if self.info is None else self.info.step


def read_config(config_class: type, workdir: pathlib.Path) -> Any:
    """Return the config of the run in a directory.

    Raises:
      ResumeError: there is no run, or its config is of an earlier version or of another command.
    """
    file = workdir / CONFIG_FILE
    # Its presence is what makes a directory that of a run.
    if not file.exists():
        raise checkpoints.ResumeError(f"{workdir} holds no run to go on with; give --config")
    value = run_json.read_run_json(file)
    try:
        return configlib.from_json(config_class, value)
    except ValueError as error:
        raise checkpoints.ResumeError(
            f"{file} is of an earlier version or of another command: {error}. Begin a new run with "
            f"its weights: a new --workdir, and --init_from={workdir}"
        ) from None


def begin_run(
    config_class: type,
    config: Any,
    workdir: pathlib.Path,
    changeable: re.Pattern,
    options: ResumeOptions,
) -> RunStart:
    """Return what to start. All processes call this, and process 0's files decide.

    Args:
      config_class: class of the config.
      config: the run's config. None goes on with the config in `workdir`.
      workdir: directory of the run.
      changeable: matches the paths of the fields that may differ from the run in `workdir`.
      options: what the command says.

    Raises:
      ResumeError: `config` is None and there is no run, or the run there has another config or
        began otherwise.
      ConfigFileError: `options` name a field that does not exist.
    """

    def decide() -> RunStart:
        chosen = read_config(config_class, workdir) if config is None else config
        for path in options.allow_change:
            configlib.check_path(chosen, path)
        record, changes = ResumeRecord(), ()
        if (workdir / CONFIG_FILE).exists():
            saved = read_config(config_class, workdir)
            changes = _find_changes(saved, chosen, changeable)
            _check_changes(
                changes,
                options,
                f"{workdir} holds a run with another config",
                "Go on with the old one by leaving --config out",
            )
            record = _read_record(workdir)
            _check_first_weights(record, workdir, options)
        return RunStart(chosen, workdir, changeable, options, record, changes)

    return multihost.broadcast_object(distributed.run_on_first(decide))


def find_position(start: RunStart, store: checkpoints.CheckpointStore) -> RunPosition:
    """Return where the run begins or goes on. All processes call this. Nothing is changed yet.

    Raises:
      ResumeError: there is no such checkpoint, it has another config, or it is another run's.
    """
    step = store.latest_step()
    if start.from_step is not None:
        step = store.choose_step(start.from_step)
    info = None if step is None else store.read_info(step)
    first_weights = start.record.first_weights
    if info is None and first_weights is None and start.options.init_from:
        first_weights = _find_first_weights(start)

    def decide() -> RunPosition:
        changes, events = start.changes, []
        if info is not None:
            changes = _compare_checkpoint(start, info, store.directory)
        is_known = start.record.step == (step or 0) and start.record.changes == changes
        if changes and not is_known:
            events.append({"changed": "; ".join(changes)})
        events += _describe_way_back(start, store.latest_step() or 0)
        if info is None and first_weights is not None:
            events.append(
                {
                    "init_from": f"{first_weights.directory} step {first_weights.step}",
                    "init_moments": first_weights.with_moments,
                }
            )
        from_step = start.record.from_step if start.from_step is None else start.from_step
        record = ResumeRecord(step or 0, changes, from_step, first_weights)
        return RunPosition(info, None if info else first_weights, record, tuple(events))

    return multihost.broadcast_object(distributed.run_on_first(decide))


def carry_out(
    start: RunStart,
    position: RunPosition,
    store: checkpoints.CheckpointStore,
    writer: metrics.MetricsWriter,
) -> None:
    """Write down what the run does, once everything could be opened. All processes call this.

    Later checkpoints than the run's go away first. A command that is killed in between does it all
    again.
    """
    store.delete_after(position.step)
    if jax.process_index():
        return
    for event in position.events:
        writer.write(position.step, "event", event)
    writer.flush()
    for name, value in ((RECORD_FILE, position.record), (CONFIG_FILE, start.config)):
        text = json.dumps(configlib.to_json(value), indent=1)
        durable.write_text_atomically(start.workdir / name, text)


def _read_record(workdir: pathlib.Path) -> ResumeRecord:
    file = workdir / RECORD_FILE
    if not file.exists():
        return ResumeRecord()
    return configlib.from_json(ResumeRecord, run_json.read_run_json(file))


def _find_changes(old_config: Any, new_config: Any, changeable: re.Pattern) -> tuple[str, ...]:
    # Each line begins with the path of the field.
    lines = configlib.list_differences(old_config, new_config)
    return tuple(line for line in lines if not changeable.match(line))


def _check_changes(
    changes: tuple[str, ...], options: ResumeOptions, problem: str, remedy: str
) -> None:
    """Refuse changes that the command does not allow.

    Args:
      changes: lines of `configlib.list_differences`.
      options: what the command says.
      problem: beginning of the error.
      remedy: how to go on without a change.

    Raises:
      ResumeError: there is one. The message names all.
    """
    refused = [line for line in changes if not _is_allowed(line, options.allow_change)]
    if refused:
        fields = " ".join(f"--allow_change={line.partition(':')[0]}" for line in refused)
        # A line has both values, which may be whole lists of stages.
        lines = "; ".join(f"{line:.300}" for line in refused)
        raise checkpoints.ResumeError(
            f"{problem}: {lines}. {remedy}, allow the change by {fields}, or give a new --workdir."
        )


def _is_allowed(line: str, allowed: tuple[str, ...]) -> bool:
    path = line.partition(":")[0]
    return any(path == field or path.startswith(f"{field}.") for field in allowed)


def _compare_checkpoint(
    start: RunStart, info: checkpoints.CheckpointInfo, directory: Any
) -> tuple[str, ...]:
    """Return the lines in which the run's config differs from that of its checkpoint.

    Raises:
      ResumeError: the command did not allow one of them, nor did an earlier command.
    """
    problem = f"{directory} holds checkpoints of another config, at step {info.step}"
    try:
        saved = configlib.from_json(type(start.config), info.config)
    except ValueError as error:
        raise checkpoints.ResumeError(
            f"{problem}: {error}. Give the directory of this run's own checkpoints "
            "(save.directory), or a new --workdir."
        ) from None
    changes = _find_changes(saved, start.config, start.changeable)
    # What an earlier command was allowed, before the first checkpoint with the new config.
    known = start.record.changes if start.record.step == info.step else ()
    _check_changes(
        tuple(line for line in changes if line not in known),
        start.options,
        problem,
        "Give their config or another save.directory",
    )
    return changes


def _describe_way_back(start: RunStart, newest_step: int) -> list[dict[str, Any]]:
    """Return the event of a run that goes back, or that has gone back before, if it is one."""
    asked = None if start.options.init_from else start.options.from_step
    if asked is None or asked >= newest_step:
        return []
    if start.from_step is not None:
        return [{"went_back_from": newest_step, "went_back_to": asked}]
    remedy = f"delete {start.workdir / RECORD_FILE} to go back again"
    return [{"already_went_back_to": asked, "goes_on_from": newest_step, "remedy": remedy}]


def _check_first_weights(
    record: ResumeRecord, workdir: pathlib.Path, options: ResumeOptions
) -> None:
    """Refuse other first weights than those that the run in the directory began with."""
    if not options.init_from:
        return
    began = record.first_weights
    if began is None or began != dataclasses.replace(
        began,
        directory=str(options.init_directory),
        step=options.from_step or began.step,
        with_moments=options.init_moments,
    ):
        text = "other weights" if began is None else f"{began.directory} step {began.step}"
        raise checkpoints.ResumeError(
            f"init_from: {workdir} holds a run that began with {text}; leave --init_from out to go "
            "on with it, or give a new --workdir"
        )


def _find_first_weights(start: RunStart) -> FirstWeights:
    """Return the checkpoint of another run that the command names. All processes call this."""
    directory = start.options.init_directory

    def read_save_config() -> config_lib.SaveConfig:
        file = directory / CONFIG_FILE
        if not file.exists() or directory == start.workdir.resolve():
            raise checkpoints.ResumeError(
                f"init_from: got {start.options.init_from}, which holds no other run; wanted the "
                "--workdir of a run (exported weights are the config's checkpoint)"
            )
        return configlib.from_json(config_lib.SaveConfig, run_json.read_run_json(file).get("save"))

    save = multihost.broadcast_object(distributed.run_on_first(read_save_config))
    with checkpoints.CheckpointStore(directory, save, read_only=True) as store:
        step = store.choose_step(start.options.from_step)
    return FirstWeights(str(directory), step, start.options.init_moments, save)
