"""One generation batch through the trainer: copies of it and layouts make the same update."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params_support import tree_leaves
from turns_support import take_turns

from m1_jax import ModelConfig, sharding
from m1_jax import params as params_lib
from train import optim, step
from train.rl import config as rl_config
from train.rl import group_columns, groups, update
from train.rl import sample as sample_lib

MODEL = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    hidden_size=32,
    intermediate_size=32,
    vocab_size=64,
    initializer_range=0.2,
)
ADAMW = optim.AdamW(1e-2)
SOURCE = rl_config.TaskSource("s", "s.jsonl")


def make_config(rows=2, objective="cispo", **rollout_fields):
    return rl_config.RlConfig(
        checkpoint="c", batches=1, sources=(SOURCE,), dtype="float32",
        objective=rl_config.PRESETS[objective],
        rollout=rl_config.RolloutConfig(
            4, rl_config.LengthSchedule((32,)), max_prompt_tokens=5, group_size=3, **rollout_fields
        ),
        update=rl_config.UpdateConfig(1e-2, minibatches=2, rows=rows),
        rewards=rl_config.RewardsConfig(sources=(("s", (("exact", 1.0, ()),)),)),
    )  # fmt: skip


def make_batch(routes=False):
    rng, batch = np.random.default_rng(0), []
    for number in range(4):
        task = sample_lib.Task(f"s/{number}", (), "s")
        samples = []
        for _ in range(3):
            prompt, answer = int(rng.integers(1, 6)), int(rng.integers(2, 33))
            mask = rng.random(answer) < 0.9
            sample = sample_lib.Sample(
                task,
                rng.integers(0, 64, prompt),
                rng.integers(0, 64, answer),
                mask,
                rng.uniform(-5, -3, answer) * mask,
                np.where(mask, 7 - (np.arange(answer) < 3), -1),
                reward=float(rng.random()),
            )
            if routes:
                shape = (sample.num_tokens - 1, 2, MODEL.num_experts_per_tok)
                sample.routes = rng.integers(0, 8, shape).astype(np.int8)
            samples.append(sample)
        samples[1].valid = number != 2
        samples[0].turn_rewards = [(1, 0.5)] if number == 1 else []
        samples[2].parts = {"exact": 0.5}
        batch.append(groups.SampleGroup(number, "s", number, 32, task, samples, [None] * 3, []))
    return groups.GenerationBatch(batch, {"rounds": 1.0}, 0.5)


def make_layout(axes):
    devices = jax.devices()[: math.prod(axes.values())]
    return sharding.make_layout(sharding.make_mesh(axes, devices), MODEL, sharding.TRAIN)


def train(batch, config=None, layout=None):
    """Return (weights after the updates of a batch, metrics that do not depend on the clock)."""
    config = make_config() if config is None else config
    updater = update.PolicyUpdater(config, MODEL, layout, ADAMW)
    model = params_lib.random_model(MODEL, jax.random.key(0), jnp.float32, layout=layout)
    state, report = updater(step.init_state(model, ADAMW), batch.groups, 0, 7)
    metrics = {k: v for k, v in report.metrics.items() if not k.endswith("_secs")}
    return tree_leaves(state.model), metrics | {"pearson": report.pearson}


@pytest.fixture(scope="module")
def plain():
    return train(make_batch())


@pytest.mark.slow
@pytest.mark.parametrize("routes", [False, True])
def test_a_batch_sent_as_columns_makes_the_same_bits(plain, routes):
    config = make_config(replay_routes=routes)
    weights, metrics = train(make_batch(routes), config) if routes else plain
    table, columns = group_columns.batch_to_columns(make_batch(routes))
    columns = {
        name: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for name, x in columns.items()
    }
    batch = group_columns.batch_from_columns(json.loads(json.dumps(table)), columns)
    weights_again, metrics_again = train(batch, config)
    assert metrics_again == metrics
    for a, b in zip(weights_again, weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_a_batch_reports(plain):
    _, metrics = plain
    samples = [s for group in make_batch().groups for s in group.samples]
    tokens = sum(s.num_tokens for s in samples if s.valid)
    assert metrics["updates"] == 2
    assert metrics["microbatches/scoring"] == 1  # 2 rows of 128 hold the whole batch
    assert metrics["microbatches/update"] == 2
    assert metrics["utilisation/scoring"] == tokens / 256
    assert metrics["utilisation/update"] == tokens / 256  # one row each
    generated = np.concatenate([s.logprobs[s.mask] for s in samples])
    assert metrics["nll"] == pytest.approx(-generated.mean(), rel=1e-6)
    assert metrics["length_max"] == max(s.num_generated for s in samples)
    assert metrics["reward/exact"] == 0.5


@pytest.mark.slow
def test_the_update_does_not_depend_on_the_number_of_rows(plain):
    weights, metrics = train(make_batch(), make_config(rows=1))
    assert_close(weights, metrics, plain, except_for=("utilisation/", "microbatches/"))


@pytest.mark.parametrize("axes", take_turns({"context": 2}, {"context": 2, "expert": 2}))
def test_odd_rows_on_a_mesh_that_splits_them(plain, axes):
    """The longest sample has 37 tokens, which no mesh splits: rows are longer."""
    config = make_config()
    assert config.rollout.max_sample_tokens == 37
    layout = make_layout(axes)
    weights, metrics = train(make_batch(), config, layout)
    assert_close(weights, metrics, plain, except_for=("utilisation/", "microbatches/"))


def assert_close(weights, metrics, expected, except_for):
    for a, b in zip(weights, expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    for name in ("loss", "grad_norm", "entropy", "entropy_old", "pearson", "k3", "nll"):
        assert metrics[name] == pytest.approx(expected[1][name], rel=1e-4, abs=1e-6), name
    assert metrics.keys() == expected[1].keys()


def test_rows_that_the_mesh_cannot_split_are_refused_before_anything_is_sampled():
    layout = make_layout({"fsdp": 2})
    with pytest.raises(ValueError, match="batch: got 3 rows over fsdp=2"):
        update.PolicyUpdater(make_config(rows=3), MODEL, layout, ADAMW)
