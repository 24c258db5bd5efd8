"""Times this model against transformers' `MiniMaxForCausalLM`: same weights, same CPU, one process.

    python benchmarks/model_vs_transformers.py [--json=FILE] [--repeats=7] [--size=tiny]

Both sides compute in float32 with all cores. They are called in turn (ours, theirs, ours, theirs),
and the ratio is that of the fastest calls: a virtual machine only ever adds time, at times
threefold. For transformers the fastest of its implementations of experts counts. Medians are
reported too. `matmuls` is the time of the model's matmuls alone in torch, at the shapes of
perfectly balanced experts: no float32 implementation on this machine can be much faster.
Compilation, first calls and disturbed calls (`side_by_side.py`) are not timed. Before any timing,
both sides must give the same numbers.

Needs the `parity` extra (torch, transformers).
"""

import copy
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import matmul_floor
import numpy as np
import side_by_side
import torch
from absl import app, flags

from train import optim, step
from train.data import batch as batch_lib

_SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "120M parameters, or a quick try.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each side per case.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to run. Empty: all.")
_PATIENCE = flags.DEFINE_float("patience_secs", 120, "Longest wait per case for a quiet machine.")
_JSON = flags.DEFINE_string("json", None, "File to write the numbers to, as JSON.")

_TOLERANCES = {
    # Absolute. Logits have a standard deviation near 1 and pass 8 layers of float32 reductions in
    # another order (1e-6 each); transformers also has a layer factor off by up to 1e-5 relative.
    "logits": 2e-4,
    "decoded logits": 2e-4,
    # Relative: sums over many of the above.
    "loss": 1e-5,
    "gradient norm": 1e-3,
}


# transformers' implementations of experts. batched_mm copies the weights of each token's experts:
# right for one token, 13 GB for 1,024.
_BATCH_EXPERTS = ("eager", "grouped_mm")
_SINGLE_EXPERTS = (*_BATCH_EXPERTS, "batched_mm")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the lengths at which it is timed."""

    model: dict  # fields of transformers' MiniMaxConfig
    prefill_tokens: int  # of the prompt whose prefill is timed
    prompt_tokens: int  # of a prompt before decoding
    decode_tokens: int  # tokens that are decoded after it
    train_shape: tuple[int, int]  # rows and tokens of a training batch
    check_tokens: int  # length at which numbers are compared


_MODELS = side_by_side.MODELS
_SIZES = {
    "full": Size(
        side_by_side.MODELS["full"], 2048, 128, 64, train_shape=(4, 512), check_tokens=300
    ),
    "tiny": Size(side_by_side.MODELS["tiny"], 128, 16, 8, train_shape=(2, 64), check_tokens=40),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
      name: as printed.
      tokens: processed in a timed call.
      matmuls: (rows, in, out, count) of every weight matmul in a call. Empty for decoding, whose
        time goes into reading weights.
      ours: a call of this model, which returns the seconds that it timed.
      theirs: the same of transformers.
      experts: implementations of transformers' experts to try.
      target: ratio of speeds to reach.
    """

    name: str
    tokens: int
    matmuls: tuple[tuple[int, int, int, int], ...]
    ours: Callable[[], float]
    theirs: Callable[[], float]
    experts: tuple[str, ...]
    target: float


@functools.partial(jax.jit, static_argnames="max_length")
def _prefill_prompt(model, tokens, max_length):
    """Return (logits [B, 1, V] of the last token, the state with the whole prompt)."""
    state = model.init_state(batch=tokens.shape[0], max_length=max_length)
    return model.extend(tokens, state, last_only=True)


@functools.partial(jax.jit, static_argnames="num_steps", donate_argnames="state")
def _decode_greedily(model, token, state, num_steps):
    """Continue greedily from `token` [B, 1]; return tokens [num_steps, B, 1] and the state."""

    def step(carry, _):
        token, state = carry
        logits, state = model.extend(token, state)
        token = jnp.argmax(logits, axis=-1).astype(token.dtype)
        return (token, state), token

    (_, state), tokens = jax.lax.scan(step, (token, state), length=num_steps)
    return tokens, state


@jax.jit
def _loss_and_gradients(model, tokens):
    def loss(model):
        logprobs = jax.nn.log_softmax(model(tokens)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))

    return jax.value_and_grad(loss)(model)


def _our_decode_secs(model, token, state, num_steps):
    state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # The call donates its state.
    return side_by_side.clock(lambda: _decode_greedily(model, token, state, num_steps))


@torch.no_grad()
def _their_decode_secs(model, token, cache, num_steps):
    cache = copy.deepcopy(cache)  # The call extends its cache.
    start = time.perf_counter()
    for _ in range(num_steps):
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits.argmax(-1)
    return time.perf_counter() - start


