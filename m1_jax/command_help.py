"""What every command answers to --help and --version, and to arguments that it does not have.

A command's module has a docstring, flags in groups, and `main`:

    def _define_flags() -> None:
        with command_help.flag_group("What to convert"):
            flags.DEFINE_string("src", None, "Directory to read.", required=True)
        with command_help.flag_group("How"):
            flags.DEFINE_float("memory_gib", 2.0, "Most tensor bytes in memory at once, GiB.")

    def main(argv) -> None:      # argv[1:] is empty
        ...

    def cli() -> None:           # of [project.scripts]
        _define_flags()
        command_help.run_command(__doc__, main)

The command then has these flags besides its own. Each prints to stdout and exits with status 0:

    --help       the docstring, and each flag of the command with its default, by group (also -h)
    --helpshort  the docstring's first paragraphs, and a line for each flag
    --helpfull   --help, and the flags of libraries
    --version    the version of m1_jax, and the command's name

A flag that does not exist, a value that a flag cannot have, a flag that is missing and an argument
that is no flag are refused in one line on stderr, with status 2.
"""

import contextlib
import difflib
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from absl import flags

from m1_jax import version

USAGE_STATUS = 2  # of a process that refuses its arguments, as of argparse and of shells
_PACKAGES = ("m1_jax", "pallas_kernels", "train", "infer")
_HELP_GROUP = "Help"
_OTHER_GROUP = "Other flags"
# What stands for a value, by the type of a flag.
_VALUE_NAMES = {"int": "N", "float": "X"}
_MAX_CHOICES_CHARACTERS = 40  # longer lists of choices stand in the text
_MAX_HEAD_CHARACTERS = 26  # flags with longer names have their text below them
_MAX_WIDTH = 100

# Names of flags by the title of their group, in the order of their definitions.
_groups: dict[str, list[str]] = {}


@contextlib.contextmanager
def flag_group(title: str) -> Iterator[None]:
    """Put the flags that are defined in the context under a title of --help."""
    names = set(flags.FLAGS)
    yield
    new_names = [name for name in flags.FLAGS if name not in names]
    # A short name is a key of its own.
    full_names = [name for name in new_names if flags.FLAGS[name].name == name]
    _groups.setdefault(title, []).extend(full_names)


def run_command(doc: str | None, main: Callable[[list[str]], Any], known_only: bool = False):
    """Parse the process's arguments, run `main`, and exit. The flags are defined before.

    Args:
      doc: docstring of the command's module.
      main: takes the name of the program, and after it the arguments that were not read.
      known_only: whether unknown flags and further arguments are left to `main`. Otherwise they
        are refused here.
    """
    from absl import app  # importing it defines flags, which only a command may

    def parse_flags(argv: list[str]) -> list[str]:
        _define_help_flags(doc or "")
        return _parse_arguments(argv, known_only)

    app.run(main, flags_parser=parse_flags)


