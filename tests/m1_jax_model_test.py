"""What must hold for the model whatever its weights: packing, padding, state, memory, sharding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import m1_jax
from m1_jax import (
    ModelConfig,
    experts,
    lightning,
    logprobs,
    moe,
    oracle,
    ring_attention,
    sharding,
    testing,
)
from m1_jax import params as params_lib
from m1_jax.config import LIGHTNING, SOFTMAX

SMALL = dataclasses.replace(
    ModelConfig.tiny(), layer_types=(LIGHTNING, SOFTMAX), vocab_size=128, initializer_range=0.2
)


@pytest.fixture(scope="module")
def model():
    return m1_jax.MiniMaxM1(SMALL, nnx.Rngs(0), dtype=jnp.float32)


def tokens_of(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, SMALL.vocab_size, shape), jnp.int32)


def close(got, wanted, atol=2e-4):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


# ---- documents and padding


def test_packed_documents_equal_separate_ones(model):
    lengths = [70, 1, 64, 15]
    documents = [tokens_of(1, n, seed=n) for n in lengths]
    packed = jnp.concatenate(documents, axis=1)
    ids = jnp.asarray(np.repeat([[4, 2, 9, 1]], lengths, axis=1), jnp.int32)
    got = np.split(np.asarray(model(packed, ids)), np.cumsum(lengths)[:-1], axis=1)
    for part, document in zip(got, documents, strict=True):
        close(part, model(document))


def test_no_gradient_crosses_a_document_border(model):
    tokens = tokens_of(1, 40)
    ids = jnp.asarray(np.repeat([[1, 2]], [25, 15], axis=1), jnp.int32)

    def second_document(table):
        changed = nnx.clone(model)
        changed.embed.table[...] = table
        return jnp.sum(changed(tokens, ids)[:, 25:] ** 2)

    grad = jax.grad(second_document)(model.embed.table[...])
    unseen = np.setdiff1d(np.asarray(tokens[:, :25]), np.asarray(tokens[:, 25:]))
    assert unseen.size > 5
    np.testing.assert_array_equal(np.asarray(grad)[unseen], 0)


def test_padding_never_changes_a_real_token(model):
    tokens = tokens_of(2, 60)
    wanted = model(tokens)
    for before, after in ((0, 9), (70, 0), (3, 66)):
        pad = ((0, 0), (before, after))
        ids = jnp.pad(jnp.ones_like(tokens), pad)
        one, two = (model(jnp.pad(tokens, pad, constant_values=fill), ids) for fill in (0, 77))
        real = slice(before, before + 60)
        close(one[:, real], wanted)
        np.testing.assert_array_equal(one[:, real], two[:, real])
        assert np.isfinite(one).all()


def test_router_statistics_leave_padding_out(model):
    tokens = tokens_of(2, 30)
    statistics = jax.jit(lambda *a: model.hidden(*a)[1])
    wanted = moe.balance_loss(statistics(tokens))
    padded = jnp.pad(tokens, ((0, 0), (0, 20)))
    ids = jnp.pad(jnp.ones_like(tokens), ((0, 0), (0, 20)))
    stats = statistics(padded, ids)
    np.testing.assert_allclose(moe.balance_loss(stats), wanted, rtol=1e-5)
    np.testing.assert_array_equal(stats.num_tokens, [60, 60])


def test_perfect_balance_is_the_number_of_slots():
    stats = moe.RouterStats(
        jnp.full((3, 2, 8), 4.0), jnp.full((3, 8), 4.0), jnp.full((3,), 32.0), jnp.zeros(3)
    )
    np.testing.assert_allclose(moe.balance_loss(stats), 2.0, rtol=1e-6)


def test_given_positions_are_used(model):
    tokens = tokens_of(1, 20)
    shifted = model(tokens, positions=jnp.arange(20, dtype=jnp.int32)[None] + 5)
    close(shifted, model(tokens))  # RoPE sees differences only
    doubled = model(tokens, positions=2 * jnp.arange(20, dtype=jnp.int32)[None])
    assert np.max(np.abs(doubled - model(tokens))) > 1e-3


# ---- decode state


def test_rows_of_different_lengths_extend_as_if_alone(model):
    lengths, more = np.array([37, 5, 64]), np.array([1, 3, 0])
    tokens, extra = tokens_of(3, 64), tokens_of(3, 3, seed=1)
    state = model.init_state(3, 80)
    logits, state = model.extend(tokens, state, num_tokens=jnp.asarray(lengths))
    last, again = model.extend(
        tokens, model.init_state(3, 80), num_tokens=jnp.asarray(lengths), last_only=True
    )
    second, state = model.extend(extra, state, num_tokens=jnp.asarray(more))
    assert state.length.tolist() == (lengths + more).tolist()
    assert again.length.tolist() == lengths.tolist()
    assert np.isfinite(logits).all()
    for row, (n, m) in enumerate(zip(lengths, more, strict=True)):
        alone = jnp.concatenate([tokens[row : row + 1, :n], extra[row : row + 1, :m]], axis=1)
        wanted = np.asarray(model(alone))[0]
        close(logits[row, :n], wanted[:n])
        close(last[row, 0], wanted[n - 1])
        close(second[row, :m], wanted[n:])


def test_extend_runs_under_jit_and_keeps_float32_state():
    model = m1_jax.MiniMaxM1(SMALL, nnx.Rngs(0), dtype=jnp.bfloat16)
    state = model.init_state(2, 16)
    assert state.group_states[0].dtype == jnp.float32
    assert state.group_states[1].keys.dtype == jnp.bfloat16
    logits, state = jax.jit(lambda m, t, s: m.extend(t, s))(model, tokens_of(2, 4), state)
    assert logits.dtype == jnp.float32
    assert state.group_states[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.extend(tokens_of(2, 9), m.init_state(2, 8)), "holds 8 tokens per row; got 9"),
        (lambda m: m.extend(tokens_of(3, 2), m.init_state(2, 8)), r"wanted \[2, T >= 1\]"),
        (lambda m: m.extend(tokens_of(2, 0), m.init_state(2, 8)), r"wanted \[B >= 1, T >= 1\]"),
        (lambda m: m.extend(jnp.full((2, 1), 128), m.init_state(2, 8)), "token id 128 is outside"),
        (lambda m: m(jnp.full((1, 3), -1)), "token id -1 is outside"),
        (lambda m: m(tokens_of(7)), r"tokens: got shape \(7,\)"),
        (lambda m: m(tokens_of(1, 7), tokens_of(1, 6)), "segment_ids: got shape"),
        (lambda m: m(tokens_of(1, 7), None, tokens_of(1, 6)), "positions: got shape"),
        (lambda m: m(tokens_of(1, 7).astype(jnp.float32)), "got dtype float32; wanted int32"),
        (
            lambda m: m.extend(tokens_of(1, 3), m.init_state(1, 8), num_tokens=jnp.array([4])),
            r"num_tokens: got \[4\]; wanted 0 to 3",
        ),
        (lambda m: m.init_state(0, 8), "wanted at least 1 of each"),
    ],
)
def test_bad_calls_say_what_is_wrong(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


# ---- sizes


def test_full_size_model_has_the_release_s_parameters_and_bytes():
    leaves = jax.tree.leaves(params_lib.abstract_model(ModelConfig.m1()))
    assert sum(math.prod(x.shape) for x in leaves) == 456_089_655_296
    assert sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) == 912_210_767_872


def equations(jaxpr):
    """Yield every equation of a jaxpr and of the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from equations(getattr(value, "jaxpr", value))


