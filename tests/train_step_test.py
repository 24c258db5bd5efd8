"""The training step on a tiny model: what it optimises, and what it must leave alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from params_support import tree_leaves

from m1_jax import ModelConfig, logprobs, model, moe, sharding
from m1_jax import params as params_lib
from train import optim, step
from train.data import batch as batch_lib

ROWS, LENGTH = 4, 12
CONFIG = dataclasses.replace(
    ModelConfig.tiny(), vocab_size=98, layer_types=("lightning", "softmax"), remat="layer"
)


def _make():
    return model.MiniMaxM1(CONFIG, nnx.Rngs(0), dtype=jnp.float32)


_weights = functools.cache(_make)


def _model(dtype=jnp.float32):
    """Return a copy of the same weights: a step takes its model's away."""
    net = jax.tree.map(jnp.copy, _weights())
    net.dtype = jnp.dtype(dtype)
    return net


def _batch(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    ids = np.ones((rows, LENGTH), np.int32)
    ids[0, 9:] = 0
    weights = rng.uniform(0.5, 1.5, (rows, LENGTH)).astype(np.float32) * (ids > 0)
    weights[1, :5] = 0  # a prompt
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    arrays = (tokens[:, :-1], ids, positions, tokens[:, 1:], weights)
    return batch_lib.TrainBatch(*map(jnp.asarray, arrays))


def _settings(accumulate=1, coefficient=None, **kwargs):
    optimizer = optim.AdamW(kwargs.pop("schedule", 1e-2), **kwargs)
    return step.TrainStepSettings(optimizer, accumulate, coefficient)


_gradients = jax.jit(step.compute_gradients, static_argnums=2)
_hidden = jax.jit(lambda net, batch: net.hidden(batch.tokens, batch.segment_ids, batch.positions))


@pytest.fixture(scope="module")
def gradients():
    """Gradients of one batch by number of microbatches, without the balance loss."""
    return {n: _gradients(_model(), _batch(), _settings(n, 0.0)) for n in (1, 2, 4)}


def test_int8_weights_are_refused():
    net = params_lib.abstract_model(CONFIG, jnp.float32, weights="int8-all")
    with pytest.raises(ValueError, match=r"int8 weights, .* no gradient\. Load the model without"):
        step.init_state(net, optim.AdamW(1e-2))


def test_loss_falls_in_bfloat16_and_masters_stay_float32():
    # A token a step: 2 steps of warm-up, 40 in all.
    schedule = optim.make_stage_schedule("cosine", 3e-3, 0.0, 2, 40, tokens_per_step=1)
    settings = _settings(schedule=schedule)
    state = step.init_state(_model(jnp.bfloat16), settings.optimizer)
    losses = []
    for _ in range(20):
        state, metrics = step.train_step(state, _batch(), settings=settings)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    params = jax.tree.leaves(state.model)
    assert len(floats) == 3 * len(params)
    assert state.model.dtype == jnp.bfloat16


def test_first_loss_is_the_weighted_mean_of_real_tokens():
    batch, settings = _batch(), _settings(coefficient=0.1)
    net = _model()
    hidden, stats = _hidden(net, batch)
    logps = np.asarray(logprobs.token_logprobs(net, hidden, batch.targets).logp)
    weights = np.asarray(batch.weights)
    balance = float(moe.balance_loss(stats))
    _, metrics = step.train_step(step.init_state(net, settings.optimizer), batch, settings=settings)
    np.testing.assert_allclose(metrics["loss"], -(weights * logps).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["balance_loss"], balance, rtol=1e-5)
    assert float(metrics["tokens"]) == ROWS * LENGTH - 3
    assert float(metrics["learning_rate"]) == np.float32(1e-2)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_large_batch(gradients, accumulate):
    whole, metrics = gradients[1]
    parts, sums = gradients[accumulate]
    scale = max(np.abs(x).max() for x in tree_leaves(whole))
    for one, other in zip(tree_leaves(whole), tree_leaves(parts), strict=True):
        # Sums of float32 in another order.
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(sums["loss"], metrics["loss"], rtol=1e-6)
    assert float(sums["tokens"]) == float(metrics["tokens"])


def test_accumulated_balance_loss_is_the_mean_by_tokens():
    batch, net = _batch(), _model()
    expected = 0.0
    for rows in ((0, 2), (1, 3)):  # microbatches take every second row
        part = jax.tree.map(lambda x, rows=rows: x[jnp.asarray(rows)], batch)
        _, stats = _hidden(net, part)
        share = np.sum(np.asarray(part.segment_ids) > 0) / (ROWS * LENGTH - 3)
        expected += float(moe.balance_loss(stats)) * share
    _, metrics = _gradients(net, batch, _settings(2))
    np.testing.assert_allclose(metrics["balance_loss"], expected, rtol=1e-5)


def test_balance_loss_has_the_models_coefficient():
    net, batch = _model(), _batch()
    plain, _ = _gradients(net, batch, _settings(coefficient=0.0))
    ours, _ = _gradients(net, batch, _settings())
    same, _ = _gradients(net, batch, _settings(coefficient=CONFIG.router_aux_loss_coef))
    router = ours.layers[0].moe.router[...]
    np.testing.assert_array_equal(router, same.layers[0].moe.router[...])
    assert np.abs(router - plain.layers[0].moe.router[...]).max() > 0


def test_masked_targets_have_no_gradient(gradients):
    batch = _batch()
    targets = jnp.where(batch.weights == 0, 0, batch.targets)
    changed, _ = _gradients(
        _model(), dataclasses.replace(batch, targets=targets), _settings(coefficient=0.0)
    )
    for one, other in zip(tree_leaves(gradients[1][0]), tree_leaves(changed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-7)
    nothing = dataclasses.replace(batch, weights=jnp.zeros_like(batch.weights))
    zero, metrics = _gradients(_model(), nothing, _settings(coefficient=0.0))
    assert float(metrics["loss"]) == 0
    assert not any(leaf.any() for leaf in tree_leaves(zero))


def test_tokens_without_weight_or_followers_change_nothing(gradients):
    batch = _batch()
    tokens = batch.tokens.at[0, 9:].set(5)  # padding
    changed, _ = _gradients(
        _model(), dataclasses.replace(batch, tokens=tokens), _settings(coefficient=0.0)
    )
    for one, other in zip(tree_leaves(gradients[1][0]), tree_leaves(changed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-7)


def test_state_is_donated():
    settings = _settings()
    state = step.init_state(_model(), settings.optimizer)
    before = jax.tree.leaves(state)
    step.train_step(state, _batch(), settings=settings)
    assert all(leaf.is_deleted() for leaf in before)


def test_update_is_clipped_adamw_by_hand():
    """Two steps of one parameter in float64, against two updates of a whole model."""
    net = _model()
    optimizer = optim.AdamW(lambda s: 0.1 / (s + 1), eps=1e-8, weight_decay=0.1, clip_norm=0.5)
    state = optimizer.init(net)
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-2, x.dtype), net)
    norm = 1e-2 * np.sqrt(sum(x.size for x in jax.tree.leaves(net)))
    g, m, v = 1e-2 * min(1.0, 0.5 / norm), 0.0, 0.0
    matrix, vector = (
        np.asarray(p, np.float64) for p in (net.head.kernel[...], net.norm.scale[...])
    )
    for t in (1, 2):
        net, state, metrics = optimizer.update(grads, state, net, jnp.asarray(t - 1, jnp.int32))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        move = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        matrix -= 0.1 / t * (move + 0.1 * matrix)
        vector -= 0.1 / t * move  # a norm is not decayed
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        np.testing.assert_allclose(metrics["learning_rate"], 0.1 / t, rtol=1e-6)
    np.testing.assert_allclose(net.head.kernel[...], matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.norm.scale[...], vector, rtol=1e-5)


def test_small_gradients_are_not_clipped_and_tiny_ones_still_move():
    net = _model()
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 1e-12, x.dtype), net)
    optimizer = optim.AdamW(0.5)
    moved, _, _ = optimizer.update(grads, optimizer.init(net), net, jnp.zeros((), jnp.int32))
    # (1e-12)^2 is a float32, and eps = 1e-15 lies far below its root.
    np.testing.assert_allclose(net.norm.scale[...] - moved.norm.scale[...], 0.5, rtol=2e-3)


