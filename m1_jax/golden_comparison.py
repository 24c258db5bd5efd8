"""Comparing a model with a golden file, quantity by quantity: what m1-verify prints.

All is computed in float32, whatever the dtype of the parameters.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from m1_jax import config as config_lib
from m1_jax import golden_file as golden_lib
from m1_jax import logprobs, moe, progress_bar
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import state as state_lib
from m1_jax.checkpoints import params_map

# The differences of float32 sums in another order than the release's, over the eight layers of the
# tests' fixture. `testing.TOLERANCES` has the reasons.
ABSOLUTE_TOLERANCE, STATE_TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 1e-4, 1e-3
# Fixed by the program that made the golden files, which do not state them.
LOSS_TOKENS = 320
GREEDY_PROMPT_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One compared quantity."""

    name: str  # of the quantity, such as "logits"
    difference: float  # between model and golden file, in the unit of `measure`, or NaN
    tolerance: float  # the largest difference that passes, in the same unit
    measure: str  # such as "max absolute" or "relative L2"

    @property
    def passed(self) -> bool:
        return bool(self.difference <= self.tolerance)  # NaN fails


def compare_golden(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile, shows_progress: bool = False
) -> list[ComparisonRow]:
    """Return a row per quantity of the golden file.

    Args:
      model: a float32 model, on the layout of `golden`.

    Raises:
      ValueError: a golden file of another model, or with nothing to compare.
    """
    rows = []
    # By default TPUs multiply float32 numbers in bfloat16.
    with jax.default_matmul_precision("highest"):
        for compare in progress_bar.iterate_with_bar(
            "verify", _COMPARISONS, "pass", shows_progress
        ):
            # A comparison is a generator, so its work is done here, under the precision above.
            rows.extend(compare(model, golden))
    # No row would count as success.
    if not rows:
        raise ValueError(f"{golden.path}: got nothing to compare; wanted a key beside input_ids")
    return rows


def _compare_absolute(
    name: str, actual: ArrayLike, expected: np.ndarray, tolerance: float = ABSOLUTE_TOLERANCE
) -> ComparisonRow:
    _check_shapes(name, actual, expected)
    difference = float(np.max(np.abs(golden_lib.fetch_array(actual) - expected)))
    return ComparisonRow(name, difference, tolerance, "max absolute")


def _compare_relative(
    name: str, actual: ArrayLike, expected: np.ndarray, tolerance: float
) -> ComparisonRow:
    _check_shapes(name, actual, expected)
    error = np.linalg.norm((golden_lib.fetch_array(actual) - expected).astype(np.float64))
    norm = np.linalg.norm(np.asarray(expected, np.float64))
    # The bound keeps zeros against zeros at 0, not NaN.
    return ComparisonRow(name, float(error / max(norm, 1e-30)), tolerance, "relative L2")


def _check_shapes(name: str, actual: ArrayLike, expected: np.ndarray) -> None:
    # Arrays of unequal shapes would be broadcast, and a difference computed all the same.
    if np.shape(actual) != np.shape(expected):
        raise ValueError(
            f"golden {name} has shape {np.shape(expected)}; the model gives {np.shape(actual)}. "
            "Was the file made with this model?"
        )


def _compare_forward(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> Iterator[ComparisonRow]:
    """Compare what one pass over all tokens gives: logits, router statistics, layer outputs."""
    tokens = golden.tokens
    if "logits" in golden:
        logits = model(tokens)[:, golden["logits_positions"]]
        yield _compare_absolute("logits", golden.own_rows(logits), golden["logits"])
    hidden, stats, outputs = jax.jit(model_lib.MiniMaxM1.trace)(model, tokens)
    if "next_token_logprobs" in golden:
        logp = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:]).logp
        expected = golden["next_token_logprobs"]
        yield _compare_absolute("next_token_logprobs", golden.own_rows(logp), expected)
    if "aux_loss" in golden:
        yield _compare_absolute("aux_loss", moe.balance_loss(stats), golden["aux_loss"])
    if "hidden_norms" in golden:
        # As transformers' hidden_states: the last layer's output is there after the final norm.
        activations = [model.embed(tokens, model.dtype), *outputs[:-1], hidden]
        norms = jnp.stack([jnp.mean(jnp.linalg.norm(x, axis=-1)) for x in activations])
        yield _compare_relative("hidden_norms", norms, golden["hidden_norms"], STATE_TOLERANCE)