def largest_array(jaxpr) -> int:
    """Elements of the largest intermediate anywhere in a jaxpr."""
    avals = (out.aval for eqn in equations(jaxpr) for out in eqn.outvars)
    return max(math.prod(getattr(aval, "shape", ())) for aval in avals)


def test_memory_of_a_long_sequence_is_linear():
    config = dataclasses.replace(SMALL, vocab_size=64)
    model = params_lib.abstract_model(config, jnp.float32)

    def loss(model, tokens):
        hidden, _ = model.hidden(tokens)
        return jnp.sum(logprobs.token_logprobs(model, hidden, tokens, 1024).logp)

    sizes = {}
    for length in (16_384, 32_768):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        program = jax.make_jaxpr(jax.grad(loss))(model, tokens)
        sizes[length] = largest_array(program.jaxpr)
    assert 32_768 * 64 <= sizes[32_768] < 32_768**2 / 8
    assert sizes[32_768] <= 2.01 * sizes[16_384]


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_memory_of_a_split_sequence_is_linear(monkeypatch, remat):
    monkeypatch.setattr(ring_attention, "MAX_GATHER_BYTES", 0)
    config = dataclasses.replace(
        SMALL, layer_types=(LIGHTNING, SOFTMAX) * 2, vocab_size=64, remat=remat
    )
    layout = sharding.make_layout(sharding.make_mesh({"context": 4}, jax.devices()[:4]), config)
    model = params_lib.abstract_model(config, jnp.float32, layout=layout)

    def loss(model, tokens):
        hidden, _ = model.hidden(tokens)
        return jnp.sum(logprobs.token_logprobs(model, hidden, tokens, 1024).logp)

    sizes = {}
    for length in (32_768, 65_536):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        sizes[length] = largest_array(jax.make_jaxpr(jax.grad(loss))(model, tokens).jaxpr)
    # Masks of all pairs of blocks, moved out of the loop over layers, would be quadratic.
    assert sizes[65_536] <= 2.01 * sizes[32_768]


