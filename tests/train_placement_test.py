"""Rows of a batch on the meshes of real slices, whose hosts hold rows that are not neighbours."""

import json

import jax
import numpy as np
import pytest
import records_support
import tokenizer_support

from m1_jax import config as config_lib
from m1_jax import sharding
from m1_jax.plan import topology
from train.data import config as data_config
from train.data import placement
from train.data import stream as stream_lib

# Fixtures.
tokenizer = tokenizer_support.tokenizer

# Slices and meshes of the shipped configs and of docs/plan.md.
SLICES = [
    ("v5p:8x8x8", {"fsdp": 16, "expert": 32}, 512),
    ("v5p:8x8x8", {"fsdp": 2, "expert": 32, "context": 8}, 64),
    ("v5p:8x8x8", {"expert": 8, "context": 64}, 8),
    ("v5p:4x4x8", {"fsdp": 2, "expert": 32, "tensor": 2}, 128),
    ("tpu7x:4x4x4", {"fsdp": 2, "expert": 32, "tensor": 2}, 128),
    ("tpu7x:4x4x4", {"expert": 16, "tensor": 2, "context": 4}, 16),
    ("v6e:16x16", {"fsdp": 8, "expert": 32}, 256),
    ("v5e:16x16", {"fsdp": 8, "expert": 8, "tensor": 4}, 64),
]


def layout_of(name, mesh):
    devices = topology.get_slice_devices(topology.parse_slice(name))
    layout = sharding.make_layout(
        sharding.make_mesh(mesh, devices), config_lib.ModelConfig.m1(), sharding.TRAIN
    )
    assert layout is not None
    return layout


@pytest.mark.parametrize(("name", "mesh", "num_rows"), SLICES)
def test_every_process_of_a_slice_knows_its_rows(name, mesh, num_rows):
    pytest.importorskip("libtpu")
    layout = layout_of(name, mesh)
    rows_by_process = placement.find_rows_by_process(layout, num_rows)
    processes = {device.process_index for device in layout.mesh.devices.flat}
    assert rows_by_process.keys() == processes
    assert {row for rows in rows_by_process.values() for row in rows} == set(range(num_rows))
    # What JAX asks of a process is what the process reads.
    wanted = layout.activation_sharding("batch", "length")
    for device, index in wanted.devices_indices_map((num_rows, 4096)).items():
        rows = range(*index[0].indices(num_rows))
        assert set(rows) <= set(rows_by_process[device.process_index])


def test_hosts_of_a_slice_make_the_batch_of_one_host(tmp_path, tokenizer):
    """With the default number of lanes, 64, for 128 hosts and 512 rows."""
    pytest.importorskip("libtpu")
    texts = [{"text": f"{i} lightning attention keeps one matrix"} for i in range(4000)]
    records_support.write_jsonl(tmp_path / "texts.jsonl", texts)
    source = data_config.DataSource("texts", f"{tmp_path}/texts.jsonl")
    config = data_config.StreamConfig(data_config.DataConfig((source,)), seq_len=32, rows=512)
    rows_by_process = placement.find_rows_by_process(
        layout_of("v5p:8x8x8", {"fsdp": 16, "expert": 32}), 512
    )
    assert len(rows_by_process) == 128
    with stream_lib.BatchStream(config, tokenizer) as stream:
        wanted = next(stream)
    state = {}
    for process in (0, 1, 63, 127):
        with stream_lib.BatchStream(config, tokenizer, rows_by_process[process]) as stream:
            got = next(stream)
            state |= stream.get_state()
        rows = list(rows_by_process[process])
        assert got.sample_ids == [wanted.sample_ids[row] for row in rows]
        np.testing.assert_array_equal(got.arrays.tokens, wanted.arrays.tokens[rows])
    assert json.loads(json.dumps(state))["lanes"] == 64


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "expert": 2}, {"fsdp": 2, "context": 4}])
def test_rows_reach_their_devices(mesh):
    layout = sharding.make_layout(
        sharding.make_mesh(mesh), config_lib.ModelConfig.tiny(), sharding.TRAIN
    )
    batch_placement = placement.BatchPlacement(layout, 16)
    assert batch_placement.row_numbers == tuple(range(16))
    tokens = np.arange(16 * 8, dtype=np.int32).reshape(16, 8)
    placed = batch_placement.device_put_array(tokens)
    assert isinstance(placed, jax.Array)
    np.testing.assert_array_equal(placed, tokens)


def test_scattered_rows_reach_their_devices():
    """A process whose local rows are in another order than those of the batch."""
    layout = sharding.make_layout(
        sharding.make_mesh({"fsdp": 8}), config_lib.ModelConfig.tiny(), sharding.TRAIN
    )
    batch_placement = placement.BatchPlacement(layout, 8)
    tokens = np.arange(8 * 4, dtype=np.int32).reshape(8, 4)
    batch_placement.row_numbers = (3, 1, 2, 0, 7, 5, 6, 4)
    placed = batch_placement.device_put_array(tokens[list(batch_placement.row_numbers)])
    np.testing.assert_array_equal(placed, tokens)
