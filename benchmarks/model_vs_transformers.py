"""Times this model against transformers' `MiniMaxForCausalLM`: same weights, same CPU, one run.

    python benchmarks/model_vs_transformers.py [--json=FILE] [--repeats=7] [--size=tiny]

Both sides compute in float32 with all cores. They are timed in turn (ours, theirs, ours, theirs)
and the ratio is that of the fastest calls (a virtual machine only ever adds time, at times
threefold), for transformers of whichever of its expert implementations was fastest; medians stand
beside them. `matmuls` is the time of nothing but the model's matmuls in torch, at the shapes of
perfectly balanced experts: no float32 implementation on this machine can be much faster.
Compilation and first calls are not timed, nor calls that were disturbed (`side_by_side.py`). Before
any timing, both must give the same numbers.

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
import numpy as np
import side_by_side
import torch
from absl import app, flags

from train import optim, step
from train.data import batch as batch_lib

_SIZE = flags.DEFINE_enum("size", "full", ["full", "tiny"], "120M parameters, or a quick try.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed calls of each side per case.", lower_bound=1)
_CASES = flags.DEFINE_list("cases", [], "Names of the cases to run; all if empty.")
_PATIENCE = flags.DEFINE_float("patience_secs", 120, "Longest wait per case for a quiet machine.")
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers as JSON.")

_TOLERANCES = {
    # Absolute. Logits have a standard deviation near 1 and pass 8 layers of float32 reductions in
    # another order (1e-6 each); transformers also has a layer factor off by up to 1e-5 relative.
    "logits": 2e-4,
    "decoded logits": 2e-4,
    # Relative: sums over many of the above.
    "loss": 1e-5,
    "gradient norm": 1e-3,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and the lengths it is timed at."""

    model: dict
    prefill_tokens: int
    prompt_tokens: int
    decode_tokens: int
    train_shape: tuple[int, int]
    check_tokens: int


_MODELS = side_by_side.MODELS
_SIZES = {
    "full": Size(
        side_by_side.MODELS["full"], 2048, 128, 64, train_shape=(4, 512), check_tokens=300
    ),
    "tiny": Size(side_by_side.MODELS["tiny"], 128, 16, 8, train_shape=(2, 64), check_tokens=40),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement. Both sides take no argument and return the seconds they timed.

    tokens: processed per timed call, for tokens per second.
    matmuls: (rows, in, out, how often) of every weight matmul in a call; empty for decoding, which
      reads weights rather than computes.
    experts: implementations of transformers' experts to choose from.
    target: the ratio of speeds that we promise.
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
    state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # The call consumes it.
    return side_by_side.clock(lambda: _decode_greedily(model, token, state, num_steps))


@torch.no_grad()
def _their_decode_secs(model, token, cache, num_steps):
    cache = copy.deepcopy(cache)  # The call extends it.
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


def _make_our_step(ours, tokens):
    """Return a call that makes one step of `train.step` on its own copy of the model."""
    settings = step.TrainStepSettings(optim.AdamW(1e-6), balance_coefficient=0.0)
    held = [step.init_state(jax.tree.map(jnp.copy, ours), settings.optimizer)]
    ones = jnp.ones_like(tokens)
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    targets = jnp.roll(tokens, -1, axis=1)
    weights = jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0.0)
    batch = batch_lib.TrainBatch(tokens, ones, places, targets, weights)

    def call():
        state, metrics = step.train_step(held.pop(), batch, settings=settings)
        held.append(state)
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

        def one():
            optimizer.zero_grad(set_to_none=True)
            model(tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return side_by_side.clock(one)

    return call


def _check_differences(ours, theirs, size: Size) -> dict[str, float]:
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
        expected = theirs(on_torch, use_cache=False).logits.numpy()
    differences = {"logits": float(np.max(np.abs(ours(on_jax) - expected)))}

    start = size.check_tokens - 8
    logits, state = _prefill_prompt(ours, on_jax[:, :start], max_length=size.check_tokens)
    steps = [logits]
    for i in range(start, size.check_tokens):
        logits, state = ours.extend(on_jax[:, i : i + 1], state)
        steps.append(logits)
    decoded = np.concatenate(steps, axis=1)
    differences["decoded logits"] = float(np.max(np.abs(decoded - expected[:, start - 1 :])))

    loss, gradients = _loss_and_gradients(ours, on_jax)
    norm = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradients)))
    expected_loss = theirs(on_torch, labels=on_torch, use_cache=False).loss
    expected_loss.backward()
    their_norm = np.sqrt(sum(float(p.grad.square().sum()) for p in theirs.parameters()))
    theirs.zero_grad(set_to_none=True)
    differences["loss"] = abs(float(loss) / expected_loss.item() - 1)
    differences["gradient norm"] = abs(norm / their_norm - 1)

    for name, tolerance in _TOLERANCES.items():
        if not (got := differences[name]) <= tolerance:
            raise RuntimeError(
                f"{name}: got a difference of {got:.1e}, want at most {tolerance}. "
                "The sides compute different models, so their times cannot be compared."
            )
    return differences


def _count_matmuls(size: Size, tokens: int, head_tokens: int, passes: int = 1):
    """Return `FuzzCase.matmuls` of `passes` as costly as a forward pass: 3 with gradients."""
    m = size.model
    hidden, ffn, heads = m["hidden_size"], m["intermediate_size"], m["num_attention_heads"]
    width = heads * m["head_dim"]
    softmax = m["layer_types"].count("full_attention")
    lightning = len(m["layer_types"]) - softmax
    kv = 2 * m["num_key_value_heads"] * m["head_dim"]
    experts = m["num_local_experts"]
    rows = tokens * m["num_experts_per_tok"] // experts
    shapes = (
        (tokens, hidden, 3 * width, lightning),
        (tokens, hidden, width, lightning),  # The output gate.
        (tokens, hidden, width + kv, softmax),
        (tokens, width, hidden, lightning + softmax),
        (rows, hidden, ffn, 2 * experts * (lightning + softmax)),
        (rows, ffn, hidden, experts * (lightning + softmax)),
        (head_tokens, hidden, m["vocab_size"], 1),
    )
    return tuple((*shape, passes * count) for *shape, count in shapes)


