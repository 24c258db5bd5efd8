"""The kernel benchmark runs on any device, and its packed workloads are what they say."""

import json
import sys

import numpy as np
import pytest

from pallas_kernels.lightning_attention import bench, shapes


def test_smoke_shape_gives_a_record_of_every_pass(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    arguments = ["bench", "--shapes=cpu_smoke,cpu_smoke_packed", "--repeats=2", f"--json={path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    records = json.loads(path.read_text())
    got = {(r["shape"], r["pass"], r["implementation"]) for r in records}
    wanted = {
        (shape, done, name)
        for shape in ("cpu_smoke", "cpu_smoke_packed")
        for done in ("forward", "forward_backward")
        for name in ("chunked", "reference")
    }
    assert got == wanted
    for record in records:
        assert 0 < record["median_secs"] <= record["p90_secs"]
        assert record["gb_per_sec"] > 0
        assert record["share_of_copy"] > 0
        assert record["error"] < 1e-5, record


def test_decoding_is_right_where_it_is_timed(monkeypatch):
    small = shapes.DecodeShape(3, 2, chunk_tokens=16)
    monkeypatch.setitem(shapes.DECODE_SHAPES, "small", small)
    (record,) = bench.bench_decode("small", 1, 1e9, interpret=True)
    assert record["error"] < 2**-8  # o is rounded to bfloat16


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="shape is '9k'; wanted one of"):
        bench.run_benchmarks(["9k"], ["chunked"], 1)
    with pytest.raises(ValueError, match="implementation is 'cuda'"):
        bench.run_benchmarks(["8k"], ["cuda"], 1)


def test_minimum_bytes_are_those_of_the_design_notes():
    assert 128 * bench.FORWARD_BYTES_PER_ELEMENT == 1024
    assert 128 * (bench.TRAIN_BYTES_PER_ELEMENT - bench.FORWARD_BYTES_PER_ELEMENT) == 1856


@pytest.mark.parametrize(
    ("name", "count"), [("64k_equal", 16), ("64k_short", 512), ("64k_lognormal", None)]
)
def test_packed_rows_are_full_of_documents(name, count):
    ids = shapes.TRAINING_SHAPES[name].segment_ids()
    assert ids.shape == (1, 65536)
    lengths = np.bincount(ids[0])[1:]
    assert lengths.min() > 0
    np.testing.assert_array_equal(np.unique(ids), np.arange(1, len(lengths) + 1))
    np.testing.assert_array_equal(ids, shapes.TRAINING_SHAPES[name].segment_ids())
    if count:
        assert len(lengths) == count
    else:
        assert 1024 < lengths.mean() < 4096
