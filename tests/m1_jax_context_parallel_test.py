"""Lightning attention over a length that is split over devices: NaN of one document stays in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import ModelConfig, context_parallel, sharding
from pallas_kernels.lightning_attention import api

DEVICES, HEADS, SIZE, LENGTH = 4, 2, 16, 200  # 50 tokens a device
SLOPES = jnp.array([0.917, 0.0039], jnp.float32)
# Ends of the first document, and the bad token: both on one device, at both sides of a device's
# border, documents over several devices, and behind padding.
ROWS = ((20, 10), (20, 30), (50, 49), (50, 50), (75, 60), (75, 80), (120, 5), (150, 199), (130, 30))


def make_segment_ids() -> np.ndarray:
    ids = np.array([[1 + (t >= end) for t in range(LENGTH)] for end, _ in ROWS])
    ids[-1, 45:105] = 0  # padding within the first document, all of one device
    return ids


@functools.cache
def make_programs():
    """Return the attention with its gradients, on a mesh and on one device.

    Both take (qkv, d_o) and return (o, state, d_qkv, d_initial).
    """
    mesh = sharding.make_mesh({"context": DEVICES}, jax.devices()[:DEVICES])
    layout = sharding.make_layout(mesh, ModelConfig.tiny())
    assert layout is not None
    kernel = functools.partial(api.lightning_attention, implementation="chunked")
    tokens, state_spec = layout.activation_spec("batch", "length"), layout.activation_spec()

    def attend_part(qkv, segment_ids, state):
        return context_parallel.attend_sharded_length(kernel, qkv, SLOPES, segment_ids, state)

    attend_on_mesh = sharding.run_sharded(
        layout, attend_part, (tokens, tokens, state_spec), (tokens, state_spec)
    )
    ids = jnp.asarray(make_segment_ids())
    rng = np.random.default_rng(1)
    states = rng.standard_normal((2, len(ROWS), HEADS, SIZE, SIZE)).astype(np.float32)

    def with_gradients(attend):
        def compute(qkv, d_o):
            outputs, pull = jax.vjp(lambda x, state: attend(x, ids, state), qkv, states[0])
            return *outputs, *pull((d_o, jnp.asarray(states[1])))

        return jax.jit(compute)

    return with_gradients(attend_on_mesh), with_gradients(attend_part)


def draw_inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((len(ROWS), LENGTH, HEADS * 3 * SIZE)).astype(np.float32)
    return qkv, rng.standard_normal((len(ROWS), LENGTH, HEADS * SIZE)).astype(np.float32)


def test_a_mesh_computes_what_one_device_does():
    on_mesh, on_one = make_programs()
    for got, wanted in zip(on_mesh(*draw_inputs()), on_one(*draw_inputs()), strict=True):
        # Sums over 200 tokens in another order.
        np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("bad_value", "is_gradient"), [(np.nan, False), (np.inf, False), (np.nan, True)]
)
def test_a_bad_document_reaches_no_other(bad_value, is_gradient):
    on_mesh, _ = make_programs()
    qkv, d_o = draw_inputs()
    clean = [np.asarray(x) for x in on_mesh(qkv, d_o)]
    for row, (_, token) in enumerate(ROWS):
        (d_o if is_gradient else qkv)[row, token] = bad_value
    o, state, d_qkv, d_initial = (np.asarray(x) for x in on_mesh(qkv, d_o))
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
