"""Measures the errors of log-probabilities with int8 weights, beside those with bfloat16.

    python benchmarks/int8_error.py [--checkpoint=DIR] [--rows=4 --length=512] [--json=FILE]
    python benchmarks/int8_error.py --size=120M

Without --checkpoint, weights are random: those of the tests' tiny model, or of 120M parameters.
Every model is compared with the float32 model, on random tokens. The table has |error| of the next
tokens' log-probabilities, the divergence KL(float32 || model) at each position, how often both
models have the same likeliest token, and the bytes of all parameters. The largest errors are those
of near-ties in a router: rounding decides them otherwise, and sends a token to another expert
(`docs/log.md`).
"""

import dataclasses
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import m1_jax
from m1_jax import params as params_lib
from m1_jax import quantize
from m1_jax.checkpoints import save as save_lib

TINY = pathlib.Path(__file__).parents[1] / "tests" / "data" / "m1-tiny"
# (name, dtype of the computation, recipe of quantization)
MODELS = (
    ("bfloat16", jnp.bfloat16, None),
    *((weights, jnp.float32, weights) for weights in quantize.INT8_RECIPES),
    *((f"{weights}, bfloat16", jnp.bfloat16, weights) for weights in quantize.INT8_RECIPES),
)


def config_120m() -> m1_jax.ModelConfig:
    """Return the model of `model_vs_transformers.py`: M1's ratios at 120M parameters."""
    return dataclasses.replace(
        m1_jax.ModelConfig.m1(),
        vocab_size=8192,
        hidden_size=512,
        layer_types=("lightning",) * 7 + ("softmax",),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=32,
        intermediate_size=1024,
        num_local_experts=8,
        max_position_embeddings=4096,
        initializer_range=512**-0.5,  # the default would leave the logits to the embedding
    )


def random_checkpoint(directory: pathlib.Path) -> pathlib.Path:
    model = params_lib.random_model(config_120m(), jax.random.key(0), jnp.float32)
    return save_lib.save(model, directory / "random")


def log_probs(model, tokens) -> np.ndarray:
    """Return log-probabilities [B, T - 1, V] of the tokens that follow each token but the last."""
    # One row at a time, which bounds the memory of the logits.
    return np.concatenate([jax.nn.log_softmax(model(row[None])[:, :-1]) for row in tokens])


def compare_log_probs(name: str, log_p: np.ndarray, expected: np.ndarray, tokens, model) -> dict:
    """Return the record of one model; `expected` is the float32 model's log-probabilities."""
    next_tokens = np.asarray(tokens)[:, 1:, None]
    error = np.abs(np.take_along_axis(log_p - expected, next_tokens, axis=-1))
    divergence = np.sum(np.exp(expected) * (expected - log_p), axis=-1)
    return {
        "weights": name,
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "same_top": float(np.mean(log_p.argmax(-1) == expected.argmax(-1))),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model)),
    }


def run(path: pathlib.Path, rows: int, length: int) -> list[dict]:
    """Return one record a model, the float32 model's first. One model is loaded at a time."""
    model = m1_jax.load(path)
    drawn = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    tokens = jnp.asarray(drawn, jnp.int32)
    expected = log_probs(model, tokens)
    records = [compare_log_probs("float32", expected, expected, tokens, model)]
    for name, dtype, weights in MODELS:
        del model  # before the next is loaded
        model = m1_jax.load(path, dtype, weights=weights)
        records.append(compare_log_probs(name, log_probs(model, tokens), expected, tokens, model))
    return records


def format_table(records: list[dict]) -> str:
    lines = [
        "| weights | mean error | max error | mean KL | max KL | same top token | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['weights']} | {r['mean_error']:.4f} | {r['max_error']:.3f} "
            f"| {r['mean_kl']:.2e} | {r['max_kl']:.2e} | {r['same_top']:.1%} "
            f"| {r['parameter_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)  # Orbax logs every step at INFO
    arguments = flags.FLAGS
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(arguments.checkpoint or TINY)
        if arguments.size == "120M":
            path = random_checkpoint(pathlib.Path(directory))
        records = run(path, arguments.rows, arguments.length)
    print(format_table(records))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(records, indent=1) + "\n")


def cli() -> None:
    flags.DEFINE_string("checkpoint", "", "release or converted directory. Empty: the tests' model")
    flags.DEFINE_enum("size", "tiny", ["tiny", "120M"], "random weights instead of a checkpoint")
    flags.DEFINE_integer("rows", 4, "rows of random tokens", lower_bound=1)
    flags.DEFINE_integer("length", 512, "tokens a row", lower_bound=2)
    flags.DEFINE_string("json", "", "file for the numbers")
    app.run(main)


if __name__ == "__main__":
    cli()
