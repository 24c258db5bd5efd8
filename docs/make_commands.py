"""Write docs/commands.md: every installed command, its flags and their defaults, from the code.

    python docs/make_commands.py

Commands are those of `[project.scripts]` in pyproject.toml. Each one defines its flags as it does
when it runs, and stops before it reads any. `tests/docs_reference_test.py` fails while the file is
stale.
"""

import contextlib
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
from absl.testing import flagsaver

REPO = pathlib.Path(__file__).resolve().parents[1]
PATH = REPO / "docs" / "commands.md"
HEADER = """# Commands

Written by `python docs/make_commands.py` from the commands themselves. Edit the words there, not
here.

Each command is installed as a script, and runs as a module from the repository's root, too. Flags
are written `--name=value`. A flag with `[no]` in its name is a switch. `--help` prints the same
list.
"""
_WIDTH = 105
# What stands for a value, by the type of a flag.
_VALUE_NAMES = {"int": "N", "float": "X"}
_MAX_CHOICES_CHARACTERS = 60  # longer lists of choices stand in the text


@dataclasses.dataclass(frozen=True)
class Command:
    """A command whose flags are defined, and not parsed yet.

    Attributes:
      name: name of the script.
      module: as `python -m` takes it.
      doc: docstring of its module.
      flag_names: its own flags, in the order of their definitions.
      parse: takes the arguments with the program's name first. Returns what is left of them.
      main: takes what `parse` returned, and runs the command.
    """

    name: str
    module: str
    doc: str
    flag_names: tuple[str, ...]
    parse: Callable[[list[str]], list[str]]
    main: Callable[[list[str]], Any]


def read_scripts() -> dict[str, str]:
    """Return "module:function" of every installed command by its name."""
    return tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["scripts"]


def module_name(target: str) -> str:
    """Return what `python -m` takes for "module:function"."""
    module = target.partition(":")[0]
    package = module.rpartition(".")[0]
    has_main = REPO.joinpath(*package.split("."), "__main__.py").exists()
    return package if has_main else module


@contextlib.contextmanager
def open_command(name: str) -> Iterator[Command]:
    """Define a command's flags within the context, and stop where it would read them."""
    target = read_scripts()[name]
    module_path, _, function = target.partition(":")
    module = importlib.import_module(module_path)
    captured: dict[str, Any] = {}

    def capture(main, argv=None, flags_parser=None):
        captured.update(main=main, parse=flags_parser or (lambda argv: flags.FLAGS(argv)))

    main_module = sys.modules["__main__"]
    main_doc, app_run = main_module.__doc__, app.run
    with flagsaver.flagsaver():  # it takes away what was defined within
        names_before = set(flags.FLAGS)
        app.run = capture
        try:
            getattr(module, function)()
            names = [flag for flag in flags.FLAGS if flag not in names_before]
            # A short name is a key of its own.
            names = [flag for flag in names if flags.FLAGS[flag].name == flag]
            doc = inspect.cleandoc(module.__doc__ or "")
            yield Command(name, module_name(target), doc, tuple(names), **captured)
        finally:
            app.run, main_module.__doc__ = app_run, main_doc


def render_document() -> str:
    """Return the text of docs/commands.md."""
    contents, blocks = [], []
    for name in read_scripts():
        with open_command(name) as command:
            summary = _split_doc(command.doc)[0]
            contents.append(_wrap_text(f"- [{name}](#{name}): {summary}", "  "))
            blocks.append(_render_command(command))
    return "\n".join([HEADER, *contents, "", *blocks, _render_slime_flags()])


def _render_command(command: Command) -> str:
    lines = [f"## {command.name}", "", f"`python -m {command.module}`", ""]
    for paragraph in _split_doc(command.doc):
        if paragraph.startswith("    "):
            lines += ["```text", textwrap.dedent(paragraph), "```", ""]
        else:
            lines += [_wrap_text(paragraph, ""), ""]
    lines += ["Flags:", ""]
    lines += [_wrap_text(_describe_flag(flags.FLAGS[name]), "  ") for name in command.flag_names]
    return "\n".join(lines) + "\n"


def _split_doc(doc: str) -> list[str]:
    """Return the paragraphs of a command's docstring, the examples with their indentation."""
    first, *rest = re.split(r"\n\s*\n", doc)
    first = " ".join(first.removeprefix("Command: ").split())
    first = first[:1].upper() + first[1:]
    return [first, *(text if text.startswith("    ") else " ".join(text.split()) for text in rest)]


def _describe_flag(flag: flags.Flag) -> str:
    choices = [choice for choice in getattr(flag.parser, "enum_values", None) or () if choice]
    listed = "|".join(choices)
    is_short = 0 < len(listed) <= _MAX_CHOICES_CHARACTERS
    value = listed if is_short else _VALUE_NAMES.get(flag.flag_type(), "TEXT")
    head = f"`--[no]{flag.name}`" if flag.boolean else f"`--{flag.name}={value}`"
    text = " ".join((flag.help or "").split())
    # What absl adds to the text of a flag with choices, and of one that may be repeated.
    text = re.sub(r"^<[^>]*>: |; repeat this option to specify a list of values$", "", text)
    text += "" if text.endswith((".", "?")) else "."
    if choices and not is_short:
        text += f" One of {', '.join(choices)}."
    return f"- {head}{_describe_default(flag)}: {text}"


def _describe_default(flag: flags.Flag) -> str:
    # absl says that a flag must be given in the message of a validator alone.
    if any("must have a value other than None" in each.message for each in flag.validators):
        return ", required"
    if flag.boolean:
        return f", default {'on' if flag.default else 'off'}"
    if flag.default is None or flag.default in ("", []):
        return ""
    default = flag.default
    return f", default `{', '.join(default) if isinstance(default, list) else default}`"


def _render_slime_flags() -> str:
    """Return the section about the further flags of m1-rl."""
    slime_flags = importlib.import_module("train.rl.slime_flags")
    names = ", ".join(f"`--{name}`" for name in slime_flags._FLAG_TYPES)
    text = (
        "m1-rl also takes these flags of slime, as `--name VALUE`, `--name=VALUE` or a switch. "
        "They change the config, and the command prints what they mean before the run. "
        "`train/rl/slime_flags.py` translates them."
    )
    paragraphs = [_wrap_text(text, ""), "", _wrap_text(names, ""), ""]
    return "\n".join(["## slime's flags of m1-rl", "", *paragraphs])


def _wrap_text(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    # Python puts this folder first on the path, and not the repository.
    sys.path.insert(0, str(REPO))
    PATH.write_text(render_document())
