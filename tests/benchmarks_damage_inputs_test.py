"""Some of the damages of benchmarks/damage_inputs.py, five of each kind."""

import importlib.util
import pathlib

import pytest

_FILE = pathlib.Path(__file__).resolve().parents[1] / "benchmarks" / "damage_inputs.py"


@pytest.fixture(scope="module")
def damage_inputs():
    spec = importlib.util.spec_from_file_location("damage_inputs", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_damages_end_in_requests_or_in_one_line(damage_inputs, tmp_path):
    checkpoint = damage_inputs.make_checkpoint(tmp_path / "checkpoint")
    ends = [
        damage_inputs.run_case(number, checkpoint, tmp_path)
        for number in range(5 * len(damage_inputs.DAMAGES))
    ]
    assert {end for end, _ in ends} == {"value", "error"}, ends


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("PATH:3: got x", "error"),
        ("PATH: got x", "error"),
        ("got 2 bad lines of 9; nothing was run:\n  PATH:3: got x\n  PATH:4: got y", "error"),
        ("got 1 bad lines of 9; nothing was run: PATH:3: got x", "error"),
        ("got 1 bad lines of 9; nothing was run: got x", "FAULT"),
        ("got x", "FAULT"),
        ("PATH:3: got " + "x" * 300, "FAULT"),
        ("PATH:3: got x\n", "FAULT"),
        ("got 2 bad lines of 9; nothing was run:\n  PATH:3: got x\n  got y", "FAULT"),
    ],
)
def test_what_a_good_error_is(damage_inputs, text, end):
    path = pathlib.Path("/a/b.jsonl")
    assert damage_inputs.check_error(path, text.replace("PATH", str(path)))[0] == end
