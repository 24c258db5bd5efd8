"""Command: recompute a golden file's numbers from a checkpoint and compare.

    python -m m1_jax.verify --checkpoint=DIR --golden=FILE.npz

Prints one row per quantity. The exit status is 0 if all are within tolerance, else 1.

A golden file holds what the release's own code computed for some tokens, in float32. Its keys:
    input_ids [B, T]             the tokens; the only key that must be there
    logits, logits_positions     [B, P, V] and the P positions of all T
    next_token_logprobs          [B, T - 1]
    aux_loss                     the load-balancing loss of all layers and tokens
    hidden_norms [L + 1]         mean norm of the embeddings, of each layer's output but the last's,
                                 and of the final norm's output
    lightning_state, lightning_layer         [B, N, H, H] of that layer after all tokens
    softmax_k_last4, softmax_v_last4, softmax_layer    [B, 4, K, H], rotated, of that layer
    decode_logits, decode_start  [B, S, V], one token at a time from that position on
    greedy_tokens [B, S]         the most likely tokens after the first `GREEDY_PROMPT_TOKENS`
    loss                         of the first `LOSS_TOKENS`: cross-entropy and the balance loss
    grad/NAME                    its gradient for the release's tensor NAME
What belongs to keys that are absent is not compared.
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
from jax.typing import ArrayLike

from m1_jax import config as config_lib
from m1_jax import input_checks, logprobs, moe
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from m1_jax.checkpoints import load as load_lib
from m1_jax.checkpoints import params_map

# For float32 sums in another order than the release's, over the eight layers of the tests' fixture;
# `testing.TOLERANCES` has the reasons.
ABSOLUTE_TOLERANCE, STATE_TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 1e-4, 1e-3
LOSS_TOKENS = 320
GREEDY_PROMPT_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """What to compare with what."""

    checkpoint: str  # a directory that `m1_jax.load` reads
    golden: str  # an .npz file
    progress: bool = True  # whether to show a bar


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One compared quantity."""

    name: str
    difference: float  # in the unit of `measure`
    tolerance: float  # the largest difference that passes
    measure: str  # such as "max absolute" or "relative L2"

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)  # NaN fails


class GoldenFile:
    """The file's arrays, checked to fit the model."""

    def __init__(self, path: str, config: config_lib.ModelConfig):
        self.path = path
        try:
            # np.load would take bare arrays and pickles, too.
            zipfile.ZipFile(path).close()
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
        input_checks.check_token_ids(ids, config.vocab_size)
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
        # Each comparison compiles programs of its own, which takes most of the time.
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


def _compare_absolute(
    name: str, got: ArrayLike, wanted: np.ndarray, tolerance: float = ABSOLUTE_TOLERANCE
) -> ComparisonRow:
    _check_shapes(name, got, wanted)
    difference = float(np.max(np.abs(np.asarray(got) - wanted)))
    return ComparisonRow(name, difference, tolerance, "max absolute")


def _compare_relative(
    name: str, got: ArrayLike, wanted: np.ndarray, tolerance: float
) -> ComparisonRow:
    _check_shapes(name, got, wanted)
    error = np.linalg.norm((np.asarray(got) - wanted).astype(np.float64))
    size = np.linalg.norm(np.asarray(wanted, np.float64))
    return ComparisonRow(name, float(error / max(size, 1e-30)), tolerance, "relative L2")


def _check_shapes(name: str, got: ArrayLike, wanted: np.ndarray) -> None:
    if np.shape(got) != np.shape(wanted):
        raise ValueError(
            f"golden {name} has shape {np.shape(wanted)}; the model gives {np.shape(got)}. "
            "Was the file made with this model?"
        )


def _compare_forward(model: model_lib.MiniMaxM1, golden: GoldenFile) -> Iterator[ComparisonRow]:
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


def _init_empty_state(model: model_lib.MiniMaxM1, golden: GoldenFile) -> state_lib.DecodeState:
    """Return an empty state, of one capacity for all comparisons: they share compiled steps."""
    return model.init_state(*golden.tokens.shape)


