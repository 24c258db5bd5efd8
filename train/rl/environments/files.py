"""Questions about a few files, which the model searches and reads, and a calculation."""

import ast
import operator
import random
import re
from collections.abc import Sequence

from train.rl import sample as sample_lib
from train.rl.environments import base

TOOL_SCHEMAS = (
    base.make_tool_schema(
        "search", "Return the lines that hold all of these words.", words="string"
    ),
    base.make_tool_schema("read", "Return a file.", name="string"),
    base.make_tool_schema(
        "calculate", "Return the value of an arithmetic expression.", expression="string"
    ),
)
MAX_SEARCH_LINES = 8  # that one search returns
# Up to 18 digits, as every value of a calculation has.
_ANSWER_PATTERN = re.compile(r"^Answer: (-?[0-9]{1,18})\s*\Z", re.MULTILINE)
# Bounds on the work of one calculation: 9**9**9**9 would never end.
_MAX_EXPRESSION_CHARS, _MAX_VALUE, _MAX_EXPONENT = 200, 10**18, 64
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_TOWNS = ("Aldby", "Brigg", "Corby", "Dalton", "Elton", "Fenwick", "Garth", "Hexley")
_GOODS = ("apples", "pears", "sheep", "geese", "carts")


class FilesEnvironment(base.Environment):
    """Final reward 1 if the last line is `Answer: ` and the right whole number, otherwise 0.

    The task's metadata is {"files": {name: text}}, and its label is the number.
    """

    def __init__(self):
        # Those of the task, from `start` on.
        self._files: dict[str, str] = {}
        self._label: int | None = None

    def start(self, task: sample_lib.Task) -> None:
        """Take the files and the label from the task."""
        files = task.metadata.get("files")
        if not isinstance(files, dict) or not isinstance(task.label, int):
            raise ValueError(
                f"task {task.id!r}: got files {files!r:.80} and the label {task.label!r:.80}; "
                "wanted an object and a whole number. Make tasks with files.make_tasks."
            )
        self._files, self._label = files, task.label

    def step(self, calls: Sequence[base.EnvironmentCall]) -> base.EnvironmentStep:
        """Search, read and calculate."""
        tools = {"search": self._search, "read": self._read_file, "calculate": evaluate_expression}
        return base.EnvironmentStep(base.execute_calls(calls, TOOL_SCHEMAS, tools))

    def finish(self, text: str) -> float:
        """Compare the answer with the label."""
        answer = _ANSWER_PATTERN.search(text)
        return float(answer is not None and int(answer.group(1)) == self._label)

    def _search(self, words: str) -> str:
        terms = words.lower().split()
        if not terms:
            raise base.CallError("words: got none; wanted at least one")
        lines = [
            f"{name}: {line}"
            for name, text in self._files.items()
            for line in text.splitlines()
            if all(term in line.lower() for term in terms)
        ]
        num_hidden = len(lines) - MAX_SEARCH_LINES
        note = [f"and {num_hidden} more"] if num_hidden > 0 else []
        return "\n".join([*lines[:MAX_SEARCH_LINES], *note]) or "nothing found"

    def _read_file(self, name: str) -> str:
        if name not in self._files:
            raise base.CallError(f"got the file {name!r}; wanted one that a search names")
        return self._files[name]


def evaluate_expression(expression: str) -> str:
    """Return the value of an expression of numbers, + - * / // % ** and brackets.

    Raises:
      base.CallError: the expression holds anything else, or a value in it is not real or is beyond
        10**18.
    """
    if len(expression) > _MAX_EXPRESSION_CHARS or not re.fullmatch(
        r"[0-9\s.+\-*/%()]+", expression
    ):
        raise base.CallError(
            f"expression: got {expression!r:.80}; wanted at most {_MAX_EXPRESSION_CHARS} "
            "characters: numbers, + - * / // % ** and brackets"
        )
    try:
        value = _evaluate_node(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError) as error:
        raise base.CallError(f"expression: got {expression!r:.80}: {error}") from None
    # Ten decimals hide what floats add: 0.1 + 0.2 is 0.3.
    return str(round(value, 10)) if value % 1 else str(int(value))


def _evaluate_node(node: ast.expr) -> int | float:
    """Return a syntax node's value: eval() would run a model's text as code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = node.value
    elif isinstance(node, ast.UnaryOp):
        value = _OPERATORS[type(node.op)](_evaluate_node(node.operand))
    elif isinstance(node, ast.BinOp):
        left, right = _evaluate_node(node.left), _evaluate_node(node.right)
        # Checked before the power is computed. Every operand is below _MAX_VALUE already.
        if isinstance(node.op, ast.Pow) and abs(right) > _MAX_EXPONENT:
            raise base.CallError(f"got the exponent {right}; wanted at most {_MAX_EXPONENT}")
        value = _OPERATORS[type(node.op)](left, right)
    else:
        raise base.CallError(f"got {ast.unparse(node)!r:.80}; wanted arithmetic on numbers")
    if isinstance(value, complex) or not abs(value) <= _MAX_VALUE:
        raise base.CallError(f"got {ast.unparse(node)!r:.80}; wanted real values up to 10**18")
    return value


def make_tasks(size: int, seed: int) -> list[sample_lib.Task]:
    """Return `size` tasks. A longer list begins with the tasks of a shorter one."""
    return [make_task(seed, index) for index in range(size)]


def make_task(seed: int, index: int) -> sample_lib.Task:
    """Return one task, which depends on seed and index alone."""
    # A text seeds by SHA-512, so equal seeds make equal tasks on every machine.
    return _make_task(random.Random(f"files {seed} {index}"), f"files-{seed}-{index}")


def _make_task(rng: random.Random, name: str) -> sample_lib.Task:
    """Return a question for a sum over two or three towns.

    Each town has a file of its own, whose name does not tell the town.
    """
    stock = {town: {goods: rng.randint(10, 99) for goods in _GOODS} for town in _TOWNS}
    numbers = rng.sample(range(1, 100), len(_TOWNS))
    # Sorted by name: the order of files does not tell the town either.
    files = {
        f"note-{number:02}.txt": "\n".join(
            [
                f"What there is in {town}.",
                *(f"{goods}: {count}" for goods, count in town_stock.items()),
            ]
        )
        for number, (town, town_stock) in sorted(zip(numbers, stock.items(), strict=True))
    }
    towns, goods = rng.sample(_TOWNS, rng.randint(2, 3)), rng.choice(_GOODS)
    town_list = f"{', '.join(towns[:-1])} and {towns[-1]}"
    question = (
        f"How many {goods} are there in {town_list} together? Search the notes. "
        "End with a line 'Answer: ' and the number."
    )
    return sample_lib.Task(
        id=name,
        messages=({"role": "user", "content": question},),
        source="files",
        label=sum(stock[town][goods] for town in towns),
        metadata={"files": files},
        tools=TOOL_SCHEMAS,
    )
