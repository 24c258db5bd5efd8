"""Blocks of code in the documents, the marks above them, and the commands in them.

A mark is an HTML comment on the line above a block. Readers do not see it:

    <!-- not run: REASON -->     the block is not run; the flags of its commands are parsed
    <!-- saved as: FILE -->      the block is the content of a file that later blocks read

A comment anywhere on the page names what its first block finds in the working directory:

    <!-- begins with: NAME, NAME -->
"""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

REPO = pathlib.Path(__file__).resolve().parents[2]
# What happened then is told with the commands of then.
_LEFT_OUT = ("log.md",)
LANGUAGES = ("bash", "python", "json", "text", "yaml")
_COMMENT_PATTERN = re.compile(r"^\s*<!-- (.*?) -->\s*$")
_FENCE_PATTERN = re.compile(r"^( *)(```+)(.*)$")
# What stands between two commands of a line.
_SEPARATORS = ("&&", "||", "|", ";", "&")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str  # the page's path from the repository
    line: int  # of the fence, from 1
    language: str  # such as "bash"; a directive of Sphinx has braces, as in {toctree}
    text: str
    mark: str  # text of the comment above, "" without one

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in ("bash", "python") and not self.mark.startswith("not run: ")

    @property
    def file_name(self) -> str | None:
        """The file whose content the block is."""
        name = self.mark.removeprefix("saved as: ")
        return None if name == self.mark else name


def list_pages() -> list[pathlib.Path]:
    """Return README, CONTRIBUTING and all pages of docs/ and configs/ but the log."""
    paths = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "configs" / "README.md"]
    paths += sorted(REPO.glob("docs/*.md"))
    return [path for path in paths if path.name not in _LEFT_OUT]


def page_name(path: pathlib.Path) -> str:
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name


def read_blocks(path: pathlib.Path) -> list[Block]:
    """Return the blocks of a page in their order."""
    blocks, mark, begin, language, texts = [], "", 0, "", []
    kind = "outside"
    for number, kind, line in _classify_lines(path):
        match kind:
            case "begin":
                begin, language, texts = number, line.strip().lstrip("`"), []
            case "inside":
                texts.append(line)
            case "end":
                blocks.append(Block(page_name(path), begin, language, "\n".join(texts), mark))
                mark = ""
            case _:
                comment = _COMMENT_PATTERN.match(line)
                mark = comment[1] if comment else ""
    assert kind in ("outside", "end"), f"{page_name(path)}:{begin}: the block has no end"
    return blocks


def text_outside_of_blocks(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yield the number and text of each line that is in no block."""
    for number, kind, line in _classify_lines(path):
        if kind == "outside":
            yield number, line


def _classify_lines(path: pathlib.Path) -> Iterator[tuple[int, str, str]]:
    """Yield the number of each line, its kind and itself: outside, begin, inside or end."""
    fence = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = _FENCE_PATTERN.match(line)
        if not fence and match:
            fence = match[2]
            yield number, "begin", line
        elif fence and match and match[2] == fence and not match[3].strip():
            fence = ""
            yield number, "end", line
        else:
            yield number, "inside" if fence else "outside", line


def read_first_files(path: pathlib.Path) -> list[str]:
    """Return what the page's first block finds in the working directory."""
    match = re.search(r"<!-- begins with: (.*?) -->", path.read_text())
    return re.split(r",\s*", match[1]) if match else []


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a bash block, joined where one ends with a backslash or in quotes."""
    lines: list[str] = []
    held = ""
    for line in text.splitlines():
        held += line.removesuffix("\\") if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        try:
            shlex.split(held, comments=True)
        except ValueError:  # a quote is open
            held += "\n"
            continue
        lines += [held] if held.strip() and not held.lstrip().startswith("#") else []
        held = ""
    assert not held, f"got a block that ends inside of a command: {held!r}"
    return lines


def split_commands(line: str) -> list[list[str]]:
    """Return the words of each command of a line, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skip_next = False
    for word in lexer:
        if word in _SEPARATORS:
            commands.append([])
        elif set(word) <= set("<>&"):
            skip_next = True  # the file, or the number of another stream
            if commands[-1] and commands[-1][-1] in ("1", "2"):
                commands[-1].pop()
        elif skip_next:
            skip_next = False
        else:
            commands[-1].append(word)
    return [words for words in commands if words]