def program_name() -> str:
    """Return the command as it was typed: a script's name, or python -m and a module."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return os.path.basename(sys.argv[0])


# ---- arguments


def _parse_arguments(argv: list[str], known_only: bool) -> list[str]:
    """Read the flags, and return what is left. Exit if an argument cannot be read."""
    # Values of unknown flags may stand between ours. Parsing must not stop there.
    flags.FLAGS.set_gnu_getopt(True)
    try:
        arguments = flags.FLAGS(argv, known_only=known_only)
    except flags.UnrecognizedFlagError as error:
        refuse_arguments(f"unknown flag --{error.flagname}; {suggest_flag(error.flagname)}")
    except flags.IllegalFlagValueError as error:
        refuse_arguments(_describe_bad_value(str(error)))
    except (flags.Error, ValueError) as error:  # a flag without its value, a switch with one
        refuse_arguments(" ".join(str(error).split()) + ";")
    if arguments[1:] and not known_only:
        refuse_arguments(
            f"got the argument {arguments[1]!r}; wanted flags alone, each as --name=value;"
        )
    return arguments


def refuse_arguments(reason: str) -> NoReturn:
    """Exit as for every argument that cannot be read. `reason` ends with a mark."""
    print(f"error: {reason.strip()} {program_name()} --help lists all flags", file=sys.stderr)
    sys.exit(USAGE_STATUS)


def suggest_flag(name: str) -> str:
    """Return "did you mean --X?" where the command has a flag like this one, else ""."""
    names = [name for _, names in _iterate_groups() for name in names]
    spellings = names + [f"no{name}" for name in names if flags.FLAGS[name].boolean]
    near_names = difflib.get_close_matches(name.replace("-", "_"), spellings, 1)
    return f"did you mean --{near_names[0]}?" if near_names else ""


def _describe_bad_value(message: str) -> str:
    """Return what is wrong with a flag's value, from absl's message."""
    missing_names = [f"--{name}" for name in _required_names() if flags.FLAGS[name].value is None]
    # absl tells of one value at a time, and of required flags last.
    match = re.match(r"(?s)flag --(\w+)=(.*?): (.*)", message)
    if match is None or (match[2] == "None" and f"--{match[1]}" in missing_names):
        return f"got no {' and no '.join(missing_names)};" if missing_names else f"{message};"
    name, value, reason = match.groups()
    flag = flags.FLAGS[name]
    choices = _flag_choices(flag)
    wanted = " or ".join(choices) or flag.parser.syntactic_help or reason
    wanted = "true or false" if flag.boolean else wanted
    return f"--{name}: got {value.strip()!r:.80}; wanted {wanted};"


# ---- flags that print


class _PrintingFlag(flags.BooleanFlag):
    """A switch that prints a text, and ends the process."""

    def __init__(self, name: str, short_name: str | None, text: str, make_text: Callable[[], str]):
        # absl has defined flags of these names before, which this one replaces.
        super().__init__(name, False, text, short_name=short_name, allow_override=True)
        self._make_text = make_text

    def parse(self, argument: str | bool) -> None:
        if self._parse(argument):
            print(self._make_text())
            sys.exit(0)


def _define_help_flags(doc: str) -> None:
    texts = {
        "help": ("h", "This text.", lambda: format_help(doc)),
        "helpshort": (None, "A line for each flag.", lambda: format_short_help(doc)),
        "helpfull": (
            None,
            "This text, and the flags of libraries.",
            lambda: format_full_help(doc),
        ),
        "version": (
            None,
            "The version of m1_jax.",
            lambda: f"{program_name()} (m1-jax {version.VERSION})",
        ),
    }
    for name, (short_name, text, make_text) in texts.items():
        flags.DEFINE_flag(_PrintingFlag(name, short_name, text, make_text))
    _groups[_HELP_GROUP] = list(texts)


# ---- texts


def format_help(doc: str) -> str:
    """Return the command's docstring and its flags by group."""
    parts = [_format_usage(), _clean_doc(doc)]
    parts += [_format_group(title, names) for title, names in _iterate_groups()]
    return "\n\n".join(parts)


def format_short_help(doc: str) -> str:
    """Return the docstring up to its examples, and a line for each flag."""
    paragraphs = _clean_doc(doc).split("\n\n")
    # The first paragraph says what the command is for. Examples are indented.
    kept = paragraphs[:1] + [text for text in paragraphs[1:2] if text.startswith("    ")]
    width = _text_width()
    lines = []
    for _, names in _iterate_groups():
        for name in names:
            head = _format_head(flags.FLAGS[name])
            line = f"  {head:<{_MAX_HEAD_CHARACTERS}} {_describe_flag(flags.FLAGS[name])}"
            lines.append(line if len(line) <= width else line[: width - 3].rstrip() + "...")
    return "\n\n".join([_format_usage(), *kept, "\n".join(lines)])


def format_full_help(doc: str) -> str:
    """Return what `format_help` does, and the flags that libraries have defined."""
    own_names = {name for _, names in _iterate_groups() for name in names}
    parts = [format_help(doc)]
    for module, module_flags in sorted(flags.FLAGS.flags_by_module_dict().items()):
        names = [flag.name for flag in module_flags if flag.name not in own_names]
        if names:
            parts.append(_format_group(f"Flags of {module}", names))
    return "\n\n".join(parts)


