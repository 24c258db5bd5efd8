"""The serving kernel in interpret mode: a float64 recurrence, any company, and NaN in memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tpu_support import compile_for_chip, whole_moves

from m1_jax.serving import lightning, ragged_batch
from m1_jax.serving import state as state_lib
from pallas_kernels.lightning_attention import tiling
from pallas_kernels.lightning_serving import tiles, tpu

HEADS, SIZE, CHUNK, TILE, SLOTS = 2, 128, 16, 8, 5
STACK, INDEX = (2, 2), (1, 0)
SLOPES = np.asarray([0.6, 2e-4], np.float32)
PREFILL_TILES, DECODE_ROWS = 4, 3


@dataclasses.dataclass
class Sequence:
    """q, k and v of a sequence's tokens [T, N3H], its slot, and what attention returned so far."""

    qkv: np.ndarray
    slot: int
    outputs: list


def make_sequence(seed, slot, length=40, dtype="bfloat16"):
    qkv = np.random.default_rng(seed).normal(size=(length, HEADS * 3 * SIZE))
    return Sequence(np.asarray(jnp.asarray(qkv, dtype)), slot, [])


def make_memory(dtype="bfloat16", garbage=np.nan):
    lead = (*STACK, SLOTS, HEADS)
    rows = (*lead, CHUNK, SIZE)
    return tpu.SlotArrays(
        jnp.full((*lead, SIZE, SIZE), garbage, jnp.float32),
        *(jnp.full(rows, garbage, dtype) for _ in range(2)),
    )


@functools.partial(jax.jit, donate_argnums=3)
def attend(qkv, slots, positions, memory):
    return tpu.attend_tiles(qkv, SLOPES, slots, positions, memory, INDEX, interpret=True)


