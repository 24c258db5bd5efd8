"""Writes demo/data: stories in plain sentences, sums, sums with mistakes, and the tiny tokenizer.

    PYTHONPATH=. python demo/make_data.py

The files are always the same.
"""

import json
import pathlib
import random

from m1_jax import testing

OUTPUT_DIR = pathlib.Path(__file__).resolve().parent / "data"
PLACES = {"harbour": "ships", "market": "apples", "library": "books", "mill": "flour"}
PEOPLE = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"]
MAX_ADDEND = 4  # the largest addend of the sums that reinforcement learning trains
TIMES = ["In the morning", "At noon", "In the evening"]


def draw_story(rng: random.Random) -> str:
    """Return a few sentences whose later words follow from earlier ones."""
    who, friend = rng.sample(PEOPLE, 2)
    lines = []
    for time in TIMES:
        location = rng.choice(list(PLACES))
        count = rng.randint(2, 9)
        goods = PLACES[location]
        lines.append(f"{time} {who} goes to the {location} and counts {count} {goods}.")
        lines.append(f"{friend} asks how many {goods} are at the {location}: there are {count}.")
    return " ".join(lines)


def draw_sum_chat(rng: random.Random) -> dict:
    """Return a conversation that thinks in one line and answers in a fixed form."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    thought = f"{a} and {b} make {a + b}."
    return {
        "messages": [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\nAnswer: {a + b}"},
        ]
    }


def draw_careless_chat(rng: random.Random) -> dict:
    """Return a conversation about a smaller sum whose answer is wrong every other time."""
    a, b = rng.randint(1, MAX_ADDEND), rng.randint(1, MAX_ADDEND)
    stated_sum = a + b + (rng.choice((-2, -1, 1, 2)) if rng.random() < 0.5 else 0)
    answer = f"<think>\n{a} and {b} make {stated_sum}.\n</think>\n\nAnswer: {stated_sum}"
    return {
        "messages": [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": answer},
        ]
    }


def main() -> None:
    rng = random.Random(0)
    OUTPUT_DIR.mkdir(exist_ok=True)
    for name, num_stories in (("text", 400), ("text_held_out", 20)):
        write_records(name, [{"text": draw_story(rng)} for _ in range(num_stories)])
    write_records("chat", [draw_sum_chat(rng) for _ in range(600)])
    # A generator of its own: careless.jsonl does not depend on the number of stories and sums.
    rng = random.Random(1)
    write_records("careless", [draw_careless_chat(rng) for _ in range(1000)])
    pairs = [(a, b) for a in range(1, MAX_ADDEND + 1) for b in range(1, MAX_ADDEND + 1)]
    write_records(
        "sums", [{"prompt": f"What is {a} + {b}?", "label": str(a + b)} for a, b in pairs]
    )
    testing.write_tiny_tokenizer(OUTPUT_DIR / "tokenizer")


def write_records(name: str, records: list[dict]) -> None:
    lines = (json.dumps(record) + "\n" for record in records)
    (OUTPUT_DIR / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
