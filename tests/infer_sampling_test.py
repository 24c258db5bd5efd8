"""Sampling against a plain NumPy reference, and what must not matter to it."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from infer import options as options_lib
from infer.execution import sampling

choose = jax.jit(sampling.sample_tokens)


def row_keys(step, rows):
    """Return keys of requests with these seeds, at one place of their sequences."""
    return sampling.sampling_keys(jnp.asarray(rows, jnp.uint32), jnp.full(len(rows), step))


def sample(logits, options, keys, counts=None):
    chosen = choose(logits, options, keys, counts)
    return chosen.token, chosen.logp, chosen.logp_raw


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
    return np.asarray(_narrowed(logits, sampling.make_options(len(logits), **options)))


@jax.jit
def _narrowed(logits, options):
    x = jnp.asarray(logits) / options.temperature[:, None]
    x = sampling._narrow_candidates(x - jnp.max(x, axis=-1, keepdims=True), options)
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


def draws(logits, count, counts=None, **options):
    """Draw `count` tokens from one row of logits."""
    keys = row_keys(7, jnp.arange(count))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    counts = None if counts is None else jnp.broadcast_to(jnp.asarray(counts), rows.shape)
    return sample(rows, sampling.make_options(count, **options), keys, counts)


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
    keys = row_keys(0, jnp.arange(2))
    tokens, logp, raw = sample(logits, sampling.make_options(2, temperature=0.0), keys)
    np.testing.assert_array_equal(tokens, [1, 2])
    np.testing.assert_array_equal(logp, [0.0, 0.0])
    np.testing.assert_allclose(raw, jax.nn.log_softmax(logits)[jnp.arange(2), tokens], atol=1e-6)
    mixed, logp, _ = sample(logits, sampling.make_options(2, temperature=[0.0, 1.0]), keys)
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
    tokens, _, raw = draws(logits, 3, seen.astype(np.int32), temperature=0, repetition_penalty=1.2)
    assert (tokens == 4).all()
    np.testing.assert_allclose(raw, kept_reference(logits)[4], atol=1e-6)
    penalised = np.where(seen, np.where(logits > 0, logits / 1.2, logits * 1.2), logits)
    counts = np.asarray([sampling.PROMPT_FLAG, 0, 3, sampling.PROMPT_FLAG + 2, 0])
    tokens, logp, _ = draws(logits, 200, counts, top_p=1.0, repetition_penalty=1.2)
    np.testing.assert_allclose(logp, kept_reference(penalised)[np.asarray(tokens)], atol=1e-5)


@pytest.mark.parametrize("others", [0.0, 1.0])
def test_penalties_that_overflow_have_no_best_token(others):
    """Greedy rows, alone and beside rows that are drawn."""
    logits = jnp.asarray([[3.0, 2.0, 1.0, -4.0], [-3.0, -2.0, -1.0, -4.0]] * 2)
    seen = jnp.ones((4, 4), jnp.int32)
    penalties = [2e-38, 3e38, 1.5, 1.0]  # the first ones make all of a row infinite
    temperatures = [0.0, 0.0, others, others]
    options = sampling.make_options(
        4, temperature=temperatures, top_p=1.0, repetition_penalty=penalties
    )
    logits = logits.at[0, 3].set(1e30).at[1].mul(1e10)
    chosen = choose(logits, options, row_keys(0, [1, 2, 3, 4]), seen)
    assert np.isnan(chosen.logp[:2]).all()
    assert np.isfinite(chosen.logp_raw).all()
    assert np.isfinite(chosen.logp[2:]).all()
    # Without an overflow a greedy row has no other choice.
    if not others:
        assert (chosen.logp[2:] == 0).all()


def test_randomness_is_the_row_s_own():
    logits = jax.random.normal(jax.random.key(0), (5, 300)) * 2
    rows, positions = jnp.arange(5), jnp.asarray([3, 9, 9, 100, 2])
    keys = sampling.sampling_keys(rows, positions)
    together = sample(logits, sampling.make_options(5), keys)
    for i in range(5):
        alone = sample(logits[i : i + 1], sampling.make_options(1), keys[i : i + 1])
        assert alone[0][0] == together[0][i]
    order = jnp.asarray([4, 2, 0, 1, 3])
    shuffled = sample(logits[order], sampling.make_options(5), keys[order])
    np.testing.assert_array_equal(shuffled[0], together[0][order])
    data = jax.random.key_data(keys)
    assert len(np.unique(data, axis=0)) == 5
    data = jax.random.key_data(row_keys(9, rows))
    assert len(np.unique(data, axis=0)) == 5


def test_options_never_recompile_and_nothing_sorts():
    function = jax.jit(lambda *args: sampling.sample_tokens(*args))
    logits, keys = jnp.zeros((2, 9)), row_keys(0, jnp.arange(2))
    many = {"presence_penalty": 1, "frequency_penalty": [0, 1], "top_logprobs": [0, 3]}
    for values in ({}, {"temperature": 0}, {"top_k": [3, 0]}, {"min_p": 0.5, "top_p": 0.3}, many):
        function(logits, sampling.make_options(2, **values), keys)
    assert function._cache_size() == 1
    program = str(jax.make_jaxpr(function)(logits, sampling.make_options(2), keys))
    assert "while" in program
    assert " sort[" not in program
    # The only top_k is inside the branch for rows that ask for log-probabilities.
    assert program.count("top_k[") == 1


def test_gumbel_noise():
    noise = sampling.gumbel_noise(jnp.asarray([0, 2**31, 2**32 - 1], jnp.uint32))
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
        ({"presence_penalty": [0, 3]}, "presence_penalty: got 3; wanted -2 to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty: got -2.5; wanted -2 to 2"),
        ({"top_logprobs": 21}, "top_logprobs: got 21; wanted a whole number"),
        ({"temperature": [1.0]}, r"temperature: got shape \(1,\); wanted one number, or 2"),
        ({"top_k": True}, "top_k: got True"),
    ],
)
def test_refused_options(values, error):
    with pytest.raises(ValueError, match=error):
        sampling.make_options(2, **values)


def test_options_of_requests():
    asked = options_lib.Options(temperature=0.5, top_k=3, top_logprobs=2)
    made = sampling.make_options(1, **asked.sampling_values)
    assert {f.name for f in dataclasses.fields(made)} == set(asked.sampling_values)
    for name, value in asked.sampling_values.items():
        np.testing.assert_allclose(getattr(made, name), [value])
    assert (made.top_k.dtype, made.top_p.dtype) == (jnp.int32, jnp.float32)


def test_unknown_option():
    with pytest.raises(TypeError, match="got option 'topk'; wanted one of temperature"):
        sampling.make_options(1, topk=3)


V = 45  # not a whole number of words of a mask


def packed(allowed):
    """Pack booleans [B, V] into words, bit v % 32 of word v // 32; the rest of the last is 0."""
    padded = np.zeros((len(allowed), -(-allowed.shape[1] // 32) * 32), np.uint32)
    padded[:, : allowed.shape[1]] = allowed
    return (padded.reshape(len(allowed), -1, 32) << np.arange(32, dtype=np.uint32)).sum(
        axis=-1, dtype=np.uint32
    )


@dataclasses.dataclass
class Case:
    """Eight rows of logits, and what limits them."""

    logits: np.ndarray
    counts: np.ndarray
    bias: np.ndarray
    allowed: np.ndarray
    banned: np.ndarray

    @property
    def args(self):
        return self.counts, self.bias, packed(self.allowed), self.banned

    def rows(self, places):
        values = dataclasses.asdict(self).values()
        return Case(*(value[np.asarray(places)] for value in values))


def make_case(seed, vocab_size=V, batch=8):
    rng = np.random.default_rng(seed)
    shape = batch, vocab_size
    logits = (rng.normal(size=shape) * 2).astype(np.float32)
    counts = rng.integers(0, 4, shape) * (rng.random(shape) < 0.3)
    counts = counts + sampling.PROMPT_FLAG * (rng.random(shape) < 0.3)
    bias = np.where(rng.random(shape) < 0.2, rng.normal(size=shape) * 2, 0).astype(np.float32)
    allowed = rng.random(shape) < 0.7
    banned = np.full((batch, 8), -1)
    banned[:, 1:3] = rng.integers(0, vocab_size, (batch, 2))
    return Case(logits, counts.astype(np.int32), bias, allowed, banned.astype(np.int32))


def nothing(case):
    """The same logits with no limits."""
    return Case(
        case.logits,
        np.zeros_like(case.counts),
        np.zeros_like(case.bias),
        np.ones_like(case.allowed),
        np.full_like(case.banned, -1),
    )


def limited_reference(case, row, repetition=1.0, presence=0.0, frequency=0.0, **narrow):
    """Return the log-probabilities of one row, one token after the other."""
    x = np.asarray(case.logits[row], np.float64)
    for token, count in enumerate(case.counts[row].tolist()):
        output = count % sampling.PROMPT_FLAG
        if count:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        x[token] -= frequency * output
        x[token] -= presence if output else 0
        x[token] += case.bias[row, token]
        if not case.allowed[row, token] or token in case.banned[row]:
            x[token] = -np.inf
    return kept_reference(x, **narrow)


PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}
SHORT = {"repetition": 1.3, "presence": 0.7, "frequency": -0.4}


@pytest.mark.parametrize("seed", range(3))
def test_frequencies_with_every_feature(seed):
    case = make_case(seed).rows([0])
    narrow = {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02}
    logp = limited_reference(case, 0, **SHORT, **narrow)
    draws, batch = 40_000, 4_000
    rows = case.rows([0] * batch)
    options = sampling.make_options(batch, **PENALTIES, **narrow)
    tokens = []
    for number in range(draws // batch):
        keys = row_keys(number, jnp.arange(batch))
        chosen = choose(rows.logits, options, keys, *rows.args)
        np.testing.assert_allclose(chosen.logp, logp[np.asarray(chosen.token)], atol=1e-5)
        tokens.append(np.asarray(chosen.token))
    found = np.bincount(np.concatenate(tokens), minlength=V)
    wanted = np.exp(logp) * draws
    assert not found[wanted == 0].any()
    kept = wanted > 0
    assert 5 < kept.sum() < 20
    chi_square = (((found - wanted)[kept]) ** 2 / wanted[kept]).sum()
    # Mean and standard deviation of chi-square are n and sqrt(2 n); four of them and a margin.
    freedom = kept.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom) + 4


def test_each_feature_alone():
    case, keys = make_case(5), row_keys(0, jnp.arange(8))
    off = nothing(case)
    for changes, options, short in [
        ({"counts": case.counts}, {"presence_penalty": 1.5}, {"presence": 1.5}),
        ({"counts": case.counts}, {"frequency_penalty": 0.5}, {"frequency": 0.5}),
        ({"counts": case.counts}, {"repetition_penalty": 0.8}, {"repetition": 0.8}),
        ({"bias": case.bias}, {}, {}),
        ({"allowed": case.allowed}, {}, {}),
        ({"banned": case.banned}, {}, {}),
    ]:
        one = dataclasses.replace(off, **changes)
        chosen = choose(one.logits, sampling.make_options(8, top_p=1, **options), keys, *one.args)
        for row, token in enumerate(np.asarray(chosen.token).tolist()):
            logp = limited_reference(one, row, **short)
            np.testing.assert_allclose(chosen.logp[row], logp[token], atol=1e-5)
            raw = kept_reference(case.logits[row])[token]
            np.testing.assert_allclose(chosen.logp_raw[row], raw, atol=1e-5)


def test_mask_and_ban_leave_one_token():
    case = make_case(6)
    alone = nothing(case)
    alone.allowed[:] = False
    alone.allowed[np.arange(8), np.arange(8) * 6] = True
    keys = row_keys(0, jnp.arange(8))
    options = sampling.make_options(8, temperature=[0.0, 5.0] * 4)
    chosen = choose(alone.logits, options, keys, *alone.args)
    np.testing.assert_array_equal(chosen.token, np.arange(8) * 6)
    np.testing.assert_array_equal(chosen.logp, np.zeros(8))
    last = nothing(case)
    last.logits[:, -1] = 50.0  # -1, which is none, must not ban the last one
    last.banned[:, 3] = 2
    chosen = choose(last.logits, sampling.make_options(8, temperature=0), keys, *last.args)
    assert (chosen.token == V - 1).all()


def test_most_likely_tokens():
    case, keys = make_case(7), row_keys(0, jnp.arange(8))
    case.logits[1, 5:9] = 9.0  # ties go by id
    options = sampling.make_options(8, top_logprobs=[0, 1, 20, 0, 3, 0, 0, 0], **PENALTIES)
    chosen = choose(case.logits, options, keys, *case.args)
    for row in range(8):
        if row in (1, 2, 4):
            logp = kept_reference(case.logits[row])
            order = np.lexsort((np.arange(V), -case.logits[row]))[:20]
            np.testing.assert_array_equal(chosen.top_ids[row], order)
            np.testing.assert_allclose(chosen.top_logp[row], logp[order], atol=1e-5)
        else:
            assert (chosen.top_ids[row] == -1).all()
            assert np.isneginf(chosen.top_logp[row]).all()
    few = choose(case.logits[:, :7], options, keys)
    assert sorted(np.asarray(few.top_ids[2])[:7].tolist()) == list(range(7))
    assert (few.top_ids[2, 7:] == -1).all()


def test_forced_tokens():
    case, keys = make_case(8), row_keys(0, jnp.arange(8))
    narrow = {"temperature": 1.4, "top_k": 20, "top_p": 0.9}
    options = sampling.make_options(
        8, **PENALTIES, **(narrow | {"temperature": [1.4] * 6 + [0, 0]})
    )
    chosen = choose(case.logits, options, keys, *case.args)
    token = np.asarray([-1, 0, 1, 2, -1, 44, 3, int(chosen.token[7])], np.int32)
    after = choose(case.logits, options, keys, *case.args, token)
    np.testing.assert_array_equal(after.token, np.where(token < 0, chosen.token, token))
    np.testing.assert_array_equal(after.top_ids, chosen.top_ids)
    for row in range(8):
        if token[row] < 0:
            assert (after.logp[row], after.logp_raw[row]) == (
                chosen.logp[row],
                chosen.logp_raw[row],
            )
            continue
        logp = limited_reference(case, row, **SHORT, **narrow)[token[row]]
        wanted = {6: -np.inf, 7: 0.0}.get(row, logp)  # greedy rows
        np.testing.assert_allclose(after.logp[row], wanted, atol=1e-5)
        raw = kept_reference(case.logits[row])[token[row]]
        np.testing.assert_allclose(after.logp_raw[row], raw, atol=1e-5)
    # Forcing what is chosen anyway changes nothing.
    same = choose(case.logits, options, keys, *case.args, chosen.token)
    jax.tree.map(np.testing.assert_array_equal, same, chosen)


ROWS = {
    "temperature": [1.0, 0.7, 1.3, 1.0, 0.0, 0.9, 1.0, 2.0],
    "top_p": [1.0, 0.9, 0.95, 0.5, 0.9, 1.0, 0.9999999, 0.99],
    "top_k": [0, 12, 0, 7, 3, 0, 100_000, 30],
    "min_p": [0.0, 0.0, 0.1, 0.0, 0.2, 0.0, 0.0, 0.01],
    "repetition_penalty": [1.0, 1.2, 1.0, 1.0, 0.9, 1.0, 1.0, 1.5],
    "presence_penalty": [0.0, 0.0, 0.5, 0.0, 1.0, 0.0, 0.0, -0.3],
    "frequency_penalty": [0.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.1],
    "top_logprobs": [0, 5, 0, 20, 1, 0, 0, 2],
}
PLAIN = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}


def bits(chosen, row):
    return [np.asarray(leaf)[row].tobytes() for leaf in jax.tree.leaves(chosen)]


@pytest.mark.parametrize("vocab_size", [V, 20_011])
def test_other_rows_never_change_a_bit(vocab_size):
    """Each row among rows with every feature, and alone among greedy ones with none."""
    case, keys = make_case(9, vocab_size), row_keys(1, jnp.arange(8))
    # Rows without limits of their own beside rows that have them; every row has counts.
    for row in (0, 5, 6):
        for name in ("bias", "allowed", "banned"):
            getattr(case, name)[row] = getattr(nothing(case), name)[row]
    case.logits[:, 3] = -0.0
    token = np.asarray([-1, 3, -1, -1, 5, -1, 2, -1], np.int32)
    options = sampling.make_options(8, **ROWS)
    together = choose(case.logits, options, keys, *case.args)
    together_forced = choose(case.logits, options, keys, *case.args, token)
    for row in range(8):
        alone = dataclasses.replace(nothing(case), counts=case.counts)
        for name in ("bias", "allowed", "banned"):
            getattr(alone, name)[row] = getattr(case, name)[row]
        values = {}
        for name, column in ROWS.items():
            values[name] = [PLAIN.get(name, 0)] * 8
            values[name][row] = column[row]
        options = sampling.make_options(8, **values)
        chosen = choose(case.logits, options, keys, *alone.args)
        assert bits(chosen, row) == bits(together, row), row
        own = np.where(np.arange(8) == row, token, -1)
        after = choose(case.logits, options, keys, *alone.args, own)
        assert bits(after, row) == bits(together_forced, row), row


@pytest.mark.parametrize("vocab_size", [V, 20_011])
def test_a_row_s_place_never_changes_a_bit(vocab_size):
    case, keys = make_case(10, vocab_size), row_keys(1, jnp.arange(8))
    options = sampling.make_options(8, **ROWS)
    straight = choose(case.logits, options, keys, *case.args)
    order = [7, 2, 0, 5, 1, 6, 3, 4]
    moved = case.rows(order)
    options = jax.tree.map(lambda column: column[jnp.asarray(order)], options)
    chosen = choose(moved.logits, options, keys[jnp.asarray(order)], *moved.args)
    for place, row in enumerate(order):
        assert bits(chosen, place) == bits(straight, row)
