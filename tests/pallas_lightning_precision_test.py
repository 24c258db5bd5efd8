"""The precision bars of the training kernels: every slope of the release, relative and per head.

The oracle is the recurrence and its adjoint in float64. `release` is the release's own arithmetic
with its roundings, which bfloat16 may never do worse than.
"""

import functools

import jax
import jax.numpy as jnp
import lightning_support
import numpy as np
import pytest
import tpu_support

from m1_jax import ModelConfig, lightning
from pallas_kernels.lightning_attention import api, chunked, tiling, tpu

NAMES = ("chunked", "tpu")
SIZE, CHUNK = 16, 32
# No decay at all, a lightning last layer, one that forgets at once.
SYNTHETIC = (0.0, 3.9e-8, 8.0)
FAST_AND_SLOW = lightning_support.SLOPES[:3]
EXTREMES = np.array([8, 0.0039, 0], np.float32)


def release_slopes():
    """The decay rates of the 70 x 64 lightning heads of M1."""
    config = ModelConfig.m1()
    return lightning.decay_slopes(config)[np.array(config.layer_types) == "lightning"]


def inputs(batch, length, heads, size=SIZE, seed=0):
    """Return qkv, initial state and a gradient of each output, all normal."""
    rng = np.random.default_rng(seed)
    state = (batch, heads, size, size)
    shapes = (batch, length, heads * 3 * size), state, (batch, length, heads * size), state
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def silu_inputs(length, heads, size, seed=0):
    """Return bfloat16 qkv as the release makes it, and a bfloat16 gradient of o."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, length, heads * 3 * size), np.float32)
    d_o = rng.standard_normal((1, length, heads * size), np.float32)
    return jnp.asarray(x / (1 + np.exp(-x)), jnp.bfloat16), jnp.asarray(d_o, jnp.bfloat16)


def float64(qkv, slopes, state, d_o=None, d_state=None, segment_ids=None) -> tuple[np.ndarray, ...]:
    """Return (o, final state) of the recurrence and, given d_o, (d_qkv, d_initial_state) too."""
    batch, length, _ = qkv.shape
    size = state.shape[2]
    heads = np.asarray(qkv, np.float64).reshape(batch, length, len(slopes), 3, size)
    q, k, v = np.moveaxis(heads, 3, 0)
    state = np.asarray(state, np.float64)
    ids = np.ones((batch, length), int) if segment_ids is None else segment_ids
    decay = np.exp(-np.asarray(slopes, np.float64))[None, :, None, None]
    document = np.zeros(batch, int)  # of the last real token; 0 before the first
    kept, after, o = [], [], np.zeros(v.shape)
    for t in range(length):
        real = ids[:, t] > 0
        start = real & (document > 0) & (ids[:, t] != document)
        document = np.where(real, ids[:, t], document)
        keep = np.where(start[:, None, None, None], 0, decay)
        added = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = np.where(real[:, None, None, None], keep * state + added, state)
        o[:, t] = np.where(real[:, None, None], (q[:, t, :, None] @ state)[:, :, 0], 0)
        if d_o is not None:
            kept.append(np.where(real[:, None, None, None], keep, 1))
            after.append(state)
    o = o.reshape(batch, length, -1)
    if d_o is None:
        return o, state
    d_heads, grad = np.zeros(heads.shape), np.asarray(d_state, np.float64)
    d_o = np.asarray(d_o, np.float64).reshape(v.shape)
    for t in reversed(range(length)):
        d = np.where(ids[:, t, None, None] > 0, d_o[:, t], 0)
        grad = grad + q[:, t, :, :, None] * d[:, :, None]
        d_token = [after[t] @ d[..., None], grad @ v[:, t, ..., None]]
        d_token.append(np.swapaxes(grad, 2, 3) @ k[:, t, ..., None])
        real = ids[:, t, None, None, None] > 0
        d_heads[:, t] = np.where(real, np.stack(d_token, 2)[..., 0], 0)
        grad = kept[t] * grad
    return o, state, d_heads.reshape(batch, length, -1), grad


@functools.partial(jax.jit, static_argnames="block")
def release(qkv, slopes, block=256):
    """Return (o, final state) in the arithmetic of the release: bfloat16, no gradient.

    Source: `MiniMaxM1LightningAttention.inference`. The product q k and what a block adds to the
    state are bfloat16 matrix products with bfloat16 results; the rest is float32.
    """
    length, heads = qkv.shape[1], slopes.shape[0]
    q, k, v = jnp.moveaxis(qkv.reshape(1, length, heads, 3, -1), (3, 2), (0, 2))
    slope = slopes.reshape(1, heads, 1, 1)
    step = jnp.arange(1, block + 1, dtype=jnp.float32)
    q_decay = jnp.exp(-slope * step.reshape(1, 1, block, 1))
    k_decay = jnp.exp(-slope * (block - step).reshape(1, 1, block, 1))
    gap = (step.reshape(block, 1) - step.reshape(1, block))[None, None]
    diagonal = jnp.exp(jnp.where(gap >= 0, -slope * gap, -jnp.inf))
    f32, product = jnp.float32, functools.partial(jnp.matmul, precision="highest")
    state, outputs = jnp.zeros((1, heads, q.shape[3], q.shape[3]), f32), []
    for first in range(0, length, block):
        q_i, k_i, v_i = (x[:, :, first : first + block] for x in (q, k, v))
        m = q_i.shape[2]
        across = product(q_i * q_decay[:, :, :m], state)
        pairs = product(q_i, jnp.swapaxes(k_i, 2, 3)).astype(f32) * diagonal[:, :, :m, :m]
        outputs.append((across + product(pairs, v_i.astype(f32))).astype(q.dtype))
        k_i = (k_i * k_decay[:, :, block - m :]).astype(v.dtype)
        added = product(jnp.swapaxes(k_i, 2, 3), v_i).astype(f32)
        state = jnp.exp(-slope * m) * state + added
    return jnp.moveaxis(jnp.concatenate(outputs, 2), 1, 2).reshape(1, length, -1), state


def by_head(got, wanted, heads):
    """Relative L2 error of each head of o, of a gradient of qkv, or of a state [B, N, H, H]."""

    def split(x):
        x = np.asarray(x, np.float64)
        x = x.reshape(-1, heads, x.shape[-1] // heads) if x.ndim == 3 else x
        return np.moveaxis(x, 1, 0).reshape(heads, -1)

    got, wanted = split(got), split(wanted)
    return np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


def by_part(got, wanted, heads):
    """Errors of the gradient of q, of k and of v, head by head: [3, N]."""

    def part(x, i):
        x = np.asarray(x).reshape(*x.shape[:2], heads, 3, -1)
        return x[:, :, :, i].reshape(*x.shape[:2], -1)

    return np.stack([by_head(part(got, i), part(wanted, i), heads) for i in range(3)])


@functools.partial(jax.jit, static_argnames=("name", "blocks"))
def forward(name, blocks, qkv, slopes, segment_ids, state):
    """Run an implementation in blocks (chunk, superblock, heads of a block)."""
    if name == "chunked":
        return chunked.lightning_attention(qkv, slopes, segment_ids, state, blocks[0])
    tile = tiling.TpuBlockSizes(*blocks)
    return tpu.lightning_attention(
        qkv, slopes, segment_ids, state, block_sizes=tile, interpret=True
    )


@functools.partial(jax.jit, static_argnames=("name", "blocks", "cuts"))
def both(name, blocks, qkv, slopes, segment_ids, state, d_o, d_state, cuts=()):
    """Return o, state and both gradients; `cuts` split the row into calls that carry the state."""

    def attend(qkv, state):
        outputs, edges = [], (0, *cuts, qkv.shape[1])
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            ids = None if segment_ids is None else segment_ids[:, first:last]
            o, state = forward(name, blocks, qkv[:, first:last], slopes, ids, state)
            outputs.append(o)
        return jnp.concatenate(outputs, 1), state

    (o, after), pull = jax.vjp(attend, qkv, state)
    return o, after, *pull((d_o, d_state))


def check(got, wanted, heads):
    """The float32 bars: 1e-5 for values, 1e-4 for gradients, of every head."""
    for what, bar, mine, true in zip(
        ("o", "state", "d_qkv", "d_state"), (1e-5, 1e-5, 1e-4, 1e-4), got, wanted, strict=True
    ):
        worst = np.max(by_head(mine, true, heads))
        assert worst < bar, what
    assert np.max(by_part(got[2], wanted[2], heads)) < 1e-4, "d_q, d_k, d_v"


@pytest.mark.parametrize("name", NAMES)
def test_every_head_of_the_release_in_float32(name):
    """All 70 x 64 slopes and the synthetic ones: values, first tokens of chunks, gradients."""
    slopes = np.append(release_slopes().reshape(-1), [*SYNTHETIC, 1.0]).astype(np.float32)
    heads, length = len(slopes), 2 * CHUNK + 11  # a full superblock and a ragged one
    arguments = inputs(1, length, heads)
    qkv, state, *grads = arguments
    got = both(name, (CHUNK, 2 * CHUNK, 4), qkv, slopes, None, state, *grads)
    pieces = []
    for at in range(0, heads, 76):  # the oracle keeps every state: not of all heads at once
        few = slice(at, at + 76)
        widths = 3 * SIZE, None, SIZE, None
        part = [
            x[:, few] if n is None else x[:, :, at * n : (at + 76) * n]
            for x, n in zip(arguments, widths, strict=True)
        ]
        pieces.append(float64(part[0], slopes[few], part[1], *part[2:]))
    wanted = [
        np.concatenate(x, axis)
        for x, axis in zip(zip(*pieces, strict=True), (2, 1) * 2, strict=True)
    ]
    check(got, wanted, heads)
    for first in range(0, length, CHUNK):  # a missing +1 in the query decay shows here
        few = slice(first, first + 4)
        assert np.max(by_head(got[0][:, few], wanted[0][:, few], heads)) < 1e-5


def rounding_bars(name, slopes, length, size, blocks):
    """Errors of o and of the state, per head: ours and those of the release."""
    heads = len(slopes)
    qkv, _ = silu_inputs(length, heads, size)
    zero = np.zeros((1, heads, size, size), np.float32)
    wanted = float64(np.asarray(qkv, np.float32), slopes, zero)
    ours = forward(name, blocks, qkv, slopes, None, zero)
    theirs = release(qkv, slopes)
    return [
        (by_head(a, w, heads), by_head(b, w, heads))
        for a, b, w in zip(ours, theirs, wanted, strict=True)
    ]


def check_rounding(name, slopes, length, size, blocks, noise):
    """No head of o or of the state is further from float64 than the release's.

    The state, which the release rounds once more, always wins. So does the o of "chunked". That of
    the kernels ties on the fast heads: they round q k lambda^n where the release rounds q k. Over
    ten seeds the ratio of the 32 fastest heads has means from 0.993 to 1.005, 0.9989 over all, and
    a spread of up to 0.011 at 512 x 128 outputs: `noise` is what one seed may add to 1.
    """
    bars = [rounding_bars(name, few, length, size, blocks) for few in slopes]
    o, state = (np.concatenate([ours[i][0] / ours[i][1] for ours in bars]) for i in range(2))
    assert np.max(o) < (1 + noise if name == "tpu" else 1)
    assert np.mean(o) < 1
    assert np.max(state) < 1


@pytest.mark.parametrize(("name", "chunk"), [("chunked", 128), ("tpu", 128), ("tpu", 256)])
def test_bfloat16_is_never_worse_than_the_release(name, chunk):
    slopes = release_slopes()[::23, ::21].reshape(1, -1)  # 4 layers, 4 heads of each
    check_rounding(name, slopes, 700, 128, (chunk, 512, 4), noise=0.02)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_never_worse_than_the_release_on_any_head(name):
    check_rounding(name, release_slopes(), 512, 64, (128, 512, 4), noise=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gradients(name):
    """The kernels round P, dP, the decayed operands and the states they read: 3e-3 in all."""
    size, slopes = 128, np.append(FAST_AND_SLOW, np.float32(0.05))
    qkv, d_o = silu_inputs(400, len(slopes), size)
    _, state, _, d_state = inputs(1, 1, len(slopes), size)
    got = both(name, (128, 256, 4), qkv, slopes, None, state, d_o, d_state)
    wanted = float64(*(np.asarray(x, np.float32) for x in (qkv, slopes, state, d_o, d_state)))
    bar = 3e-3 if name == "tpu" else 2e-3  # rounding the result alone is 1.7e-3
    assert got[2].dtype == jnp.bfloat16
    assert np.max(by_part(got[2], wanted[2], len(slopes))) < bar
    assert np.max(by_head(got[3], wanted[3], len(slopes))) < (bar if name == "tpu" else 1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "blocks", "cuts"),
    [
        ("chunked", (16, 0, 0), ()),
        ("chunked", (24, 0, 0), (1, 40)),
        ("chunked", (64, 0, 0), (32, 33, 74)),
        ("tpu", (16, 48, 1), (40,)),
        ("tpu", (64, 64, 3), (1, 74)),
    ],
)
def test_splits_and_blocks_change_neither_values_nor_gradients(name, blocks, cuts, packed):
    """A row in pieces that hand the state on, cut inside documents too, is the row in one."""
    qkv, state, d_o, d_state = inputs(2, 75, 3)
    ids = None
    if packed:  # no cut at a border: there a new row would continue the document before it
        ids = np.repeat([[7, 2, 0, 2, 5], [3, 3, 3, 3, 3]], [30, 6, 5, 20, 14], 1).astype(np.int32)
    got = both(name, blocks, qkv, FAST_AND_SLOW, ids, state, d_o, d_state, cuts)
    check(got, float64(qkv, FAST_AND_SLOW, state, d_o, d_state, ids), 3)


@pytest.mark.parametrize("name", NAMES)
def test_every_remainder_of_a_chunk(name):
    """Row m holds m real tokens behind a full chunk; NaN follows in qkv and in the gradient."""
    rows, length = CHUNK - 1, 2 * CHUNK
    qkv, state, d_o, d_state = inputs(rows, length, 3)
    ids = (np.arange(length)[None] < CHUNK + 1 + np.arange(rows)[:, None]).astype(np.int32)
    padding = ids[:, :, None] == 0
    poisoned = [np.where(padding, np.float32(np.nan), x) for x in (qkv, d_o)]
    got = both(
        name, (CHUNK, length, 3), poisoned[0], FAST_AND_SLOW, ids, state, poisoned[1], d_state
    )
    wanted = float64(qkv, FAST_AND_SLOW, state, d_o, d_state, ids)
    check(got, wanted, 3)
    for row in range(rows):
        few = slice(row, row + 1)
        check([x[few] for x in got], [x[few] for x in wanted], 3)
    assert np.all(np.where(padding, got[0], 0) == 0)
    assert np.all(np.where(padding, got[2], 0) == 0)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_remainder_of_a_length(name):
    """The same without segment ids: the array itself ends inside a chunk."""
    for length in range(17, 32):
        qkv, state, d_o, d_state = inputs(1, length, 3)
        got = both(name, (16, 16, 3), qkv, FAST_AND_SLOW, None, state, d_o, d_state)
        check(got, float64(qkv, FAST_AND_SLOW, state, d_o, d_state), 3)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_separate_ones(name):
    """Values and gradients; and another document's values change not a bit of either."""
    lengths = [1, 30, 33, 2, 32, 29]  # borders inside a chunk, at its end and at its start
    edges = np.cumsum([0, *lengths])
    qkv, state, d_o, d_state = inputs(1, edges[-1], 3)
    ids = np.repeat(np.arange(1, 7), lengths).astype(np.int32)[None]
    blocks = (CHUNK, 2 * CHUNK, 3)
    got = both(name, blocks, qkv, EXTREMES, ids, state, d_o, d_state)
    check(got, float64(qkv, EXTREMES, state, d_o, d_state, ids), 3)

    # Separate documents: one a row, from its own first chunk on. The row's state enters the
    # first and leaves the last.
    rows = [np.zeros((6, max(lengths), x.shape[2]), np.float32) for x in (qkv, d_o)]
    alone_ids = np.zeros((6, max(lengths)), np.int32)
    states = [np.zeros((6, *state.shape[1:]), np.float32) for _ in range(2)]
    states[0][0], states[1][5] = state[0], d_state[0]
    for i, length in enumerate(lengths):
        alone_ids[i, :length] = 1
        for row, x in zip(rows, (qkv, d_o), strict=True):
            row[i, :length] = x[0, edges[i] : edges[i + 1]]
    alone = both(name, blocks, rows[0], EXTREMES, alone_ids, states[0], rows[1], states[1])
    real = alone_ids > 0
    joined = [
        alone[0][real][None], alone[1][5:], alone[2][real][None], alone[3][:1]
    ]  # fmt: skip
    check(joined, got, 3)

    for changed in range(6):
        mine = slice(edges[changed], edges[changed + 1])
        other = qkv.copy()
        other[:, mine] = 1e3 * other[:, mine] + 1
        again = both(name, blocks, other, EXTREMES, ids, state, d_o, d_state)
        for before, after in ((got[0], again[0]), (got[2], again[2])):
            before, after = (np.delete(np.asarray(x), mine, 1) for x in (before, after))
            np.testing.assert_array_equal(before, after)
        if changed != 5:
            np.testing.assert_array_equal(got[1], again[1])
        if changed != 0:
            np.testing.assert_array_equal(got[3], again[3])