def test_decay_spares_norms_only():
    mask = optim.matrix_mask(_model())
    names = {
        ".".join(map(str, path)): bool(param.get_value())
        for path, param in nnx.iter_graph(mask)
        if isinstance(param, nnx.Param)
    }
    assert {name for name, decayed in names.items() if not decayed} == {
        name for name in names if name.endswith("scale")
    }


def test_cosine_schedule_with_warmup():
    rate = optim.make_stage_schedule("cosine", 1.0, 0.1, 4, 12, 1)
    # The warm-up ends with step 3, a quarter of the way.
    quarter = 1 - 0.9 * (1 - np.cos(np.pi / 4)) / 2
    np.testing.assert_allclose(
        [rate(s) for s in (0, 3, 6, 12, 20)], [0.25, quarter, 0.55, 0.1, 0.1], atol=1e-6
    )
    assert rate is optim.make_stage_schedule("cosine", 1.0, 0.1, 4, 12, 1)


def test_abstract_state_lies_where_parameters_do():
    layout = sharding.make_layout(sharding.make_mesh({"fsdp": 2, "expert": 4}), CONFIG)
    net = params_lib.abstract_model(CONFIG, param_dtype=jnp.float32, layout=layout)
    optimizer = optim.AdamW(1.0, weight_decay=0.1)
    state = step.abstract_state(net, optimizer)
    adam = state.moments[0]
    assert isinstance(adam, optax.ScaleByAdamState)
    wanted = [x.sharding for x in jax.tree.leaves(net)]
    for tree in (state.model, adam.mu, adam.nu):
        assert [x.sharding for x in jax.tree.leaves(tree)] == wanted
    assert state.step.sharding.is_fully_replicated
    assert [x.dtype for x in jax.tree.leaves(state.model)] == [jnp.float32] * len(wanted)


