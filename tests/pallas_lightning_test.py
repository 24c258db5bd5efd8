"""Every implementation of lightning attention against a float64 recurrence."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.experimental.topologies
import jax.numpy as jnp
import lightning_support
import numpy as np
import pytest
from lightning_support import recurrence, worst_state

from m1_jax import ModelConfig, lightning
from pallas_kernels.lightning_attention import (
    api,
    chunked,
    documents,
    gpu,
    gpu_tiling,
    reference,
    tiling,
    tpu,
)

HEADS, SIZE = 3, 16
SLOPES = lightning_support.SLOPES[:3]  # of lightning layers that the release has

worst_head = functools.partial(lightning_support.worst_head, heads=HEADS)


def inputs(batch, length, seed=0, heads=HEADS, size=SIZE):
    rng = np.random.default_rng(seed)
    qkv = rng.standard_normal((batch, length, heads * 3 * size)).astype(np.float32)
    state = rng.standard_normal((batch, heads, size, size)).astype(np.float32)
    return qkv, state


# One program: without jit each operation compiles by itself, and tests of gradients take ten times
# as long.
@functools.partial(jax.jit, static_argnames="name")
def run(name, qkv, slopes, segment_ids=None, state=None):
    return api.lightning_attention(
        qkv,
        slopes,
        segment_ids=segment_ids,
        initial_state=state,
        implementation=name,
        interpret=name in api.KERNEL_IMPLEMENTATIONS,
    )


@pytest.mark.parametrize("name", api.IMPLEMENTATIONS)
class TestImplementations:
    @pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 128, 200])
    def test_values(self, name, length):
        qkv, state = inputs(2, length)
        wanted_o, wanted_state = recurrence(qkv, SLOPES, None, state)
        o, after = run(name, qkv, SLOPES, state=state)
        assert worst_head(o, wanted_o) < 1e-5
        assert worst_state(after, wanted_state) < 1e-5
        for start in range(0, length, 64):  # a missing +1 in the query decay shows here
            first = slice(start, start + 4)
            assert worst_head(o[:, first], wanted_o[:, first]) < 1e-5

    def test_packed_documents_padding_and_carried_state(self, name):
        qkv, state = inputs(3, 150)
        ids = np.zeros((3, 150), np.int32)
        ids[0] = np.repeat([3, 1, 2, 9, 4], [1, 62, 2, 60, 25])  # starts inside and at chunk ends
        ids[1, 5:70], ids[1, 75:140] = 1, 1  # one document with a hole, padding at both ends
        ids[2, 100:] = 7
        poisoned = np.where(ids[:, :, None] > 0, qkv, np.nan)
        wanted_o, wanted_state = recurrence(qkv, SLOPES, ids, state)
        o, after = run(name, poisoned, SLOPES, ids, state)
        assert worst_head(o, wanted_o) < 1e-5
        assert worst_state(after, wanted_state) < 1e-5
        np.testing.assert_array_equal(np.asarray(o)[ids == 0], 0)

    def test_only_padding_leaves_the_state_alone(self, name):
        qkv, state = inputs(1, 70)
        o, after = run(name, qkv, SLOPES, np.zeros((1, 70), np.int32), state)
        np.testing.assert_array_equal(after, state)
        np.testing.assert_array_equal(o, 0)

    def test_gradients_stop_at_document_borders(self, name):
        qkv, state = inputs(1, 100)
        ids = np.repeat([[1, 2]], [30, 70], axis=1).astype(np.int32)

        def second(qkv, state):
            o, after = run(name, qkv, SLOPES, ids, state)
            return jnp.sum(o[:, 30:] ** 2) + jnp.sum(after**2)

        d_qkv, d_state = jax.jit(jax.grad(second, (0, 1)))(qkv, state)
        np.testing.assert_array_equal(d_qkv[:, :30], 0)
        np.testing.assert_array_equal(d_state, 0)
        assert np.all(np.any(np.asarray(d_qkv[:, 30:]) != 0, axis=-1))

    def test_nan_padding_gives_finite_gradients(self, name):
        qkv, state = inputs(1, 90)
        ids = (np.arange(90) < 70).astype(np.int32)[None]
        qkv[:, 70:] = np.nan

        def loss(qkv):
            o, after = run(name, qkv, SLOPES, ids, state)
            return jnp.sum(o**2) + jnp.sum(after)

        grad = np.asarray(jax.jit(jax.grad(loss))(qkv))
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(grad[:, 70:], 0)

    def test_extreme_slopes_of_the_release(self, name):
        config = ModelConfig.m1()
        kinds = np.array(config.layer_types) == "lightning"
        slopes = np.concatenate(
            [lightning.decay_slopes(config)[kinds][[0, 35, 69]].reshape(-1), [0, 3.9e-8, 8]]
        ).astype(np.float32)
        size = 128 if name == "tpu" else 8  # blocks of the kernels are whole lanes
        qkv, state = inputs(1, 130, heads=len(slopes), size=size)
        wanted_o, wanted_state = recurrence(qkv, slopes, None, state)
        o, after = run(name, qkv, slopes, state=state)
        assert worst_head(o, wanted_o, heads=len(slopes)) < 1e-5
        assert worst_state(after, wanted_state) < 1e-5

    def test_bfloat16_input_gives_bfloat16_output_and_float32_state(self, name):
        qkv, state = inputs(1, 80)
        rounded = jnp.asarray(qkv, jnp.bfloat16)
        wanted_o, wanted_state = recurrence(np.asarray(rounded, np.float32), SLOPES, None, state)
        o, after = run(name, rounded, SLOPES, state=state)
        assert o.dtype == jnp.bfloat16
        assert after.dtype == jnp.float32
        assert worst_head(o, wanted_o) < 3e-3  # the rounding of o alone is 1.7e-3
        # The TPU kernels round k lambda^n to bfloat16 as well, which is 1.7e-3 again.
        assert worst_state(after, wanted_state) < (2.5e-3 if name == "tpu" else 1e-5)


def test_chunked_gradients_equal_the_reference():
    qkv, state = inputs(2, 150)
    ids = np.repeat([[1, 2, 0, 3], [1, 2, 3, 3]], [40, 50, 13, 47], axis=1).astype(np.int32)
    weight, weight_state = inputs(2, 150, seed=1)

    def loss(name, segment_ids):
        def value(qkv, state):
            o, after = run(name, qkv, SLOPES, segment_ids, state)
            return jnp.sum(o * weight[:, :, : o.shape[2]]) + jnp.sum(after * weight_state)

        return jax.jit(jax.grad(value, (0, 1)))(qkv, state)

    for segment_ids in (None, ids):
        wanted, got = loss("reference", segment_ids), loss("chunked", segment_ids)
        assert worst_head(got[0], wanted[0]) < 1e-5
        scale = max(np.linalg.norm(wanted[1]), 1e-30)
        assert np.linalg.norm(got[1] - wanted[1]) / scale < 1e-5


def packed_ids():
    """Starts inside and at the ends of chunks; holes inside documents; padding at both ends."""
    ids = np.zeros((3, 150), np.int32)
    ids[0] = np.repeat([3, 1, 2, 9, 4], [1, 62, 2, 60, 25])
    ids[1, 5:70], ids[1, 75:140] = 1, 1
    ids[2, 100:] = 7
    return ids


def check_against_reference(kernels, length, packed):
    """Compare values and gradients; kernels is (qkv, slopes, segment_ids, state) -> (o, state)."""
    qkv, state = inputs(3, length)
    ids = packed_ids()[:, :length] if packed else np.ones((3, length), np.int32)
    mask = jnp.asarray(ids > 0)[:, :, None]
    weight, weight_state = inputs(3, length, seed=1)
    weight = jnp.where(mask, weight[:, :, : HEADS * SIZE], jnp.nan)  # nor may this leak

    def ours(qkv, state):
        segment_ids = jnp.asarray(ids) if packed else None
        return kernels(jnp.where(mask, qkv, jnp.nan), jnp.asarray(SLOPES), segment_ids, state)

    def wanted(qkv, state):
        return reference.lightning_attention(qkv, jnp.asarray(SLOPES), jnp.asarray(ids), state)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(function, qkv, state, d_o):
        results, pull = jax.vjp(function, qkv, state)
        return results, pull((d_o, weight_state))

    (o, after), got = values_and_gradients(ours, qkv, state, weight)
    weight = jnp.where(mask, weight, 0)
    (wanted_o, wanted_after), expected = values_and_gradients(wanted, qkv, state, weight)
    assert worst_head(o, wanted_o) < 1e-5
    assert worst_state(after, wanted_after) < 1e-5
    assert worst_head(got[0], expected[0]) < 1e-4
    assert worst_state(got[1], expected[1]) < 1e-4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "blocks"), [(150, (32, 64, 1)), (128, (32, 64, 3)), (33, (32, 32, 3)), (150, None)]
)
def test_tpu_blocks_change_neither_values_nor_gradients(length, blocks, packed):
    tile = blocks and tiling.TpuBlockSizes(*blocks)
    kernels = functools.partial(tpu.lightning_attention, block_sizes=tile, interpret=True)
    check_against_reference(kernels, length, packed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "blocks"), [(150, (32, 64, 16)), (128, (32, 32, 8)), (150, (64, 192, 16))]
)
def test_gpu_spans_and_parts_change_neither_values_nor_gradients(length, blocks, packed):
    kernels = functools.partial(
        gpu.lightning_attention, block_sizes=gpu_tiling.GpuBlockSizes(*blocks), interpret=True
    )
    check_against_reference(kernels, length, packed)


def lower_for_gpu(function, *arguments):
    """Lower for CUDA on any machine; newer JAX wants to be told which GPU."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def gpu_gradients(batch, length, heads, width, dtype, packed, sharding=None):
    """Return a function of values and gradients on GPU, and the shapes of its arguments."""

    def gradients(qkv, slopes, segment_ids, state, d_o, d_state):
        def run(qkv, state):
            return gpu.lightning_attention(qkv, slopes, segment_ids, state)

        o, pull = jax.vjp(run, qkv, state)
        return o, pull((d_o, d_state))

    def shape(*size, dtype=dtype):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    state = shape(batch, heads, width, width, dtype=jnp.float32)
    ids = shape(batch, length, dtype=jnp.int32) if packed else None
    qkv, d_o = (shape(batch, length, heads * n * width) for n in (3, 1))
    return gradients, qkv, shape(heads, dtype=jnp.float32), ids, state, d_o, state


