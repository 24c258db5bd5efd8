"""The kernels' static schedules stay within the budgets recorded in tests/data."""

import json
import pathlib
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
import tpu_support

from pallas_kernels.lightning_attention import api, schedule, tiling

# Written by `python -m pallas_kernels.lightning_attention.schedule --json=<this file>`.
# Counts differ from one compiler to the next; the Makefile installs this one.
COMPILER = "0.0.51"
BUDGETS = pathlib.Path(__file__).parent / "data" / "lightning_schedule.json"
SLACK = 1.02
# These spill no register on any generation, and a new budget cannot change that.
SPILL_FREE = {"lightning_fwd", "lightning_bwd", "lightning_serving"}


@pytest.mark.parametrize("chip", tpu_support.CHIPS_IN_TURNS)
def test_schedule_stays_within_its_budget(chip):
    pytest.importorskip("libtpu")
    if (got := metadata.version("libtpu")) != COMPILER:
        pytest.skip(f"libtpu: got {got}; the budgets were counted with {COMPILER}")
    budgets = {(r["kernel"], r["chip"]): r for r in json.loads(BUDGETS.read_text())}
    assert {name for name, on in budgets if on == chip} == set(schedule.SCHEDULED_KERNELS)
    for record in schedule.measure_schedule(chip):
        budget = budgets[record["kernel"], chip]
        for key in ("bundles_per_token_head", "spills", "vmem_bytes"):
            assert record[key] <= budget[key] * SLACK, (record["kernel"], key)
        assert not (record["kernel"] in SPILL_FREE and record["spills"]), record


def test_blocks_are_those_of_the_generation_compiled_for():
    """The generation is part of jit's key: one function traced twice gets two block sizes."""
    program = jax.jit(lambda x: x * tiling.MATRIX_UNIT_SIDES[tiling.current_generation()])
    assert program(1) == 128  # off-device: v5p
    with tiling.compile_for("v6e"):
        assert tiling.current_generation() == "v6e"
        assert program(1) == 256
        with tiling.compile_for("v5e"):
            assert program(1) == 128
    assert tiling.current_generation() == "v5p"
    with pytest.raises(ValueError, match=r"generation is 'v7'; wanted one of \['v5e'"):
        tiling.compile_for("v7")


def test_saved_states_cost_at_most_64_bytes_per_token_and_head():
    for head_dim in (64, 128, 256):
        tile = tiling.choose_block_sizes(8, head_dim, 1 << 20, 2, "v5p")
        assert head_dim**2 * 4 / tile.superblock_tokens <= 64


@pytest.mark.parametrize("num_heads", [1, 3, 6, 16, 61, 64])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_any_number_of_heads_has_blocks(num_heads, head_dim):
    for generation in tiling.MATRIX_UNIT_SIDES:
        for item_bytes in (2, 4):
            tile = tiling.choose_block_sizes(num_heads, head_dim, 5000, item_bytes, generation)
            assert tile is not None
            assert num_heads % tile.block_heads == 0
            assert tiling.estimate_vmem_bytes(tile, head_dim, item_bytes) <= tiling.VMEM_LIMIT_BYTES


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(4, 64, jnp.bfloat16), (9, 64, jnp.float32), (3, 128, jnp.float32), (2, 256, jnp.bfloat16)],
)
@pytest.mark.parametrize("chip", tpu_support.CHIPS_IN_TURNS)
def test_packed_rows_of_any_head_compile(chip, heads, head_dim, dtype):
    where = tpu_support.chip_sharding(schedule.CHIP_SPECS[chip][0])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def both(qkv, slopes, ids, state, d_o):
        def attend(qkv, state):
            return api.lightning_attention(
                qkv, slopes, segment_ids=ids, initial_state=state, implementation="tpu"
            )

        (o, after), pull = jax.vjp(attend, qkv, state)
        return o, after, pull((d_o, after))

    qkv, d_o = (array(dtype, 1, 3000, heads * n * head_dim) for n in (3, 1))
    slopes, ids = array(jnp.float32, heads), array(jnp.int32, 1, 3000)
    state = array(jnp.float32, 1, heads, head_dim, head_dim)
    with tiling.compile_for(chip):
        traced = jax.jit(both).trace(qkv, slopes, ids, state, d_o)
    traced.lower(lowering_platforms=("tpu",)).compile()


@pytest.mark.slow
def test_nothing_copies_the_projection_around_the_kernels():
    """Ragged packed rows, forward and backward: temporaries are far below one copy of qkv."""
    where = tpu_support.chip_sharding("v5p:2x2x1")

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def both(qkv, slopes, segment_ids, d_o):
        def attend(qkv):
            return api.lightning_attention(qkv, slopes, segment_ids=segment_ids)

        (o, state), pull = jax.vjp(attend, qkv)
        return o, state, pull((d_o, state))

    qkv, d_o = (array(jnp.bfloat16, 2, 5000, 8 * n * 128) for n in (3, 1))
    arguments = qkv, array(jnp.float32, 8), array(jnp.int32, 2, 5000), d_o
    program = jax.jit(both).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    assert program.memory_analysis().temp_size_in_bytes < qkv.size * 2 / 4