def run(memory, parts, num_tiles=PREFILL_TILES):
    """Append counts of tokens of sequences, each from the next row of its tile on."""
    qkv = np.zeros((num_tiles * TILE, HEADS * 3 * SIZE), parts[0][0].qkv.dtype)
    positions, slots = np.full(num_tiles * TILE, -1, np.int32), np.zeros(num_tiles, np.int32)
    first, rows = 0, []
    for one, count in parts:
        done = len(one.outputs)
        here = np.arange(count) + first * TILE + done % TILE
        qkv[here], positions[here] = one.qkv[done : done + count], np.arange(done, done + count)
        end = -(-(done % TILE + count) // TILE) + first
        slots[first:end], first = one.slot, end
        rows.append(here)
    shape = (num_tiles, TILE, -1)
    o, memory = attend(qkv.reshape(shape), slots, positions.reshape(shape[:2]), memory)
    o = np.asarray(o).reshape(num_tiles * TILE, -1)
    for (one, _), here in zip(parts, rows, strict=True):
        one.outputs += list(o[here])
    return memory


def reference(one):
    """Return the outputs and the last state of the recurrence in float64."""
    heads = one.qkv.astype(np.float64).reshape(-1, HEADS, 3, SIZE)
    state, outputs = np.zeros((HEADS, SIZE, SIZE)), []
    for q, k, v in np.moveaxis(heads, 2, 1):
        state = np.exp(-SLOPES.astype(np.float64))[:, None, None] * state
        state = state + k[:, :, None] * v[:, None, :]
        outputs.append(np.einsum("nk,nkv->nv", q, state).reshape(-1))
    return np.stack(outputs), state


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_agrees_with_the_recurrence(dtype):
    """Two chunks, closed in prefill and in decoding; memory is NaN wherever nothing was written."""
    one = make_sequence(0, 3, 32, dtype)
    memory = run(make_memory(dtype), [(one, 21)])
    while len(one.outputs) < 32:
        memory = run(memory, [(one, 1)])
    outputs, state = reference(one)
    # o is rounded to its dtype. The order of float32 sums is the rest.
    tolerance = {"bfloat16": 2**-8, "float32": 2e-6}[dtype]
    got = np.stack(one.outputs).astype(np.float64)
    scale = np.abs(outputs).reshape(32, HEADS, SIZE).max(axis=(0, 2)).repeat(SIZE)
    np.testing.assert_array_less(np.abs(got - outputs) / scale, tolerance)
    gap = np.abs(np.asarray(memory.states)[(*INDEX, 3)] - state).max(axis=(1, 2))
    np.testing.assert_array_less(gap / np.abs(state).max(axis=(1, 2)), 2e-6)


def test_cuts_and_company_change_no_bit():
    want = make_sequence(0, 1)
    memory = run(make_memory(garbage=0.0), [(want, 32)])
    run(memory, [(want, 8)])
    one, other, third = make_sequence(0, 2), make_sequence(1, 4), make_sequence(2, 1)
    memory = run(make_memory(), [(other, 8), (one, 13), (third, 5)])
    memory = run(memory, [(third, 1), (one, 3), (other, 10)])  # several rows of an open tile
    while len(one.outputs) < 40:
        parts = [(other, 1), (one, 1), (third, 1)]
        memory = run(memory, parts if len(one.outputs) % 2 else parts[1:])
    np.testing.assert_array_equal(np.stack(one.outputs), np.stack(want.outputs))
    outputs, _ = reference(third)
    got = np.stack(third.outputs)
    np.testing.assert_allclose(got, outputs[: len(got)], rtol=0, atol=2**-8 * np.abs(outputs).max())


def test_only_named_slots_are_written_and_padding_is_zero():
    one = make_sequence(0, 2)
    memory = run(make_memory(), [(one, 16)])
    for array in memory:
        array = np.array(array, np.float32)
        assert np.isfinite(array[(*INDEX, 2)]).all()
        array[(*INDEX, 2)] = np.nan
        assert np.isnan(array).all()
    positions = np.full((PREFILL_TILES, TILE), -1, np.int32)
    qkv = np.full((PREFILL_TILES, TILE, HEADS * 3 * SIZE), np.nan, one.qkv.dtype)
    o, after = attend(qkv, np.zeros(PREFILL_TILES, np.int32), positions, make_memory())
    assert not np.asarray(o).any()
    assert all(np.isnan(np.asarray(array, np.float32)).all() for array in after)


def test_a_chunk_goes_on_after_tokens_are_taken_back():
    want = make_sequence(0, 1)
    run(make_memory(), [(want, 20)])
    one = make_sequence(0, 1)
    memory = run(make_memory(), [(one, 17)])
    wrong = make_sequence(5, 1)
    wrong.outputs = list(one.outputs)
    memory = run(memory, [(wrong, 3)])
    run(memory, [(one, 3)])
    np.testing.assert_array_equal(np.stack(one.outputs), np.stack(want.outputs))


def test_tables_of_tiles():
    positions = np.full((5, 8), -1)
    positions[0], positions[1, :3], positions[3, 5], positions[4, 2:4] = (
        range(8, 16),
        (16, 17, 18),
        37,
        (2, 3),
    )
    got = tiles.make_tile_tables(jnp.asarray([4, 4, 0, 1, 3]), jnp.asarray(positions), 16)
    want = [
        [0, 0, -1, 1, 2],
        [8, 0, 0, 0, 0],
        [15, 2, -1, 5, 3],
        [255, 7, 0, 32, 12],
        [1, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(got.tiles, want)
    np.testing.assert_array_equal(got.runs, [[4, 1, 3, -1, -1, -1], [1, 0, 1, 0, 0, 0]])


def attend_slots(qkv, batch, state, implementation):
    return lightning.attend_slots(qkv, SLOPES, batch, state, INDEX, implementation)


def test_the_engine_takes_it_where_it_fits(monkeypatch):
    """Within rounding of the XLA form, row by row; sizes that do not fit are refused by name."""
    monkeypatch.setattr(tpu, "attend_tiles", functools.partial(tpu.attend_tiles, interpret=True))
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(3, HEADS * 3 * SIZE)), jnp.float32)
    positions, slots = jnp.asarray([31, -1, 18]), jnp.asarray([1, 0, 4])
    batch = ragged_batch.RaggedBatch(positions, slots, slots[:, None], TILE)
    fill = np.random.default_rng(1)
    memory = [jnp.asarray(fill.normal(size=x.shape), x.dtype) for x in make_memory("float32")]
    state = state_lib.LightningSlots(*memory)
    want, want_state = attend_slots(qkv, batch, state, "chunked")
    got, got_state = attend_slots(qkv, batch, state, "tpu")
    np.testing.assert_allclose(got[::2], want[::2], rtol=0, atol=1e-4)
    for mine, theirs in zip(jax.tree.leaves(got_state), jax.tree.leaves(want_state), strict=True):
        written = slice(None) if mine.shape[4] == SIZE else slice(0, 3)
        mine, theirs = (np.asarray(x)[(*INDEX, [1, 4])][:, :, written] for x in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
    assert (
        "tpu_custom_call"
        not in jax.jit(attend_slots, static_argnums=3).lower(qkv, batch, state, None).as_text()
    )
    odd = dataclasses.replace(batch, attention_tile=4)
    with pytest.raises(ValueError, match="tiles of 4 .*wanted .*8, 16 or 32 rows"):
        attend_slots(qkv, odd, state, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("rows", [64, 512])
def test_compiles_in_place(chip, rows):
    """Decoding and prefill in loops over steps and layers: no copy of the slots."""
    slots, heads = 65, 8
    lead = (10, 7, slots, heads)
    shapes = [((*lead, 128, 128), "float32"), *[((*lead, 64, 128), "bfloat16")] * 2]
    num_tiles = rows if rows == 64 else rows // TILE

    def step(qkv, positions, slots, num_layers, *memory):
        slopes = jnp.full(heads, 0.01)
        batch = ragged_batch.RaggedBatch(positions, slots, slots[:, None], TILE)

        def attend_layer(layer, carry):
            x, state = carry
            o, state = lightning.attend_slots(x, slopes, batch, state, (layer, 3))
            return jnp.tile(o, (1, 3)), state

        # As the model's scan over layers, in a loop over steps.
        def attend_layers(_, carry):
            return jax.lax.fori_loop(0, num_layers, attend_layer, carry)

        state = state_lib.LightningSlots(*memory)
        return jax.lax.fori_loop(0, num_layers, attend_layers, (qkv, state))

    arguments = [((rows, heads * 384), "bfloat16"), ((rows,), "int32"), ((num_tiles,), "int32")]
    with tiling.compile_for(chip):
        program = compile_for_chip(step, [*arguments, ((), "int32"), *shapes], chip, (4, 5, 6))
    assert "lightning_serving" in program.as_text()
    assert not whole_moves(program, [shape for shape, _ in shapes])
    slot_bytes = sum(np.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= slot_bytes
    assert memory.temp_size_in_bytes < 64 * 2**20