def test_step_on_a_mesh_equals_the_step_on_one_device():
    batch, settings = _batch(), _settings(2, 0.01)
    expected, numbers = step.train_step(
        step.init_state(_model(), settings.optimizer), batch, settings=settings
    )
    layout = sharding.make_layout(
        sharding.make_mesh({"expert": 2, "tensor": 2, "context": 2}), CONFIG
    )
    net = params_lib.abstract_model(CONFIG, jnp.float32, layout=layout)
    values = params_lib.params_by_path(_weights())
    for name, param in params_lib.params_by_path(net).items():
        where = param.get_value().sharding
        param.set_value(jax.device_put(np.asarray(values[name].get_value()), where))
    before = [leaf.sharding for leaf in jax.tree.leaves(net)]
    batch = jax.device_put(batch, layout.activation_sharding("batch", "length"))
    state = jax.jit(step.init_state, static_argnums=1)(net, settings.optimizer)
    state, metrics = step.train_step(state, batch, settings=settings)
    for name in numbers:
        np.testing.assert_allclose(metrics[name], numbers[name], rtol=1e-4)
    # Adam turns a gradient's last bits into steps of any size below the rate, 1e-2.
    for one, other in zip(
        tree_leaves(expected.moments.mu), tree_leaves(state.moments.mu), strict=True
    ):
        np.testing.assert_allclose(other, one, atol=2e-5 * np.abs(one).max() + 1e-7)
    for tree in (state.model, state.moments.mu, state.moments.nu):
        for leaf, where in zip(jax.tree.leaves(tree), before, strict=True):
            assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    size = step.train_step._cache_size()
    step.train_step(state, batch, settings=settings)
    assert step.train_step._cache_size() == size  # the second step is the same program


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: optim.AdamW(1.0, b1=1.0), "b1: got 1.0"),
        (lambda: optim.AdamW(1.0, eps=0.0), "eps"),
        (lambda: optim.AdamW(1.0, weight_decay=-1.0), "weight_decay"),
        (lambda: optim.AdamW(1.0, clip_norm=0.0), "clip_norm"),
        (lambda: _settings(0), "accumulate"),
        (lambda: step.split_microbatches(_batch(), 3), "4 rows in 3 microbatches"),
        (
            lambda: step.init_state(model.MiniMaxM1(CONFIG, nnx.Rngs(0)), optim.AdamW(1.0)),
            "param_dtype=float32",
        ),
    ],
)
def test_wrong_values_are_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_z_loss_is_the_mean_squared_log_normalizer_and_has_a_gradient():
    net, batch = _model(), _batch()
    hidden, _ = _hidden(net, batch)
    logits = net.head(hidden)
    squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
    wanted = jnp.sum(batch.weights * squares) / jnp.sum(batch.weights)
    plain, metrics = _gradients(net, batch, _settings(1, 0.0))
    np.testing.assert_allclose(metrics["z_loss"], wanted, rtol=1e-5)
    settings = dataclasses.replace(_settings(1, 0.0), z_coefficient=0.1)
    grads, _ = _gradients(net, batch, settings)

    def loss(kernel):
        logits = hidden @ kernel
        sums = jax.nn.logsumexp(logits, axis=-1)
        return 0.1 * jnp.sum(batch.weights * jnp.square(sums)) / jnp.sum(batch.weights)

    wanted = jax.grad(loss)(net.head.kernel[...])
    got = grads.head.kernel[...] - plain.head.kernel[...]
    np.testing.assert_allclose(got, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_told(skip):
    settings = dataclasses.replace(_settings(), skip_nonfinite=skip)
    state = step.init_state(_model(), settings.optimizer)
    before = tree_leaves(state.model)
    batch = dataclasses.replace(_batch(), weights=_batch().weights.at[0, 0].set(jnp.inf))
    state, metrics = step.train_step(state, batch, settings=settings)
    assert float(metrics["skipped"]) == 1.0
    same = all(np.array_equal(a, b) for a, b in zip(before, tree_leaves(state.model), strict=True))
    assert same == skip
    assert int(state.step) == 1


def test_metrics_tell_gradient_norms_by_part_and_the_load_of_experts():
    settings = _settings()
    _, metrics = step.train_step(
        step.init_state(_model(), settings.optimizer), _batch(), settings=settings
    )
    parts = {name: value for name, value in metrics.items() if name.startswith("grad_norm/")}
    assert parts.keys() == {
        f"grad_norm/{kind}" for kind in ("embed", "head", "lightning", "softmax", "experts")
    }
    whole = np.sqrt(sum(float(value) ** 2 for value in parts.values()))
    np.testing.assert_allclose(whole, metrics["grad_norm"], rtol=1e-5)
    load = np.asarray(metrics["expert_load"])
    assert load.shape == (CONFIG.num_hidden_layers, CONFIG.num_local_experts)
    np.testing.assert_allclose(load.sum(-1), 1.0, rtol=1e-5)


def test_packed_documents_have_the_gradients_of_separate_ones():
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in (5, 4, 3)]

    def rows(groups):
        """Return a batch with each group of documents in a row of its own."""
        arrays = np.zeros((4, len(groups), LENGTH), np.int32)
        weights = np.zeros((len(groups), LENGTH), np.float32)
        for row, group in enumerate(groups):
            at = 0
            for number, document in enumerate(group, 1):
                place = slice(at, at + len(document))
                arrays[0, row, place] = document
                arrays[1, row, place] = number
                arrays[2, row, place] = np.arange(len(document))
                arrays[3, row, place] = np.append(document[1:], 0)
                weights[row, at : at + len(document) - 1] = 1
                at += len(document)
        return batch_lib.TrainBatch(*map(jnp.asarray, (*arrays, weights)))

    packed, _ = _gradients(_model(), rows([documents]), _settings(1, 0.0))
    separate, _ = _gradients(_model(), rows([[d] for d in documents]), _settings(1, 0.0))
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in tree_leaves(separate)))
    gaps = [a - b for a, b in zip(tree_leaves(packed), tree_leaves(separate), strict=True)]
    gap = np.sqrt(sum(np.sum(np.square(g)) for g in gaps))
    assert gap < 1e-5 * norm
