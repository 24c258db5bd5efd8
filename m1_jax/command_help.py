"""What --help prints of a command: the docstring of its module, and its flags."""

import sys

from absl import flags


def prepare_help(doc: str | None, flags_module: str) -> None:
    """Make absl's --help print `doc` and the flags that `flags_module` has defined.

    absl itself prints the docstring of `__main__` and the flags that `__main__` defines. Both are
    empty for a command that is installed as a script.

    Args:
      doc: docstring of the command's module.
      flags_module: `__name__` of the module whose code defines the flags.
    """
    sys.modules["__main__"].__doc__ = doc
    for flag in flags.FLAGS.get_flags_for_module(flags_module):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
