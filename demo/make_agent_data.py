"""Writes demo/data/agent.jsonl: demonstrations of a tool, careless ones; see the lookup task.

    PYTHONPATH=. python demo/make_agent_data.py

Always the same file.
"""

import json
import pathlib

from train.environments import lookup

OUT = pathlib.Path(__file__).resolve().parent / "data" / "agent.jsonl"
SIZE = 600


def main() -> None:
    records = lookup.demonstrations(SIZE, seed=0)
    OUT.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