@functools.partial(jax.jit, static_argnames=("name", "rounded"))
def chain(name, rounded, spans, slopes, state):
    """Carry the state over spans [S, 1, T, 3H]; `rounded` keeps it in bfloat16 between them."""

    def step(state, qkv):
        _, state = forward(name, (128, qkv.shape[1], 1), qkv, slopes, None, state)
        return (state.astype(jnp.bfloat16).astype(jnp.float32) if rounded else state), None

    return jax.lax.scan(step, state, spans)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_million_tokens_of_the_slowest_head(name):
    """The final state stays within 1e-4 of float64; carried in bfloat16 it does not."""
    slope, span = release_slopes().min(), 1024
    rng = np.random.default_rng(0)
    spans = rng.standard_normal((1024, 1, span, 3 * SIZE), np.float32)
    spans[..., 2 * SIZE :] += 1  # values with a mean, so that the state grows
    zero = np.zeros((1, 1, SIZE, SIZE), np.float32)

    # A million steps in Python take long: the oracle takes a span at a time, still in float64.
    ramp = np.exp(-np.float64(slope) * np.arange(span - 1, -1, -1))[:, None]
    wanted = np.zeros((SIZE, SIZE))
    for i, qkv in enumerate(spans[:, 0].astype(np.float64)):
        k, v = qkv[:, SIZE : 2 * SIZE], qkv[:, 2 * SIZE :]
        wanted = np.exp(-np.float64(slope) * span) * wanted + (k * ramp).T @ v
        if i == 0:
            _, step_by_step = float64(spans[0], [slope], zero)
            np.testing.assert_allclose(wanted, step_by_step[0, 0], rtol=1e-11)
    slopes = np.array([slope], np.float32)
    exact, rounded = (chain(name, r, spans, slopes, zero) for r in (False, True))
    assert by_head(exact, wanted[None, None], 1)[0] < 1e-4
    assert by_head(rounded, wanted[None, None], 1)[0] > 1e-3