# JAX 0.11 deprecates this way to a GPU and keeps it.
triton_is_deprecated = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)


@triton_is_deprecated
def test_none_is_decided_by_the_platform_lowered_for():
    arguments = (
        jax.ShapeDtypeStruct((1, 200, 2 * 3 * 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    )
    traced = jax.jit(api.lightning_attention).trace(*arguments)
    tpu_text = traced.lower(lowering_platforms=("tpu",)).as_text()
    cpu_text = traced.lower(lowering_platforms=("cpu",)).as_text()
    gpu_text = lower_for_gpu(api.lightning_attention, *arguments).as_text()
    assert "tpu_custom_call" in tpu_text
    # No GPU has checked the kernels for GPUs, so they are taken by name alone.
    assert "tpu_custom_call" not in cpu_text + gpu_text
    assert "lightning_gpu_fwd" not in gpu_text


@triton_is_deprecated
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "dtype"),
    [
        (1, 8192, 64, 128, "bfloat16"),
        (1, 8192, 8, 128, "float32"),  # few heads: spans
        (2, 4096, 64, 64, "bfloat16"),
        (1, 1000, 64, 256, "bfloat16"),  # a ragged tail
        (1, 1 << 20, 64, 128, "bfloat16"),  # 2^33 elements of o: indices of 64 bits
    ],
)
def test_gpu_kernels_lower_for_cuda_and_read_qkv_where_it_lies(
    batch, length, heads, width, dtype, packed
):
    text = lower_for_gpu(*gpu_gradients(batch, length, heads, width, dtype, packed)).as_text()
    assert "lightning_gpu_fwd" in text
    assert "lightning_gpu_bwd" in text
    assert ("lightning_gpu_sums" in text) == (heads == 8)
    kind = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    arrays = [f"tensor<{batch}x{length}x{heads * n * width}x{kind}>" for n in (3, 1)]
    for line in text.splitlines():
        if any(array in line for array in arrays):
            assert any(x in line for x in ("@__gpu$xla.gpu.triton", "func.", "call @", "return")), (
                line[:200]
            )


