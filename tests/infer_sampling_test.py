"""Tests of infer.sampling against a plain NumPy reference, and of what must not matter."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from infer import sampling

sample = jax.jit(sampling.sample)


def kept_reference(logits, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Sort one row; return its log-probabilities, -inf where it leaves a token out."""
    x = np.asarray(logits, np.float64) / temperature
    order = np.lexsort((np.arange(len(x)), -x))
    order = order[: top_k or None]
    p = np.exp(x[order] - x[order].max())
    p /= p.sum()
    # Less 1e-6: a border that float32 sums cannot tell from the exact one counts as reached.
    order = order[: np.searchsorted(np.cumsum(p), top_p - 1e-6) + 1] if top_p < 1 else order
    order = order[x[order] - x.max() >= np.log(min_p) - 1e-9] if min_p else order
    logp = np.full(len(x), -np.inf)
    logp[order] = x[order] - np.log(np.exp(x[order]).sum())
    return logp


def narrowed(logits, **options):
    """Return the log-probabilities that `sample` draws from."""
    return np.asarray(_narrowed(logits, sampling.options(len(logits), **options)))


@jax.jit
def _narrowed(logits, options):
    x = jnp.asarray(logits) / options.temperature[:, None]
    x = sampling._narrow(x - jnp.max(x, axis=-1, keepdims=True), options)
    return jax.nn.log_softmax(x)


# Whole and half logits make many ties; probabilities stay in a range where float32 is enough.
LOGITS = st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=7, max_size=7)


@hypothesis.given(
    LOGITS,
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0.01, 0.3, 0.57, 0.9, 0.95, 0.999, 1.0]),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_what_is_kept(logits, temperature, top_p, top_k, min_p):
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    got = narrowed(np.asarray([logits], np.float32), **options)[0]
    np.testing.assert_allclose(got, kept_reference(logits, **options), atol=1e-5)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.95, 0.9999])
def test_what_is_kept_of_a_large_vocabulary(top_p):
    logits = np.random.default_rng(0).normal(size=(2, 20_011)).astype(np.float32) * 3
    got = narrowed(logits, top_p=top_p)
    for row, logp in zip(logits, got, strict=True):
        p, kept = np.exp(kept_reference(row)), logp > -np.inf
        assert p[kept].min() > p[~kept].max()
        # Shortest prefix with enough mass, up to the error of float32 sums of 20,011 terms.
        assert p[kept].sum() - p[kept].min() - 1e-5 < top_p <= p[kept].sum() + 1e-5
    assert ((narrowed(logits, top_k=137, top_p=1.0) > -np.inf).sum(axis=1) == 137).all()


def test_rows_are_narrowed_on_their_own():
    logits = np.random.default_rng(1).normal(size=(4, 50)).astype(np.float32)
    options = {
        "temperature": [1.0, 0.7, 1.0, 1.3],
        "top_p": [1.0, 0.5, 0.9, 1.0],
        "top_k": [0, 0, 5, 3],
        "min_p": [0.0, 0.1, 0.0, 0.2],
    }
    got = narrowed(logits, **options)
    for i, row in enumerate(logits):
        own = {name: values[i] for name, values in options.items()}
        np.testing.assert_allclose(got[i], kept_reference(row, **own), atol=1e-5)


def draws(logits, count, seen=None, **options):
    """Draw `count` tokens from one row of logits."""
    keys = sampling.row_keys(7, jnp.arange(count))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen), rows.shape)
    return sample(rows, sampling.options(count, **options), keys, seen)


@pytest.mark.parametrize(
    "options", [{"top_p": 1.0}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 3, "min_p": 0.2}]
)
def test_frequencies_and_logprobs(options):
    logits = np.asarray([1.0, -1.0, 0.5, 2.0, -np.inf, 0.0])
    count = 20_000
    tokens, logp, raw = map(np.asarray, draws(logits, count, **options))
    wanted = kept_reference(logits, **{"top_p": 0.95, **options})
    shares = np.bincount(tokens, minlength=6) / count
    # Five standard deviations of a share are at most 5 * 0.5 / sqrt(20,000) = 0.018.
    np.testing.assert_allclose(shares, np.exp(wanted), atol=0.018)
    np.testing.assert_allclose(logp, wanted[tokens], atol=1e-5)
    np.testing.assert_allclose(raw, kept_reference(logits)[tokens], atol=1e-5)


