"""The kernels' static schedules stay within the budgets recorded in tests/data."""

import json
import pathlib

import pytest

from pallas_kernels.lightning_attention import schedule, tiling

# Written by `python -m pallas_kernels.lightning_attention.schedule --json=<this file>`.
BUDGETS = pathlib.Path(__file__).parent / "data" / "lightning_schedule.json"
SLACK = 1.02  # another build of the compiler may move a few bundles


@pytest.mark.slow
@pytest.mark.parametrize("chip", schedule.CHIPS)
def test_schedule_stays_within_its_budget(chip):
    pytest.importorskip("libtpu")
    budgets = {(r["kernel"], r["chip"]): r for r in json.loads(BUDGETS.read_text())}
    for record in schedule.measure(chip):
        budget = budgets[record["kernel"], chip]
        for key in ("bundles_per_token_head", "spills", "vmem_bytes"):
            assert record[key] <= budget[key] * SLACK, (record["kernel"], key)


def test_saved_states_cost_at_most_64_bytes_per_token_and_head():
    for head_dim in (64, 128, 256):
        tile = tiling.choose(8, head_dim, 1 << 20, 2, "v5p")
        assert head_dim**2 * 4 / tile.superblock <= 64


@pytest.mark.parametrize("num_heads", [1, 3, 6, 16, 61, 64])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_any_number_of_heads_has_blocks(num_heads, head_dim):
    for generation in tiling.MATRIX_UNIT:
        for item_bytes in (2, 4):
            tile = tiling.choose(num_heads, head_dim, 5000, item_bytes, generation)
            assert tile is not None
            assert num_heads % tile.heads == 0
            assert tiling.vmem_bytes(tile, head_dim, item_bytes) <= tiling.VMEM_BYTES
