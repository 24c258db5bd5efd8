"""NaN and infinity of one document reach no other, and TPUs without a kernel are told."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lightning_attention import api, gpu, gpu_tiling, tiling, tpu

HEADS, SIZE, LENGTH = 2, 16, 200
SLOPES = jnp.array([0.917, 0.0039], jnp.float32)
# Ends of the first document, and the bad token: within a chunk, at both sides of a chunk's border,
# at the row's end, and behind padding.
ROWS = ((20, 10), (64, 63), (64, 64), (128, 5), (150, 199), (90, 30))


def gradients(attend, qkv, d_o):
    """Return (o, state, d_qkv, d_initial), all as NumPy arrays."""
    ids = np.array([[1 + (t >= end) for t in range(LENGTH)] for end, _ in ROWS])
    ids[-1, 40:70] = 0  # padding within the first document
    rng = np.random.default_rng(1)
    states = rng.standard_normal((2, len(ROWS), HEADS, SIZE, SIZE)).astype(np.float32)

    def attend_ids(qkv, state):
        return attend(qkv, SLOPES, segment_ids=jnp.asarray(ids), initial_state=state)

    outputs, pull = jax.vjp(attend_ids, jnp.asarray(qkv), jnp.asarray(states[0]))
    return [np.asarray(x) for x in (*outputs, *pull((jnp.asarray(d_o), jnp.asarray(states[1]))))]


def attend_in_spans(qkv, slopes, segment_ids, initial_state):
    blocks = gpu_tiling.GpuBlockSizes(64, 128, 16)
    return gpu.lightning_attention(
        qkv, slopes, segment_ids, initial_state, block_sizes=blocks, interpret=True
    )


def attend_by(name):
    if name == "gpu in spans":
        return attend_in_spans
    interpret = name in api.KERNEL_IMPLEMENTATIONS
    return lambda *x, **y: api.lightning_attention(
        *x, **y, implementation=name, interpret=interpret
    )


@pytest.mark.parametrize("name", [*api.IMPLEMENTATIONS, "gpu in spans"])
def test_a_bad_document_reaches_no_other(name):
    attend = jax.jit(attend_by(name))
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((len(ROWS), LENGTH, HEADS * 3 * SIZE)).astype(np.float32)
    d_o = rng.standard_normal((len(ROWS), LENGTH, HEADS * SIZE)).astype(np.float32)
    clean = gradients(attend, qkv, d_o)
    for bad_value, is_gradient in ((np.nan, False), (np.inf, False), (np.nan, True)):
        bad_qkv, bad_d_o = qkv.copy(), d_o.copy()
        for row, (_, token) in enumerate(ROWS):
            (bad_d_o if is_gradient else bad_qkv)[row, token] = bad_value
        o, state, d_qkv, d_initial = gradients(attend, bad_qkv, bad_d_o)
        for row, (end, token) in enumerate(ROWS):
            others = slice(end, None) if token < end else slice(0, end)
            np.testing.assert_array_equal(o[row, others], clean[0][row, others])
            np.testing.assert_array_equal(d_qkv[row, others], clean[2][row, others])
            # The final state is the second document's, the initial one the first one's.
            if token < end:
                np.testing.assert_array_equal(state[row], clean[1][row])
            else:
                np.testing.assert_array_equal(d_initial[row], clean[3][row])
            # The bad document itself does not look whole.
            assert not np.isfinite((d_qkv if is_gradient else o)[row, token]).all()


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3", "TPU v4", "TPU v9"])
def test_a_tpu_without_kernels_takes_the_form_in_xla(monkeypatch, kind):
    qkv = jax.ShapeDtypeStruct((1, 8192, 64 * 3 * 128), jnp.bfloat16)
    assert tpu.supports_shapes(qkv, 64)
    monkeypatch.setattr(tiling.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(tiling.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert tiling.current_generation() is None
    assert not tpu.supports_shapes(qkv, 64)
    small = jnp.zeros((1, 128, 2 * 3 * 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=rf"got {kind}; wanted one of v5e, v5p, .*'chunked'"):
        tpu.lightning_attention(small, SLOPES, None, jnp.zeros((1, 2, 128, 128)))
    # What is compiled for another TPU is chosen for that one.
    with tiling.compile_for("v5e"):
        assert tpu.supports_shapes(qkv, 64)


# libtpu calls a v5p "TPU v5".
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"])
def test_a_tpu_with_kernels_takes_them(monkeypatch, kind):
    monkeypatch.setattr(tiling.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(tiling.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert tiling.current_generation() in tiling.MATRIX_UNIT_SIDES
    assert tpu.supports_shapes(jax.ShapeDtypeStruct((1, 512, 2 * 3 * 128), jnp.bfloat16), 2)