@pytest.mark.parametrize("name", api.KERNEL_IMPLEMENTATIONS)
def test_bfloat16_gradients(name):
    qkv, state = inputs(1, 130)
    rounded = jnp.asarray(qkv, jnp.bfloat16)
    weight, weight_state = inputs(1, 130, seed=1)
    weight = jnp.asarray(weight[:, :, : HEADS * SIZE], jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(name, qkv):
        def ours(qkv, state):
            return run(name, qkv, SLOPES, None, state)

        (o, _), pull = jax.vjp(ours, qkv, jnp.asarray(state))
        return pull((weight.astype(o.dtype), jnp.asarray(weight_state)))

    got, wanted = gradients(name, rounded), gradients("reference", rounded.astype(jnp.float32))
    assert got[0].dtype == jnp.bfloat16
    assert got[1].dtype == jnp.float32
    # Roundings of the pairs, of dS, of what is added to dS and of the result, 1.7e-3 each at most.
    assert worst_head(got[0], wanted[0]) < 3.4e-3
    assert worst_state(got[1], wanted[1]) < 3.4e-3


H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
}
"""


@triton_is_deprecated
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "width", "dtype"),
    [
        (8192, 64, 128, "bfloat16"),
        (8192, 8, 128, "float32"),
        (8192, 64, 64, "bfloat16"),
        (1000, 64, 256, "bfloat16"),
    ],
)
def test_gpu_kernels_compile_ahead_of_time_and_fit_an_h100(length, heads, width, dtype, packed):
    """Needs `jax-cuda13-plugin`, `jax-cuda13-pjrt` and ptxas, but no GPU."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    topology = jax.experimental.topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
    )
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    # XLA raises where a kernel asks for more shared memory than there is.
    lower_for_gpu(*gpu_gradients(1, length, heads, width, dtype, packed, sharding)).compile()


