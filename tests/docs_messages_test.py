"""Messages that docs/troubleshooting.md quotes are messages of the code."""

import ast
import pathlib
import re

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PAGE = _REPO / "docs" / "troubleshooting.md"
_PACKAGES = ("m1_jax", "pallas_kernels", "train", "infer")
# In backticks and a first cell, and no message: programs, and variables of the environment.
_NO_MESSAGES = ("docker", "pip", "ssh ... \\| tee")


def read_messages(text: str) -> list[str]:
    """Return what stands in backticks in the first cell of a table's rows."""
    cells = re.findall(r"(?m)^\| ((?:[^|\\]|\\.)*) \|", text)
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    return [message for message in quoted if message not in _NO_MESSAGES]


def collect_texts() -> list[str]:
    """Return all texts of the packages, those of f-strings in the pieces between their values."""
    texts = []
    for package in _PACKAGES:
        for path in sorted((_REPO / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(" ".join(node.value.split()))
    return texts


def find_unknown_parts(message: str, texts: list[str]) -> list[str]:
    """Return the parts of a message, between its dots, that no text has."""
    parts = [part.strip() for part in message.split("...")]
    return [part for part in parts if part and not any(part in text for text in texts)]


@pytest.fixture(scope="module")
def texts():
    return collect_texts()


def test_quoted_messages_are_the_code_s(texts):
    messages = read_messages(_PAGE.read_text())
    assert len(messages) > 20
    unknown = {message: find_unknown_parts(message, texts) for message in messages}
    assert not {message: parts for message, parts in unknown.items() if parts}


def test_changed_message_is_found(texts):
    row = "| `mesh: ... is ... gadgets; got ...`, or `a` \\| `b` | c |"
    page = f"| message | remedy |\n|---|---|\n{row}\n"
    assert read_messages(page) == ["mesh: ... is ... gadgets; got ...", "a", "b"]
    assert find_unknown_parts("mesh: ... is ... gadgets; got ...", texts) == ["gadgets; got"]
    assert not find_unknown_parts("mesh: ... is ... devices; got ...", texts)
