"""The objective: no split, packing or padding changes it, and every guard is needed."""

import dataclasses
import functools
import pathlib
import types

import hypothesis
import jax
import jax.numpy as jnp
import loss_support
import numpy as np
import pytest
from hypothesis import strategies as st
from loss_support import CISPO, bound_weights, make_terms, near, value_and_grad

from train.rl import loss, objective, rollout_correction
from train.rl import metrics as rl_metrics

# Fixtures.
double = loss_support.double

PRESETS = objective.PRESETS
MIX = dataclasses.replace(CISPO, aggregation="mix", mix_lambda=0.5)

OLD = np.array([[-0.5, -1, -2, -3], [-0.7, -0.2, -9, -9]])
RATIO = np.array([[1, 1.5, 0.5, 8], [2, 0.9, 1, 1]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])


def shared(options, prompts=(0, 1), module=loss):
    """Return the terms of the vectors T2 and T6."""
    coefficients = module.token_coefficients(
        options, MASK.sum(1), np.array(prompts), np.ones(2, bool)
    )
    return make_terms(
        OLD + np.log(RATIO), [[1], [-1]], MASK, OLD, coefficients=MASK * coefficients[:, None]
    )


# ---- a batch worked by hand, in whatever aggregation


FULL = [[-0.16666667, -0.25, -0.08333333, -0.83333333], [0.33333333, 0.15, 0, 0]]
HALF = [[-0.125, -0.1875, -0.0625, -0.625], [0.5, 0.225, 0, 0]]
DAPO_GRAD = [[-0.16666667, 0, -0.08333333, 0], [0.33333333, 0.15, 0, 0]]
T2 = {
    "cispo": (CISPO, (0, 1), 1.17543969, FULL),
    "seq-mean": (
        dataclasses.replace(CISPO, aggregation="seq-mean-token-mean"),
        (0, 1),
        0.84551350,
        HALF,
    ),
    "two prompts": (
        dataclasses.replace(CISPO, aggregation="prompt-mean"),
        (0, 1),
        0.84551350,
        HALF,
    ),
    "one prompt": (
        dataclasses.replace(CISPO, aggregation="prompt-mean"),
        (5, 5),
        1.17543969,
        FULL,
    ),
    "mix": (
        MIX,
        (0, 1),
        1.01047659,
        [[-0.14583333, -0.21875, -0.07291667, -0.72916667], [0.41666667, 0.1875, 0, 0]],
    ),
    "slime .2/5": (
        bound_weights(0.8, 6),
        (0, 1),
        1.46352345,
        [[-0.16666667, -0.25, -0.13333333, -1], [0.33333333, 0.15, 0, 0]],
    ),
    "nemo": (
        bound_weights(0, 6),
        (0, 1),
        1.32886610,
        [[-0.16666667, -0.25, -0.08333333, -1], [0.33333333, 0.15, 0, 0]],
    ),
    "verl": (
        bound_weights(-9, 1.2),
        (0, 1),
        0.56360629,
        [[-0.16666667, -0.2, -0.08333333, -0.2], [0.2, 0.15, 0, 0]],
    ),
    "trl": (bound_weights(None, 0.2), (0, 1), 0.14653424, [[-1 / 30] * 4, [1 / 30, 1 / 30, 0, 0]]),
    "dapo": (PRESETS["dapo"], (0, 1), 0.25967391, DAPO_GRAD),
    "grpo": (
        PRESETS["grpo"],
        (0, 1),
        0.15868917,
        [[-0.125, 0, -0.0625, 0], [0.5, 0.225, 0, 0]],
    ),
    "dr_grpo": (
        dataclasses.replace(PRESETS["dr_grpo"], length_max=8),
        (0, 1),
        0.09737772,
        [[-0.0625, 0, -0.03125, 0], [0.125, 0.05625, 0, 0]],
    ),
    "gspo": (
        PRESETS["gspo"],
        (0, 1),
        -0.10471954,
        [[0, 0, 0, 0], [0.33541020, 0.33541020, 0, 0]],
    ),
    "gspo unclipped": (
        dataclasses.replace(PRESETS["gspo"], clip_low=0.5, clip_high=0.9),
        (0, 1),
        0.81637980,
        [[-0.19563557] * 4, [0.33541020, 0.33541020, 0, 0]],
    ),
}