def test_greedy_takes_the_first_largest_and_has_no_choice():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [-1.0, -2.0, -0.5]])
    keys = sampling.row_keys(0, jnp.arange(2))
    tokens, logp, raw = sample(logits, sampling.options(2, temperature=0.0), keys)
    np.testing.assert_array_equal(tokens, [1, 2])
    np.testing.assert_array_equal(logp, [0.0, 0.0])
    np.testing.assert_allclose(raw, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], atol=1e-6)
    mixed, logp, _ = sample(logits, sampling.options(2, temperature=[0.0, 1.0]), keys)
    assert (mixed[0], logp[0]) == (1, 0.0)
    assert logp[1] < 0


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
def test_narrowest_options_are_greedy(options):
    tokens, logp, _ = draws([1.0, 5.0, 4.9, -np.inf], 50, **options)
    assert (tokens == 1).all()
    np.testing.assert_allclose(logp, 0.0, atol=1e-6)


def test_repetition_penalty():
    logits = np.asarray([2.0, 1.5, -1.0, 0.0, 1.9])
    seen = np.asarray([True, False, True, True, False])
    tokens, _, raw = draws(logits, 3, seen, temperature=0, repetition_penalty=1.2)
    assert (tokens == 4).all()
    np.testing.assert_allclose(raw, kept_reference(logits)[4], atol=1e-6)
    penalised = np.where(seen, np.where(logits > 0, logits / 1.2, logits * 1.2), logits)
    counts = seen.astype(np.int32) * 3
    tokens, logp, _ = draws(logits, 200, counts, top_p=1.0, repetition_penalty=1.2)
    np.testing.assert_allclose(logp, kept_reference(penalised)[np.asarray(tokens)], atol=1e-5)


def test_randomness_is_the_row_s_own():
    logits = jax.random.normal(jax.random.key(0), (5, 300)) * 2
    rows, positions = jnp.arange(5), jnp.asarray([3, 9, 9, 100, 2])
    keys = sampling.step_keys(sampling.row_keys(3, rows), positions)
    together = sample(logits, sampling.options(5), keys)
    for i in range(5):
        alone = sample(logits[i : i + 1], sampling.options(1), keys[i : i + 1])
        assert alone[0][0] == together[0][i]
    order = jnp.asarray([4, 2, 0, 1, 3])
    shuffled = sample(logits[order], sampling.options(5), keys[order])
    np.testing.assert_array_equal(shuffled[0], together[0][order])
    data = jax.random.key_data(keys)
    assert len(np.unique(data, axis=0)) == 5
    other = jax.random.key_data(sampling.row_keys(4, rows))
    assert not np.array_equal(other, jax.random.key_data(sampling.row_keys(3, rows)))


def test_options_never_recompile_and_nothing_sorts():
    function = jax.jit(lambda *args: sampling.sample(*args))
    logits, keys = jnp.zeros((2, 9)), sampling.row_keys(0, jnp.arange(2))
    for values in ({}, {"temperature": 0}, {"top_k": [3, 0]}, {"min_p": 0.5, "top_p": 0.3}):
        function(logits, sampling.options(2, **values), keys)
    assert function._cache_size() == 1
    program = str(jax.make_jaxpr(function)(logits, sampling.options(2), keys))
    assert "while" in program
    assert " sort[" not in program
    assert "top_k" not in program


def test_gumbel_noise():
    noise = sampling.gumbel(jnp.asarray([0, 2**31, 2**32 - 1], jnp.uint32))
    assert np.isfinite(noise).all()
    np.testing.assert_allclose(noise[1], -np.log(np.log(2)), rtol=1e-6)
    assert noise[0] > 22  # one in 2^33


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1; wanted 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": float("inf")}, "temperature: got inf"),
        ({"top_p": 0.0}, "top_p: got 0.0; wanted more than 0, at most 1"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"top_k": -1}, "top_k: got -1; wanted a whole number, 0"),
        ({"top_k": 1.5}, "top_k: got 1.5"),
        ({"min_p": 1.5}, "min_p: got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0; wanted more than 0"),
        ({"temperature": [1.0]}, r"temperature: got shape \(1,\); wanted one number, or 2"),
        ({"top_k": True}, "top_k: got True"),
    ],
)
def test_refused_options(values, error):
    with pytest.raises(ValueError, match=error):
        sampling.options(2, **values)


def test_unknown_option_and_seed():
    with pytest.raises(TypeError, match="got option 'topk'; wanted one of temperature"):
        sampling.options(1, topk=3)
    with pytest.raises(ValueError, match="seed: got -1; wanted 0 to 4294967295"):
        sampling.row_keys(-1, jnp.arange(1))
