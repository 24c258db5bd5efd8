"""The pages build with warnings as errors, and every page is in the navigation."""

import pathlib
import subprocess
import sys

import pytest

_DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


def _build(source: pathlib.Path, target: pathlib.Path) -> subprocess.CompletedProcess:
    """Build as `make docs` does."""
    options = ["-W", "--keep-going", "-n", "-q", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(autouse=True)
def sphinx():
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="needs the extra docs: pip install -e '.[docs]'")


def test_pages_build_without_a_warning(tmp_path):
    done = _build(_DOCS, tmp_path)
    assert done.returncode == 0, done.stderr
    built = {path.stem for path in tmp_path.glob("*.html")}
    assert {path.stem for path in _DOCS.glob("*.md")} <= built


def test_dead_link_fails_the_build(tmp_path):
    """To a page, and to a heading: both are errors of the build."""
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text(
        'extensions = ["myst_parser"]\nnitpicky = True\nmyst_heading_anchors = 4\n'
    )
    for link, message in {"absent.md": "absent", "index.md#absent": "absent"}.items():
        (source / "index.md").write_text(f"# Index\n\n[a link]({link})\n")
        done = _build(source, tmp_path / "out")
        assert done.returncode != 0
        assert message in done.stderr
