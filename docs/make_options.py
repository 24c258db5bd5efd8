"""Write docs/options.md: every option of a request, its range and where it can be given.

    python docs/make_options.py

The words are those of `infer.options.Options`. Ranges and places are found by asking the code: an
option is a flag of m1-generate if `GenerateConfig` has such a field. `tests/docs_reference_test.py`
fails while the file is stale.
"""

import dataclasses
import inspect
import pathlib
import sys

REPO = pathlib.Path(__file__).resolve().parents[1]
# Python puts this folder first on the path, and not the repository.
sys.path.insert(0, str(REPO))

from infer import generate, jsonl, openai_batch, options  # noqa: E402

PATH = REPO / "docs" / "options.md"
HEADER = """# Request options

Written by `python docs/make_options.py` from `infer/options.py`. Edit the words there, not here.

An option is a field of a line of `m1-batch`, and of `infer.options.Options`. "flag" says that
`m1-generate` has it as a flag of the same name, too. A value out of range is refused with the
option's name. Nothing is clipped, rounded or ignored silently.
"""


def render_document() -> str:
    """Return the text of docs/options.md."""
    make_config = _import_make_config()
    _, entries = make_config.parse_docstring(inspect.getdoc(options.Options) or "")
    flag_names = {field.name for field in dataclasses.fields(generate.GenerateConfig)}
    rows = ["| option | default | range | flag | what it does |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(options.Options):
        sampling = options.SAMPLING_FIELDS.get(field.name)
        rows.append(
            _table_row(
                f"`{field.name}`",
                f"`{_default_of(field)!r}`",
                sampling[2] if sampling else "",
                "yes" if field.name in flag_names else "",
                entries[field.name],
            )
        )
    return "\n".join([HEADER, *rows, "", _render_presets(), _render_lines()])


def _render_presets() -> str:
    """Return the table of presets: what differs from the defaults."""
    lines = ["## Presets", "", "`--preset=NAME`, or `preset` of a line, sets these options:", ""]
    lines += ["| preset | options |", "|---|---|"]
    for name, preset in options.PRESETS.items():
        values = options.options_to_json(preset)
        text = ", ".join(f"`{option}={value!r}`" for option, value in values.items())
        lines.append(_table_row(f"`{name}`", text))
    return "\n".join(lines) + "\n"


def _render_lines() -> str:
    """Return what a line of m1-batch may hold besides options."""
    names = ", ".join(f"`{name}`" for name in jsonl.REQUEST_FIELDS)
    fixed = ", ".join(f"`{name}`: {value!r}" for name, value in openai_batch._FIXED_FIELDS.items())
    ignored = ", ".join(f"`{name}`" for name in openai_batch._FIELDS_WITHOUT_EFFECT)
    renamed = ", ".join(
        f"`{name}` as `{own_name}`" for name, own_name in openai_batch._RENAMED_FIELDS.items()
    )
    return "\n".join(
        [
            "## Lines of m1-batch",
            "",
            f"- The request: {names}. A line has `prompt` or `messages`.",
            "- Beside it: `id`, which the output repeats, and `preset`.",
            "",
            "A line of OpenAI's batch API has `custom_id`, `method`, `url` and `body`. In a body:",
            "",
            "- All options above.",
            f"- Read under another name: {renamed}.",
            f"- Of one value alone: {fixed}.",
            f"- Without an effect: {ignored}.",
            "- `response_format` of the types `text`, `json_object` and `json_schema`. The",
            "  constraint holds after thinking.",
            "- `logprobs` with `m1-batch --tokens`.",
            "",
            "Any other field is refused by its name.",
            "",
        ]
    )


def _default_of(field: dataclasses.Field):
    if field.default is not dataclasses.MISSING:
        return field.default
    assert field.default_factory is not dataclasses.MISSING
    return field.default_factory()


def _table_row(*cells: str) -> str:
    # A bar would end the cell.
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _import_make_config():
    sys.path.insert(0, str(REPO / "docs"))
    try:
        import make_config
    finally:
        sys.path.remove(str(REPO / "docs"))
    return make_config


if __name__ == "__main__":
    PATH.write_text(render_document())