def check_t2(name, module=loss):
    options, prompts, value, grad = T2[name]
    loss_value, slope, _ = value_and_grad(options, shared(options, prompts, module), module)
    near(loss_value, value)
    near(slope, grad)


@pytest.mark.parametrize("name", list(T2))
def test_t2_and_t6_value_and_gradient(name):
    check_t2(name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dapo", -0.19333333),
        ("grpo", 0.23750000),
        ("dr_grpo", -0.06250000),
        ("gspo", 0.17062039),
        ("gspo unclipped", -0.11172190),
    ],
)
def test_t6_value_in_the_form_of_a_minimum(name, value):
    options, prompts, _, _ = T2[name]
    _, _, metrics = value_and_grad(options, shared(options, prompts))
    near(metrics.shares["ppo_loss"], value)


def check_ratios(module=loss):
    terms = shared(CISPO)
    near(module.compute_loss(CISPO, terms)[1].ratio, RATIO)
    a, b = 1.56508458, 1.34164079
    near(module.compute_loss(PRESETS["gspo"], terms)[1].ratio, [[a, a, a, a], [b, b, 1, 1]])


def test_ratios_of_tokens_and_sequences():
    check_ratios()


# ---- properties


def draw(seed, lengths):
    """Return samples of these lengths, a dict of arrays each."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in lengths:
        logp_old = -rng.exponential(1.0, n)
        # No ratio is near a bound such as 1.2: rounding may not decide what is clipped.
        samples.append(
            {
                "logp": logp_old + rng.choice([-0.5, -0.1, 0.1, 0.4, 1.9], n),
                "logp_old": logp_old,
                "logp_rollout": logp_old + rng.normal(0, 0.1, n),
                "logp_ref": logp_old + rng.normal(0, 0.3, n),
                "entropy": rng.exponential(1.0, n),
                "advantages": np.full(n, rng.choice([-1.3, 0.0, 0.8])),
                "mask": (rng.random(n) < 0.8).astype(np.float64),
            }
        )
    return samples


def pack(samples, coefficients_by_sample, locations, num_rows, length, dirt=0.0):
    """Return samples in rows, at their (row, start). Every masked value is `dirt`."""
    names = samples[0].keys() | {"coefficients"}
    out = {name: np.full((num_rows, length), dirt) for name in names}
    out["mask"][:] = 0
    ids = np.zeros((num_rows, length), np.int32)
    for n, (sample, (row, start)) in enumerate(zip(samples, locations, strict=True)):
        columns = (row, slice(start, start + len(sample["mask"])))
        for name, values in sample.items():
            visible = values if name == "mask" else np.where(sample["mask"] > 0, values, dirt)
            out[name][columns] = visible
        out["coefficients"][columns] = np.where(sample["mask"] > 0, coefficients_by_sample[n], dirt)
        ids[columns] = ids[row].max() + 1
    return loss.TokenTerms(**jax.tree.map(jnp.asarray, out), segment_ids=jnp.asarray(ids))


def apart(num):
    return [(n, 0) for n in range(num)]


@functools.partial(jax.jit, static_argnums=0)
def jitted(options, terms):
    return value_and_grad(options, terms)


LENGTHS = (5, 3, 7, 1, 4, 6, 2, 8)
SPLIT = [
    *(PRESETS[name] for name in ("cispo", "dr_grpo", "gspo")),
    dataclasses.replace(
        CISPO,
        kl_coef=0.1,
        entropy_coef=0.01,
        aggregation="mix",
        mix_lambda=0.3,
        correction=rollout_correction.RolloutCorrection("sequence", "mask", 0.5, 1.5, veto=0.3),
        off_policy_max=0.3,
    ),
    dataclasses.replace(
        CISPO,
        aggregation="prompt-mean",
        correction=rollout_correction.RolloutCorrection("geometric"),
    ),
]


def coefficients(options, samples, valid=None):
    lengths = np.array([s["mask"].sum() for s in samples])
    prompts = np.arange(len(samples)) // 2
    valid = np.ones(len(samples), bool) if valid is None else valid
    return loss.token_coefficients(options, lengths, prompts, valid)


@pytest.mark.parametrize("options", SPLIT, ids=lambda o: f"{o.name}-{o.aggregation}")
@hypothesis.given(st.integers(0, 2**32), st.permutations(range(8)))
@hypothesis.settings(max_examples=3)
def test_micro_batches_and_packing_change_nothing(options, seed, order):
    samples = draw(seed, LENGTHS)
    sample_coefficients = coefficients(options, samples)
    terms = pack(samples, sample_coefficients, apart(8), 8, 9)
    value, grad, metrics = jitted(options, terms)
    expected = rl_metrics.summarize_metrics(metrics)
    for parts in (2, 4):  # of the same step, in another order of rows
        size, grads, total = 8 // parts, np.zeros((8, 9)), 0.0
        merged = None
        for i in range(parts):
            rows = np.array(order[i * size : (i + 1) * size])
            share, grads[rows], part_metrics = jitted(
                options, jax.tree.map(lambda x, h=rows: x[h], terms)
            )
            total += share
            merged = (
                part_metrics if merged is None else rl_metrics.add_metrics(merged, part_metrics)
            )
        near(total, value, 1e-12)
        near(grads, grad, 1e-12)
        for name, measured in rl_metrics.summarize_metrics(merged).items():
            near(measured, expected[name], 1e-9)
    locations = [(0, 0), (0, 5), (0, 8), (1, 0), (1, 2), (1, 6), (2, 1), (2, 3)]
    packed = pack(samples, sample_coefficients, locations, 3, 15, dirt=np.nan)
    share, grads, part_metrics = jitted(options, packed)
    near(share, value, 1e-12)
    for n, (row, start) in enumerate(locations):
        near(grads[row, start : start + LENGTHS[n]], grad[n, : LENGTHS[n]], 1e-12)
    for name, measured in rl_metrics.summarize_metrics(part_metrics).items():
        near(measured, expected[name], 1e-9)


@pytest.mark.parametrize("options", SPLIT[-3:], ids=["sequence", "corrected", "prompts"])
def test_rows_spread_over_devices_are_the_same_step(options):
    samples = draw(2, LENGTHS)
    locations = [(0, 0), (0, 5), (1, 0), (1, 7), (2, 0), (2, 4), (3, 0), (3, 2)]
    terms = pack(samples, coefficients(options, samples), locations, 4, 10, dirt=np.inf)
    mesh = jax.make_mesh((4, 2), ("rows", "length"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.NamedSharding(mesh, jax.P("rows", "length"))
    expected, actual = jitted(options, terms), jitted(options, jax.device_put(terms, spread))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        near(b, a, 1e-12)


def check_on_policy(module=loss):
    """Check that with r = 1 the presets are REINFORCE, each with its mean."""
    samples = draw(3, LENGTHS)
    for sample in samples:
        sample["logp"] = sample["logp_old"]
    for aggregation in ("token-mean", "seq-mean-token-mean"):
        grads = {}
        for name in ("cispo", "grpo", "dapo", "gspo"):
            options = dataclasses.replace(PRESETS[name], aggregation=aggregation)
            terms = pack(samples, coefficients(options, samples), apart(8), 8, 9)
            grads[name] = value_and_grad(options, terms, module)[1]
            near(grads[name], -terms.coefficients * terms.advantages, 1e-12)
        assert np.abs(grads["cispo"]).max() > 0.01


def test_on_policy_all_are_reinforce():
    check_on_policy()


@pytest.mark.parametrize("dirt", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_masked_is_never_seen(dirt):
    check_masked(dirt)


def check_masked(dirt, module=loss):
    samples = draw(7, LENGTHS)
    for options in SPLIT:
        sample_coefficients = coefficients(options, samples)
        clean = value_and_grad(options, pack(samples, sample_coefficients, apart(8), 8, 9), module)
        dirty = value_and_grad(
            options, pack(samples, sample_coefficients, apart(8), 8, 9, dirt), module
        )
        for expected, actual in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(actual, expected)


def check_sources(module=loss):
    """Check that a gradient reaches logp and entropy, and nothing else."""
    options = SPLIT[-2]
    samples = draw(5, LENGTHS)
    terms = pack(samples, coefficients(options, samples), apart(8), 8, 9)
    grads = jax.grad(lambda t: module.compute_loss(options, t)[0], allow_int=True)(terms)
    for field in dataclasses.fields(terms):
        grad = getattr(grads, field.name)
        if field.name in ("logp", "entropy"):
            assert np.abs(grad).max() > 0
        elif grad is not None and field.name != "segment_ids":
            assert not np.asarray(grad).any(), field.name


def test_a_gradient_reaches_the_policy_alone():
    check_sources()


def check_dtypes(module=loss):
    samples = draw(9, LENGTHS)
    terms = pack(samples, coefficients(CISPO, samples), apart(8), 8, 9)
    for dtype, expected_dtype in [
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ]:
        low_terms = jax.tree.map(lambda x, d=dtype: x.astype(d), terms)
        low_terms = dataclasses.replace(low_terms, segment_ids=terms.segment_ids)
        cast_terms = jax.tree.map(lambda x, w=expected_dtype: x.astype(w), low_terms)
        cast_terms = dataclasses.replace(cast_terms, segment_ids=terms.segment_ids)
        value, parts = module.compute_loss(CISPO, low_terms)
        value_again, parts_again = module.compute_loss(CISPO, cast_terms)
        metrics = rl_metrics.loss_metrics(parts), rl_metrics.loss_metrics(parts_again)
        for a, b in zip(*map(jax.tree.leaves, metrics), strict=True):
            assert a.dtype == expected_dtype
            np.testing.assert_array_equal(a, b)
        assert value.dtype == expected_dtype
        assert value == value_again


def test_computes_in_float32_at_least():
    check_dtypes()


def test_kl_and_entropy_have_their_own_gradients():
    options = dataclasses.replace(CISPO, kl_coef=0.5, entropy_coef=0.25)
    logp, ref, entropy = (jnp.asarray([[x]]) for x in (-1.0, -0.4, 2.0))

    def loss_of(logp, entropy):
        terms = make_terms([[0.0]], [[0.0]], logp_ref=ref, entropy=entropy)
        return loss.compute_loss(options, dataclasses.replace(terms, logp=logp))[0]

    near(loss_of(logp, entropy), 0.5 * (np.exp(0.6) - 1.6) - 0.25 * 2)
    slopes = jax.grad(loss_of, (0, 1))(logp, entropy)
    near(slopes[0], [[0.5 * (1 - np.exp(0.6))]])
    near(slopes[1], [[-0.25]])
    with pytest.raises(ValueError, match="got terms without logp_ref, entropy"):
        loss.compute_loss(options, make_terms([[0.0]], [[0.0]]))


def test_a_divergence_that_is_only_measured_may_be_infinite():
    terms = make_terms([[-1000.0]], [[1.0]], logp_ref=jnp.zeros((1, 1)))
    value, grad, metrics = value_and_grad(CISPO, terms)
    assert metrics.shares["kl_loss"] == np.inf
    near(value, 1000)
    near(grad, [[-1]])


def test_rloo_is_reinforce_whatever_the_ratio():
    terms = shared(PRESETS["rloo"])
    _, grad, _ = value_and_grad(PRESETS["rloo"], terms)
    near(grad, [[-0.5] * 4, [0.5, 0.5, 0, 0]])


def test_a_correction_is_normalised_by_the_whole_step():
    options = dataclasses.replace(
        CISPO, correction=rollout_correction.RolloutCorrection(normalise=True)
    )
    terms = dataclasses.replace(shared(CISPO), logp_rollout=jnp.asarray(OLD - 0.5))
    with pytest.raises(ValueError, match="without weight_mean"):
        loss.compute_loss(options, terms)
    mean = jnp.asarray(np.exp(0.5))  # all weights are that
    value, grad, _ = value_and_grad(options, dataclasses.replace(terms, weight_mean=mean))
    near(value, 1.17543969)
    near(grad, FULL)


# ---- each guard is needed: without it one of the checks above fails

GUARDS = [
    ("jax.lax.stop_gradient(jnp.exp(d))", "jnp.exp(d)"),
    ("value = jax.lax.stop_gradient(value)", "pass"),
    ("jnp.where(real, value, 0.0)", "value * terms.mask"),
    ("jnp.where(real, value, 0.0)", "value"),
    ("value.astype(jnp.promote_types(value.dtype, jnp.float32))", "value"),
    ("jnp.where(clip_mask & keep_mask, rho, 0.0)", "jnp.where(keep_mask, rho, 0.0)"),
    ("d = d * terms.mask", "d = d"),
    ("jnp.clip(ratio, objective.is_weight_min, objective.is_weight_max)", "ratio"),
    ("(advantages > 0) & (ratio > 1 + objective.clip_high)", "ratio > 1 + objective.clip_high"),
    ("(advantages < 0) & (ratio < 1 - objective.clip_low)", "ratio < 1 - objective.clip_low"),
]


def suite(module):
    for name in T2:
        check_t2(name, module)
    check_ratios(module)
    check_on_policy(module)
    check_masked(np.inf, module)
    check_sources(module)
    check_dtypes(module)


@pytest.mark.parametrize(("guard", "without"), GUARDS)
def test_removing_a_guard_is_noticed(guard, without):
    source = pathlib.Path(loss.__file__).read_text()
    assert source.count(guard) == 1
    module = types.ModuleType("mutant")
    module.__dict__["__name__"] = loss.__name__  # where dataclasses look annotations up
    exec(compile(source.replace(guard, without), "mutant", "exec"), module.__dict__)
    with pytest.raises((AssertionError, TypeError)):
        suite(module)


def test_presets_carry_their_names_and_are_hashable():
    assert all(options.name == name for name, options in PRESETS.items())
    assert len({hash(options) for options in PRESETS.values()}) == len(PRESETS)
    assert objective.Objective() == CISPO
    assert (CISPO.is_weight_min, CISPO.is_weight_max) == (None, 5.0)


@pytest.mark.parametrize("name", objective.PRESETS)
def test_a_presets_name_means_the_preset(name):
    """`--set=objective.name=NAME` replaces the name alone."""
    for other in objective.PRESETS:
        if other != name:
            with pytest.raises(ValueError, match=rf"the name '{name}' with .* another name"):
                dataclasses.replace(objective.PRESETS[other], name=name)
    # A changed preset keeps its name, and any fields may have a name of their own.
    changed = dataclasses.replace(objective.PRESETS[name], advantage_eps=1e-4, off_policy_max=1.0)
    assert changed.name == name
    assert dataclasses.replace(objective.PRESETS[name], name="mine").name == "mine"
    if name in ("grpo", "rloo", "gspo", "reinforce_pp"):
        with pytest.raises(ValueError, match=rf"the name '{name}'"):
            dataclasses.replace(objective.PRESETS["cispo"], name=name, entropy_coef=0.1)