def _iterate_groups() -> Iterator[tuple[str, list[str]]]:
    """Yield title and flags of each group. Flags of our packages outside of groups come last."""
    # A process that defines the flags of several commands in turn has removed earlier ones.
    defined_groups = {
        title: [name for name in names if name in flags.FLAGS] for title, names in _groups.items()
    }
    grouped_names = {name for names in defined_groups.values() for name in names}
    other_names = []
    for module, module_flags in flags.FLAGS.flags_by_module_dict().items():
        # absl calls the module that runs by the name of its file.
        if module.split(".")[0] in _PACKAGES or module == sys.argv[0]:
            other_names += [flag.name for flag in module_flags if flag.name not in grouped_names]
    help_names = defined_groups.pop(_HELP_GROUP, [])
    groups = {title: names for title, names in defined_groups.items() if names}
    groups |= {_OTHER_GROUP: other_names} if other_names else {}
    yield from groups.items()
    yield _HELP_GROUP, help_names


def _clean_doc(doc: str) -> str:
    text = inspect.cleandoc(doc).removeprefix("Command: ")
    return text[:1].upper() + text[1:]


def _format_usage() -> str:
    required_flags = "".join(f" {_format_head(flags.FLAGS[name])}" for name in _required_names())
    return f"usage: {program_name()}{required_flags} [flags]"


def _format_group(title: str, names: Iterable[str]) -> str:
    lines = [f"{title}:"]
    width, indent = _text_width(), " " * (_MAX_HEAD_CHARACTERS + 3)
    for name in names:
        flag = flags.FLAGS[name]
        head, text = f"  {_format_head(flag)}", _describe_flag(flag)
        texts = textwrap.wrap(text, width - len(indent), break_long_words=False)
        if len(head) < len(indent):
            head = head.ljust(len(indent)) + texts.pop(0)
        lines += [head, *(indent + text for text in texts)]
    return "\n".join(lines)


def _format_head(flag: flags.Flag) -> str:
    """Return a flag as it is typed, such as --[no]progress or --memory_gib=X."""
    if isinstance(flag, _PrintingFlag):
        return f"-{flag.short_name}, --{flag.name}" if flag.short_name else f"--{flag.name}"
    if flag.boolean:
        return f"--[no]{flag.name}"
    choices = "|".join(_flag_choices(flag))
    value_name = _VALUE_NAMES.get(flag.flag_type(), "TEXT")
    return f"--{flag.name}={choices if _are_short(choices) else value_name}"


def _describe_flag(flag: flags.Flag) -> str:
    """Return a flag's help on one line, with its choices and its default."""
    text = " ".join((flag.help or "").split())
    # What absl adds to the text of a flag with choices, and of one that may be repeated.
    text = re.sub(r"^<[^>]*>: |; repeat this option to specify a list of values$", "", text)
    text += "" if text.endswith((".", "?")) else "."
    choices = _flag_choices(flag)
    if choices and not _are_short("|".join(choices)):
        text += f" One of {', '.join(choices)}."
    return f"{text} {_describe_default(flag)}".strip()


def _describe_default(flag: flags.Flag) -> str:
    """Return a sentence, or nothing where the flag's own text says it."""
    if isinstance(flag, _PrintingFlag):
        return ""
    if flag.name in _required_names():
        return "Required."
    if flag.boolean:
        return f"Default: {'on' if flag.default else 'off'}."
    if flag.default is None or flag.default in ("", []):
        return "" if "default" in (flag.help or "").lower() else "Default: none."
    default = flag.default
    return f"Default: {', '.join(default) if isinstance(default, list) else default}."


def _flag_choices(flag: flags.Flag) -> list[str]:
    choices = getattr(flag.parser, "enum_values", None) or ()
    return [choice for choice in choices if choice]  # an empty one stands for the default


def _are_short(choices: str) -> bool:
    return 0 < len(choices) <= _MAX_CHOICES_CHARACTERS


def _required_names() -> list[str]:
    """Return the names of the flags that must be given, in the order of their groups."""
    names = [name for _, names in _iterate_groups() for name in names]
    # absl says it in the message of a validator alone.
    wanted = "must have a value other than None"
    return [
        name
        for name in names
        if any(wanted in validator.message for validator in flags.FLAGS[name].validators)
    ]


def _text_width() -> int:
    return min(shutil.get_terminal_size((_MAX_WIDTH, 24)).columns, _MAX_WIDTH)