def test_program_size_does_not_grow_with_depth():
    def size(repeats):
        config = dataclasses.replace(SMALL, layer_types=SMALL.layer_types * repeats)
        model = params_lib.abstract_model(config, jnp.float32)
        tokens = jax.ShapeDtypeStruct((1, 32), jnp.int32)
        program = jax.make_jaxpr(lambda m, t: m.hidden(t))(model, tokens)
        return sum(1 for _ in equations(program.jaxpr))

    assert 100 < size(2) == size(40)


# ---- options that must not change the result


@pytest.mark.parametrize("remat", ["layer", "attention", "dots", "products"])
def test_remat_changes_no_gradient(model, remat):
    tokens = tokens_of(1, 20)
    # A sum of squares would not do: the last norm makes it a constant, and its gradient rounding.
    direction = jax.random.normal(jax.random.key(0), (1, 20, SMALL.hidden_size))

    def grads(config):
        other = nnx.clone(model)
        other.config = config
        return jax.jit(jax.grad(lambda m: jnp.sum(m.hidden(tokens)[0] * direction)))(other)

    wanted, got = grads(SMALL), grads(dataclasses.replace(SMALL, remat=remat))
    got = params_lib.params_by_path(got)
    for name, param in params_lib.params_by_path(wanted).items():
        scale = np.max(np.abs(param[...])) + 1e-30
        assert np.max(np.abs(got[name][...] - param[...])) / scale < 1e-5, name


@jax.jit
def compute_hidden(model, tokens):
    return model.hidden(tokens)[0]


def test_token_logprobs_do_not_depend_on_the_chunk(model):
    tokens = tokens_of(2, 50)
    hidden = compute_hidden(model, tokens)
    wanted = jnp.take_along_axis(
        jax.nn.log_softmax(model.head(hidden), axis=-1), tokens[:, :, None], axis=-1
    )[:, :, 0]
    chunked = jax.jit(logprobs.token_logprobs, static_argnums=3)
    for chunk in (None, 7, 100, 128):
        close(chunked(model, hidden, tokens, chunk).logp, wanted, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 7, 100])
def test_entropy_of_chunks_is_that_of_the_whole(model, chunk, temperature):
    tokens = tokens_of(2, 20)
    hidden = 3 * compute_hidden(model, tokens)  # sharper, so that no gradient is lost in rounding

    def chunked(hidden):
        out = logprobs.token_logprobs(
            model,
            hidden,
            tokens,
            chunk,
            with_entropy=True,
            temperature=temperature,
        )
        return out.logp, out.log_normalizer, out.entropy

    def whole(hidden):
        logits = model.head(hidden) / temperature
        logp = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logp, tokens[:, :, None], axis=-1)[:, :, 0]
        return (
            chosen,
            jax.scipy.special.logsumexp(logits, axis=-1),
            -jnp.sum(jnp.exp(logp) * logp, axis=-1),
        )

    factors = jnp.asarray(np.random.default_rng(0).standard_normal(tokens.shape), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(function, hidden):
        values, pull = jax.vjp(function, hidden)
        zeros = [jnp.zeros_like(factors)] * 3
        ones = [(*zeros[:i], factors, *zeros[i + 1 :]) for i in range(3)]
        return values, [pull(cotangent)[0] for cotangent in ones]

    got, wanted = (values_and_gradients(function, hidden) for function in (chunked, whole))
    for index in range(3):
        close(got[0][index], wanted[0][index], 1e-5)
        assert np.abs(wanted[1][index]).max() > 1e-3
        close(got[1][index], wanted[1][index], 1e-5)


def test_entropy_is_there_where_it_was_asked_for(model):
    tokens = tokens_of(1, 5)
    hidden = compute_hidden(model, tokens)
    compute = jax.jit(logprobs.token_logprobs, static_argnames="with_entropy")
    assert compute(model, hidden, tokens).entropy is None
    out = compute(model, hidden, tokens, with_entropy=True)
    assert out.entropy.shape == out.log_normalizer.shape == out.logp.shape == (1, 5)
    with pytest.raises(ValueError, match="temperature: got 0; wanted more than 0"):
        logprobs.token_logprobs(model, hidden, tokens, temperature=0)


# ---- parts


@pytest.mark.parametrize("sizes", [[5, 0, 3, 0], [0, 0, 0, 2], [300, 0, 45, 700], [1, 0, 0, 0]])
def test_cpu_experts_equal_ragged_dot(sizes):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    num = sum(sizes)
    rows, matrices = draw(num, 16), (draw(4, 16, 24), draw(4, 16, 24), draw(4, 24, 16))
    weights = draw(num)
    sizes = jnp.asarray(sizes, jnp.int32)
    cotangent = draw(*rows.shape)

    def differentiate(function):
        def value(*arguments):
            return function(*arguments[:4], sizes, arguments[4])

        out, vjp = jax.vjp(value, rows, *matrices, weights)
        return out, *vjp(cotangent)

    # By hand from what the forward pass keeps, against autodiff.
    def run_ragged():
        arguments = (rows, *matrices, sizes, weights)
        out, *kept = experts._grouped_mlp_ragged(*arguments)
        return out, *experts._ragged_gradients(*arguments, *kept, cotangent)

    wanted = jax.jit(lambda: differentiate(lambda *x: experts._grouped_mlp_ragged(*x)[0]))()
    for got in (jax.jit(lambda: differentiate(experts.grouped_mlp))(), jax.jit(run_ragged)()):
        for a, b in zip(got, wanted, strict=True):
            assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b)) + 1e-30


