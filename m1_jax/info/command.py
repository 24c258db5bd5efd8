"""Command: print what a bug report needs: versions, devices, memory, disks and settings.

    m1-info [--checkpoint=DIR] [--json]
    python -m m1_jax.info

Nothing is changed, and no weight is read. A part that cannot be found says why, and the others are
printed all the same: the exit status is 0. JAX looks for devices in a process of its own, which has
--limit_secs for it.
"""

import json

import jax
from absl import flags, logging

from m1_jax import command_help
from m1_jax.info import report


def main(_) -> None:
    values = flags.FLAGS
    logging.set_verbosity(logging.ERROR)
    # The shapes of a checkpoint's model need no accelerator, which may be busy.
    jax.config.update("jax_platforms", "cpu")
    sections = report.collect_sections(values.checkpoint, values.limit_secs)
    print(json.dumps(sections, indent=1) if values.json else report.format_sections(sections))


def _define_flags() -> None:
    with command_help.flag_group("What to tell"):
        text = "Directory of a checkpoint to describe, too."
        flags.DEFINE_string("checkpoint", "", text)
        text = "Seconds that JAX may look for devices."
        flags.DEFINE_float("limit_secs", 120.0, text, lower_bound=1.0)
        flags.DEFINE_bool("json", False, "Print JSON, sizes in bytes.")


def cli() -> None:
    _define_flags()
    command_help.run_command(__doc__, main)


if __name__ == "__main__":
    cli()
