"""`m1_jax.verify`: passes on the golden checkpoint, fails on every changed tensor, clear errors."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from m1_jax import convert, golden_comparison, oracle, testing, verify
from m1_jax.checkpoints import release

_REPO = pathlib.Path(__file__).resolve().parents[1]
_HF = testing.tiny_config(attn_type_list=[0, 1], num_local_experts=2, shared_intermediate_size=8)
_KINDS = sorted({re.sub(r"experts\.\d+", "experts.1", n) for n in testing.tensor_shapes(_HF)})


@pytest.fixture(scope="module")
def tensors():
    return testing.random_tensors(_HF)


@pytest.fixture(scope="module")
def small(tensors, tmp_path_factory):
    """A small release and a golden file for it, of a few quantities that compile fast."""
    directory = testing.write_release(tmp_path_factory.mktemp("small"), _HF, tensors)
    tokens = np.random.default_rng(0).integers(0, 512, (2, 24), np.int32)
    out = oracle.run_oracle(_HF, tensors, tokens)
    positions = np.arange(0, 24, 5)
    np.savez(
        directory / "golden.npz",
        input_ids=tokens,
        logits=out["logits"][:, positions],
        logits_positions=positions,
        aux_loss=out["aux_loss"],
    )
    return directory


def _golden(small, path, **changes):
    """Write a copy of the golden file with some arrays replaced, or left out where None."""
    with np.load(small / "golden.npz") as file:
        arrays = dict(file) | changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def _run(checkpoint, golden):
    return verify.run(verify.VerifyConfig(str(checkpoint), str(golden)))


@pytest.fixture
def command(capsys):
    """Run the command line in this process; return its exit status and all it printed."""
    before = set(flags.FLAGS)
    verify._define_flags()

    def call(checkpoint, golden):
        arguments = ["m1-verify", f"--checkpoint={checkpoint}", f"--golden={golden}"]
        with pytest.raises(SystemExit) as stop:
            verify.main(flags.FLAGS(arguments))
        code = stop.value.code
        # A string is what the interpreter prints before it exits with status 1.
        status, error = (1, code) if isinstance(code, str) else (code, "")
        return status, capsys.readouterr().out + error

    yield call
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


# ---- the golden checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["release", "orbax"])
def test_the_golden_checkpoint_passes(golden_dir, tmp_path, layout):
    checkpoint = golden_dir
    if layout == "orbax":
        settings = convert.ConvertConfig(
            "orbax", str(golden_dir), str(tmp_path / "orbax"), progress=False
        )
        checkpoint = convert.run(settings)
    rows = _run(checkpoint, golden_dir / "golden.npz")
    assert [row for row in rows if not row.passed] == []
    names = [row.name for row in rows]
    assert len(names) == len(set(names))
    with np.load(golden_dir / "golden.npz") as golden:
        inputs = {"input_ids", "logits_positions", "lightning_layer", "softmax_layer"}
        inputs |= {"decode_start", "greedy_margin"}
        wanted = {key.replace("grad/", "grad ") for key in golden.files if key not in inputs}
    assert wanted | {"decode against full pass"} == set(names)


# ---- failures


def test_the_small_checkpoint_passes(small, command):
    status, printed = command(small, small / "golden.npz")
    assert status == 0
    assert "FAILED" not in printed
    assert re.search(r"^logits +\d\.\d+e-\d+ +2e-04 +max absolute +ok$", printed, re.MULTILINE)
    assert printed.endswith("2 of 2 within tolerance\n")


@pytest.mark.parametrize("name", _KINDS)
def test_one_changed_tensor_fails(small, tensors, tmp_path, command, name):
    changed = tensors | {name: (tensors[name] * np.float32(1.25)).astype(tensors[name].dtype)}
    testing.write_release(tmp_path, _HF, changed)
    status, printed = command(tmp_path, small / "golden.npz")
    assert status == 1
    assert re.search(r"^logits .* FAILED$", printed, re.MULTILINE)


def test_nan_fails(small, tensors, tmp_path, command):
    name = "model.layers.1.self_attn.v_proj.weight"
    broken = tensors[name].copy()
    broken[0, 0] = np.nan
    testing.write_release(tmp_path, _HF, tensors | {name: broken})
    status, printed = command(tmp_path, small / "golden.npz")
    assert status == 1
    assert re.search(r"^logits +nan .* FAILED$", printed, re.MULTILINE)
    assert "0 of 2 within tolerance" in printed


def test_a_golden_nan_fails(small, tmp_path):
    (row,) = _run(
        small, _golden(small, tmp_path / "g.npz", aux_loss=np.float32("nan"), logits=None)
    )
    assert row.name == "aux_loss"
    assert not row.passed


def test_differences_at_the_tolerance_pass_and_above_fail():
    for difference, passed in ((2e-4, True), (2.001e-4, False), (float("nan"), False)):
        row = golden_comparison.ComparisonRow("x", difference, 2e-4, "max absolute")
        assert row.passed is passed


def test_absent_quantities_are_left_out(small, tmp_path):
    rows = _run(small, _golden(small, tmp_path / "g.npz", logits=None, logits_positions=None))
    assert [row.name for row in rows] == ["aux_loss"]


def test_the_command_line(small, tmp_path):
    """A real process: a table and status 1 for a failure."""
    golden = _golden(small, tmp_path / "g.npz", aux_loss=np.float32(7))
    code = [sys.executable, "-m", "m1_jax.verify", f"--checkpoint={small}", f"--golden={golden}"]
    done = subprocess.run(code, cwd=_REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "1 of 2 within tolerance" in done.stdout
    assert "Traceback" not in done.stderr


# ---- errors


def _no_archive(small, path):
    path.write_bytes(b"\x93NUMPY")


def _one_array(small, path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _pickle(small, path):
    _golden(small, path, input_ids=np.array([{}], object))


def _cut_off(small, path):
    path.write_bytes((small / "golden.npz").read_bytes()[:-40])


def _flipped_bit(small, path):
    raw = bytearray((small / "golden.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _changed(**changes):
    return lambda small, path: _golden(small, path, **changes)


_STATE = np.zeros((2, 4, 32, 32), np.float32)
_LAST4 = np.zeros((2, 4, 2, 32), np.float32)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda small, path: None, ["g.npz", "not a readable .npz", "No such file"]),
        (_no_archive, ["g.npz", "not a readable .npz", "download it again"]),
        (_one_array, ["g.npz", "not a readable .npz"]),
        (_pickle, ["g.npz", "not a readable .npz", "pickle"]),
        (_cut_off, ["g.npz", "not a readable .npz"]),
        (_flipped_bit, ["g.npz", "not a readable .npz", "CRC"]),
        (_changed(input_ids=None), ["g.npz", "input_ids is missing", "golden file?"]),
        (_changed(input_ids=np.zeros(3, np.int32)), ["input_ids has shape (3,)", "[B, T]"]),
        (_changed(input_ids=np.zeros((1, 3))), ["dtype float64", "wanted integers"]),
        (_changed(input_ids=np.full((2, 24), 512)), ["token id 512", "0 to 511"]),
        (_changed(input_ids=np.full((2, 24), -1)), ["token id -1", "0 to 511"]),
        (_changed(input_ids=np.full((2, 24), 2**32)), ["token id 4294967296", "0 to 511"]),
        (_changed(logits_positions=None), ["logits_positions is missing"]),
        (_changed(logits=np.zeros((2, 5, 9))), ["logits has shape (2, 5, 9)", "(2, 5, 512)"]),
        (_changed(logits=None, aux_loss=None), ["g.npz", "nothing to compare"]),
        (_changed(lightning_state=_STATE), ["lightning_layer is missing"]),
        (_changed(lightning_state=_STATE, lightning_layer=1), ["lightning_layer is 1", "wanted a"]),
        (_changed(lightning_state=_STATE, lightning_layer=9), ["lightning_layer is 9", "wanted a"]),
        (_changed(softmax_k_last4=_LAST4, softmax_layer=0), ["softmax_layer is 0", "wanted a"]),
        (_changed(softmax_k_last4=_LAST4, softmax_layer=1), ["softmax_v_last4 is missing"]),
        (_changed(decode_logits=np.zeros((2, 3, 512))), ["decode_start is missing"]),
        (_changed(**{"grad/model.norm": np.zeros(2)}), ["grad/model.norm", "no such tensor"]),
    ],
    ids=lambda value: "" if callable(value) else value[0],
)
def test_a_damaged_golden_file_is_refused(small, tmp_path, command, write, words):
    write(small, tmp_path / "g.npz")
    status, printed = command(small, tmp_path / "g.npz")
    assert status == 1
    assert printed.startswith("error: ")
    for word in words:
        assert word in printed
    assert "\n" not in printed


def test_a_damaged_checkpoint_is_refused(small, tensors, tmp_path, command):
    testing.write_release(tmp_path / "release", _HF, tensors)
    (tmp_path / "release" / "model-00001-of-00003.safetensors").unlink()
    status, printed = command(tmp_path / "release", small / "golden.npz")
    assert status == 1
    assert printed.startswith("error: ")
    assert "model-00001-of-00003" in printed
    (tmp_path / "release" / "config.json").write_text(json.dumps(_HF | {"rope_scaling": 2}))
    status, printed = command(tmp_path / "release", small / "golden.npz")
    assert status == 1
    assert "rope_scaling" in printed
    with pytest.raises(
        release.CheckpointError, match="holds checkpoints, but is none itself. Give .*release"
    ):
        _run(tmp_path, small / "golden.npz")
