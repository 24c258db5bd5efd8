"""Small functions and ways to break them, of which the repair task's repositories are made.

Every function below appears in repositories with exactly the text that it has here. Another text
makes other tasks. `BUGGY_FUNCTIONS` says how a function is broken, and on what it is tested.
The functions take and return JSON values.
"""

import dataclasses
import inspect
import random
from collections.abc import Callable
from typing import Any


def median(numbers):
    """Return the number in the middle, in order; of an even count, the mean of the two."""
    ordered = sorted(numbers)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2


def runs(text):
    """Return [character, count] of each run of equal characters."""
    found = []
    for char in text:
        if found and found[-1][0] == char:
            found[-1][1] += 1
        else:
            found.append([char, 1])
    return found


def merge(spans):
    """Return the spans [start, end] in order, those that touch or overlap made one."""
    merged = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return merged


def rotate(items, steps):
    """Return the items moved to the right by so many steps, the last ones to the front."""
    if not items:
        return []
    cut = -steps % len(items)
    return items[cut:] + items[:cut]


def change(amount, coins):
    """Return the least number of coins that make the amount, None if no coins do."""
    fewest: list[int | None] = [0]
    for total in range(1, amount + 1):
        ways = [fewest[total - coin] for coin in coins if coin <= total]
        ways = [way for way in ways if way is not None]
        fewest.append(min(ways) + 1 if ways else None)
    return fewest[amount]


def count_words(text):
    """Return how often each word is there, in small letters and without its punctuation."""
    counts = {}
    for word in text.lower().split():
        word = word.strip(".,!?")
        if word:
            counts[word] = counts.get(word, 0) + 1
    return counts


def roman(number):
    """Return the number, 1 to 399, in Roman numerals."""
    written = ""
    tens = ((100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"))
    for value, letters in (*tens, (9, "IX"), (5, "V"), (4, "IV"), (1, "I")):
        while number >= value:
            written += letters
            number -= value
    return written


def find(ordered, wanted):
    """Return the first place of a number in an ordered list, -1 if it is not there."""
    low, high = 0, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if ordered[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low if low < len(ordered) and ordered[low] == wanted else -1


def _draw_numbers(rng: random.Random, min_count: int = 1) -> list[int]:
    return [rng.randint(0, 9) for _ in range(rng.randint(min_count, 7))]


def _draw_spans(rng: random.Random) -> list[list[int]]:
    starts = [rng.randint(0, 15) for _ in range(rng.randint(2, 5))]
    return [[start, start + rng.randint(1, 6)] for start in starts]


def _draw_words(rng: random.Random) -> str:
    return " ".join(rng.choice(["A", "a", "dog", "Dog,", "ran.", "!"]) for _ in range(6))


@dataclasses.dataclass(frozen=True)
class BuggyFunction:
    """A function of a repository, and its possible bugs."""

    correct: Callable[..., Any]  # one of the functions above
    mutations: tuple[tuple[str, str], ...]  # (text that occurs once, the text that replaces it)
    draw: Callable[[random.Random], list[Any]]  # random arguments to test the function on

    @property
    def name(self) -> str:
        """Return the function's name, which is also the name of its module in the repository."""
        return self.correct.__name__

    def source(self, mutation_index: int | None = None) -> str:
        """Return the function's text, correct or with one of its bugs."""
        text = inspect.getsource(self.correct)
        return text if mutation_index is None else text.replace(*self.mutations[mutation_index])


BUGGY_FUNCTIONS = (
    BuggyFunction(
        median,
        (
            ("sorted(numbers)", "list(numbers)"),
            ("ordered[half - 1] + ordered[half]", "ordered[half] + ordered[-half]"),
        ),
        lambda rng: [_draw_numbers(rng)],
    ),
    BuggyFunction(
        runs,
        (("found[-1][0] ==", "found[0][0] =="), ("[char, 1]", "[char, 0]")),
        lambda rng: ["".join(rng.choice("aab") for _ in range(rng.randint(0, 6)))],
    ),
    BuggyFunction(
        merge,
        (
            ("start <= merged", "start < merged"),
            ("max(merged[-1][1], end)", "end"),
            ("in sorted(spans)", "in spans"),
        ),
        lambda rng: [_draw_spans(rng)],
    ),
    BuggyFunction(
        rotate,
        (("-steps %", "steps %"), ("items[cut:] + items[:cut]", "items[:cut] + items[cut:]")),
        lambda rng: [_draw_numbers(rng, min_count=0), rng.randint(-3, 9)],
    ),
    BuggyFunction(
        change,
        (("coin <= total", "coin < total"), ("min(ways)", "ways[0]")),
        lambda rng: [rng.randint(0, 20), rng.sample([1, 2, 5, 7, 8], 3)],
    ),
    BuggyFunction(
        count_words,
        ((".lower()", ""), ("counts.get(word, 0) + 1", "1"), ('".,!?"', '"."')),
        lambda rng: [_draw_words(rng)],
    ),
    BuggyFunction(
        roman,
        (("number >= value", "number > value"), (' (4, "IV"),', ""), ('(90, "XC")', '(90, "CX")')),
        lambda rng: [rng.randint(1, 399)],
    ),
    BuggyFunction(
        find,
        (("low < len(ordered) and ", ""), ("middle] < wanted", "middle] <= wanted")),
        lambda rng: [sorted(_draw_numbers(rng, min_count=0)), rng.randint(0, 9)],
    ),
)


def evaluate_call(source: str, name: str, arguments: list[Any]) -> list[Any]:
    """Return ["value", value] or ["error", name of its type] of calling a function of this file.

    The call runs in this process: never use it on a model's text, which `train.rl.rewards.runner`
    runs.
    """
    module: dict[str, Any] = {}
    exec(source, module)
    try:
        return ["value", module[name](*arguments)]
    except Exception as error:
        return ["error", type(error).__name__]
