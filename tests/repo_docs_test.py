"""Documents name files that exist, and links lead somewhere."""

import pathlib
import re

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_DOCUMENTS = sorted(
    path
    for path in (*_REPO.glob("*.md"), *_REPO.glob("docs/*.md"), *_REPO.glob("configs/*.md"))
    # What happened then is told with the names of then.
    if path.name not in ("CHANGELOG.md", "log.md")
)
_TOPS = ("m1_jax", "pallas_kernels", "train", "infer", "configs", "demo", "benchmarks", "tests")


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    text = document.read_text()
    named = re.findall(rf"(?<![\w/.-])((?:{'|'.join(_TOPS)})/[\w/.-]*\w)", text)
    named = [path for path in named if not path.startswith("demo/out/")]  # the demo writes it
    assert not [path for path in named if "*" not in path and not (_REPO / path).exists()]


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    assert not [target for target in local if not (document.parent / target).exists()]


def test_modules_that_commands_name_exist():
    for document in _DOCUMENTS:
        for module in re.findall(r"python -m ([\w.]+)", document.read_text()):
            path = _REPO.joinpath(*module.split("."))
            if module.split(".")[0] in _TOPS:
                assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_sections_that_code_cites_exist():
    """Code cites a document as `docs/kernels.md, "Serving"`; the heading may go on after that."""
    cited = set()
    for top in _TOPS:
        for path in _REPO.joinpath(top).rglob("*.py"):
            text = re.sub(r"\s+(?:# )?", " ", path.read_text())
            cited |= set(re.findall(r'(docs/\w+\.md), "([A-Z][^"]*)"', text))
    assert ("docs/kernels.md", "Serving") in cited
    for document, section in cited:
        headings = re.findall(r"(?m)^#+ (.*)$", (_REPO / document).read_text())
        assert any(heading.startswith(section) for heading in headings), (document, section)
