"""Rows travel to their experts and back: values, gradients, garbage in buffers, collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from m1_jax import (
    ModelConfig,
    choice_rows,
    exchange_plan,
    expert_exchange,
    experts,
    fsdp,
    moe,
    sharding,
)

DEVICES, EXPERTS, WIDTH, HIDDEN, TOKENS = 4, 8, 16, 24, 24
LAYERS = (2, 3)  # of the stack
TOKEN_AXIS, EXPERT_AXIS = PartitionSpec("expert"), PartitionSpec("expert")


@functools.cache
def make_layout(mode=sharding.TRAIN):
    mesh = sharding.make_mesh({"expert": DEVICES}, jax.devices()[:DEVICES])
    layout = sharding.make_layout(mesh, ModelConfig.tiny(), mode)
    assert layout is not None
    return layout


def draw_inputs(choose="any", num_choices=2):
    """Return tokens, weights, expert ids, and the experts' matrices.

    With "any", every seventh choice is of no expert. With "first", all choose experts 0 and 1,
    which are the first device's, so that rows come in several rounds.
    """
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)

    ids = np.stack([rng.permutation(EXPERTS)[:num_choices] for _ in range(TOKENS)])
    if choose == "first":
        ids = np.tile(np.arange(num_choices), (TOKENS, 1))
    else:
        ids.reshape(-1)[::7] = EXPERTS
    gate, up, down = (
        draw(EXPERTS, *shape) for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH))
    )
    weights = jnp.asarray(rng.random((TOKENS, num_choices)), jnp.float32)
    return draw(TOKENS, WIDTH), weights, jnp.asarray(ids, jnp.int32), gate, up, down


def compute_dense(x, weights, ids, gate, up, down):
    """Compute every expert on every token, and take what was chosen."""
    hidden = jax.nn.silu(jnp.einsum("md,edf->emf", x, gate)) * jnp.einsum("md,edf->emf", x, up)
    outputs = jnp.einsum("emf,efd->emd", hidden, down)
    factors = jax.nn.one_hot(ids, EXPERTS) * weights[:, :, None]  # an id past the end is all 0
    return jnp.einsum("mae,emd->md", factors, outputs)


def exchange(*inputs, capacity=None):
    program = sharding.run_sharded(
        make_layout(),
        lambda *inputs: expert_exchange.run_routed_experts(*inputs, capacity)[0],
        (*(TOKEN_AXIS,) * 3, *(EXPERT_AXIS,) * 3),
        TOKEN_AXIS,
    )
    return program(*inputs)


def fill_with_nan(monkeypatch):
    """Make uninitialised memory the worst it can be. On CPU it is zeros otherwise."""
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


def value_and_gradients(function, inputs):
    x, weights, ids, *matrices = inputs
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    @jax.jit
    def run(x, weights, matrices):
        y, pullback = jax.vjp(lambda x, w, m: function(x, w, ids, *m), x, weights, matrices)
        return y, pullback(cotangent)

    return run(x, weights, matrices)


@pytest.mark.parametrize("choose", ["any", "first"])
def test_exchange_equals_dense_experts(choose, monkeypatch):
    fill_with_nan(monkeypatch)
    inputs = draw_inputs(choose)
    wanted = value_and_gradients(compute_dense, inputs)
    got = value_and_gradients(exchange, inputs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))  # float32 sums of 24 products


def test_a_capacity_drops_rows_to_zeros(monkeypatch):
    fill_with_nan(monkeypatch)
    x, weights, ids, *matrices = draw_inputs("first")
    program = jax.jit(functools.partial(exchange, capacity=1.0))
    y = np.asarray(program(x, weights, ids, *matrices))
    # All rows come to the first device, sorted by expert. It takes 12, one share, rounded up to 16:
    # those that the first 16 tokens have for expert 0.
    wanted = compute_dense(x, weights.at[:, 1].set(0), ids, *matrices)
    kept = 16
    np.testing.assert_allclose(y[:kept], wanted[:kept], rtol=0, atol=1e-5)
    assert np.all(y[kept:] == 0)


@pytest.mark.parametrize("num_choices", [1, 2, 4])
def test_choices_add_up_in_order(num_choices):
    inverse = jnp.asarray(np.random.default_rng(0).permutation(24).reshape(-1, num_choices))
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(24, 5)), jnp.float32)
    rows = rows.at[inverse[2]].set(jnp.nan)
    has_expert = jnp.ones(inverse.shape, bool).at[2].set(False)
    total = jax.jit(choice_rows._add_choices)(rows, inverse, has_expert)
    wanted = np.sum(np.asarray(rows)[np.asarray(inverse)], axis=1, dtype=np.float32)
    wanted[2] = 0
    np.testing.assert_array_equal(total, wanted)


# ---- experts stacked over layers


def stack_layers(matrices):
    """Put the matrices at layer (1, 1) of a stack whose other layers are NaN."""
    return [jnp.full((*LAYERS, *a.shape), jnp.nan, a.dtype).at[1, 1].set(a) for a in matrices]


def exchange_stacked(x, weights, ids, *matrices):
    def run(x, weights, ids, gate, up, down):
        arguments = x, weights, ids, gate, up, down
        return expert_exchange.run_routed_experts(*arguments, stack_index=(1, jnp.int32(1)))[0]

    stacked = PartitionSpec(None, None, "expert")
    specs = (*(TOKEN_AXIS,) * 3, *(stacked,) * 3)
    program = sharding.run_sharded(make_layout(), run, specs, TOKEN_AXIS)
    return program(x, weights, ids, *stack_layers(matrices))


@pytest.mark.parametrize(
    ("gathered_tokens", "single_round_rows", "num_choices"),
    [
        (expert_exchange.MAX_GATHERED_TOKENS, 0, 1),
        (expert_exchange.MAX_GATHERED_TOKENS, 0, 2),
        (0, 0, 2),
        (0, exchange_plan.SINGLE_ROUND_ROWS, 2),
    ],
)
@pytest.mark.parametrize("choose", ["any", "first"])
def test_stacked_experts_have_the_same_bits(
    choose, gathered_tokens, single_round_rows, num_choices, monkeypatch
):
    fill_with_nan(monkeypatch)
    monkeypatch.setattr(expert_exchange, "MAX_GATHERED_TOKENS", gathered_tokens)
    monkeypatch.setattr(exchange_plan, "SINGLE_ROUND_ROWS", single_round_rows)
    inputs = draw_inputs(choose, num_choices)
    # The tile of the engine: a row's bits do not depend on the buffer's size. A new function for
    # each case, since jit knows an old one's trace, which has other limits.
    with experts.matmul_tile(8):
        wanted, got = jax.jit(exchange)(*inputs), jax.jit(lambda *x: exchange_stacked(*x))(*inputs)
    np.testing.assert_array_equal(got, wanted)


def test_experts_stay_stacked_unless_they_are_gathered():
    def is_gathered(sizes, mode):
        mesh = sharding.make_mesh(sizes, jax.devices()[: np.prod(list(sizes.values()))])
        layout = sharding.make_layout(mesh, ModelConfig.tiny(), mode)
        return fsdp.is_gathered(layout, moe.EXPERT_AXES)

    assert not fsdp.is_gathered(None, moe.EXPERT_AXES)
    assert not is_gathered({"expert": 2, "tensor": 2}, sharding.DECODE)
    assert not is_gathered({"expert": 2, "tensor": 2}, sharding.TRAIN)
    assert is_gathered({"fsdp": 2, "expert": 2}, sharding.TRAIN)
    assert is_gathered({"context": 2, "expert": 2}, sharding.TRAIN)


@pytest.mark.parametrize(
    ("gathered_tokens", "num_choices", "wanted"),
    [
        (TOKENS, 2, (2, 1, 0)),  # tokens, their experts and weights; sums of tokens
        (TOKENS - 1, 2, (1, 0, 2)),  # counts and weights; rows there and back
        # A sum of four could depend on a token's place, so rows travel whatever their number.
        (TOKENS, 4, (1, 0, 2)),
    ],
)
def test_decoding_needs_three_collectives_of_the_group(
    gathered_tokens, num_choices, wanted, monkeypatch
):
    monkeypatch.setattr(expert_exchange, "MAX_GATHERED_TOKENS", gathered_tokens)
    inputs = draw_inputs(num_choices=num_choices)
    lowered = (
        jax.jit(lambda *x: exchange_stacked(*x)).trace(*inputs).lower(lowering_platforms=("tpu",))
    )
    text = lowered.as_text()
    collectives = ("stablehlo.all_gather", "stablehlo.reduce_scatter", "@ragged_all_to_all")
    assert tuple(map(text.count, collectives)) == wanted
    assert text.count("stablehlo.all_reduce") == 0  # the number of rounds is known
    assert text.count("stablehlo.while") == 0


# ---- rematerialisation


def test_saved_rows_do_not_travel_again():
    x, weights, ids, *matrices = draw_inputs()
    names = (expert_exchange.ROWS_NAME, experts.GATE_NAME, experts.UP_NAME)

    def gradients(policy):
        def run(x, *matrices):
            # A capacity, since one round has no loops: every exchange is in the text once.
            y, _ = expert_exchange.run_routed_experts(x, weights[:6], ids[:6], *matrices, 1.0)
            return y

        def pull_back(x, *matrices):
            _, pullback = jax.vjp(jax.checkpoint(run, policy=policy), x, *matrices)
            return pullback(x)

        specs = (TOKEN_AXIS, *(EXPERT_AXIS,) * 3)
        program = sharding.run_sharded(make_layout(), pull_back, specs, specs)
        text = str(jax.make_jaxpr(program)(x, *matrices))
        return text.count("= ragged_all_to_all["), jax.jit(program)(x, *matrices)

    all_again, wanted = gradients(None)
    saved, got = gradients(jax.checkpoint_policies.save_only_these_names(*names))
    assert (all_again, saved) == (5, 4)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
