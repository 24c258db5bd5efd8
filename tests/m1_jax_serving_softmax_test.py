"""Softmax attention over pages: right values, and the same bits in any company, form by form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax.plan import topology
from m1_jax.serving import ragged_batch, softmax
from m1_jax.serving import state as state_lib
from pallas_kernels.paged_attention import tpu as tpu_kernel

TILE, CHUNK, NUM_KV, HEADS, SIZE, PAGES = 8, 16, 2, 6, 16, 24
INDEX = (1, 0)  # of a stack of two layers
BLOCK_KEYS = tpu_kernel.BLOCK_KEYS


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Let a short sequence have several blocks of keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "BLOCK_KEYS", 2 * CHUNK)
        patch.setattr(tpu_kernel, "BLOCK_KEYS", 2 * CHUNK)
        yield
    # The kernel's traces have the small blocks.
    jax.clear_caches()


def draw(length, seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = ((length, HEADS, SIZE), (length, NUM_KV, SIZE), (length, NUM_KV, SIZE))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def empty_cache(dtype="float32"):
    shape = (2, 1, PAGES + 1, NUM_KV, CHUNK, SIZE)
    return state_lib.PagedKVCache(*(jnp.full(shape, jnp.nan, dtype) for _ in range(2)))


@functools.partial(jax.jit, static_argnames="implementation")
def attend(q, k, v, batch, cache, implementation):
    return softmax.attend_pages(q, k, v, batch, cache, INDEX, implementation)


def run(parts, cache, implementation, num_tiles=None):
    """Attend in full tiles, or row by row. Return each part's output, and the cache.

    Args:
      parts: (q k v, first row, end row, pages) of sequences, or None for a tile of padding.
      num_tiles: of a program of full tiles. None: one row in each tile.
    """
    rows_per_tile = 1 if num_tiles is None else TILE
    num_tiles = num_tiles or len(parts)
    positions = np.full(num_tiles * rows_per_tile, -1, np.int32)
    pages = np.zeros((num_tiles, PAGES), np.int32)
    dtype = cache.keys.dtype
    # Padding computes with NaN: it must reach nobody.
    heads = (HEADS, NUM_KV, NUM_KV)
    arrays = [np.full((len(positions), n, SIZE), np.nan, np.float32) for n in heads]
    at, places = 0, []
    for part in parts:
        if part is None:
            at += rows_per_tile
            continue
        qkv, first, end, own_pages = part
        place = at + (first % TILE if rows_per_tile > 1 else 0)
        rows = np.arange(place, place + end - first)
        positions[rows] = np.arange(first, end)
        for array, values in zip(arrays, qkv, strict=True):
            array[rows] = np.asarray(values[first:end], np.float32)
        tiles = slice(at // rows_per_tile, -(-(rows[-1] + 1) // rows_per_tile))
        pages[tiles, : len(own_pages)] = own_pages
        at = tiles.stop * rows_per_tile
        places.append(rows)
    slots = np.zeros(num_tiles, np.int32)
    batch = ragged_batch.RaggedBatch(positions, slots, pages, TILE, 8)
    arrays = [jnp.asarray(array, dtype) for array in arrays]
    o, cache = attend(*arrays, batch, cache, implementation=implementation)
    return [np.asarray(o)[rows] for rows in places], cache


def oracle(qkv):
    q, k, v = (np.asarray(x, np.float64) for x in qkv)
    k, v = (np.repeat(x, HEADS // NUM_KV, axis=1) for x in (k, v))
    scores = np.einsum("ind,jnd->nij", q, k) / np.sqrt(SIZE)
    scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return np.einsum("nij,jnd->ind", weights / weights.sum(axis=2, keepdims=True), v)


def assert_same_bits(got, want):
    unsigned = np.uint32 if got.dtype == np.float32 else np.uint16
    np.testing.assert_array_equal(got.view(unsigned), want.view(unsigned))


LONG, SHORT = (20, 5, 7, 1, 9, 3), (11, 2, 17)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_no_bit(dtype, implementation):
    """Prefill and decoding, alone and beside longer and shorter sequences, among NaN."""
    long, short = draw(90, 1, dtype), draw(45, 2, dtype)
    (want_long,), _ = run([(long, 0, 90, LONG)], empty_cache(dtype), implementation, 16)
    (want,), _ = run([(short, 0, 45, SHORT)], empty_cache(dtype), implementation, 16)
    # Together in one program, from there on in parts that begin and end within a tile.
    together, _ = run(
        [(short, 0, 45, SHORT), None, (long, 0, 90, LONG)], empty_cache(dtype), implementation, 24
    )
    for got, expected in zip(together, (want, want_long), strict=True):
        assert_same_bits(got, expected)
    cache = empty_cache(dtype)
    (long_rows, short_rows), cache = run(
        [(long, 0, 85, LONG), (short, 0, 11, SHORT)], cache, implementation, 16
    )
    rows = [short_rows]
    (piece,), cache = run([(short, 11, 40, SHORT)], cache, implementation, 16)
    rows.append(piece)
    long_rows = [long_rows]
    for i in range(5):
        parts = [None, (short, 40 + i, 41 + i, SHORT), None, (long, 85 + i, 86 + i, LONG)]
        pieces, cache = run(parts + [None] * (4 + i % 2 * 8), cache, implementation)
        rows.append(pieces[0])
        long_rows.append(pieces[1])
    assert_same_bits(np.concatenate(rows), want)
    assert_same_bits(np.concatenate(long_rows), want_long)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
def test_agrees_with_the_definition(implementation):
    long, short = draw(90, 1), draw(45, 2)
    cache = empty_cache()
    outputs, cache = run([(short, 0, 45, SHORT), (long, 0, 90, LONG)], cache, implementation, 24)
    # Float32 sums over 90 keys, in another order.
    np.testing.assert_allclose(outputs[0], oracle(short), rtol=0, atol=2e-6)
    np.testing.assert_allclose(outputs[1], oracle(long), rtol=0, atol=2e-6)
    # The other layer, and pages of nobody, are as they were.
    for array in (cache.keys, cache.values):
        assert np.isnan(np.asarray(array)[0]).all()
        others = sorted(set(range(PAGES + 1)) - {0, *LONG, *SHORT})
        assert np.isnan(np.asarray(array)[1][:, others]).all()


def test_another_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation: got 'gpu'; wanted None, 'xla', 'tpu'"):
        run([(draw(8, 1), 0, 8, SHORT)], empty_cache(), "gpu", 1)


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_tpu_program_reads_pages_in_place(name, monkeypatch):
    """Lowered for TPU, the kernel is chosen, and no program has a second cache beside the first."""
    monkeypatch.setattr(tpu_kernel, "BLOCK_KEYS", BLOCK_KEYS)
    pytest.importorskip("libtpu")
    device = topology.get_slice_devices(topology.parse_slice(name))[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def shape(dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    rows, pages, num_pages = 64, 64, 2048
    batch = ragged_batch.RaggedBatch(
        *(shape(dims, jnp.int32) for dims in ((rows,), (rows,), (rows, pages))), 8, 8
    )
    cache = shape((10, 1, num_pages, 1, 64, 128))
    q, k = shape((rows, 8, 128)), shape((rows, 1, 128))

    def attend_all_layers(q, k, v, batch, cache):
        def body(cache, layer):
            o, cache = softmax.attend_pages(q, k, v, batch, cache, (layer, 0))
            return cache, o

        return jax.lax.scan(body, cache, jnp.arange(10, dtype=jnp.int32))

    compiled = (
        jax.jit(attend_all_layers, donate_argnums=4)
        .lower(q, k, k, batch, state_lib.PagedKVCache(cache, cache))
        .compile()
    )
    assert "paged_attention" in compiled.as_text()
    cache_bytes = 2 * 10 * num_pages * 64 * 128
    assert compiled.memory_analysis().temp_size_in_bytes < cache_bytes / 4
