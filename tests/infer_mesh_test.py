"""The engine on meshes, and with guesses: the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from output_support import bits
from tokenizer_support import load_tokenizer
from turns_support import take_turns

import m1_jax
from infer import config as config_lib
from infer import engine, prompt_lookup
from infer import options as options_lib
from m1_jax import config as model_config
from m1_jax import expert_exchange, sharding

SIZES = {
    "max_length": 192,
    "max_rows": 4,
    "chunk_tokens": 16,
    "prefill_tokens": (64,),
    "num_snapshots": 6,
    "decode_steps": 8,
    "record_routes": True,
}
RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 300, 48).tolist()
PROMPTS = [BASE[: 40 + n] + RNG.integers(0, 300, 5 * n).tolist() + BASE[:n] for n in range(6)]


def options(number: int, **changes) -> options_lib.Options:
    temperature = (0.0, 0.05, 1.0)[number % 3]
    penalty = 1.2 if number == 3 else 1.0
    return options_lib.Options(
        temperature=temperature, repetition_penalty=penalty, seed=number, ignore_eos=True, **changes
    )


def make_engine(golden_dir, mesh=None, **sizes) -> engine.Engine:
    layout = None
    if mesh:
        devices = jax.devices()[: int(np.prod(list(mesh.values())))]
        read = model_config.ModelConfig.from_file(golden_dir / "config.json")
        layout = sharding.make_layout(sharding.make_mesh(mesh, devices), read, sharding.DECODE)
    model = m1_jax.load(golden_dir, dtype=jnp.float32, mesh=layout)
    return engine.Engine(model, load_tokenizer(), config_lib.EngineConfig(**SIZES | sizes))


@pytest.fixture(scope="module")
def plain(golden_dir):
    return make_engine(golden_dir)


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    take_turns(
        ({"expert": 4}, {"max_rows": 8}),
        # One row a partition, and guesses, so that every program has run on a mesh.
        ({"data": 2, "expert": 2, "tensor": 2}, {"draft_tokens": 7}),
        ids=["expert", "all"],
    ),
)
def test_a_mesh_serves_as_one_device_does(golden_dir, plain, mesh, sizes, monkeypatch):
    # Decoding brings all tokens to all experts then, and a prompt's rows travel to theirs.
    monkeypatch.setattr(expert_exchange, "MAX_GATHERED_TOKENS", 32)
    spread = make_engine(golden_dir, mesh, host_bytes=10**9, swap_tokens=1, **sizes)
    requests = [spread.submit(p, options(n, max_tokens=20)) for n, p in enumerate(PROMPTS)]
    for _ in range(5):
        spread.step()
    began_in = partitions_of(spread)
    assert len(set(began_in.values())) >= 3  # requests with a common prefix go together
    for request in requests[1::2]:
        spread.preempt(request)
    came_back_to = {}
    for _ in range(4):
        spread.step()
        came_back_to = partitions_of(spread) | came_back_to  # where each was seen first
    if "max_rows" in sizes:  # with one row a partition, each finds its old one free
        first = requests[1].sequence_id
        assert (began_in[first], came_back_to[first]) == (0, 3)
    spread.run()
    assert spread.stats().memory.swapped_in > 0
    for n, (prompt, request) in enumerate(zip(PROMPTS, requests, strict=True)):
        alone, single = (
            served.submit(prompt, options(n, max_tokens=20)) for served in (spread, plain)
        )
        spread.run()
        plain.run()
        assert bits(alone.output()) == bits(request.output())  # exact on one mesh, anywhere on it
        got, wanted = (np.asarray(bits(served.output())) for served in (alone, single))
        np.testing.assert_array_equal(got[:, 0], wanted[:, 0])
        # Sums over devices in float32: a few units of the last place of values near 6; logits
        # are divided by the temperature before a token is drawn.
        np.testing.assert_allclose(got[:, 2], wanted[:, 2], atol=1e-5)
        scale = options(n, max_tokens=20).temperature or 1.0
        np.testing.assert_allclose(got[:, 1], wanted[:, 1], atol=1e-5 / scale)
        np.testing.assert_array_equal(alone.routes, single.routes)
        np.testing.assert_array_equal(request.routes, single.routes)


def partitions_of(served: engine.Engine) -> dict:
    return {name: s.partition for name, s in served._scheduler._sequences.items() if s.slot}


def test_guesses_change_no_bit(golden_dir, plain):
    guessing = make_engine(golden_dir, draft_tokens=7)
    ran = []
    run = guessing._device.run_program
    guessing._device.run_program = lambda name, *arguments: (
        ran.append(name) or run(name, *arguments)
    )
    requests = [guessing.submit(p, options(n, max_tokens=100)) for n, p in enumerate(PROMPTS)]
    guessing.run()
    assert ran.count("verify") > 10
    num_tokens = sum(len(request.tokens) for request in requests)
    assert num_tokens == 100 * len(PROMPTS)
    for n, (prompt, request) in enumerate(zip(PROMPTS, requests, strict=True)):
        (wanted,) = plain.generate([prompt], options(n, max_tokens=100))
        assert bits(request.output()) == bits(wanted)


def test_a_guess_is_what_came_after_the_same_tokens_last():
    lookup = prompt_lookup.PromptLookup([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 2, 3])
    assert lookup.draft_tokens(2) == [6, 7]
    lookup.push(6)
    assert lookup.draft_tokens(5) == [7, 2, 3, 6]
    lookup.push(9)
    assert lookup.draft_tokens(5) == []
    assert prompt_lookup.PromptLookup([1]).draft_tokens(3) == []
