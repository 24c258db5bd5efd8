"""The text of tests: what it asserts, which names it takes from the program, and its counted form.

A test without an assertion passes every program, and so does one that catches what its assertions
raise. So a call before each assertion counts it as begun, and one after it as held.
"""

import ast
import builtins
import symtable
import sys
from collections.abc import Iterable

BEGIN_FUNCTION, HOLD_FUNCTION = "__begin_assertion__", "__hold_assertion__"
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
    """Return the tree with calls of `BEGIN_FUNCTION` and `HOLD_FUNCTION` around assertions."""
    _AssertionCounter().visit(tree)  # in place
    return ast.fix_missing_locations(tree)


def find_program_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the names that tests import from `solution`, and those that nothing defines.

    MBPP's tests name the program's functions without an import.
    """
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == PROGRAM_MODULE
        for alias in node.names
    }
    module = symtable.symtable(ast.unparse(tree), "tests.py", "exec")
    tables = [module]
    for table in tables:  # grows on the way
        tables += table.get_children()
    symbols = [(table, symbol) for table in tables for symbol in table.get_symbols()]
    defined = {
        symbol.get_name()
        for table, symbol in symbols
        if (table is module or symbol.is_declared_global())
        and (symbol.is_assigned() or symbol.is_imported())
    }
    used = {
        symbol.get_name()
        for table, symbol in symbols
        if symbol.is_referenced() and (table is module or symbol.is_global())
    }
    return imported - {"*"}, used - defined - set(dir(builtins)) - {"__file__"}


def needs_candidate(tree: ast.Module) -> bool:
    """Tell whether tests define HumanEval's `check(candidate)` and leave its call to others."""
    has_check = any(
        isinstance(node, ast.FunctionDef) and node.name == "check" for node in tree.body
    )
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return has_check and not any(
        isinstance(function, ast.Name) and function.id == "check" for function in called
    )


def is_standard_module(name: str) -> bool:
    """Tell whether a name that nothing defines is a module that the tests forgot to import."""
    return name in sys.stdlib_module_names


def _is_assertion(node: ast.AST) -> bool:
    """Tell whether the statement fails by itself where a program is wrong."""
    if isinstance(node, ast.If):  # if f(1) != 2: raise ...
        return _has_failure(node.body) or _has_failure(node.orelse)
    if isinstance(node, ast.Try):  # try: f(-1); assert False; except ValueError: pass
        return _has_failure([*node.body, *node.orelse])
    if isinstance(node, ast.With):  # with pytest.raises(ValueError): ...
        return any(_is_assert_call(item.context_expr) for item in node.items)
    return _is_plain_assertion(node)


def _is_plain_assertion(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        # `assert (f(1) == 2, "text")` holds for every program.
        is_constant = isinstance(node.test, ast.Constant) and bool(node.test.value)
        return not is_constant and not (isinstance(node.test, ast.Tuple) and node.test.elts)
    return isinstance(node, ast.Expr) and _is_assert_call(node.value)


def _is_assert_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = _get_called_name(node)
    return name.startswith("assert") or name == "raises"


def _has_failure(body: Iterable[ast.stmt]) -> bool:
    """Tell whether a block fails whenever it is reached: sys.exit(1), pytest.fail()."""
    return any(
        isinstance(node, ast.Raise)
        or (isinstance(node, ast.Expr) and _is_failing_call(node.value))
        or (
            isinstance(node, ast.Assert)
            and isinstance(node.test, ast.Constant)
            and not node.test.value
        )
        for node in body
    )


def _is_failing_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = _get_called_name(node)
    is_error = bool(node.args) and not (
        isinstance(node.args[0], ast.Constant) and not node.args[0].value
    )
    return name == "fail" or (name in ("exit", "_exit", "quit") and is_error)


def _get_called_name(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


class _AssertionCounter(ast.NodeTransformer):
    """Puts calls around each statement that asserts."""

    def visit(self, node: ast.AST) -> ast.AST | list[ast.AST]:
        # Blocks hold assertions that they may catch on purpose: only their end counts.
        is_plain, is_assertion = _is_plain_assertion(node), _is_assertion(node)
        self.generic_visit(node)
        if not is_assertion:
            return node
        begin, hold = (
            ast.copy_location(ast.Expr(ast.Call(ast.Name(name, ast.Load()), [], [])), node)
            for name in (BEGIN_FUNCTION, HOLD_FUNCTION)
        )
        # A block counts as begun at its end: one that ends by `return` asserts nothing wrong.
        return [begin, node, hold] if is_plain else [node, begin, hold]
