"""Our predicted training speed of Mixtral 8x7B beside one that was published.

    python benchmarks/predict_published.py [--chips=v5p,v6e] [--meshes=MESH;MESH] [--json=FILE]

This code's model expresses Mixtral 8x7B: softmax attention in every layer, plain pre-norm, two of
eight experts. Its training step is compiled ahead of time for the slice of the published figure,
once for each mesh, and its time is predicted as `m1-plan` does it. A compile takes minutes.

What the comparison can show: whether the predictor is in the range of what TPUs have done with a
model of this shape, and which part of our step is far from that. What it cannot show: that our step
runs at the predicted speed. The published figures were measured, with other code (MaxText), another
compiler and its tuned options. That of v6e drops tokens over an expert's capacity, and this
code drops none.
MaxText counts all pairs of tokens as operations of attention, while this code counts the causal
half. So the MFU beside the published one is counted MaxText's way.
"""

import argparse
import json
import pathlib
import sys
import tempfile

import jax

from m1_jax import ModelConfig
from m1_jax.plan import chip_specs, report, time_report, topology
from m1_jax.plan import command as plan_command
from m1_jax.plan import config as plan_config

PURPOSE = "Our predicted training speed of Mixtral 8x7B beside one that was published."
SEQUENCE_TOKENS, ROWS_PER_CHIP = 4096, 8
# MFU and tokens a second and chip, MaxText: its page of performance tiers for v5p, and
# AI-Hypercomputer/tpu-recipes training/trillium/Mixtral-8x7B-MaxText for v6e, whose log has 8 rows
# of 4,096 tokens a chip. The rows of the v5p figure are not published: the same are taken.
PUBLISHED = {
    "v5p": ("v5p:4x8x8", 0.526, 2909.0),
    "v6e": ("v6e:16x16", 0.352, 3896.8),
}
MESHES = "fsdp=256;fsdp=32,expert=8"


def make_mixtral_config() -> ModelConfig:
    """Return Mixtral 8x7B (arXiv 2401.04088, table 1): 46.7 billion parameters."""
    return ModelConfig(
        vocab_size=32_000,
        hidden_size=4096,
        layer_types=("softmax",) * 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rotary_dim=128,
        intermediate_size=14_336,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=1e6,
        max_position_embeddings=32_768,
    )


def count_published_flops(config: ModelConfig) -> float:
    """Return the operations of a token in training as MaxText counts them.

    Three passes, all products, and attention over the whole row for every query.
    """
    embed, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    layer = 2 * embed * (2 * width + 2 * kv_width + config.num_local_experts)
    layer += 6 * embed * config.intermediate_size * config.num_experts_per_tok
    layer += 4 * SEQUENCE_TOKENS * width
    return 3 * (config.num_hidden_layers * layer + 2 * embed * config.vocab_size)


def predict_step(chip: str, mesh: str, config_file: pathlib.Path) -> dict:
    """Return the plan's record of the training step on one mesh."""
    name = PUBLISHED[chip][0]
    num_devices = topology.parse_slice(name).num_devices
    return plan_command.run(
        plan_config.PlanConfig(
            topology=name,
            job="train",
            config=str(config_file),
            mesh=mesh,
            seq=SEQUENCE_TOKENS,
            batch=ROWS_PER_CHIP * num_devices,
        )
    )


def format_row(chip: str, record: dict, flops_per_token: float) -> str:
    """Return the line of one mesh: predicted, and published beside it."""
    _, published_mfu, published_rate = PUBLISHED[chip]
    time = record["programs"][0]["time"]
    words = f"{chip} {report.format_mesh(record['mesh'])}: {report.format_verdict(record)}"
    if "unavailable" in time:
        return f"{words}; {time_report.format_time(time)[0]}"
    # Devices are whole chips on both generations.
    rates = {m: rate / record["devices"] for m, rate in time["tokens_per_sec"].items()}
    peak = chip_specs.CHIP_SPECS[chip].flops_per_sec
    mfus = {m: rate * flops_per_token / peak for m, rate in rates.items()}
    return (
        f"{words}\n  predicted {rates['high']:,.0f} to {rates['low']:,.0f} tokens/s a chip, MFU "
        f"{mfus['high']:.1%} to {mfus['low']:.1%} as published ones are counted "
        f"({time['mfu']['high']:.1%} to {time['mfu']['low']:.1%} by ours); "
        f"published {published_rate:,.0f} tokens/s, {published_mfu:.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=PURPOSE)
    parser.add_argument("--chips", default=",".join(PUBLISHED))
    parser.add_argument("--meshes", default=MESHES, help="by semicolons")
    parser.add_argument("--json", type=pathlib.Path, help="file for the records")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config, records = make_mixtral_config(), {}
    flops_per_token = count_published_flops(config)
    with tempfile.TemporaryDirectory() as folder:
        config_file = pathlib.Path(folder) / "config.json"
        config_file.write_text(json.dumps(config.to_hf()))
        for chip in arguments.chips.split(","):
            for mesh in arguments.meshes.split(";"):
                record = records[f"{chip} {mesh}"] = predict_step(chip, mesh, config_file)
                print(format_row(chip, record, flops_per_token), flush=True)
                for line in time_report.format_time(record["programs"][0]["time"]):
                    print(f"    {line}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
