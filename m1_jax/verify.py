"""Command: recompute a golden file's numbers from a checkpoint and compare.

    python -m m1_jax.verify --checkpoint=DIR --golden=FILE.npz

Prints one row per quantity; the exit status is 0 if all are within tolerance, else 1. The file's
keys are those that `golden/README.md` of the fixture lists; keys that are absent are left out.
"""

import dataclasses
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import app, flags, logging

from m1_jax import config as config_lib
from m1_jax import logprobs, moe
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import params_map

# Float32 sums in another order than the release's, over eight layers: see the fixture's README.
ABSOLUTE_TOLERANCE, STATE_TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 1e-4, 1e-3
LOSS_TOKENS = 320  # the fixture's loss covers the first 320 positions
GREEDY_PROMPT_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """checkpoint: directory that `m1_jax.load` reads. golden: .npz file. progress: show a bar."""

    checkpoint: str
    golden: str
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One compared quantity. `difference` is absolute or relative, as `measure` says."""

    name: str
    difference: float
    tolerance: float
    measure: str

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)  # NaN fails


class GoldenFile:
    """The file's arrays, checked to fit the model."""

    def __init__(self, path: str, config: config_lib.ModelConfig):
        self.path = path
        try:
            zipfile.ZipFile(path).close()  # np.load would take bare arrays and pickles, too
            with np.load(path) as file:
                self.arrays = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"{path} is not a readable .npz file: {error}. Make or download it again."
            ) from None
        ids = self["input_ids"]
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{path}: input_ids has shape {ids.shape} and dtype {ids.dtype}; wanted integers "
                "[B, T]"
            )
        model_lib.check_token_ids(ids, config.vocab_size)
        self.tokens = jnp.asarray(ids, jnp.int32)

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self.arrays:
            raise ValueError(
                f"{self.path}: {key} is missing; it has {', '.join(sorted(self.arrays)[:8])}... "
                "Is it a golden file?"
            )
        return self.arrays[key]


def run(config: VerifyConfig) -> list[ComparisonRow]:
    """Return a row per quantity of the golden file, computed in float32."""
    model = load_lib.load(pathlib.Path(config.checkpoint), jnp.float32)
    golden = GoldenFile(config.golden, model.config)
    rows = []
    # TPUs would otherwise multiply float32 in bfloat16.
    with jax.default_matmul_precision("highest"):
        # Each compiles programs of its own, which is where the time goes.
        comparisons = (
            _compare_forward,
            _compare_state,
            _compare_decode,
            _compare_greedy,
            _compare_gradients,
        )
        for compare in tqdm.tqdm(comparisons, "verify", disable=not config.progress):
            rows.extend(compare(model, golden))
    if not rows:
        raise ValueError(f"{config.golden} holds nothing to compare")
    return rows


def _compare_absolute(name, got, wanted, tolerance=ABSOLUTE_TOLERANCE) -> ComparisonRow:
    _check_shapes(name, got, wanted)
    return ComparisonRow(
        name, float(np.max(np.abs(np.asarray(got) - wanted))), tolerance, "max absolute"
    )


def _compare_relative(name, got, wanted, tolerance) -> ComparisonRow:
    _check_shapes(name, got, wanted)
    error = np.linalg.norm((np.asarray(got) - wanted).astype(np.float64))
    size = np.linalg.norm(np.asarray(wanted, np.float64))
    return ComparisonRow(name, float(error / max(size, 1e-30)), tolerance, "relative L2")


def _check_shapes(name, got, wanted) -> None:
    if np.shape(got) != np.shape(wanted):
        raise ValueError(
            f"golden {name} has shape {np.shape(wanted)}; the model gives {np.shape(got)}. "
            "Was the file made with this model?"
        )


def _compare_forward(model, golden) -> Iterator[ComparisonRow]:
    tokens = golden.tokens
    if "logits" in golden:
        logits = model(tokens)[:, golden["logits_positions"]]
        yield _compare_absolute("logits", logits, golden["logits"])
    hidden, stats, outputs = jax.jit(model_lib.MiniMaxM1.trace)(model, tokens)
    if "next_token_logprobs" in golden:
        got = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:])
        yield _compare_absolute("next_token_logprobs", got, golden["next_token_logprobs"])
    if "aux_loss" in golden:
        yield _compare_absolute("aux_loss", moe.balance_loss(stats), golden["aux_loss"])
    if "hidden_norms" in golden:
        seen = [model.embed(tokens, model.dtype), *outputs[:-1], hidden]
        norms = jnp.stack([jnp.mean(jnp.linalg.norm(x, axis=-1)) for x in seen])
        yield _compare_relative("hidden_norms", norms, golden["hidden_norms"], STATE_TOLERANCE)


def _init_empty_state(model, golden):
    """One capacity for all, so that they share their compiled steps."""
    return model.init_state(*golden.tokens.shape)


