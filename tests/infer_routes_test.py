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


def choices(model, tokens):
    """Return the trainer's own choices, token after token and layer after layer."""
    layers, number = len(model.config.layer_types), model.config.num_experts_per_tok
    made = np.zeros((len(tokens), layers, number), np.int8)
    for end in range(1, len(tokens) + 1):
        counted = [
            np.asarray(_stats(model, tokens[:end])),
            np.asarray(_stats(model, tokens[: end - 1])),
        ]
        made[end - 1] = (counted[0] - counted[1]).argmax(-1)
    return made


def _stats(model, tokens):
    padded = jnp.zeros((1, 96), jnp.int32).at[0, : len(tokens)].set(jnp.asarray(tokens, jnp.int32))
    real = (jnp.arange(96) < len(tokens)).astype(jnp.int32)[None]
    return _chosen(model, padded, real)


@jax.jit
def _chosen(model, tokens, segment_ids):
    return model.hidden(tokens, segment_ids)[1].choice_counts


def test_recorded_routes_are_those_of_the_trainer(served):
    model, made = served
    shared = list(range(5, 38))
    options = options_lib.Options(max_tokens=12, top_p=1.0)
    first = made.submit([*shared, 40], options)
    made.run()
    second = made.submit([*shared, 41], options)  # the beginning comes from the cache
    made.step()
    made.preempt(second)
    made.run()
    for one in (first, second):
        tokens = [*one.prompt, *(token.id for token in one.tokens)]
        assert one.routes.shape == (len(tokens) - 1, 8, 2)
        np.testing.assert_array_equal(one.routes, choices(model, tokens[:-1]))
    assert second.cached_tokens > 0


def test_replayed_routes_are_taken():
    model = params_lib.random_model(ModelConfig.tiny(), jax.random.key(0), jnp.float32)
    tokens = jnp.arange(20, dtype=jnp.int32)[None]
    free = jnp.full((1, 20, 8, 2), -1, jnp.int8)
    own, _ = model.hidden(tokens)
    np.testing.assert_array_equal(own, model.hidden(tokens, expert_ids=free)[0])
    forced = free.at[:, 3].set(jnp.array([6, 1], jnp.int8))
    other, stats = model.hidden(tokens, expert_ids=forced)
    np.testing.assert_array_equal(own[:, :3], other[:, :3])
    assert np.abs(own[:, 3:] - other[:, 3:]).min(axis=-1).max() > 0
    assert np.all(np.asarray(stats.choice_counts)[:, 0, 6] >= 1)
    assert np.all(np.asarray(stats.choice_counts)[:, 1, 1] >= 1)
