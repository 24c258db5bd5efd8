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
    flags.DEFINE_string(
        "config",
        None,
        "File with get_config(arg), as FILE or FILE:ARG. Without it the run in --workdir goes on.",
    )
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE in the config. May be repeated.")
    flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, config.")
    flags.DEFINE_multi_string(
        "allow_change",
        [],
        "Field of the config that may differ from the run so far, with all fields below it. May be "
        "repeated. The change is written to the log.",
    )
    flags.DEFINE_integer(
        "from_step",
        None,
        "Go back to the checkpoint of this step. Later checkpoints are deleted. With --init_from: "
        "the other run's step. The default is the newest.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "init_from", "", "Directory of a run whose trained weights a new run begins with."
    )
    flags.DEFINE_bool("init_moments", False, "With --init_from: take the optimizer's moments, too.")
    flags.DEFINE_bool("distributed", False, distributed.DISTRIBUTED_HELP)
    flags.DEFINE_bool(
        "verbose", False, "Print every step that is logged, and messages of libraries."
    )
    command_help.prepare_help(sys.modules[run.__module__].__doc__, __name__)
    from absl import app  # importing it defines flags, which only a command may

    def parse_flags(argv):
        # Values of unknown flags may stand between ours. Parsing must not stop there.
        flags.FLAGS.set_gnu_getopt(True)
        return flags.FLAGS(argv, known_only=edit_config is not None)

    app.run(lambda argv: _run_command(argv, run, edit_config), flags_parser=parse_flags)


def _run_command(argv, run: RunFunction, edit_config: ConfigEdit | None) -> None:
    if len(argv) > 1 and edit_config is None:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    values = flags.FLAGS
    logging.set_verbosity(logging.INFO if values.verbose else logging.WARNING)
    try:
        if not values.workdir:
            raise ValueError("workdir: got none; wanted a directory for the run")
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
        if edit_config is not None and argv[1:]:
            if config is None:
                raise ValueError(f"got {argv[1]!r} without --config, which it would change")
            config, message = edit_config(config, argv[1:])
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