@pytest.mark.parametrize("packed", [False, True])
def test_blockwise_attention_equals_one_block(monkeypatch, packed):
    rng = np.random.default_rng(0)
    shapes = ((2, 75, 4, 8), (2, 2, 90, 8), (2, 2, 90, 8))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    places = jnp.arange(75, dtype=jnp.int32)[None] + 15
    key_places = jnp.arange(90, dtype=jnp.int32)[None]
    documents = [None, None]
    if packed:
        ids = np.repeat([[1, 0, 2, 3], [1, 1, 1, 2]], [30, 8, 20, 32], axis=1).astype(np.int32)
        documents = [jnp.asarray(ids[:, 15:]), jnp.asarray(ids)]

    def value(q, k, v):
        return ring_attention.causal_attention(q, k, v, places, key_places, *documents)

    def both(q, k, v):
        out, vjp = jax.vjp(value, q, k, v)
        return out, *vjp(jnp.cos(out))

    wanted = jax.jit(both)(q, k, v)
    monkeypatch.setattr(ring_attention, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(ring_attention, "MAX_DIRECT_PAIRS", 0)
    got = jax.jit(lambda *a: both(*a))(q, k, v)
    for a, b in zip(got, wanted, strict=True):
        assert np.isfinite(a).all()
        close(a, b, 1e-5)


def test_rematerialised_attention_keeps_no_pair_of_blocks(monkeypatch):
    """The conditionals of a loop, differentiated by jax, would keep sums for every pair."""
    monkeypatch.setattr(ring_attention, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(ring_attention, "MAX_DIRECT_PAIRS", 0)
    queries, keys = ((1, 96, 4, 8), (1, 2, 96, 8))
    places = jnp.arange(96, dtype=jnp.int32)[None]

    @jax.checkpoint
    def value(q, k, v):
        return jnp.sum(ring_attention.causal_attention(q, k, v, places, places))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (queries, keys, keys)]
    traced = jax.make_jaxpr(jax.grad(value, (0, 1, 2)))(*shapes)
    assert max(_sizes(traced.jaxpr)) <= 96 * 4 * 8  # as many numbers as q has


def _sizes(jaxpr):
    """Return the size of every array that a program computes, also in its loops."""
    for equation in jaxpr.eqns:
        yield from (math.prod(getattr(x.aval, "shape", ())) for x in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from _sizes(getattr(value, "jaxpr", value))


def _is_program(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def test_slopes_are_the_release_s():
    slopes = lightning.decay_slopes(ModelConfig.m1())
    assert slopes.shape == (80, 64)
    assert slopes.dtype == np.float32
    np.testing.assert_allclose(slopes[0, 0], 0.917, rtol=1e-3)
    np.testing.assert_allclose(slopes[78, 63], 4.949e-5, rtol=1e-3)
    config = testing.tiny_config(
        num_attention_heads=6, attn_type_list=[0, 0, 1], num_hidden_layers=3
    )
    for layer in range(3):
        np.testing.assert_array_equal(
            lightning.decay_slopes(ModelConfig.from_hf(config))[layer],
            oracle.lightning_slopes(config, layer),
        )


@pytest.mark.slow
def test_full_size_programs_lower_for_tpu_in_a_minute():
    model = params_lib.abstract_model(ModelConfig.m1())
    tokens = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(model, tokens):
        hidden, stats = model.hidden(tokens)
        logp = logprobs.token_logprobs(model, hidden[:, :-1], tokens[:, 1:]).logp
        return -jnp.mean(logp) + 0.001 * moe.balance_loss(stats)

    def decode(model, tokens, state):
        return model.extend(tokens, state)

    state = jax.eval_shape(lambda: model.init_state(8, 32_768))
    step = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    for function, args in (
        (lambda m, t: m(t), (model, tokens)),
        (jax.grad(loss), (model, tokens)),
        (decode, (model, step, state)),
    ):
        jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",))