@pytest.mark.parametrize("name", api.KERNEL_IMPLEMENTATIONS)
def test_a_named_kernel_raises_on_cpu(name):
    qkv, _ = inputs(1, 8, heads=2, size=64)
    with pytest.raises(ValueError, match="[Ii]nterpret mode"):
        api.lightning_attention(jnp.asarray(qkv), jnp.asarray(SLOPES[:2]), implementation=name)


_chunked = jax.jit(chunked.lightning_attention, static_argnums=4)


@hypothesis.given(
    chunk=st.sampled_from([24, 256]), cut=st.sampled_from([1, 75, 149]), packed=st.booleans()
)
@hypothesis.settings(max_examples=6)
def test_chunk_size_and_splits_change_nothing(chunk, cut, packed):
    qkv, state = inputs(1, 150)
    slopes, qkv = jnp.asarray(SLOPES), jnp.asarray(qkv)
    ids = jnp.asarray(np.repeat([[1, 2, 0, 2]], [45, 50, 5, 50], axis=1), jnp.int32)
    ids = ids if packed else None
    wanted = _chunked(qkv, slopes, ids, state, None)
    got = _chunked(qkv, slopes, ids, state, chunk)
    assert worst_head(got[0], wanted[0]) < 1e-5
    assert worst_state(got[1], wanted[1]) < 1e-5
    if not packed:  # a cut inside packed rows is a new row: its first document continues the state
        first = _chunked(qkv[:, :cut], slopes, None, state, None)
        second = _chunked(qkv[:, cut:], slopes, None, first[1], None)
        assert worst_head(jnp.concatenate([first[0], second[0]], 1), wanted[0]) < 1e-5
        assert worst_state(second[1], wanted[1]) < 1e-5


