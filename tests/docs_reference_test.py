"""docs/commands.md and docs/options.md are what their generators write of the code."""

import dataclasses

import doc_commands
import pytest
from absl import app, flags

from infer import options


@pytest.mark.parametrize("name", ["make_commands", "make_options"])
def test_reference_is_up_to_date(name):
    generator = doc_commands.load_generator(name)
    remedy = f"{generator.PATH} is stale: run `python docs/{name}.py` and commit it"
    assert generator.PATH.read_text() == generator.render_document(), remedy


def test_every_script_is_listed_with_its_flags():
    generator = doc_commands.load_generator("make_commands")
    text = generator.PATH.read_text()
    for name, target in generator.read_scripts().items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert f"`python -m {generator.module_name(target)}`" in section
        with generator.open_command(name) as command:
            assert command.flag_names
            for flag in command.flag_names:
                assert f"--{flag}=" in section or f"--[no]{flag}`" in section, (name, flag)


def test_open_command_leaves_nothing_behind():
    generator = doc_commands.load_generator("make_commands")
    before, run = set(flags.FLAGS), app.run
    for _ in range(2):  # a second definition of one flag would raise
        with generator.open_command("m1-convert") as command:
            command.parse(["m1-convert", "--to=hf", "--src=a", "--dst=b"])
            assert flags.FLAGS.src == "a"
            assert "memory_gib" in command.flag_names
    assert set(flags.FLAGS) == before
    assert app.run is run


def test_changed_words_make_the_reference_stale(monkeypatch):
    generator = doc_commands.load_generator("make_options")
    changed = dataclasses.replace(options.PRESETS["lightning"], max_tokens=4097)
    monkeypatch.setitem(options.PRESETS, "lightning", changed)
    assert generator.PATH.read_text() != generator.render_document()


def test_flags_by_kind():
    generator = doc_commands.load_generator("make_commands")
    values = flags.FlagValues()
    flags.DEFINE_bool("progress", True, "Show a bar", flag_values=values)
    flags.DEFINE_enum("to", None, ["a", "b"], "What to make.", required=True, flag_values=values)
    flags.DEFINE_multi_string("set", [], "FIELD=VALUE", flag_values=values)
    flags.DEFINE_float("memory_gib", 2.0, "GiB.", flag_values=values)
    texts = [generator._describe_flag(values[name]) for name in ("progress", "to", "set")]
    assert texts[0] == "- `--[no]progress`, default on: Show a bar."
    assert texts[1] == "- `--to=a|b`, required: What to make."
    assert texts[2] == "- `--set=TEXT`: FIELD=VALUE."
    assert generator._describe_flag(values["memory_gib"]).startswith(
        "- `--memory_gib=X`, default `2.0`"
    )
