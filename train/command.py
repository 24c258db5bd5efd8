"""What the training commands share: flags, errors in one line, exit status."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

from m1_jax import configlib

RunFunction = Callable[
    [Any, str], Any
]  # returns a summary: step, stopped_by, and what it prints as
# Changes a config as further arguments want it, and says what to print.
ConfigEdit = Callable[[Any, Sequence[str]], tuple[Any, str]]


def cli(run: RunFunction, edit_config: ConfigEdit | None = None) -> None:
    """Run a command around `run(config, workdir)`.

    change: takes the arguments that are not flags of ours; without it there may be none.
    """
    flags.DEFINE_string("config", None, "File with get_config(arg), as FILE or FILE:ARG.")
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE in the config; may be repeated.")
    flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, config.")
    flags.DEFINE_bool("distributed", False, "Join the other processes of a TPU slice or cluster.")
    flags.DEFINE_bool("verbose", False, "Tell every step that is logged, and what libraries do.")
    from absl import app  # importing it defines flags, which only a command may

    def parse(argv):
        flags.FLAGS.set_gnu_getopt(True)  # values of others' flags stand between ours
        return flags.FLAGS(argv, known_only=edit_config is not None)

    app.run(lambda argv: _run_command(argv, run, edit_config), flags_parser=parse)


def _run_command(argv, run: RunFunction, edit_config: ConfigEdit | None) -> None:
    if len(argv) > 1 and edit_config is None:
        sys.exit(f"error: unknown argument {argv[1]!r}")
    given = flags.FLAGS
    logging.set_verbosity(logging.INFO if given.verbose else logging.WARNING)
    try:
        if not given.workdir:
            raise ValueError("workdir: got none; wanted a directory for the run")
        if "://" in given.workdir:
            raise ValueError(
                f"workdir: got {given.workdir}; wanted a local or mounted directory. Checkpoints "
                "alone go to a bucket: --set=save.directory=gs://BUCKET/RUN"
            )
        if given.set and not given.config:
            raise ValueError("set: got overrides without --config, which they would change")
        config = configlib.load_config(given.config, given.set) if given.config else None
        if edit_config is not None and argv[1:]:
            if config is None:
                raise ValueError(f"got {argv[1]!r} without --config, which it would change")
            config, told = edit_config(config, argv[1:])
            print(told, file=sys.stderr)
        if given.distributed:
            jax.distributed.initialize()
        summary = run(config, given.workdir)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit("error: " + " ".join(str(error).split("\n")))
    if summary.stopped_by is not None:
        print(f"stopped at step {summary.step}; the same command goes on", file=sys.stderr)
        sys.exit(128 + summary.stopped_by)
    print(summary, file=sys.stderr)
