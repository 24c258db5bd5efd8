"""The same request gives the same bits, whatever runs beside it, before it and with it."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import subprocess
import sys

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from output_support import bits
from tokenizer_support import load_tokenizer

from infer import config as config_lib
from infer import engine as engine_lib
from infer import options as options_lib
from infer import request
from m1_jax import config as model_config_lib
from m1_jax import model as model_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = config_lib.EngineConfig(
    max_length=256,
    max_rows=32,
    num_pages=200,
    chunk_tokens=16,
    prefill_tokens=(64,),
    num_snapshots=8,
    decode_steps=4,
    host_bytes=2**22,
    swap_tokens=30,
)
PROMPT = tuple(range(40, 95))
ONE = options_lib.Options(seed=11, max_tokens=24, ignore_eos=True, repetition_penalty=1.1)


@functools.cache
def make_model(seed=0, dtype="float32"):
    kinds = (model_config_lib.LIGHTNING, model_config_lib.SOFTMAX, model_config_lib.LIGHTNING)
    config = dataclasses.replace(model_config_lib.ModelConfig.tiny(), layer_types=kinds)
    model = model_lib.MiniMaxM1(config, nnx.Rngs(seed), dtype=jnp.dtype(dtype))
    model.head.kernel[...] = model.head.kernel[...] * 15  # opinions, as a trained model has
    return model


@functools.cache
def make_engine(seed=0, dtype="float32"):
    return engine_lib.Engine(make_model(seed, dtype), load_tokenizer(), CONFIG)


@pytest.fixture(scope="module", autouse=True)
def drop_engines():
    yield
    make_engine.cache_clear()
    make_model.cache_clear()


@pytest.fixture
def engine():
    """Return an engine with the first weights, and nothing in its cache."""
    engine = make_engine()
    engine.swap_weights(make_model())
    return engine


@pytest.fixture
def compiled():
    """Return the names of compile events from now on."""
    names: list[str] = []

    def listen(name, _secs, **_):
        if "/compile/" in name:
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def random_requests(number, seed=0):
    rng = random.Random(seed)
    for _ in range(number):
        length = rng.randrange(1, 120)
        options = options_lib.Options(
            seed=rng.randrange(99),
            max_tokens=rng.randrange(1, 60),
            temperature=rng.choice((0, 0.7, 1)),
            presence_penalty=rng.choice((0, 1)),
            top_logprobs=rng.choice((0, 3)),
        )
        yield tuple(rng.randrange(512) for _ in range(length)), options


def worker():
    """Print what a new process makes of the request."""
    output = make_engine().generate([PROMPT], ONE)[0]
    print(json.dumps(bits(output)))


@pytest.mark.parametrize(
    ("dtype", "operations", "num_engines"),
    [
        pytest.param("float32", 300, 1, marks=pytest.mark.slow),
        pytest.param("bfloat16", 300, 1, marks=pytest.mark.long),
        pytest.param("float32", 10_000, 3, marks=pytest.mark.long),
    ],
)
def test_random_operations(dtype, operations, num_engines):
    """See `benchmarks/fuzz_engine.py`, also for what it demands to have happened."""
    command = [sys.executable, "benchmarks/fuzz_engine.py", f"--dtype={dtype}", "--cases=40"]
    command += [f"--operations={operations}", f"--engines={num_engines}"]
    # Bits are promised of the code that users run: with LLVM's optimisations, unlike the suite's.
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]


@pytest.mark.slow
def test_a_seed_gives_the_same_alone_in_company_and_in_a_new_process(engine):
    want = engine.generate([PROMPT], ONE)[0]
    assert want.cached_tokens == 0
    assert len(want.tokens) == 24
    requests = [engine.submit(*arguments) for arguments in random_requests(32)]
    requests.insert(17, engine.submit(PROMPT, ONE))
    engine.run()
    assert bits(requests[17].output()) == bits(want)
    assert bits(engine.generate([PROMPT], dataclasses.replace(ONE, seed=12))[0]) != bits(want)
    code = f"import runpy; runpy.run_path({__file__!r})['worker']()"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"}
    text = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    assert [tuple(token) for token in json.loads(text)] == bits(want)


def test_products_of_more_rows_than_a_program_has_are_as_exact():
    # A decode program of 8 rows and a prefill program of 48: both are filled up to whole tiles.
    config = dataclasses.replace(CONFIG, max_rows=8, prefill_tokens=(48,), matmul_tile=32)
    engine = engine_lib.Engine(make_model(), load_tokenizer(), config)
    (alone,) = engine.generate([PROMPT], ONE)
    requests = [engine.submit(*request) for request in random_requests(10)]
    beside = engine.submit(PROMPT, ONE)
    engine.run()
    assert all(len(request.tokens) for request in requests)
    assert bits(beside.output()) == bits(alone)


def test_the_tile_is_the_platforms_unless_it_is_given():
    assert [CONFIG.for_platform(name).matmul_tile for name in ("cpu", "gpu", "tpu")] == [
        8,
        128,
        128,
    ]
    given = dataclasses.replace(CONFIG, matmul_tile=0)
    assert given.for_platform("tpu") == given
    assert make_engine().config.matmul_tile == 8
    # Products are filled up, so the tile does not make programs larger.
    wide = config_lib.EngineConfig(max_rows=40, prefill_tokens=(64,)).for_platform("tpu")
    assert wide.decode_batch_sizes == (8, 32, 40)
    with pytest.raises(ValueError, match="matmul_tile: got -1; wanted 1 or more, 0 or None"):
        dataclasses.replace(CONFIG, matmul_tile=-1)


def test_trained_is_served(engine):
    """The trainer's forward of the whole sequence gives every token's plain log-probability."""
    served, trained = serve_and_score(engine)
    assert len(served) > 300
    np.testing.assert_allclose(served, trained, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_trained_is_served_in_bfloat16():
    served, trained = serve_and_score(make_engine(dtype="bfloat16"))
    assert len(served) > 300
    assert np.std(np.exp(trained)) > 0.1  # it has opinions
    assert np.corrcoef(np.exp(served), np.exp(trained))[0, 1] > 0.9999


def serve_and_score(engine):
    rng = random.Random(5)
    served, trained = [], []
    model = make_model(dtype=str(engine._device.weights[0].dtype))
    for seed in range(12):
        prompt = tuple(rng.randrange(512) for _ in range(20 + 3 * seed))
        options = options_lib.Options(seed=seed, max_tokens=40, top_p=1.0, ignore_eos=True)
        output = engine.generate([prompt], options)[0]
        ids = [*prompt, *(token.id for token in output.tokens)]
        padded = jnp.asarray([ids + [0] * (128 - len(ids))])
        logp = jax.nn.log_softmax(model(padded)[0].astype(jnp.float32))
        positions = np.arange(len(prompt), len(ids))
        trained += np.asarray(logp)[positions - 1, np.asarray(ids)[positions]].tolist()
        served += [token.logp_raw for token in output.tokens]
    return np.asarray(served), np.asarray(trained)


# ---- other weights


def test_new_weights_are_those_of_a_new_engine(engine):
    requests = list(random_requests(6, seed=3))
    fresh = make_engine(seed=1)
    want = [bits(fresh.generate([prompt], options)[0]) for prompt, options in requests]
    old = [bits(engine.generate([prompt], options)[0]) for prompt, options in requests]
    assert engine.generate([requests[0][0]], requests[0][1])[0].cached_tokens > 0
    version = engine.swap_weights(make_model(1))
    for (prompt, options), expected, before in zip(requests, want, old, strict=True):
        output = engine.generate([prompt], options)[0]
        assert bits(output) == expected != before
        assert {token.version for token in output.tokens} == {version}
        assert output.cached_tokens == 0
    again = [engine.generate([prompt], options)[0] for prompt, options in requests]
    assert [bits(output) for output in again] == want
    assert any(output.cached_tokens for output in again)


@pytest.mark.parametrize("moment", ["decoding", "at the host", "prefilling"])
@pytest.mark.parametrize("keep_running", [True, False])
def test_tokens_carry_their_version(engine, keep_running, moment):
    options = options_lib.Options(seed=1, max_tokens=40, ignore_eos=True)
    prompt = PROMPT * 3 if moment == "prefilling" else PROMPT
    want = bits(engine.generate([prompt], options)[0])
    engine.swap_weights(make_model())
    submitted = engine.submit(prompt, options)
    company = engine.submit(PROMPT[::-1], options)
    engine.step()
    while moment != "prefilling" and len(submitted.tokens) < 9:
        engine.step()
    if moment == "at the host":
        engine.preempt(submitted)
    known = len(submitted.tokens)
    version = engine.swap_weights(make_model(1), keep_running=keep_running)
    engine.run()
    output = submitted.output()
    versions = [token.version for token in output.tokens]
    old = versions.count(version - 1)
    assert versions == [version - 1] * old + [version] * (40 - old)
    assert known <= old <= known + 2 * CONFIG.decode_steps
    assert bits(output)[:old] == want[:old]
    assert bits(output) != want
    assert {token.version for token in company.output().tokens} >= {version}
    if not keep_running:
        # As if all tokens before had been the prompt of an engine with the new weights.
        fresh = make_engine(seed=1)
        again = fresh.submit(prompt, options)
        ids = [token.id for token in output.tokens[:old]]
        again_bits = bits(replay(fresh, again, ids))
        assert again_bits[old:] == bits(output)[old:]
    # Nothing of a sequence with two versions may be found by later ones.
    assert bits(engine.generate([prompt], options)[0]) == bits(
        make_engine(seed=1).generate([prompt], options)[0]
    )


def replay(engine, submitted, ids):
    """Serve a request that had already chosen `ids`, which its new state is computed from."""
    sequence = engine._scheduler._sequences[submitted.sequence_id]
    sequence.tokens += ids
    for token in ids:
        submitted.progress.push(token, 0.0)
        submitted.tokens.append(request.OutputToken(token, 0.0, 0.0, 0))
    engine.run()
    return submitted.output()


def test_a_hundred_swaps_compile_nothing(engine, compiled):
    leaves, tree = jax.tree.flatten(make_model(1))
    device = [jax.tree.unflatten(tree, [leaf + 0 for leaf in leaves]), make_model()]
    host = jax.tree.unflatten(tree, [np.asarray(leaf) for leaf in leaves])
    submitted = None
    compiled.clear()
    for number in range(100):
        if submitted is None or submitted.finish_reason is not None:
            submitted = engine.submit(PROMPT, ONE)
        engine.swap_weights((*device, host)[number % 3], keep_running=number % 4 > 0)
        engine.step()
        if number % 7 == 0:
            engine.preempt(submitted)
    engine.run()
    assert not compiled
    assert submitted.output().finish_reason == "length"
    compiled.clear()
    jax.jit(lambda x: x * 3 + len(compiled))(np.float32(2))
    assert compiled  # the listener hears


def test_host_weights_may_change_after_the_swap(engine):
    want = bits(make_engine(seed=1).generate([PROMPT], ONE)[0])
    leaves, tree = jax.tree.flatten(make_model(1))
    copies = [np.array(leaf) for leaf in leaves]
    engine.swap_weights(jax.tree.unflatten(tree, copies))
    for copy in copies:
        copy[:] = 0
    assert bits(engine.generate([PROMPT], ONE)[0]) == want


def test_other_shapes_are_refused(engine):
    want = bits(engine.generate([PROMPT], ONE)[0])
    config = make_model().config
    wide = dataclasses.replace(config, intermediate_size=48)
    deep = dataclasses.replace(config, layer_types=config.layer_types * 2)
    version = engine.version
    for changed, dtype in ((wide, "float32"), (deep, "float32"), (config, "bfloat16")):
        model = model_lib.MiniMaxM1(changed, nnx.Rngs(0), dtype=jnp.dtype(dtype))
        with pytest.raises(ValueError, match="swap_weights: got .*; wanted"):
            engine.swap_weights(model)
    assert engine.version == version
    assert bits(engine.generate([PROMPT], ONE)[0]) == want