@pytest.mark.parametrize(
    ("heads", "block", "unroll"), [(8, 8, 4), (8, 4, 2), (6, 3, 4), (4, 2, 3), (2, 1, 2)]
)
def test_pipelined_heads_and_products_side_by_side(heads, block, unroll):
    """Full groups, groups with a boundary in one chunk, and a ragged tail; chunk as wide as H."""
    tile = tiling.TpuBlockSizes(SIZE, 8 * SIZE, block, unroll, has_paired_products=True)
    slopes = jnp.geomspace(0.9, 5e-5, heads)
    qkv, state = inputs(2, 25 * SIZE - 5, heads=heads)
    ids = np.ones(qkv.shape[:2], np.int32)
    ids[0, 9 * SIZE + 3 :] += 1  # the rest of its group of chunks is full
    ids[0, 20 * SIZE :] += 1  # on the edge of a chunk
    ids[1, 17 * SIZE : 18 * SIZE] = 0
    qkv[ids == 0] = np.nan
    ids = jnp.asarray(ids)
    d_o, d_state = (x[..., : heads * SIZE] for x in inputs(2, qkv.shape[1], seed=3, heads=heads))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(function, qkv, state):
        (o, after), pull = jax.vjp(lambda x, s: function(x, slopes, ids, s), qkv, state)
        return o, after, *pull((d_o, d_state))

    kernels = functools.partial(tpu.lightning_attention, block_sizes=tile, interpret=True)
    got = gradients(kernels, qkv, state)
    wanted = gradients(reference.lightning_attention, qkv, state)
    assert worst_head(got[0], wanted[0], heads=heads) < 1e-5
    assert worst_state(got[1], wanted[1]) < 1e-5
    assert worst_head(got[2], wanted[2], heads=heads) < 1e-4
    assert worst_state(got[3], wanted[3]) < 1e-4
    full = jnp.asarray(np.nan_to_num(qkv[:, : 16 * SIZE]))  # no table of boundaries at all
    got = jax.jit(kernels)(full, slopes, None, state)
    ones = jnp.ones(full.shape[:2], jnp.int32)
    wanted = jax.jit(reference.lightning_attention)(full, slopes, ones, state)
    assert worst_head(got[0], wanted[0], heads=heads) < 1e-5
    assert worst_state(got[1], wanted[1]) < 1e-5


def test_odd_number_of_heads_of_64():
    slopes = np.geomspace(0.9, 5e-5, 9).astype(np.float32)
    qkv, state = inputs(1, 20, heads=9, size=64)
    wanted_o, wanted_state = recurrence(qkv, slopes, None, state)
    o, after = run("tpu", qkv, slopes, state=state)
    assert worst_head(o, wanted_o, heads=9) < 1e-5
    assert worst_state(after, wanted_state) < 1e-5


def test_long_chain_of_the_slowest_head_needs_a_float32_state():
    """8k tokens of one head, D 16: the carried state stays at 1e-5, one in bfloat16 does not."""
    qkv, _ = inputs(1, 8192, heads=1)
    qkv[:, :, 2 * SIZE :] += 1.0  # values with a mean, so that the state grows
    slopes = SLOPES[2:]
    zero = np.zeros((1, 1, SIZE, SIZE), np.float32)
    _, wanted = recurrence(qkv, slopes, None, zero)
    _, after = run("chunked", qkv, slopes, state=zero)
    assert worst_state(after, wanted) < 1e-5
    rounded = jnp.asarray(zero)
    step = jax.jit(lambda x, s: run("chunked", x, slopes, state=s)[1])
    for start in range(0, 8192, 64):
        state = step(jnp.asarray(qkv[:, start : start + 64]), rounded)
        rounded = state.astype(jnp.bfloat16).astype(jnp.float32)
    assert worst_state(rounded, wanted) > 1e-3


def test_documents():
    ids = jnp.asarray([[0, 5, 5, 0, 5, 7, 0, 7, 5, 0]], jnp.int32)
    starts = documents.document_starts(ids)
    assert starts.astype(int).tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 1, 0]]
    assert documents.document_numbers(ids).tolist() == [[0, 1, 1, 0, 1, 2, 0, 2, 3, 0]]
    assert documents.document_positions(ids).tolist() == [[0, 0, 1, 0, 2, 0, 0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": jnp.zeros((1, 4, 50))}, "qkv: got shape"),
        ({"qkv": jnp.zeros((1, 4, 144), jnp.float16)}, "float16; wanted float32 or bfloat16"),
        ({"slopes": jnp.zeros((3,), jnp.bfloat16)}, "slopes: got"),
        ({"segment_ids": jnp.zeros((1, 5), jnp.int32)}, "segment_ids: got shape"),
        ({"initial_state": jnp.zeros((1, 3, 16, 8))}, "initial_state: got"),
        ({"interpret": True}, "interpret: got"),
        ({"implementation": "gpu"}, "GPU kernels: got float32 heads of 16"),
        ({"implementation": "triton"}, "implementation is 'triton'"),
    ],
)
def test_bad_arguments_name_what_is_wrong(change, message):
    arguments = {"qkv": jnp.zeros((1, 4, 144)), "slopes": jnp.asarray(SLOPES)} | change
    with pytest.raises(ValueError, match=message):
        api.lightning_attention(arguments.pop("qkv"), arguments.pop("slopes"), **arguments)
