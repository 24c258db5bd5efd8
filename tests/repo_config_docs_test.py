"""docs/config.md lists every field of the configs, with the words of the dataclasses."""

import dataclasses
import importlib.util
import pathlib
import types

import pytest

_DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
_REMEDY = "docs/config.md is stale: run `python docs/make_config.py` and commit it"


@pytest.fixture(scope="module")
def make_config():
    spec = importlib.util.spec_from_file_location("make_config", _DOCS / "make_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_document_is_up_to_date(make_config):
    """A field without words fails in `render_document`, which names it and says what to do."""
    assert make_config.PATH.read_text() == make_config.render_document(), _REMEDY


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner one."""

    rate: float = 0.5  # a share, 0 to 1


@dataclasses.dataclass(frozen=True)
class Outer:
    """The outer one,
    in two lines.

    Attributes:
      name: of letters,
        and no digits.
      pairs: of two parts:
          first: the left one.
          second: the right one

    More prose, which is not about fields.

    Raises:
      ValueError: never.
    """

    name: str
    # Above it.
    inner: tuple[Inner, ...] = (Inner(),)
    pairs: tuple[tuple[str, int], ...] | None = None
    count: int = dataclasses.field(default=1, metadata={"help": "At least 1."})
    silent: int = 0


def test_words_come_from_help_docstring_and_comments(make_config):
    missing = []
    text = make_config.render_config(Outer, missing)
    assert [entry.split(".")[-2:] for entry in missing] == [["py: Outer", "silent"]]
    assert "`. The outer one, in two lines.\n" in text
    assert "- **`name`** (`str`, required): of letters, and no digits.\n" in text
    assert "default `(Inner(rate=0.5),)`): Above it. See [Inner](#inner).\n" in text
    assert ": of two parts:\n  - first: the left one.\n  - second: the right one.\n" in text
    assert "- **`count`** (`int`, default `1`): At least 1.\n" in text
    assert "prose" not in text
    assert list(make_config.find_configs(Outer)) == [Outer, Inner]
    assert "default `0.5`): a share, 0 to 1.\n" in make_config.render_config(Inner, missing)


def test_field_without_words_is_named(make_config, monkeypatch):
    monkeypatch.setattr(make_config, "SECTIONS", {"Test": [f"{__name__}.Outer"]})
    module = types.SimpleNamespace(Outer=Outer)
    monkeypatch.setattr(make_config.importlib, "import_module", lambda _: module)
    with pytest.raises(make_config.MissingWordsError, match=r"Attributes(.|\n)*Outer\.silent"):
        make_config.render_document()