def _compare_state(model, golden) -> Iterator[ComparisonRow]:
    if "lightning_state" not in golden and "softmax_k_last4" not in golden:
        return
    _, state = model.extend(golden.tokens, _init_empty_state(model, golden))
    if "lightning_state" in golden:
        run, *place = _find_stack_index(
            model.config, golden, "lightning_layer", config_lib.LIGHTNING
        )
        got = state.layers[run][tuple(place)]
        yield _compare_relative("lightning_state", got, golden["lightning_state"], STATE_TOLERANCE)
    if "softmax_k_last4" in golden:
        run, *place = _find_stack_index(model.config, golden, "softmax_layer", config_lib.SOFTMAX)
        cache = state.layers[run]
        for name, buffer in (("softmax_k_last4", cache.keys), ("softmax_v_last4", cache.values)):
            last = jnp.moveaxis(buffer[tuple(place)][:, :, -4:], 1, 2)
            yield _compare_absolute(name, last, golden[name])


def _find_stack_index(config, golden, key: str, kind: str) -> tuple[int, int, int]:
    """Return where the golden file's layer lies; see `ModelConfig.stack_index_of`."""
    layer = int(golden[key])
    if not 0 <= layer < config.num_hidden_layers or config.layer_types[layer] != kind:
        raise ValueError(
            f"golden {key} is {layer}; wanted a {kind} layer of this model. "
            "Was the file made with this model?"
        )
    return config.stack_index_of(layer)


def _compare_decode(model, golden) -> Iterator[ComparisonRow]:
    if "decode_logits" not in golden:
        return
    start, wanted = int(golden["decode_start"]), golden["decode_logits"]
    state = _init_empty_state(model, golden)
    _, state = model.extend(golden.tokens[:, :start], state, last_only=True)
    steps = []
    for place in range(start, start + wanted.shape[1]):
        logits, state = model.extend(golden.tokens[:, place : place + 1], state)
        steps.append(logits)
    got = jnp.concatenate(steps, axis=1)
    yield _compare_absolute("decode_logits", got, wanted)
    # The same tokens in one pass: what training would have seen.
    full = model(golden.tokens[:, : start + wanted.shape[1]])[:, start:]
    yield _compare_absolute("decode against full pass", got, np.asarray(full))


def _compare_greedy(model, golden) -> Iterator[ComparisonRow]:
    if "greedy_tokens" not in golden:
        return
    wanted = golden["greedy_tokens"]
    state = _init_empty_state(model, golden)
    logits, state = model.extend(golden.tokens[:, :GREEDY_PROMPT_TOKENS], state, last_only=True)
    tokens = []
    for _ in range(wanted.shape[1]):
        tokens.append(jnp.argmax(logits[:, -1:], axis=-1))
        logits, state = model.extend(tokens[-1], state)
    got = np.asarray(jnp.concatenate(tokens, axis=1))
    _check_shapes("greedy_tokens", got, wanted)
    yield ComparisonRow("greedy_tokens", float(np.sum(got != wanted)), 0.0, "tokens that differ")


def _compare_gradients(model, golden) -> Iterator[ComparisonRow]:
    wanted = {key[5:]: value for key, value in golden.arrays.items() if key.startswith("grad/")}
    if "loss" not in golden and not wanted:
        return
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model.config)}
    if unknown := sorted(wanted.keys() - entries.keys()):
        raise ValueError(f"golden grad/{unknown[0]}: the model has no such tensor")

    @jax.jit
    @jax.value_and_grad
    def loss(model, tokens):
        hidden, stats = model.hidden(tokens)
        logp = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:])
        coefficient = model.config.router_aux_loss_coef
        return -jnp.mean(logp) + coefficient * moe.balance_loss(stats)

    value, grads = loss(model, golden.tokens[:, :LOSS_TOKENS])
    if "loss" in golden:
        yield _compare_absolute("loss", value, golden["loss"])
    grads = params_lib.params_by_path(grads)
    for name, tensor in sorted(wanted.items()):
        got = np.asarray(grads[entries[name].param_path][...][entries[name].index])
        yield _compare_relative(
            f"grad {name}", got.T if entries[name].transposed else got, tensor, GRADIENT_TOLERANCE
        )


def format_table(rows: list[ComparisonRow]) -> str:
    """Return the rows as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'quantity':{width}}  difference  tolerance  measure"]
    for row in rows:
        mark = "ok" if row.passed else "FAILED"
        lines.append(
            f"{row.name:{width}}  {row.difference:10.2e}  {row.tolerance:9.0e}  "
            f"{row.measure:18}  {mark}"
        )
    return "\n".join(lines)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.ERROR)
    try:
        rows = run(VerifyConfig(flags.FLAGS.checkpoint, flags.FLAGS.golden, flags.FLAGS.progress))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(format_table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} within tolerance")
    sys.exit(1 if failed else 0)


def _define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Directory of the checkpoint.", required=True)
    flags.DEFINE_string("golden", None, "The .npz file to compare with.", required=True)
    flags.DEFINE_bool("progress", True, "Show a progress bar.")


def cli() -> None:
    _define_flags()
    app.run(main)


if __name__ == "__main__":
    cli()
