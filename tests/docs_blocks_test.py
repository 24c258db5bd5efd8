"""Blocks of code in README and docs/ run, page by page and in their order, on a tiny checkpoint.

A block with the mark "not run" has a reason, and the flags of its commands are parsed all the same.
"""

import ast
import json
import pathlib
import re
import shutil
import sys

import doc_blocks
import doc_commands
import jax
import pytest

from m1_jax import convert, testing

_PAGES = {doc_blocks.page_name(path): path for path in doc_blocks.list_pages()}
_RUN_PAGES = [
    name for name, path in _PAGES.items() if any(b.is_run for b in doc_blocks.read_blocks(path))
]
# README runs in every landing. Other pages that train or compile for a TPU take their turns.
_SLOW_PAGES = ("README.md", "docs/checkpoints.md", "docs/generate.md")
_LONG_PAGES = (
    "configs/README.md",
    "docs/evaluate.md",
    "docs/plan.md",
    "docs/pretrain.md",
    "docs/rl.md",
    "docs/sft.md",
    "docs/training.md",
)
# Pages about meshes see the eight devices of the tests. Readers of all others have one.
_MESH_PAGES = ("docs/sharding.md",)
# The first word of what is a command, where it stands at the beginning of an indented line.
_COMMAND_PATTERN = re.compile(r"^ {4,}(python3? |pip |m1-\w+ |make \w|gcloud |git |hf )")
# Numbers of Python blocks that would make a test large.
_TINY_NUMBERS = {
    "max_length=8192": "max_length=256",
    "max_rows=32": "max_rows=2",
    "max_tokens=100": "max_tokens=8",
}


def _page_marks(name):
    if name in _LONG_PAGES:
        return pytest.mark.long
    return pytest.mark.slow if name in _SLOW_PAGES else ()


# ---- every block


@pytest.mark.parametrize("name", _PAGES)
def test_blocks_are_of_known_languages_and_marks(name):
    for block in doc_blocks.read_blocks(_PAGES[name]):
        assert block.language in doc_blocks.LANGUAGES or block.language.startswith("{"), block.place
        if block.mark:
            is_known = re.match(r"(not run|saved as|begins with|On GitHub)", block.mark)
            assert is_known, f"{block.place}: {block.mark}"
        if block.language == "python":
            ast.parse(block.text, block.place)
        if block.language == "json":
            lines = block.text.splitlines() if block.file_name else [block.text]
            assert all(isinstance(json.loads(line), dict | list) for line in lines), block.place


@pytest.mark.parametrize("name", _PAGES)
def test_commands_have_their_flags(name):
    for block in doc_blocks.read_blocks(_PAGES[name]):
        for line in doc_blocks.split_lines(block.text) if block.language == "bash" else ():
            try:
                doc_commands.check_line(line)
            except doc_commands.CommandError as error:
                pytest.fail(f"{block.place}: {error}")


@pytest.mark.parametrize("name", _PAGES)
def test_no_command_stands_outside_of_a_block(name):
    """An indented line would be neither parsed nor run."""
    for number, line in doc_blocks.text_outside_of_blocks(_PAGES[name]):
        assert not _COMMAND_PATTERN.match(line), f"{name}:{number}: fence it as bash"


# ---- runs


@pytest.fixture(scope="module")
def first_files(golden_dir, tmp_path_factory):
    """A folder with everything that a page may begin with."""
    folder = tmp_path_factory.mktemp("first_files")
    release = folder / "MiniMax-M1-40k"
    shutil.copytree(golden_dir, release, ignore=shutil.ignore_patterns("golden.npz"))
    testing.write_tiny_tokenizer(release)
    shutil.copy(golden_dir / "golden.npz", folder)
    convert.run(convert.ConvertConfig("orbax", str(release), str(folder / "m1-orbax")))
    for name in ("tiny-sft", "tiny-pretrained"):
        (folder / name).symlink_to(folder / "m1-orbax")
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=_page_marks(n)) for n in _RUN_PAGES])
def test_page_runs(name, first_files, tmp_path, monkeypatch):
    for folder in ("configs", "demo", "benchmarks", "tests"):
        (tmp_path / folder).symlink_to(doc_blocks.REPO / folder)
    for file in doc_blocks.read_first_files(_PAGES[name]):
        (tmp_path / file).symlink_to(first_files / file)
    monkeypatch.chdir(tmp_path)
    if name not in _MESH_PAGES:
        devices = jax.devices()[:1]
        for function in ("devices", "local_devices"):
            monkeypatch.setattr(jax, function, lambda *_, **__: devices)
        for function in ("device_count", "local_device_count"):
            monkeypatch.setattr(jax, function, lambda *_, **__: 1)
    run_blocks(doc_blocks.read_blocks(_PAGES[name]), tmp_path)


