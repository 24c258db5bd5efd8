"""Pretrains and fine-tunes with the tiny configs, and prints what came of it: DIRECTORY SEED."""

import dataclasses
import json
import pathlib
import sys

from infer import generate
from m1_jax import configlib
from train import export as export_run
from train import loop, metrics, sft

PROMPTS = "What is 3 + 4?\nWhat is 9 + 2?\nWhat is 5 + 5?\n"


def main(directory: pathlib.Path, seed: str) -> None:
    def tiny(name, arg=""):
        config = configlib.load_config(f"configs/{name}.py{arg and ':' + arg}", [f"seed={seed}"])
        return dataclasses.replace(config, compilation_cache=str(directory / "xla"))

    loop.run_training(tiny("tiny_pretrain"), directory / "pretrain")
    lines = (directory / "pretrain" / metrics.METRICS_FILE).read_text().splitlines()
    held_out = [r["loss"] for r in map(json.loads, lines) if r["kind"] == "eval"]
    export_run.run(directory / "pretrain", directory / "base", dtype="float32")
    sft.run(tiny("tiny_sft", str(directory / "base")), directory / "sft")
    export_run.run(directory / "sft", directory / "tuned", dtype="float32")
    prompts = directory / "prompts.txt"
    prompts.write_text(PROMPTS)
    config = generate.GenerateConfig(
        checkpoint=str(directory / "tuned"),
        prompts_file=str(prompts),
        max_tokens=64,
        temperature=0.0,
    )
    outputs, _ = generate.run(config)
    print(json.dumps({"held_out": held_out[-1], "answers": [output.text for output in outputs]}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
