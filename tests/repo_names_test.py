"""Names that grep finds and a reader understands, and sizes that fit on a screen."""

import ast
import collections
import functools
import pathlib
import re

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("m1_jax", "pallas_kernels", "train", "infer")
_MAX_FILE_LINES = 400
_MAX_FUNCTION_LINES = 60
# The body of a Pallas kernel, which works on one set of refs.
_MAX_KERNEL_LINES = 120
_MAX_ONE_WORD_FUNCTIONS = 1 / 5
_MAX_ONE_WORD_CLASSES = 1 / 4
_MAX_PRONOUNS = 0.005
# Words that stand for a noun. A variable with such a name does not say what it holds.
_PRONOUN_PATTERN = re.compile(
    "asked|done|found|given|held|here|it|kept|made|mine|more|one|others?|ours|piece|place|rest|said"
    "|some|taken|that|theirs|them|these|they|this|those|told|what|where|which|whole"
)


@functools.cache
def _parse_packages() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the four packages, by path."""
    files = [file for name in _PACKAGES for file in sorted((_REPO / name).rglob("*.py"))]
    return {str(file.relative_to(_REPO)): ast.parse(file.read_text()) for file in files}


def _count_words(name: str) -> int:
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))


def _find_nodes(kinds) -> list[tuple[str, ast.AST]]:
    """Return (path, node) of every node of these kinds, nested ones included."""
    return [
        (path, node)
        for path, module in _parse_packages().items()
        for node in ast.walk(module)
        if isinstance(node, kinds)
    ]


def _bound_names(module: ast.AST) -> list[tuple[int, str]]:
    """Return (line, name) of each parameter, and of each variable where it is assigned."""
    parameters = [(node.lineno, node.arg) for node in ast.walk(module) if isinstance(node, ast.arg)]
    variables = [
        (node.lineno, node.id)
        for node in ast.walk(module)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return parameters + variables


def test_class_names_are_unique():
    files = collections.defaultdict(list)
    for path, node in _find_nodes(ast.ClassDef):
        files[node.name].append(path)
    assert not {name: paths for name, paths in files.items() if len(paths) > 1}


def test_few_classes_have_one_word():
    names = [f"{path}: {node.name}" for path, node in _find_nodes(ast.ClassDef)]
    one_word = [name for name in names if _count_words(name.split(": ")[1]) == 1]
    assert len(one_word) < _MAX_ONE_WORD_CLASSES * len(names), one_word


def test_few_functions_have_one_word():
    """Only functions of modules: a method's class is the other half of its name."""
    names = [
        f"{path}: {node.name}"
        for path, module in _parse_packages().items()
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    one_word = [name for name in names if _count_words(name.split(": ")[1]) == 1]
    assert len(one_word) < _MAX_ONE_WORD_FUNCTIONS * len(names), one_word


def test_variables_are_nouns():
    bound = [
        (path, line, name)
        for path, module in _parse_packages().items()
        for line, name in _bound_names(module)
    ]
    pronouns = [
        f"{path}:{line} {name}" for path, line, name in bound if _PRONOUN_PATTERN.fullmatch(name)
    ]
    share = len(pronouns) / len(bound)
    assert share < _MAX_PRONOUNS, f"{share:.2%} of {len(bound)}:\n" + "\n".join(pronouns)


def test_files_are_short():
    lengths = {path: len((_REPO / path).read_text().splitlines()) for path in _parse_packages()}
    assert not {path: lines for path, lines in lengths.items() if lines > _MAX_FILE_LINES}


def test_functions_are_short():
    long_functions = {}
    for path, node in _find_nodes(ast.FunctionDef | ast.AsyncFunctionDef):
        lines = node.end_lineno - node.lineno + 1
        is_kernel = path.startswith("pallas_kernels/") and node.name.endswith("_kernel")
        if lines > (_MAX_KERNEL_LINES if is_kernel else _MAX_FUNCTION_LINES):
            long_functions[f"{path}: {node.name}"] = lines
    assert not long_functions


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run", 1),
        ("_run", 1),
        ("make_row", 2),
        ("Batch", 1),
        ("HostBatch", 2),
        ("RMSNorm", 2),
        ("KVCache", 2),
        ("to_int8", 2),
    ],
)
def test_words_are_counted(name, words):
    assert _count_words(name) == words


def test_bound_names_are_counted():
    source = """
def measure(rows, /, *found, where=None, **other):
    one, made.rest = rows
    return [place for place in (told := one)]
"""
    names = sorted(name for _, name in _bound_names(ast.parse(source)))
    assert names == ["found", "one", "other", "place", "rows", "told", "where"]
