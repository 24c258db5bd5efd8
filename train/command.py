"""What the training commands share: flags, errors in one line, and the exit status.

A run that a signal stopped exits with 128 + the signal's number, as shells do.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags, logging

from m1_jax import command_help, configlib, distributed, process_watch
from train import resume

# Takes (config, workdir, options). Returns a summary with fields `step` and `stopped_by`. It is
# printed.
RunFunction = Callable[[Any, str, resume.ResumeOptions], Any]
# Takes (config, further arguments). Returns the changed config, and a message to print.
ConfigEdit = Callable[[Any, Sequence[str]], tuple[Any, str]]


def cli(run: RunFunction, edit_config: ConfigEdit | None = None) -> None:
    """Run a command around `run(config, workdir, options)`.

    Args:
      run: makes the run.
      edit_config: applies the arguments that are no flags of this module. None refuses them.
    """
    _define_flags()
    command_help.run_command(
        sys.modules[run.__module__].__doc__,
        lambda argv: _run_command(argv[1:], run, edit_config),
        known_only=edit_config is not None,
    )


def _define_flags() -> None:
    with command_help.flag_group("The run"):
        flags.DEFINE_string(
            "config",
            None,
            "File with get_config(arg), as FILE or FILE:ARG. Default: the config of the run in "
            "--workdir, which goes on.",
        )
        flags.DEFINE_multi_string("set", [], "FIELD=VALUE in the config. May be repeated.")
        text = "Directory of the run: checkpoints, metrics, config."
        flags.DEFINE_string("workdir", None, text, required=True)
    with command_help.flag_group("How it begins or goes on"):
        flags.DEFINE_multi_string(
            "allow_change",
            [],
            "Field of the config that may differ from the run so far, with all fields below it. "
            "May be repeated. The change is written to the log.",
        )
        flags.DEFINE_integer(
            "from_step",
            None,
            "Go back to the checkpoint of this step. Later checkpoints are deleted. With "
            "--init_from: the other run's step. Default: the newest.",
            lower_bound=1,
        )
        text = "Directory of a run whose trained weights a new run begins with."
        flags.DEFINE_string("init_from", "", text)
        text = "With --init_from: take the optimizer's moments, too."
        flags.DEFINE_bool("init_moments", False, text)
    with command_help.flag_group("Processes and messages"):
        flags.DEFINE_bool("distributed", False, distributed.DISTRIBUTED_HELP)
        text = "Print every step that is logged, and messages of libraries."
        flags.DEFINE_bool("verbose", False, text)


def _run_command(
    arguments: Sequence[str], run: RunFunction, edit_config: ConfigEdit | None
) -> None:
    values = flags.FLAGS
    logging.set_verbosity(logging.INFO if values.verbose else logging.WARNING)
    try:
        if not values.workdir:
            raise ValueError("workdir: got ''; wanted a directory for the run")
        if "://" in values.workdir:
            raise ValueError(
                f"workdir: got {values.workdir}; wanted a local or mounted directory. Checkpoints "
                "alone go to a bucket: --set=save.directory=gs://BUCKET/RUN"
            )
        options = resume.ResumeOptions(
            tuple(values.allow_change), values.from_step, values.init_from, values.init_moments
        )
        if values.set and not values.config:
            raise ValueError("set: got overrides without --config, which they would change")
        config = configlib.load_config(values.config, values.set) if values.config else None
        if edit_config is not None and arguments:
            config, message = _apply_arguments(edit_config, config, arguments)
            print(message, file=sys.stderr)
        with distributed.join_processes(values.distributed):
            summary = run(config, values.workdir, options)
    except process_watch.AgreedError as error:
        # All processes have it, and process 0 says it.
        sys.exit(f"error: {error}" if distributed.is_first_process() else 1)
    except Exception as error:
        process_watch.exit_with_error(error)
    if summary.stopped_by is not None:
        print(f"stopped at step {summary.step}; the same command goes on", file=sys.stderr)
        sys.exit(128 + summary.stopped_by)
    print(summary, file=sys.stderr)


def _apply_arguments(
    edit_config: ConfigEdit, config: Any, arguments: Sequence[str]
) -> tuple[Any, str]:
    """Return the config that the further arguments make. Exit where they cannot be read."""
    try:
        if config is None:
            raise ValueError(f"got {arguments[0]!r} without --config, which it would change")
        return edit_config(config, arguments)
    except ValueError as error:
        # It may be a flag of this command that is misspelt.
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and (near_name := command_help.suggest_flag(name[2:])):
                command_help.refuse_arguments(f"unknown flag {name}; {near_name}")
        command_help.refuse_arguments(f"{error};")