def _compare_state(model: model_lib.MiniMaxM1, golden: GoldenFile) -> Iterator[ComparisonRow]:
    if "lightning_state" not in golden and "softmax_k_last4" not in golden:
        return
    _, state = model.extend(golden.tokens, _init_empty_state(model, golden))
    if "lightning_state" in golden:
        group, *index = _find_stack_index(
            model.config, golden, "lightning_layer", config_lib.LIGHTNING
        )
        states = state.layers[group]
        assert isinstance(states, jax.Array)  # of lightning layers: [R, layers, B, N, H, H]
        got = states[tuple(index)]
        yield _compare_relative("lightning_state", got, golden["lightning_state"], STATE_TOLERANCE)
    if "softmax_k_last4" in golden:
        group, *index = _find_stack_index(model.config, golden, "softmax_layer", config_lib.SOFTMAX)
        cache = state.layers[group]
        assert isinstance(cache, state_lib.KVCache)
        for name, buffer in (("softmax_k_last4", cache.keys), ("softmax_v_last4", cache.values)):
            # The cache is [B, K, T, H], and the file [B, T, K, H].
            last = jnp.moveaxis(buffer[tuple(index)][:, :, -4:], 1, 2)
            yield _compare_absolute(name, last, golden[name])


def _find_stack_index(
    config: config_lib.ModelConfig, golden: GoldenFile, key: str, kind: str
) -> tuple[int, int, int]:
    """Return where the golden file's layer lies; see `ModelConfig.stack_index_of`."""
    layer = int(golden[key])
    if not 0 <= layer < config.num_hidden_layers or config.layer_types[layer] != kind:
        raise ValueError(
            f"golden {key} is {layer}; wanted a {kind} layer of this model. "
            "Was the file made with this model?"
        )
    return config.stack_index_of(layer)


def _compare_decode(model: model_lib.MiniMaxM1, golden: GoldenFile) -> Iterator[ComparisonRow]:
    if "decode_logits" not in golden:
        return
    start, wanted = int(golden["decode_start"]), golden["decode_logits"]
    state = _init_empty_state(model, golden)
    _, state = model.extend(golden.tokens[:, :start], state, last_only=True)
    steps = []
    for position in range(start, start + wanted.shape[1]):
        logits, state = model.extend(golden.tokens[:, position : position + 1], state)
        steps.append(logits)
    got = jnp.concatenate(steps, axis=1)
    yield _compare_absolute("decode_logits", got, wanted)
    # The same tokens in one pass, as in training: decoding must not differ from it.
    full = model(golden.tokens[:, : start + wanted.shape[1]])[:, start:]
    yield _compare_absolute("decode against full pass", got, np.asarray(full))


def _compare_greedy(model: model_lib.MiniMaxM1, golden: GoldenFile) -> Iterator[ComparisonRow]:
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


def _compare_gradients(model: model_lib.MiniMaxM1, golden: GoldenFile) -> Iterator[ComparisonRow]:
    wanted = {key[5:]: value for key, value in golden.arrays.items() if key.startswith("grad/")}
    if "loss" not in golden and not wanted:
        return
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model.config)}
    if unknown := sorted(wanted.keys() - entries.keys()):
        raise ValueError(f"golden grad/{unknown[0]}: the model has no such tensor")

    # The model is a pytree of parameters, so its gradient is a model of gradients.
    @jax.jit
    @jax.value_and_grad
    def training_loss(model, tokens):
        hidden, stats = model.hidden(tokens)
        logp = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:])
        coefficient = model.config.router_aux_loss_coef
        return -jnp.mean(logp) + coefficient * moe.balance_loss(stats)

    loss, grads = training_loss(model, golden.tokens[:, :LOSS_TOKENS])
    if "loss" in golden:
        yield _compare_absolute("loss", loss, golden["loss"])
    grads = params_lib.params_by_path(grads)
    for name, tensor in sorted(wanted.items()):
        entry = entries[name]
        got = entry.orient(np.asarray(grads[entry.param_path][...][entry.index]))
        yield _compare_relative(f"grad {name}", got, tensor, GRADIENT_TOLERANCE)


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
