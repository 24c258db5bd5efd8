"""The compiled parts of an RL update: gradients that do not depend on how samples lie in rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from params_support import tree_leaves

from m1_jax import ModelConfig
from m1_jax import params as params_lib
from train import lora, optim, step
from train.rl import advantages, loss, objective, rollout_correction, row_packing
from train.rl import batch as rl_batch
from train.rl import sample as sample_lib
from train.rl import step as rl_step

CONFIG = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    hidden_size=32,
    intermediate_size=32,
    vocab_size=64,
    initializer_range=0.2,
)
SEQ_LEN, ROUTES = 24, (2, 2)
TASK = sample_lib.Task("t", (), "s")
ADAMW = optim.AdamW(1e-2)
# Float32 sums in another order: gradients of about 1 are off by some 1e-6. The bound is ten times
# that. A microbatch that counted for another share would be off by 1e-1.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@functools.cache
def weights():
    return params_lib.random_model(CONFIG, jax.random.key(0), jnp.float32)


def model():
    """Return a copy of the weights, because an update donates its model's."""
    return jax.tree.map(jnp.copy, weights())


def make_samples(seed=0, lengths=((4, 6), (4, 8), (3, 9), (3, 5), (5, 4), (5, 12), (2, 3))):
    rng = np.random.default_rng(seed)
    samples = []
    for prompt, answer in lengths:
        tokens = rng.integers(0, 64, prompt + answer).tolist()
        mask = np.ones(answer)
        mask[answer // 2] = 0  # a tool's token
        logprobs = rng.uniform(-5, -3, answer) * mask
        samples.append(sample_lib.Sample(TASK, tokens[:prompt], tokens[prompt:], mask, logprobs))
    return samples


SAMPLES = make_samples()
GROUPS = np.array([0, 0, 1, 1, 2, 2, 2])
REWARDS = np.array([1.0, 0.0, 0.3, 0.9, 0.0, 1.0, 0.5])
VALID = np.ones(7, bool)


def one_shape(rows, seq_len=SEQ_LEN):
    """Return shapes of which every microbatch has the one."""
    return row_packing.RowShapes((rows,), (seq_len,))


def all_rows(packed):
    return [packed.make_rows(i) for i in range(packed.num_microbatches)]


def extract(packed, arrays):
    """Return of arrays, one a microbatch, each sample's part."""
    parts = {}
    for i, array in enumerate(arrays):
        parts |= packed.extract(i, np.asarray(array))
    return [parts[i] for i in range(len(packed.samples))]


def pack(rows, chosen, samples=None, seq_len=SEQ_LEN, routes=None, **fields):
    """Return packed samples as the trainer fills them. `fields` are by sample, and come last."""
    samples = SAMPLES if samples is None else samples
    packed = rl_batch.pack_samples(samples, one_shape(rows, seq_len), routes)
    lengths = np.array([sample.num_generated for sample in samples])
    indices = [SAMPLES.index(sample) for sample in samples]
    coefficients = loss.token_coefficients(chosen, lengths, GROUPS[indices], VALID)
    sample_advantages = advantages.sample_advantages(
        chosen, REWARDS[indices], GROUPS[indices], VALID
    )
    logp_old = [sample.logprobs - 0.3 for sample in samples]
    fields = {
        "coefficients": coefficients,
        "advantages": sample_advantages,
        "logp_old": logp_old,
    } | fields
    for name, values in fields.items():
        packed.fill(name, list(values))
    return packed


def settings(chosen, **changes):
    return rl_step.RlStepSettings(ADAMW, chosen, **changes)


def sums_of(packed, chosen, net=None, change=lambda rows: rows, **changes):
    """Return (gradients, metrics) of a whole step, microbatch by microbatch."""
    sums, net = None, weights() if net is None else net
    microbatches = all_rows(packed)
    tokens = [float(np.sum(rows.segment_ids > 0)) for rows in microbatches]
    assert tokens == packed.num_tokens
    for rows, num_tokens in zip(microbatches, tokens, strict=True):
        share = np.float32(num_tokens / sum(tokens))
        device_rows = rl_batch.device_put_rows(change(rows))
        sums = rl_step.accumulate_gradients(
            sums, net, device_rows, share, None, settings(chosen, **changes)
        )
    assert sums is not None
    return sums


def assert_close(first, second, **bound):
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        np.testing.assert_allclose(a, b, **(bound or CLOSE))


def assert_same(first, second):
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


CISPO = objective.PRESETS["cispo"]


@pytest.fixture(scope="module")
def one_microbatch():
    """A step's gradients and metrics from one microbatch of 4 rows."""
    packed = pack(4, CISPO)
    (rows,) = all_rows(packed)
    assert rows.segment_ids.max() >= 2  # several in a row
    return sums_of(packed, CISPO)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_gradient_does_not_depend_on_microbatches(one_microbatch, rows):
    packed = pack(rows, CISPO)
    assert packed.num_microbatches >= 2
    grads, metrics = sums_of(packed, CISPO)
    assert_close(grads, one_microbatch.gradients)
    for name in ("loss", "policy_loss", "ppo_loss"):
        np.testing.assert_allclose(
            metrics.shares[name], one_microbatch.metrics.shares[name], rtol=1e-5
        )
    for name in ("tokens", "positive", "negative", "weight_high/positive", "ppo_drop"):
        assert float(metrics.sums[name].total) == float(one_microbatch.metrics.sums[name].total)
    assert_same(metrics.drops, one_microbatch.metrics.drops)
    np.testing.assert_allclose(
        metrics.maxima["ratio_max"], one_microbatch.metrics.maxima["ratio_max"], 1e-5
    )
    assert float(metrics.sums["tokens"].total) == sum(s.num_generated for s in SAMPLES)


def test_the_gradient_does_not_depend_on_packing(one_microbatch):
    order = [SAMPLES[i] for i in (5, 2, 6, 0, 3, 1, 4)]
    packed = pack(4, CISPO, order)
    locations = pack(4, CISPO).plan.locations
    assert packed.plan.locations != [locations[SAMPLES.index(sample)] for sample in order]
    assert_close(sums_of(packed, CISPO).gradients, one_microbatch.gradients)


def test_what_stands_at_masked_places_is_never_seen(one_microbatch):
    rng = np.random.default_rng(0)

    def spoil(rows):
        changes = {}
        for name in ("logp_old", "logp_rollout", "logp_ref", "advantages"):
            wrong = rng.choice([np.nan, np.inf, -np.inf, 1e30], rows.mask.shape)
            changes[name] = np.where(rows.mask > 0, getattr(rows, name), wrong).astype("float32")
        return dataclasses.replace(rows, **changes)

    packed = pack(4, CISPO)
    grads, metrics = sums_of(packed, CISPO, change=spoil)
    assert_same(grads, one_microbatch.gradients)
    # A number of its own, so that NaN equal to NaN is not taken for right.
    assert np.isfinite(float(metrics.shares["loss"]))
    assert_same(metrics.sums, one_microbatch.metrics.sums)


@functools.cache
def own_logps():
    """Return the trainer's log-probabilities of the samples' tokens."""
    packed = rl_batch.pack_samples(SAMPLES, one_shape(4))
    scores = [
        rl_step.score_logprobs(weights(), rl_batch.device_put_rows(rows), 1.0)
        for rows in all_rows(packed)
    ]
    return extract(packed, [logp for logp, _ in scores])


@jax.jit
def forward(net, tokens, segment_ids):
    """Return (logits, how often each expert was chosen)."""
    hidden, stats = net.hidden(tokens, segment_ids)
    return net.head(hidden).astype(jnp.float32), stats.choice_counts


def alone(sample, num_tokens=SEQ_LEN):
    """Return (tokens, segment_ids) of the first tokens of a sample, in a row of its own."""
    tokens = np.zeros((1, SEQ_LEN), np.int32)
    token_ids = [*sample.prompt, *sample.tokens]
    tokens[0, : len(token_ids)] = token_ids
    return tokens, (np.arange(SEQ_LEN) < min(num_tokens, len(token_ids))).astype(np.int32)[None]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_those_of_the_models_logits(temperature):
    packed = rl_batch.pack_samples(SAMPLES, one_shape(4))
    scores = rl_step.score_logprobs(
        weights(), rl_batch.device_put_rows(packed.make_rows(0)), temperature
    )
    logps, entropies = extract(packed, [scores[0]]), extract(packed, [scores[1]])
    for sample, logp, entropy in zip(SAMPLES, logps, entropies, strict=True):
        logits = np.asarray(forward(weights(), *alone(sample))[0][0]) / temperature
        first = len(sample.prompt) - 1
        rows = np.asarray(jax.nn.log_softmax(logits[first : first + len(sample.tokens)]))
        # Alone in its row, and with others: sums in another order.
        np.testing.assert_allclose(logp, rows[np.arange(len(rows)), sample.tokens], atol=5e-5)
        np.testing.assert_allclose(entropy, -(np.exp(rows) * rows).sum(-1), atol=5e-5)


def test_on_policy_all_objectives_have_one_gradient():
    logps, grads = own_logps(), {}
    for name in ("cispo", "grpo", "dapo"):
        chosen = dataclasses.replace(objective.PRESETS[name], aggregation="token-mean")
        packed = pack(4, chosen, logp_old=logps)
        grads[name], metrics = sums_of(packed, chosen)
        assert float(metrics.sums["clip_high"].total) == 0
    # The weights are exp(0), but for the last bits of a forward pass that is compiled anew.
    for name in ("grpo", "dapo"):
        assert_close(grads[name], grads["cispo"])
    assert max(np.abs(leaf).max() for leaf in tree_leaves(grads["cispo"])) > 1e-2


def test_off_policy_they_differ(one_microbatch):
    dapo = objective.PRESETS["dapo"]
    grads, metrics = sums_of(pack(4, dapo), dapo)
    assert float(metrics.sums["clip_high"].total) > 0
    gaps = [
        np.abs(a - b).max()
        for a, b in zip(tree_leaves(grads), tree_leaves(one_microbatch.gradients), strict=True)
    ]
    assert max(gaps) > 1e-2


CORRECTED = dataclasses.replace(
    CISPO,
    correction=rollout_correction.RolloutCorrection("token", "truncate", None, 2.0, normalise=True),
)


def parts(packed, share, weight_mean):
    """Return (gradients, balance loss) with a balance loss and a correction."""
    rows = rl_batch.device_put_rows(packed.make_rows(0))
    chosen = settings(CORRECTED, balance_coefficient=0.5)
    mean = None if weight_mean is None else np.float32(weight_mean)
    grads, metrics = rl_step.accumulate_gradients(
        None, weights(), rows, np.float32(share), mean, chosen
    )
    return grads, float(metrics.shares["balance_loss"])


def test_the_balance_loss_counts_by_the_rows_share_of_tokens():
    packed = pack(4, CORRECTED, advantages=np.zeros(7))
    (full_grads, full_loss), (quarter_grads, quarter_loss) = (
        parts(packed, share, 1.0) for share in (1.0, 0.25)
    )
    assert quarter_loss == full_loss / 4 > 0
    assert_close(jax.tree.map(lambda x: x / 4, full_grads), quarter_grads)
    assert max(np.abs(leaf).max() for leaf in tree_leaves(full_grads)) > 1e-2


def test_a_correction_that_normalises_is_given_its_mean():
    packed = pack(4, CORRECTED)
    with pytest.raises(ValueError, match="weight_mean"):
        parts(packed, 0.0, None)
    grads_by_1, grads_by_2 = (parts(packed, 0.0, mean)[0] for mean in (1.0, 2.0))
    assert_close(jax.tree.map(lambda x: x / 2, grads_by_1), grads_by_2)
    assert max(np.abs(leaf).max() for leaf in tree_leaves(grads_by_2)) > 1e-2


# ---- routes


def recorded():
    """Return the samples with the experts that the model chooses, found by leaving tokens out."""
    samples = []
    for sample in SAMPLES:
        lengths = range(len(sample.prompt) + len(sample.tokens))
        counts = [np.asarray(forward(weights(), *alone(sample, n))[1]) for n in lengths]
        routes = np.diff(np.stack(counts), axis=0).argmax(-1).astype(np.int8)
        samples.append(dataclasses.replace(sample, routes=routes))
    return samples


def test_own_routes_change_nothing_and_others_do():
    samples = recorded()
    assert all(
        len(sample.routes) == len(sample.prompt) + len(sample.tokens) - 1 for sample in samples
    )
    rows = rl_batch.pack_samples(samples, one_shape(4), ROUTES).make_rows(0)
    real = rows.mask > 0

    def scored(routes):
        device_rows = rl_batch.device_put_rows(dataclasses.replace(rows, expert_ids=routes))
        return np.asarray(rl_step.score_logprobs(weights(), device_rows, 1.0)[0])[real]

    free = scored(None)
    np.testing.assert_array_equal(scored(rows.expert_ids), free)
    np.testing.assert_array_equal(scored(np.full_like(rows.expert_ids, -1)), free)
    other_routes = np.where(rows.expert_ids >= 0, (rows.expert_ids + 1) % 8, -1).astype(np.int8)
    assert np.abs(scored(other_routes) - free).max() > 1e-2


# ---- the update


def trained(net=None, packed=None, steps=1, chosen=CISPO):
    """Return the state after some updates, and the metrics of the last."""
    net = model() if net is None else net
    state, metrics = step.init_state(net, ADAMW), {}
    for _ in range(steps):
        sums = sums_of(packed or pack(4, chosen), chosen, state.model)
        state, metrics = rl_step.apply_update(state, sums.gradients, settings(chosen))
    return state, metrics


def adam(state):
    (adam_state,) = [
        leaf
        for leaf in jax.tree.leaves(state.moments, is_leaf=lambda x: hasattr(x, "nu"))
        if hasattr(leaf, "nu")
    ]
    return adam_state


def test_an_update_makes_the_moments(one_microbatch):
    grads = tree_leaves(one_microbatch.gradients)
    state, metrics = trained()
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in grads))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    scale = min(1.0, 1.0 / norm)
    for g, mu, nu in zip(
        grads, tree_leaves(adam(state).mu), tree_leaves(adam(state).nu), strict=True
    ):
        np.testing.assert_allclose(mu, 0.1 * scale * g, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(nu, 0.05 * (scale * g) ** 2, rtol=1e-4, atol=1e-12)
    zeros = sum((nu == 0).sum() for nu in tree_leaves(adam(state).nu))
    size = sum(g.size for g in grads)
    np.testing.assert_allclose(metrics["second_moment/zero"], zeros / size, rtol=1e-5)
    small = sum((np.abs(g) < 1e-14).sum() for g in grads) / size
    np.testing.assert_allclose(metrics["gradient/below_1e-14"], small, rtol=1e-5, atol=1e-7)
    assert (int(state.step), float(metrics["skipped"])) == (1, 0)
    # The samples that were worth more have become likelier, those worth less less likely.
    packed = rl_batch.pack_samples(SAMPLES, one_shape(4))
    after, _ = rl_step.score_logprobs(
        state.model, rl_batch.device_put_rows(packed.make_rows(0)), 1.0
    )
    changes = [
        np.mean((a - b)[np.array(sample.mask) > 0])
        for sample, a, b in zip(SAMPLES, extract(packed, [after]), own_logps(), strict=True)
    ]
    values = advantages.sample_advantages(CISPO, REWARDS, GROUPS, VALID)
    assert np.corrcoef(changes, values)[0, 1] > 0.8


def test_a_gradient_that_is_not_finite_changes_nothing():
    state = step.init_state(model(), ADAMW)
    grads, _ = sums_of(pack(4, CISPO), CISPO)
    grads = jax.tree.map(lambda x: x * jnp.inf, grads)
    state, metrics = rl_step.apply_update(state, grads, settings(CISPO))
    assert (float(metrics["skipped"]), int(state.step)) == (1, 1)
    assert_same(state.model, weights())
    assert not any(
        leaf.any() for leaf in [*tree_leaves(adam(state).mu), *tree_leaves(adam(state).nu)]
    )


def test_adapters_alone_are_trained():
    net = lora.add_adapters(model(), lora.LoraConfig(rank=2, alpha=4.0), jax.random.key(1))
    before = {name: np.asarray(p[...]) for name, p in params_lib.params_by_path(net).items()}
    state, _ = trained(net, steps=2)
    for name, param in params_lib.params_by_path(state.model).items():
        assert np.array_equal(param[...], before[name]) == (".adapter." not in name), name


def test_what_the_caller_keeps_is_not_donated():
    net, packed = model(), pack(2, CISPO)
    placed = [rl_batch.device_put_rows(rows) for rows in all_rows(packed)]
    half, chosen = np.float32(0.5), settings(CISPO)
    first = rl_step.accumulate_gradients(None, net, placed[0], half, None, chosen)
    total = rl_step.accumulate_gradients(first, net, placed[1], half, None, chosen)
    copies = tree_leaves(total)
    assert_same(net, weights())  # model and rows are read again for every epoch
    first_again = rl_step.accumulate_gradients(None, net, placed[0], half, None, chosen)
    assert_same(
        rl_step.accumulate_gradients(first_again, net, placed[1], half, None, chosen), copies
    )
    state = step.init_state(net, ADAMW)
    rl_step.apply_update(state, total.gradients, chosen)
    assert_same(total, copies)
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(jax.tree.leaves(state.model)[0])
    with pytest.raises(RuntimeError, match="deleted"):
        np.asarray(jax.tree.leaves(first.gradients)[0])
