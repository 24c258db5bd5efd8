"""Splash attention for softmax layers: against float64, over devices, and where it is chosen."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_support
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from m1_jax import ModelConfig, attention, ring_attention, sharding, splash_attention

BLOCK_TOKENS = splash_attention.BLOCK_TOKENS  # before a test makes it smaller
LENGTH, NUM_HEADS, NUM_KV_HEADS, SIZE = 300, 4, 2, 128  # no multiple of a block
# Documents that begin inside of blocks, padding between them and at the end.
SEGMENT_IDS = np.repeat([[1, 0, 2, 3, 0]], [90, 10, 150, 30, 20], axis=1).astype(np.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash_attention, "BLOCK_TOKENS", 128)


def make_arrays(num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, length=LENGTH):
    """Return q, k, v and the gradient of the output, float32."""
    rng = np.random.default_rng(0)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [rng.standard_normal((1, length, n, SIZE)).astype(np.float32) for n in heads]


def oracle(q, k, v, d_o, segment_ids):
    """Return the output and the gradients of q, k and v by their definitions in float64."""
    length, num_heads, size = q.shape[1:]
    group = num_heads // k.shape[2]
    q, d_o = (x[0].astype(np.float64).swapaxes(0, 1) for x in (q, d_o))
    k, v = (np.repeat(x[0].astype(np.float64).swapaxes(0, 1), group, axis=0) for x in (k, v))
    mask = np.tril(np.ones((length, length), bool))
    if segment_ids is not None:
        mask &= segment_ids[0][:, None] == segment_ids[0][None]
    scores = np.where(mask, q @ k.swapaxes(1, 2) / math.sqrt(size), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = weights @ v
    d_scores = weights * (d_o @ v.swapaxes(1, 2) - np.sum(d_o * o, -1, keepdims=True))
    d_scores /= math.sqrt(size)
    d_k, d_v = d_scores.swapaxes(1, 2) @ q, weights.swapaxes(1, 2) @ d_o
    # A kv head has the gradients of all query heads that read it.
    d_k, d_v = (x.reshape(-1, group, length, size).sum(1) for x in (d_k, d_v))
    return [x.swapaxes(0, 1)[None] for x in (o, d_scores @ k, d_k, d_v)]


def attend_and_pull_back(attend, q, k, v, d_o):
    o, pull_back = jax.vjp(attend, q, k, v)
    return o, *pull_back(d_o)


@jax.jit
def interpret_kernels(q, k, v, d_o, segment_ids):
    def attend(q, k, v):
        return splash_attention.attend_rows(q, k, v, segment_ids, interpret=True)

    return attend_and_pull_back(attend, q, k, v, d_o)


def run_interpreted(*arguments):
    return [np.asarray(x) for x in interpret_kernels(*arguments)]


@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["plain", "packed"])
def test_rows_equal_the_definition(segment_ids):
    arrays = make_arrays()
    wanted, got = oracle(*arrays, segment_ids), run_interpreted(*arrays, segment_ids)
    for name, a, b in zip(("o", "d_q", "d_k", "d_v"), got, wanted, strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), name


@pytest.mark.parametrize("place", range(4), ids=["q", "k", "v", "d_o"])
def test_nonfinite_numbers_stay_in_their_document(place):
    arrays = make_arrays(2, 1)
    clean = run_interpreted(*arrays, SEGMENT_IDS)
    # In the second document, which shares blocks with the first and the third, and in padding.
    arrays[place][0, [120, 95]] = [[[np.nan]], [[np.inf]]]
    damaged = run_interpreted(*arrays, SEGMENT_IDS)
    is_lost = np.isin(SEGMENT_IDS[0], (0, 2))
    for i, (a, b) in enumerate(zip(damaged, clean, strict=True)):
        np.testing.assert_array_equal(a[:, ~is_lost], b[:, ~is_lost])
        if place == 3 and i == 0:  # a gradient damages no output
            np.testing.assert_array_equal(a, b)
        else:
            assert np.isnan(a[:, is_lost]).all()


@pytest.mark.parametrize("num_devices", [2, 4])
def test_rows_over_devices_equal_rows_on_one(num_devices):
    """Two devices get a kv head each, four get half of the query heads of one."""
    *arrays, d_o = make_arrays(length=256)
    segment_ids = SEGMENT_IDS[:, :256]
    config = dataclasses.replace(ModelConfig.tiny(), num_attention_heads=NUM_HEADS)
    mesh = sharding.make_mesh({"context": num_devices}, jax.devices()[:num_devices])
    layout = sharding.make_layout(mesh, config, "train")
    assert layout is not None

    def attend_local(q, k, v, segment_ids):
        assert splash_attention.supports_shapes(q, k)
        return splash_attention.attend_local_rows(q, k, v, segment_ids, interpret=True)

    heads = layout.activation_spec("batch", "length", None, None)
    specs = (heads, heads, heads, layout.activation_spec("batch", "length"))
    program = sharding.run_sharded(layout, attend_local, specs, heads)
    got = jax.jit(
        lambda *xs: attend_and_pull_back(lambda *x: program(*x, jnp.asarray(segment_ids)), *xs)
    )(*arrays, d_o)
    wanted = run_interpreted(*arrays, d_o, segment_ids)
    for a, b in zip(got, wanted, strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("process", [mask_info.process_mask, mask_info.process_mask_dkv])
def test_the_mask_is_set_up_as_the_causal_one(process):
    (got, _), (wanted, _) = (
        process(splash.MultiHeadMask([mask((1024, 1024))] * 2), (256, 256))
        for mask in (splash_attention._CausalRows, splash.CausalMask)
    )
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- where it is chosen


def test_the_ring_has_longer_blocks_on_tpu(monkeypatch):
    monkeypatch.setattr(ring_attention, "MAX_DIRECT_PAIRS", 0)
    shapes = ((1, 520, 2, 8), (1, 1, 520, 8), (1, 1, 520, 8))
    q, k, v = (np.random.default_rng(0).standard_normal(s).astype(np.float32) for s in shapes)
    index = jnp.arange(520, dtype=jnp.int32)[None]
    outputs, num_blocks = [], []
    for platform in ("cpu", "tpu"):
        target = sharding.TargetDevice(platform, platform)
        monkeypatch.setattr(sharding, "target_device", lambda target=target: target)
        attend = jax.jit(lambda *x: ring_attention.causal_attention(*x, index, index))
        outputs.append(attend(q, k, v))
        num_blocks.append(520 // ring_attention._choose_block_tokens() + 1)
    assert num_blocks == [3, 2]
    np.testing.assert_allclose(*outputs, rtol=0, atol=1e-6)


def lower_for(platform, implementation, size=SIZE):
    """Lower the forward and the backward pass."""

    @jax.jit
    def program(q, k, v, d_o, segment_ids):
        def attend(q, k, v):
            return attention.attend_whole_rows(q, k, v, segment_ids, implementation)

        return attend_and_pull_back(attend, q, k, v, d_o)

    shape = jax.ShapeDtypeStruct((1, 256, 4, size), jnp.bfloat16)
    segment_ids = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    traced = program.trace(shape, shape, shape, shape, segment_ids)
    return traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize(
    ("platform", "implementation", "size", "is_splash"),
    [
        ("tpu", None, SIZE, True),
        ("tpu", "splash", SIZE, True),
        ("tpu", "xla", SIZE, False),
        ("tpu", None, 64, False),  # no shape of the kernels
        ("cpu", None, SIZE, False),
    ],
)
def test_the_kernels_run_where_a_program_is_for_a_tpu(platform, implementation, size, is_splash):
    text = lower_for(platform, implementation, size).as_text()
    assert ("tpu_custom_call" in text) == is_splash


def test_a_shape_without_a_kernel_is_refused():
    with pytest.raises(
        ValueError, match="got splash for q .* wanted a head_dim of a multiple of 128"
    ):
        lower_for("tpu", "splash", 64)


@pytest.mark.parametrize("chip", tpu_support.CHIPS_IN_TURNS)
def test_forward_and_backward_compile(monkeypatch, chip):
    monkeypatch.setattr(splash_attention, "BLOCK_TOKENS", BLOCK_TOKENS)

    def attend(q, k, v, segment_ids, d_o):
        return attend_and_pull_back(
            lambda *x: splash_attention.attend_rows(*x, segment_ids), q, k, v, d_o
        )

    q, k = (((1, 4096, heads, SIZE), jnp.bfloat16) for heads in (8, 1))
    program = tpu_support.compile_for_chip(attend, [q, k, k, ((1, 4096), jnp.int32), q], chip)
    # The executable itself: as_text cannot print this program's SparseCore calls.
    names = program.runtime_executable().serialize()
    for kernel in (b"fwd", b"dq", b"dkv"):
        assert b"splash_mha_" + kernel in names
