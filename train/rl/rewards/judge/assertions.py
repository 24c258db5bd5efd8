"""The text of tests: what it asserts, which names it takes from the program, and its counted form.

A test without an assertion passes every program. So each assertion is followed by a call that
counts it, and a verdict without a counted assertion is none.
"""

import ast
import builtins
import sys
from collections.abc import Iterable

COUNT_FUNCTION = "__count_assertion__"
PROGRAM_MODULE = "solution"


def parse_tests(text: str) -> ast.Module:
    """Return the syntax tree of tests that assert something.

    Raises:
      ValueError: the text is no Python, or holds no assertion.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"got tests that are no Python: {error}") from None
    if not any(_is_assertion(node) for node in ast.walk(tree)):
        raise ValueError("got tests without an assertion, which every program passes")
    return tree


def count_assertions(tree: ast.Module) -> ast.Module:
    """Return the tree with a call of `COUNT_FUNCTION` after each assertion."""
    return ast.fix_missing_locations(_AssertionCounter().visit(tree))


def find_program_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Return the names that tests import from `solution`, and those that nothing defines.

    MBPP's tests name the program's functions without an import.
    """
    imported: set[str] = set()
    bound: set[str] = set(dir(builtins)) | {"__file__"}
    loaded: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            bound |= names
            if isinstance(node, ast.ImportFrom) and node.module == PROGRAM_MODULE:
                imported |= {alias.name for alias in node.names} - {"*"}
        elif isinstance(node, ast.Name):
            (loaded if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
    return imported, loaded - bound


def find_function(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """Return a function of the module itself."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def is_standard_module(name: str) -> bool:
    """Tell whether a name that nothing defines is a module that the tests forgot to import."""
    return name in sys.stdlib_module_names


def _is_assertion(node: ast.AST) -> bool:
    """Tell whether the statement fails by itself where a program is wrong."""
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.Expr):
        return _is_assert_call(node.value)
    if isinstance(node, ast.With):
        return any(_is_assert_call(item.context_expr) for item in node.items)
    # if f(1) != 2: raise ...; try: f(-1); assert False; except ValueError: pass
    if isinstance(node, ast.If):
        return _has_failure(node.body) or _has_failure(node.orelse)
    return isinstance(node, ast.Try) and _has_failure([*node.body, *node.orelse])


def _is_assert_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
    return name.startswith("assert") or name == "raises"


def _has_failure(body: Iterable[ast.stmt]) -> bool:
    return any(isinstance(node, ast.Assert | ast.Raise) for node in body)


class _AssertionCounter(ast.NodeTransformer):
    """Puts a call after each statement that asserts."""

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        is_assertion = _is_assertion(node)
        self.generic_visit(node)
        if not is_assertion:
            return node
        call = ast.Call(ast.Name(COUNT_FUNCTION, ast.Load()), [], [])
        return [node, ast.copy_location(ast.Expr(call), node)]
