"""Write docs/config.md: the fields of every config that a user writes, from the dataclasses.

    python docs/make_config.py

A field's words come from the first of these places that has some: its help text (the metadata of
`dataclasses.field`), its entry in the class's docstring (`name: text` under "Attributes:"), the
comment beside the field, the comment above it. A dataclass in the type of a field gets a list of
its own. `tests/repo_config_docs_test.py` fails while the file is stale or a field has no words.
"""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator

PATH = pathlib.Path(__file__).with_name("config.md")
# By heading: the classes to begin with. Dataclasses in the types of their fields follow.
SECTIONS = {
    "The model": ["m1_jax.config.ModelConfig"],
    "Training": ["train.config.TrainConfig"],
    "Reinforcement learning": ["train.rl.config.RlConfig"],
    "Serving": ["infer.config.EngineConfig", "infer.options.Options"],
    "Commands": [
        "m1_jax.convert.ConvertConfig",
        "m1_jax.verify.VerifyConfig",
        "m1_jax.plan.config.PlanConfig",
        "train.prepare.PrepareConfig",
        "infer.generate.GenerateConfig",
        "infer.batch_input.BatchConfig",
    ],
}
HEADER = """# Config fields

Written by `python docs/make_config.py` from the dataclasses. Edit the words there, not here.

A run's config is a Python file that returns a `TrainConfig` or an `RlConfig`. `--set=FIELD=VALUE`
overrides a field. The fields of a command are its flags.
"""
_WIDTH = 105
_SECTION_PATTERN = re.compile(r"^(Attributes|Args|Raises|Returns):$")
_ENTRY_PATTERN = re.compile(r"^( *)(\w+(?:, \w+)*): (.*)$")


class MissingWordsError(ValueError):
    """Fields without words. The message lists them."""


def render_document() -> str:
    """Return the text of docs/config.md.

    Raises:
      MissingWordsError: a field has no words.
    """
    contents, blocks, missing = [], [], []
    documented: set[type] = set()
    for heading, names in SECTIONS.items():
        blocks.append(f"## {heading}\n")
        links = []
        for name in names:
            module, _, class_name = name.rpartition(".")
            for config in find_configs(getattr(importlib.import_module(module), class_name)):
                # A class of two sections is listed in the first one.
                if config not in documented:
                    documented.add(config)
                    blocks.append(render_config(config, missing))
                    links.append(_link(config))
        contents.append(_wrap_text(f"- {heading}: {', '.join(links)}", "  "))
    if missing:
        raise MissingWordsError(
            "fields without words; give each a line `name: text` under `Attributes:` in the "
            "docstring of its class:\n" + "\n".join(missing)
        )
    return "\n".join([HEADER, *contents, "", *blocks])


def find_configs(config: type) -> Iterator[type]:
    """Yield a dataclass, then the dataclasses in the types of its fields, each before its own."""
    yield config
    for hint in typing.get_type_hints(config).values():
        for part in _flatten_type(hint):
            if dataclasses.is_dataclass(part):
                yield from find_configs(typing.cast(type, part))


def render_config(config: type, missing: list[str]) -> str:
    """Return the heading, the summary and the fields of a dataclass; add to `missing`."""
    source = textwrap.dedent(inspect.getsource(config))
    statement = ast.parse(source).body[0]
    assert isinstance(statement, ast.ClassDef)
    nodes = {
        node.target.id: node
        for node in statement.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    summary, entries = parse_docstring(inspect.getdoc(config) or "")
    hints = typing.get_type_hints(config)
    lines = [f"### {config.__name__}", "", f"`{_source_path(config)}`. {summary}", ""]
    for field in dataclasses.fields(config):
        node = nodes[field.name]
        words = (
            field.metadata.get("help")
            or entries.get(field.name)
            or _read_comment(source.splitlines(), node)
        )
        if not words:
            missing.append(f"  {_source_path(config)}: {config.__name__}.{field.name}")
            continue
        main, *parts = words.split("\n")
        links = [
            _link(part)
            for part in _flatten_type(hints[field.name])
            if dataclasses.is_dataclass(part) and isinstance(part, type)
        ]
        see = f" See {', '.join(dict.fromkeys(links))}." if links else ""
        text = f"- **`{field.name}`** ({_describe_type(field, node)}): {_end_sentence(main)}{see}"
        lines.append(_wrap_text(text, "  "))
        lines += [_wrap_text(f"  - {_end_sentence(part)}", "    ") for part in parts]
    lines[2] = _wrap_text(lines[2], "")
    return "\n".join(lines) + "\n"


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """Return the prose before the sections, and by field the text of its entry.

    An entry that is indented deeper than the text of another one is a part of it, on a line of its
    own in the result.
    """
    prose: list[str] = []
    entries: dict[str, str] = {}
    section, names, indent = "", [], 0
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            match = _SECTION_PATTERN.match(line)
            if match or section:
                # Prose after the sections has no heading, and is left out.
                section, names = match[1] if match else "prose", []
        if not section:
            prose.append(line)
        elif section in ("Attributes", "Args") and line.startswith(" "):
            match = _ENTRY_PATTERN.match(line)
            if match and (not names or len(match[1]) <= indent):
                names, indent = match[2].split(", "), len(match[1])
                entries |= dict.fromkeys(names, match[3])
            else:
                # The text of an entry has two more spaces, and its parts have four.
                is_part = match is not None and len(match[1]) >= indent + 4
                text = ("\n" if is_part else " ") + line.strip()
                entries |= {name: entries[name] + text for name in names}
    return " ".join(" ".join(prose).split()), entries


def _read_comment(lines: list[str], node: ast.AnnAssign) -> str:
    """Return the comment beside a field, or else the comment lines right above it."""
    assert node.end_lineno is not None
    beside = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
    if beside.startswith("#"):
        return beside.lstrip("# ")
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.strip().startswith("#"):
            break
        above.append(line.strip().lstrip("# "))
    return " ".join(reversed(above))


def _describe_type(field: dataclasses.Field, node: ast.AnnAssign) -> str:
    """Return the type without names of modules, and the default."""
    kind = re.sub(r"\b[a-z_]+\w*\.(?=[A-Z])", "", ast.unparse(node.annotation))
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return f"`{kind}`, required"
    if field.default is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        return f"`{kind}`, default `{field.default_factory()!r}`"
    if dataclasses.is_dataclass(field.default):
        # Its repr would list every field of it. The source has what differs.
        assert node.value is not None
        return f"`{kind}`, default `{ast.unparse(node.value)}`"
    return f"`{kind}`, default `{field.default!r}`"


def _flatten_type(hint: typing.Any) -> Iterator[typing.Any]:
    """Yield the types that a type is made of, like X for tuple[X, ...] | None."""
    if isinstance(hint, types.GenericAlias | types.UnionType) or typing.get_args(hint):
        for argument in typing.get_args(hint):
            yield from _flatten_type(argument)
    else:
        yield hint


def _link(config: type) -> str:
    return f"[{config.__name__}](#{config.__name__.lower()})"


def _source_path(config: type) -> str:
    return config.__module__.replace(".", "/") + ".py"


def _end_sentence(text: str) -> str:
    return text if text.endswith((".", ":")) else text + "."


def _wrap_text(text: str, indent: str) -> str:
    lead = text[: len(text) - len(text.lstrip())]
    return textwrap.fill(
        text.strip(),
        _WIDTH,
        initial_indent=lead,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    try:
        PATH.write_text(render_document())
    except MissingWordsError as error:
        sys.exit(f"error: {error}")