@torch.no_grad()
def _matmul_secs(shapes, repeats: int) -> float:
    """Return the seconds of these matmuls alone: each shape's fastest call, times its count."""
    total = 0.0
    for rows, width, out, count in shapes:
        x, weight = torch.randn(rows, width), torch.randn(out, width)
        call = functools.partial(torch.nn.functional.linear, x, weight)
        call()
        total += count * min(side_by_side.clock(call) for _ in range(3 * repeats))
    return total


def _make_cases(ours, theirs, size: Size) -> list[Case]:
    rng = np.random.default_rng(2)

    def tokens(*shape):
        drawn = rng.integers(0, size.model["vocab_size"], shape)
        return jnp.asarray(drawn, jnp.int32), torch.from_numpy(drawn)

    # batched_mm copies the weights of each token's experts: right for one token, 13 GB for 1,024.
    many, one = ("eager", "grouped_mm"), ("eager", "grouped_mm", "batched_mm")
    length = size.prefill_tokens
    prefill_jax, prefill_torch = tokens(1, length)
    train_jax, train_torch = tokens(*size.train_shape)
    cases = [
        Case(
            "prefill-all-logits",
            length,
            _count_matmuls(size, length, length),
            lambda: side_by_side.clock(lambda: ours(prefill_jax)),
            lambda: _their_prefill_secs(theirs, prefill_torch, use_cache=False),
            many,
            1.2,
        ),
        Case(
            "prefill-last-logits-and-cache",
            length,
            _count_matmuls(size, length, 1),
            lambda: side_by_side.clock(
                lambda: _prefill_prompt(ours, prefill_jax, max_length=length)
            ),
            lambda: _their_prefill_secs(theirs, prefill_torch, use_cache=True, logits_to_keep=1),
            many,
            1.2,
        ),
    ]
    for batch in (1, 8):
        prompt_jax, prompt_torch = tokens(batch, size.prompt_tokens)
        steps = size.decode_tokens
        _, state = _prefill_prompt(ours, prompt_jax, max_length=size.prompt_tokens + steps)
        with torch.no_grad():
            cache = theirs(prompt_torch, use_cache=True).past_key_values
        token_jax, token_torch = tokens(batch, 1)
        cases.append(
            Case(
                f"decode-batch-{batch}",
                batch * steps,
                (),
                functools.partial(_our_decode_secs, ours, token_jax, state, steps),
                functools.partial(_their_decode_secs, theirs, token_torch, cache, steps),
                one if batch == 1 else many,
                2.0,
            )
        )
    cases.append(
        Case(
            "forward-and-backward",
            train_torch.numel(),
            _count_matmuls(size, train_torch.numel(), train_torch.numel(), passes=3),
            lambda: side_by_side.clock(lambda: _loss_and_gradients(ours, train_jax)),
            lambda: _their_train_secs(theirs, train_torch),
            many,
            1.5,
        )
    )
    if "training-step" in _CASES.value or not _CASES.value:
        their_steps = _make_their_step(theirs, train_torch)
        cases.append(
            Case(
                "training-step",
                train_torch.numel(),
                _count_matmuls(size, train_torch.numel(), train_torch.numel(), passes=3),
                _make_our_step(ours, train_jax),
                lambda: their_steps(theirs.config._experts_implementation),
                many,
                1.5,
            )
        )
    return cases


def _measure_case(case: Case, theirs, repeats: int) -> dict:
    """Time all sides in turn."""

    def run(experts):
        theirs.set_experts_implementation(experts)
        return case.theirs()

    sides = {"ours": case.ours} | {name: functools.partial(run, name) for name in case.experts}
    secs, quiet_calls = side_by_side.measure(sides, repeats, _PATIENCE.value)
    least = {name: min(values) for name, values in secs.items()}
    best = min(case.experts, key=least.get)
    return {
        "case": case.name,
        "tokens": case.tokens,
        "median_secs": {name: statistics.median(values) for name, values in secs.items()},
        "min_secs": least,
        "matmul_secs": _matmul_secs(case.matmuls, repeats),
        "theirs": best,
        "ratio": least[best] / least["ours"],
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
    ours, theirs = side_by_side.build(size.model)
    cases = _make_cases(ours, theirs, size)
    if unknown := sorted(set(_CASES.value) - {case.name for case in cases}):
        raise app.UsageError(f"got cases {unknown}, want some of {[case.name for case in cases]}")
    machine = side_by_side.machine(theirs)
    print(*(f"{key} {value}" for key, value in machine.items()), sep=", ")
    differences = _check_differences(ours, theirs, size)
    print("largest differences:", *(f"{k} {v:.1e}" for k, v in differences.items()))
    columns = f"{'median s':>8} {'min s':>8} {'tokens/s':>9}"
    print(f"{'':<29} {'ours':<27} {'transformers':<27}")
    print(f"{'case':<29} {columns} {columns} matmuls  {'experts':<10} {'ratio':>5} {'target':>6}")
    rows = []
    for case in cases:
        if not _CASES.value or case.name in _CASES.value:
            rows.append(_measure_case(case, theirs, _REPEATS.value))
            _print_row(rows[-1])
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(
                {"machine": machine, "differences": differences, "rows": rows}, file, indent=2
            )


if __name__ == "__main__":
    app.run(main)