@torch.no_grad()
def _their_prefill_secs(model, tokens, **kwargs):
    return side_by_side.clock(lambda: model(tokens, **kwargs).logits.numpy())


def _their_train_secs(model, tokens):
    model.zero_grad(set_to_none=True)

    def call():
        model(tokens, labels=tokens, use_cache=False).loss.backward()

    return side_by_side.clock(call)


def _make_our_step(our_model, tokens):
    """Return a call that makes one step of `train.step` on its own copy of the model."""
    settings = step.TrainStepSettings(optim.AdamW(1e-6), balance_coefficient=0.0)
    # A list of one state: a step donates its state, and returns the next.
    states = [step.init_state(jax.tree.map(jnp.copy, our_model), settings.optimizer)]
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    batch = batch_lib.TrainBatch(tokens, ones, positions, targets, weights)

    def call():
        state, metrics = step.train_step(states.pop(), batch, settings=settings)
        states.append(state)
        return metrics, state.step

    return lambda: side_by_side.clock(call)


def _make_their_step(model, tokens: torch.Tensor):
    """Return a call that makes one step of a plain loop: backward, clip, fused AdamW."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-6, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True
    )

    def call(experts: str):
        model.set_experts_implementation(experts)

        def train_step():
            optimizer.zero_grad(set_to_none=True)
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return side_by_side.clock(train_step)

    return call


def _check_differences(our_model, hf_model, size: Size) -> dict[str, float]:
    """Compare logits of one pass and of decoding, loss and gradients.

    The sequences are short: every token is one more chance that rounding decides a near tie of
    the router, after which two correct implementations differ visibly.

    Raises:
      RuntimeError: a difference is above its tolerance.
    """
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, size.model["vocab_size"], (2, size.check_tokens))
    on_jax, on_torch = jnp.asarray(tokens, jnp.int32), torch.from_numpy(tokens)
    with torch.no_grad():
        expected = hf_model(on_torch, use_cache=False).logits.numpy()
    differences = {"logits": float(np.max(np.abs(our_model(on_jax) - expected)))}

    start = size.check_tokens - 8
    logits, state = _prefill_prompt(our_model, on_jax[:, :start], max_length=size.check_tokens)
    steps = [logits]
    for i in range(start, size.check_tokens):
        logits, state = our_model.extend(on_jax[:, i : i + 1], state)
        steps.append(logits)
    decoded = np.concatenate(steps, axis=1)
    differences["decoded logits"] = float(np.max(np.abs(decoded - expected[:, start - 1 :])))

    loss, gradients = _loss_and_gradients(our_model, on_jax)
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradients)))
    expected_loss = hf_model(on_torch, labels=on_torch, use_cache=False).loss
    expected_loss.backward()
    their_norm = np.sqrt(sum(float(p.grad.square().sum()) for p in hf_model.parameters()))
    hf_model.zero_grad(set_to_none=True)
    differences["loss"] = abs(float(loss) / expected_loss.item() - 1)
    differences["gradient norm"] = abs(norm / their_norm - 1)

    for name, tolerance in _TOLERANCES.items():
        if not (difference := differences[name]) <= tolerance:
            raise RuntimeError(
                f"{name}: got a difference of {difference:.1e}, want at most {tolerance}. "
                "The sides compute different models, so their times cannot be compared."
            )
    return differences


def _make_cases(our_model, hf_model, size: Size) -> list[Case]:
    rng = np.random.default_rng(2)

    def tokens(*shape):
        drawn = rng.integers(0, size.model["vocab_size"], shape)
        return jnp.asarray(drawn, jnp.int32), torch.from_numpy(drawn)

    prefill_tokens, train_tokens = tokens(1, size.prefill_tokens), tokens(*size.train_shape)
    return [
        *_prefill_cases(our_model, hf_model, size, *prefill_tokens),
        *(_decode_case(our_model, hf_model, size, batch, tokens) for batch in (1, 8)),
        *_train_cases(our_model, hf_model, size, *train_tokens),
    ]


def _prefill_cases(our_model, hf_model, size: Size, tokens_jax, tokens_torch) -> list[Case]:
    length = size.prefill_tokens
    return [
        Case(
            "prefill-all-logits",
            length,
            matmul_floor.count_matmuls(size.model, length, length),
            lambda: side_by_side.clock(lambda: our_model(tokens_jax)),
            lambda: _their_prefill_secs(hf_model, tokens_torch, use_cache=False),
            _BATCH_EXPERTS,
            1.2,
        ),
        Case(
            "prefill-last-logits-and-cache",
            length,
            matmul_floor.count_matmuls(size.model, length, 1),
            lambda: side_by_side.clock(
                lambda: _prefill_prompt(our_model, tokens_jax, max_length=length)
            ),
            lambda: _their_prefill_secs(hf_model, tokens_torch, use_cache=True, logits_to_keep=1),
            _BATCH_EXPERTS,
            1.2,
        ),
    ]


def _decode_case(our_model, hf_model, size: Size, batch: int, tokens) -> Case:
    prompt_jax, prompt_torch = tokens(batch, size.prompt_tokens)
    steps = size.decode_tokens
    _, state = _prefill_prompt(our_model, prompt_jax, max_length=size.prompt_tokens + steps)
    with torch.no_grad():
        cache = hf_model(prompt_torch, use_cache=True).past_key_values
    token_jax, token_torch = tokens(batch, 1)
    return Case(
        f"decode-batch-{batch}",
        batch * steps,
        (),
        functools.partial(_our_decode_secs, our_model, token_jax, state, steps),
        functools.partial(_their_decode_secs, hf_model, token_torch, cache, steps),
        _SINGLE_EXPERTS if batch == 1 else _BATCH_EXPERTS,
        2.0,
    )


def _train_cases(our_model, hf_model, size: Size, tokens_jax, tokens_torch) -> list[Case]:
    num_tokens = tokens_torch.numel()
    matmuls = matmul_floor.count_matmuls(size.model, num_tokens, num_tokens, passes=3)
    cases = [
        Case(
            "forward-and-backward",
            num_tokens,
            matmuls,
            lambda: side_by_side.clock(lambda: _loss_and_gradients(our_model, tokens_jax)),
            lambda: _their_train_secs(hf_model, tokens_torch),
            _BATCH_EXPERTS,
            1.5,
        )
    ]
    # Its copies of both models with their optimizers take memory, so only where it is timed.
    if "training-step" in _CASES.value or not _CASES.value:
        their_steps = _make_their_step(hf_model, tokens_torch)
        cases.append(
            Case(
                "training-step",
                num_tokens,
                matmuls,
                _make_our_step(our_model, tokens_jax),
                lambda: their_steps(hf_model.config._experts_implementation),
                _BATCH_EXPERTS,
                1.5,
            )
        )
    return cases


def _measure_case(case: Case, hf_model, repeats: int) -> dict:
    """Time all sides in turn."""

    def run(experts):
        hf_model.set_experts_implementation(experts)
        return case.theirs()

    sides = {"ours": case.ours} | {name: functools.partial(run, name) for name in case.experts}
    secs, quiet_calls = side_by_side.measure(sides, repeats, _PATIENCE.value)
    least = {name: min(values) for name, values in secs.items()}
    fastest = min(case.experts, key=least.get)
    return {
        "case": case.name,
        "tokens": case.tokens,
        "median_secs": {name: statistics.median(values) for name, values in secs.items()},
        "min_secs": least,
        "matmul_secs": matmul_floor.matmul_secs(case.matmuls, repeats),
        "theirs": fastest,
        "ratio": least[fastest] / least["ours"],
        "target": case.target,
        "quiet_calls": min(quiet_calls.values()),
        "quiet": min(quiet_calls.values()) == repeats,
    }


def _print_row(row: dict) -> None:
    cells = [f"{row['case']:<29}"]
    for name in ("ours", row["theirs"]):
        median, least = row["median_secs"][name], row["min_secs"][name]
        cells.append(f"{median:8.3f} {least:8.3f} {row['tokens'] / least:9,.0f}")
    cells.append(f"{row['matmul_secs'] or float('nan'):7.3f}")
    cells.append(f" {row['theirs']:<10} {row['ratio']:5.2f} {row['target']:6.1f}")
    print(*cells, "" if row["quiet"] else "BUSY MACHINE: do not quote", flush=True)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"got arguments {argv[1:]}, want flags only")
    side_by_side.start()
    size = _SIZES[_SIZE.value]
    our_model, hf_model = side_by_side.build(size.model)
    cases = _make_cases(our_model, hf_model, size)
    if unknown := sorted(set(_CASES.value) - {case.name for case in cases}):
        raise app.UsageError(f"got cases {unknown}, want some of {[case.name for case in cases]}")
    machine = side_by_side.machine(hf_model)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    differences = _check_differences(our_model, hf_model, size)
    print("largest differences:", *(f"{k} {v:.1e}" for k, v in differences.items()))
    columns = f"{'median s':>8} {'min s':>8} {'tokens/s':>9}"
    print(f"{'':<29} {'ours':<27} {'transformers':<27}")
    print(f"{'case':<29} {columns} {columns} matmuls  {'experts':<10} {'ratio':>5} {'target':>6}")
    rows = []
    for case in cases:
        if not _CASES.value or case.name in _CASES.value:
            rows.append(_measure_case(case, hf_model, _REPEATS.value))
            _print_row(rows[-1])
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(
                {"machine": machine, "differences": differences, "rows": rows}, file, indent=2
            )


if __name__ == "__main__":
    app.run(main)
