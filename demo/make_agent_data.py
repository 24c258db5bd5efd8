"""Writes demo/data/agent*.jsonl: demonstrations of a tool, for the lookup task.

    PYTHONPATH=. python demo/make_agent_data.py

The files are always the same. In agent_careful.jsonl every conversation looks up the right key, in
agent.jsonl half of them look up another one.
"""

import json
import pathlib

from train.rl.environments import lookup

OUTPUT_DIR = pathlib.Path(__file__).resolve().parent / "data"
NUM_CONVERSATIONS = 600


def main() -> None:
    for name, seed, careless in (("agent", 0, 0.5), ("agent_careful", 1, 0.0)):
        records = lookup.make_demonstrations(NUM_CONVERSATIONS, seed, careless)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (OUTPUT_DIR / f"{name}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
