"""Experts as the sampler chose them, recorded by the engine and replayed by the trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import config, engine
from infer import options as options_lib
from m1_jax import params as params_lib
from m1_jax import testing, tokenizer
from m1_jax.config import ModelConfig

CONFIG = config.EngineConfig(
    max_length=96, max_rows=4, chunk_tokens=16, prefill_tokens=(32, 64), decode_steps=4,
    num_snapshots=4, swap_tokens=1, host_bytes=10**9, record_routes=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = testing.write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    model = params_lib.random_model(ModelConfig.tiny(), jax.random.key(0), jnp.float32)
    return model, engine.Engine(model, tokenizer.Tokenizer.load(directory), CONFIG)


def count_choices(model, tokens):
    """Return the trainer's hidden choices, token after token and layer after layer."""
    layers, number = len(model.config.layer_types), model.config.num_experts_per_tok
    chosen = np.zeros((len(tokens), layers, number), np.int8)
    for end in range(1, len(tokens) + 1):
        counted = [
            np.asarray(_choice_counts(model, tokens[:end])),
            np.asarray(_choice_counts(model, tokens[: end - 1])),
        ]
        chosen[end - 1] = (counted[0] - counted[1]).argmax(-1)
    return chosen


def _choice_counts(model, tokens):
    # By NumPy: JAX would compile for every number of tokens.
    padded, mask = np.zeros((2, 1, 96), np.int32)
    padded[0, : len(tokens)] = tokens
    mask[0, : len(tokens)] = 1
    return _run_hidden(model, padded, mask)


@jax.jit
def _run_hidden(model, tokens, segment_ids):
    return model.hidden(tokens, segment_ids)[1].choice_counts


def test_recorded_routes_are_those_of_the_trainer(served):
    model, engine_ = served
    shared = list(range(5, 38))
    options = options_lib.Options(max_tokens=12, top_p=1.0)
    first = engine_.submit([*shared, 40], options)
    engine_.run()
    second = engine_.submit([*shared, 41], options)  # the beginning comes from the cache
    engine_.step()
    engine_.preempt(second)
    engine_.run()
    for request in (first, second):
        tokens = [*request.prompt, *(token.id for token in request.tokens)]
        assert request.routes.shape == (len(tokens) - 1, 8, 2)
        np.testing.assert_array_equal(request.routes, count_choices(model, tokens[:-1]))
    assert second.cached_tokens > 0


def test_replayed_routes_are_taken():
    model = params_lib.random_model(ModelConfig.tiny(), jax.random.key(0), jnp.float32)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    free = jnp.full((1, 20, 8, 2), -1, jnp.int8)
    compute = jax.jit(lambda model, expert_ids: model.hidden(tokens, expert_ids=expert_ids))
    hidden, _ = compute(model, None)
    np.testing.assert_array_equal(hidden, compute(model, free)[0])
    forced = free.at[:, 3].set(jnp.array([6, 1], jnp.int8))
    replayed, stats = compute(model, forced)
    np.testing.assert_array_equal(hidden[:, :3], replayed[:, :3])
    assert np.abs(hidden[:, 3:] - replayed[:, 3:]).min(axis=-1).max() > 0
    assert np.all(np.asarray(stats.choice_counts)[:, 0, 6] >= 1)
    assert np.all(np.asarray(stats.choice_counts)[:, 1, 1] >= 1)