def million_tokens(heads, sharding=None):
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    qkv, d_o = (array((1, 1 << 20, n * heads * 128), jnp.bfloat16) for n in (3, 1))
    return qkv, array((heads,), jnp.float32), d_o


def attend(implementation, qkv, slopes):
    return api.lightning_attention(qkv, slopes, implementation=implementation)


def pull_back(implementation, qkv, slopes, d_o):
    (_, state), pull = jax.vjp(lambda x: attend(implementation, x, slopes), qkv)
    return pull((d_o, state))[0]


@pytest.mark.parametrize("name", NAMES)
def test_two_to_the_33_elements_have_shapes(name):
    """1M tokens of 64 heads of 128: q, k and v hold 2^33 elements each."""
    qkv, slopes, d_o = million_tokens(64)
    assert d_o.size == 1 << 33
    o, state = jax.eval_shape(functools.partial(attend, name), qkv, slopes)
    assert (o.shape, state.shape) == (d_o.shape, (1, 64, 128, 128))
    d_qkv = jax.eval_shape(functools.partial(pull_back, name), qkv, slopes, d_o)
    assert (d_qkv.shape, d_qkv.dtype) == (qkv.shape, qkv.dtype)


@pytest.mark.slow
def test_two_to_the_33_elements_compile_for_tpu():
    """Forward with 64 heads; backward with 32, whose qkv and gradient still exceed 2^33.

    With 64 heads the backward pass alone holds 116 GiB, more than any one chip has: it is
    lowered, not compiled.
    """
    where = tpu_support.chip_sharding("v5p:2x2x1")

    def lower(function, *arguments):
        traced = jax.jit(functools.partial(function, "tpu")).trace(*arguments)
        return traced.lower(lowering_platforms=("tpu",))

    qkv, slopes, d_o = million_tokens(64, where)
    memory = lower(attend, qkv, slopes).compile().memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes >= qkv.size * 2
    assert "lightning_bwd" in lower(pull_back, qkv, slopes, d_o).as_text()
    qkv, slopes, d_o = million_tokens(32, where)
    assert qkv.size > 1 << 33
    memory = lower(pull_back, qkv, slopes, d_o).compile().memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes >= qkv.size * 2