def run_blocks(blocks, folder: pathlib.Path) -> None:
    """Run the blocks of a page in the current directory, which is `folder`."""
    namespace: dict = {"__name__": "page"}
    for block in blocks:
        if block.file_name:
            (folder / block.file_name).write_text(_shrink_file(block))
        elif block.is_run and block.language == "python":
            text = block.text
            for number, tiny_number in _TINY_NUMBERS.items():
                text = text.replace(number, tiny_number)
            exec(compile("\n" * block.line + text, block.page, "exec"), namespace)
        elif block.is_run:
            for line in doc_blocks.split_lines(block.text):
                print(f"{block.place}: {line}", file=sys.stderr)
                doc_commands.run_line(line, folder)


def _shrink_file(block: doc_blocks.Block) -> str:
    """Return the content of a file, with outputs of 8 tokens where it has requests."""
    if block.language != "json":
        return block.text + "\n"
    lines = []
    for line in block.text.splitlines():
        value = json.loads(line)
        request = value.get("body", value)
        if "prompt" in request or request.get("messages", [{}])[-1].get("role") == "user":
            request["max_tokens"] = 8
        lines.append(json.dumps(value))
    return "\n".join(lines) + "\n"


# ---- the test itself


def _write_page(tmp_path, text: str) -> list[doc_blocks.Block]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return doc_blocks.read_blocks(page)


def test_blocks_of_a_page(tmp_path):
    blocks = _write_page(
        tmp_path,
        "<!-- begins with: a, b c -->\n\n    indented\n\n```bash\nls\n```\n"
        "<!-- not run: needs a TPU -->\n```python\nx = '''\n```text\n'''\n```\n"
        "<!-- saved as: r.jsonl -->\n```json\n{}\n```\nend\n",
    )
    assert [(b.language, b.line, b.is_run, b.file_name) for b in blocks] == [
        ("bash", 5, True, None),
        ("python", 9, False, None),
        ("json", 15, False, "r.jsonl"),
    ]
    assert blocks[1].text == "x = '''\n```text\n'''"
    assert doc_blocks.read_first_files(tmp_path / "page.md") == ["a", "b c"]
    outside = [line for _, line in doc_blocks.text_outside_of_blocks(tmp_path / "page.md")]
    assert [line for line in outside if line and "<!--" not in line] == ["    indented", "end"]


def test_lines_and_commands_of_a_block():
    text = "# a comment\na --x='1\n2' \\\n  --y  # why\n\nb > out.txt 2>&1 && nohup c | d &\n"
    lines = doc_blocks.split_lines(text)
    assert len(lines) == 2
    assert doc_blocks.split_commands(lines[0]) == [["a", "--x=1\n2", "--y"]]
    assert doc_blocks.split_commands(lines[1]) == [["b"], ["nohup", "c"], ["d"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("m1-convert --to=orbax --src=a --dest=b", "dest"),
        ("python -m m1_jax.convert --to=zip --src=a --dst=b", "zip"),
        ("python -m m1_jax.convert --to=hf --src=a --dst=b c", "c"),
        ("m1-chat --checkpoint=a", "no such script"),
        ("m1-sft --config=configs/absent.py --workdir=a", "no such file"),
        ("m1-sft --config=configs/tiny_sft.py --set=stages.0.row=1 --workdir=a", "row"),
        ("m1-generate --checkpoint=a --prompt=b --preset=fast", "preset: got 'fast'"),
        ("m1-generate --checkpoint=a --prompt=b --temperature=-1", "temperature: got -1"),
        ("m1-batch --checkpoint=a --input=b --output=c --max_rows=0", "max_rows: got 0"),
        ("m1-plan --topology=v4:2x2 --job=train", "v4"),
        ("m1-plan --topology=v5p:2x2x1 --job=train --mesh=expart=4", "expart"),
        ("m1-rl --workdir=a --config=FILE --eps-clip-higher 4.0", "eps-clip-higher"),
        ("pip install -e '.[tpus]'", "tpus"),
        ("make demos", "demos"),
        ("python benchmarks/absent.py", "no such file"),
        ("python benchmarks/data_vs_grain.py --batch=60", "--batch"),
        ("pytest tests/absent_test.py", "absent_test"),
        ("gcloud compute tpus tpu-vm create a --runtime-version=x", "--runtime-version"),
        ("gcloud compute tpus tpu-vm ssh a --command='m1-rl --word=a'", "word"),
        ("FOO=1 nohup pyhton x.py", "pyhton"),
    ],
)
def test_wrong_commands_are_found(line, reason):
    with pytest.raises(doc_commands.CommandError, match=re.escape(reason)):
        doc_commands.check_line(line)


def test_failing_blocks_fail(first_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, error in {
        "```bash\nls absent\n```\n": doc_commands.CommandError,
        "```bash\nm1-convert --to=orbax --src=absent --dst=b\n```\n": doc_commands.CommandError,
        "```python\nx = 1\n```\n```python\nassert x == 2\n```\n": AssertionError,
    }.items():
        with pytest.raises(error):
            run_blocks(_write_page(tmp_path, text), tmp_path)