def _init_empty_state(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> state_lib.DecodeState:
    """Return an empty state of one capacity, so that comparisons share their compiled steps."""
    return model.init_state(*golden.tokens.shape)


def _compare_state(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> Iterator[ComparisonRow]:
    """Compare the decode state that a pass over all tokens leaves in one layer of each kind."""
    if "lightning_state" not in golden and "softmax_k_last4" not in golden:
        return
    _, state = model.extend(golden.tokens, _init_empty_state(model, golden))
    if "lightning_state" in golden:
        location = _locate_golden_layer(
            model.config, golden, "lightning_layer", config_lib.LIGHTNING
        )
        states = state.group_states[location.group]
        assert isinstance(states, jax.Array)  # of lightning layers: [R, layers, B, N, H, H]
        layer_state = states[location.stack_index]
        yield _compare_relative(
            "lightning_state",
            golden.own_rows(layer_state),
            golden["lightning_state"],
            STATE_TOLERANCE,
        )
    if "softmax_k_last4" in golden:
        location = _locate_golden_layer(model.config, golden, "softmax_layer", config_lib.SOFTMAX)
        cache = state.group_states[location.group]
        assert isinstance(cache, state_lib.KVCache)  # buffers are [R, layers, B, K, T, H]
        for name, buffer in (("softmax_k_last4", cache.keys), ("softmax_v_last4", cache.values)):
            # The capacity is T, so the last four positions are the last four tokens. A layer's
            # cache is [B, K, T, H], and the file's array [B, 4, K, H].
            last = jnp.moveaxis(buffer[location.stack_index][:, :, -4:], 1, 2)
            yield _compare_absolute(name, golden.own_rows(last), golden[name])


def _locate_golden_layer(
    config: config_lib.ModelConfig, golden: golden_lib.GoldenFile, key: str, kind: str
) -> config_lib.LayerLocation:
    """Return where the golden file's layer lies, as `ModelConfig.locate_layer` does."""
    layer = int(golden[key])
    if not 0 <= layer < config.num_hidden_layers or config.layer_types[layer] != kind:
        raise ValueError(
            f"golden {key} is {layer}; wanted a {kind} layer of this model. "
            "Was the file made with this model?"
        )
    return config.locate_layer(layer)


def _compare_decode(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> Iterator[ComparisonRow]:
    """Compare the logits of the file's tokens, decoded one by one after a prompt in one pass."""
    if "decode_logits" not in golden:
        return
    start, expected = int(golden["decode_start"]), golden["decode_logits"]
    end = start + expected.shape[1]
    state = _init_empty_state(model, golden)
    _, state = model.extend(golden.tokens[:, :start], state, last_only=True)
    steps = []
    for position in range(start, end):
        logits, state = model.extend(golden.tokens[:, position : position + 1], state)
        steps.append(logits)
    decoded = golden.own_rows(jnp.concatenate(steps, axis=1))
    yield _compare_absolute("decode_logits", decoded, expected)
    # The same tokens in one pass, as in training: decoding must not differ from it.
    full = model(golden.tokens[:, :end])[:, start:]
    yield _compare_absolute("decode against full pass", decoded, golden.own_rows(full))


def _compare_greedy(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> Iterator[ComparisonRow]:
    """Compare a greedy continuation. One token that differs changes all tokens after it."""
    if "greedy_tokens" not in golden:
        return
    expected = golden["greedy_tokens"]
    state = _init_empty_state(model, golden)
    logits, state = model.extend(golden.tokens[:, :GREEDY_PROMPT_TOKENS], state, last_only=True)
    tokens = []
    for _ in range(expected.shape[1]):
        tokens.append(jnp.argmax(logits[:, -1:], axis=-1))
        logits, state = model.extend(tokens[-1], state)
    generated = golden.own_rows(jnp.concatenate(tokens, axis=1))
    _check_shapes("greedy_tokens", generated, expected)
    num_different = float(np.sum(generated != expected))
    yield ComparisonRow("greedy_tokens", num_different, 0.0, "tokens that differ")


def _compare_gradients(
    model: model_lib.MiniMaxM1, golden: golden_lib.GoldenFile
) -> Iterator[ComparisonRow]:
    """Compare the training loss and its gradients for the tensors that the file has."""
    tensors = {key[5:]: value for key, value in golden.arrays.items() if key.startswith("grad/")}
    if "loss" not in golden and not tensors:
        return
    entries = {entry.name: entry for entry in params_map.list_tensor_entries(model.config)}
    if unknown := sorted(tensors.keys() - entries.keys()):
        raise ValueError(
            f"golden grad/{unknown[0]}: the model has no such tensor. Was the file made with this "
            "model?"
        )

    # The model is a pytree, so its gradient is a model of gradients.
    @jax.jit
    @jax.value_and_grad
    def training_loss(model, tokens):
        hidden, stats = model.hidden(tokens)
        logp = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:]).logp
        coefficient = model.config.router_aux_loss_coef
        return -jnp.mean(logp) + coefficient * moe.balance_loss(stats)

    # A gradient has its parameter's dtype, and bfloat16 would round it by more than the tolerance.
    model = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    loss, grads = training_loss(model, golden.tokens[:, :LOSS_TOKENS])
    if "loss" in golden:
        yield _compare_absolute("loss", loss, golden["loss"])
    grads = params_lib.params_by_path(grads)
    for name, tensor in sorted(tensors.items()):
        entry = entries[name]
        # One tensor's part of the stacked gradient, transposed to the release's [out, in].
        grad = entry.orient(golden_lib.fetch_array(grads[entry.param_path][...][entry.index]))
        yield _compare_relative(f"grad {name}", grad, tensor, GRADIENT_TOLERANCE)


# Each comparison compiles programs of its own, which takes most of the time.
_COMPARISONS = (
    _compare_forward,
    _compare_state,
    _compare_decode,
    _compare_greedy,
    _compare_gradients,
)
