"""The release to Orbax and back, byte for byte, and what `load` makes of it."""

import json
import pathlib
import shutil
import subprocess
import sys

import convert_support
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import m1_jax
from m1_jax import convert, testing
from m1_jax import params as params_lib
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import params_map, release

# Fixtures.
small = convert_support.small
small_converted = convert_support.small_converted
source = convert_support.source
converted = convert_support.converted

_REPO = pathlib.Path(__file__).resolve().parents[1]


def _there_and_back(src, directory):
    converted = convert_support.run_convert("orbax", src, directory / "orbax")
    return converted, convert_support.run_convert("hf", converted, directory / "back")


# ---- byte for byte


def test_the_golden_checkpoint_comes_back(golden_dir, tmp_path):
    converted, back = _there_and_back(golden_dir, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(golden_dir)
    assert not [path for path in converted.rglob("*") if path.suffix == ".safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "orbax"]  # no .partial


def test_the_tokenizer_and_other_files_are_copied(source, tmp_path):
    extra = {"generation_config.json": b"{}", "chat_template.jinja": b"\xff\x00", ".hidden": b"1"}
    for name, content in extra.items():
        (source / name).write_bytes(content)
    for name in ("old.bin", "pytorch_model.bin.index.json", "stray.safetensors", "x.gguf"):
        (source / name).write_bytes(b"weights that the index does not list")
    converted, back = _there_and_back(source, tmp_path)
    for directory in (converted, back):
        copied = convert_support.read_files(directory)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json", *extra):
            assert copied[name] == (source / name).read_bytes()
        assert not copied.keys() & {"old.bin", "pytorch_model.bin.index.json", "x.gguf"}
        assert "stray.safetensors" not in copied


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_any_number_of_shards(tmp_path, num_shards):
    src = convert_support.write_small_release(tmp_path / "release", num_shards=num_shards)
    _, back = _there_and_back(src, tmp_path)
    assert len(list(back.glob("*.safetensors"))) == num_shards
    assert convert_support.read_files(back) == convert_support.read_files(src)


@pytest.mark.parametrize(
    "overrides",
    [
        {"shared_intermediate_size": 8},
        {"attn_type_list": [0, 0, 1, 0, 1]},
        {"attn_type_list": [1, 0] * 3},
        {"attn_type_list": [0, 0]},
        {"attn_type_list": [1]},
        {"hidden_size": 33, "intermediate_size": 7, "vocab_size": 301, "num_local_experts": 3},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "rotary_dim": 32},
    ],
    ids=str,
)
def test_other_models(tmp_path, overrides):
    src = convert_support.write_small_release(tmp_path / "release", **overrides)
    _, back = _there_and_back(src, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(src)


def test_a_single_file_without_an_index(source, tmp_path):
    hf = json.loads((source / "config.json").read_text())
    single = testing.write_release(tmp_path / "single", hf, testing.random_tensors(hf), 1)
    (single / release.INDEX_FILE).unlink()
    (single / "model-00000-of-00001.safetensors").rename(single / release.SINGLE_SHARD_FILE)
    _, back = _there_and_back(single, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(single)
    assert not (back / release.INDEX_FILE).exists()


@pytest.mark.parametrize(
    "dtypes", [{"": "float32"}, {"": "float16"}, {"": "bfloat16"}, {"gate": "float16"}], ids=str
)
def test_dtypes_are_kept(tmp_path, dtypes):
    hf = testing.tiny_config(**convert_support.SMALL_CONFIG)
    tensors = testing.random_tensors(hf)
    for part, dtype in dtypes.items():
        cast = {name: value.astype(dtype) for name, value in tensors.items() if part in name}
        tensors |= cast
    src = testing.write_release(tmp_path / "release", hf, tensors, 2)
    converted, back = _there_and_back(src, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(src)
    wanted = {tensor.name: tensor.dtype for tensor in release.Release(src).tensors.values()}
    stored = format_lib.open_params(converted, m1_jax.ModelConfig.from_hf(hf))
    for entry in params_map.list_tensor_entries(m1_jax.ModelConfig.from_hf(hf)):
        assert stored[entry.param_path].dtype.numpy_dtype == wanted[entry.name]


def test_bits_that_are_no_numbers_survive(source, tmp_path):
    """NaN payloads, infinities, subnormals and negative zeros are bytes like any other."""
    noise = np.random.default_rng(0)
    for shard in source.glob("*.safetensors"):
        header, data = convert_support.read_shard(shard)
        convert_support.write_shard(shard, header, noise.bytes(len(data)))
    _, back = _there_and_back(source, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(source)


def test_headers_are_kept_whatever_their_form(tmp_path):
    """Names in another order than the bytes, unaligned tensors, other metadata, no padding."""
    src = convert_support.write_small_release(
        tmp_path / "release", hidden_size=31, num_attention_heads=2
    )
    for number, shard in enumerate(sorted(src.glob("*.safetensors"))):
        header, data = convert_support.read_shard(shard)
        header = dict(sorted(header.items(), reverse=True))
        header["__metadata__"] = {"format": "pt", "é": "ü"}
        convert_support.write_shard(shard, header, data, padding=" " * (number + 1))
    _, back = _there_and_back(src, tmp_path)
    assert convert_support.read_files(back) == convert_support.read_files(src)
    tokens = jnp.zeros((1, 3), jnp.int32)
    np.testing.assert_array_equal(m1_jax.load(src)(tokens), m1_jax.load(back)(tokens))


def test_export_cuts_new_shards_where_the_old_ones_do_not_fit(converted, tmp_path, monkeypatch):
    """As after training: other dtypes than the release's headers say."""
    config = m1_jax.ModelConfig.from_file(converted / "config.json")
    arrays = format_lib.open_params(converted, config)
    leaf = format_lib.StoredParam(arrays["head.kernel"].shape, np.dtype(np.float32), 0)
    values = arrays["head.kernel"].read().result().astype(np.float32)
    shutil.rmtree(converted / "params" / "head.kernel")
    format_lib.allocate_params(tmp_path / "new", {"head.kernel": leaf})
    (tmp_path / "new" / "head.kernel").rename(converted / "params" / "head.kernel")
    format_lib.open_array(converted / "params", "head.kernel").write(values).result()

    monkeypatch.setattr(convert, "MAX_SHARD_BYTES", 100_000)
    back = convert_support.run_convert("hf", converted, tmp_path / "back")
    shards = [release.read_shard(path) for path in sorted(back.glob("*.safetensors"))]
    assert len(shards) > 3
    for shard in shards:
        assert len(shard.tensors) == 1 or shard.file.stat().st_size < 110_000
    exported = release.Release(back)
    head = exported.tensors["lm_head.weight"].read()
    np.testing.assert_array_equal(head, values.T)
    assert head.dtype == np.float32
    again = convert_support.run_convert(
        "hf", convert_support.run_convert("orbax", back, tmp_path / "orbax2"), tmp_path / "back2"
    )
    assert convert_support.read_files(again) == convert_support.read_files(back)


class _SlowArray:
    """An array whose writes end only when they are waited for."""

    def __init__(self, under_way, index=None):
        self.under_way, self.index, self.nbytes = under_way, index, 0

    def __getitem__(self, index):
        return _SlowArray(self.under_way, index)

    def write(self, data):
        self.nbytes = data.nbytes
        self.under_way.append(self.nbytes)
        return self

    def result(self):
        self.under_way.append(-self.nbytes)


@pytest.mark.parametrize("budget", [1, 30_000, 200_000, 2**40])
def test_bytes_under_way_stay_within_the_budget(small, tmp_path, monkeypatch, budget):
    under_way = []
    monkeypatch.setattr(format_lib, "allocate_params", lambda params, _: params.mkdir())
    monkeypatch.setattr(format_lib, "open_array", lambda *_: _SlowArray(under_way))
    monkeypatch.setattr(format_lib, "check_array", lambda *_: None)
    monkeypatch.setattr(format_lib, "find_bad_chunk", lambda *_: None)
    convert_support.run_convert("orbax", small, tmp_path / "orbax", memory_gib=budget / 2**30)
    sizes = [tensor.nbytes for tensor in release.Release(small).tensors.values()]
    assert sorted(n for n in under_way if n > 0) == sorted(sizes)
    held = np.cumsum(under_way)
    assert held[-1] == 0
    # A tensor larger than the budget goes alone.
    assert all(
        n <= budget or n == begun for n, begun in zip(held, under_way, strict=True) if begun > 0
    )
    # Nothing is waited for while the next tensor would still fit.
    begun = [place for place, n in enumerate(under_way) if n > 0]
    for place in begun[1:]:
        if under_way[place - 1] < 0:
            assert held[place - 2] + under_way[place] > budget


def test_progress_is_shown(small, tmp_path, capsys):
    convert.run(convert.ConvertConfig("orbax", str(small), str(tmp_path / "orbax")))
    assert "convert: 412k of 412k B" in capsys.readouterr().err


# ---- what Orbax and `load` make of it


def test_orbax_reads_it_without_us(small, small_converted):
    tree = ocp.StandardCheckpointer().restore(small_converted / "params")
    tensors = release.Release(small).tensors
    for entry in params_map.list_tensor_entries(
        m1_jax.ModelConfig.from_file(small / "config.json")
    ):
        leaf = tree
        for key in entry.param_path.split("."):
            leaf = leaf[key]
        wanted = tensors[entry.name].read()
        got = np.asarray(leaf[entry.index])
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got.T if entry.transposed else got, wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load_reads_both_alike(small, small_converted, dtype):
    ours, theirs = (
        params_lib.params_by_path(m1_jax.load(path, dtype)) for path in (small, small_converted)
    )
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        wanted = jnp.float32 if name.endswith("moe.router") else dtype
        assert parameter.dtype == theirs[name].dtype == wanted
        np.testing.assert_array_equal(parameter[...], theirs[name][...])


def test_load_spreads_over_a_mesh(small, small_converted):
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "expert", "tensor"))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(4, 6)
    wanted = m1_jax.load(small)(tokens)
    for path in (small, small_converted):
        model = m1_jax.load(path, mesh=mesh)
        for name, parameter in params_lib.params_by_path(model).items():
            wanted_sharding = model.layout.param_sharding(parameter.get_metadata()["logical_axes"])
            assert parameter.sharding == wanted_sharding, name
        gate = params_lib.params_by_path(model)["layers.0.moe.gate"]
        assert gate.addressable_shards[0].data.size == gate.size // 8
        np.testing.assert_allclose(model(tokens), wanted, rtol=0, atol=testing.TOLERANCES["logits"])


# ---- the command line


def test_the_command_line(small, tmp_path):
    """A real process: status 0 and a result, status 1 and one line without a traceback."""

    def call(*arguments):
        full = [sys.executable, "-m", "m1_jax.convert", *arguments]
        return subprocess.run(full, cwd=_REPO, capture_output=True, text=True, check=False)

    good = call("--to=orbax", f"--src={small}", f"--dst={tmp_path / 'orbax'}")
    assert good.returncode == 0, good.stderr
    assert good.stdout == f"wrote {tmp_path / 'orbax'}\n"
    assert "convert: 412k of 412k B" in good.stderr
    bad = call("--to=orbax", f"--src={tmp_path}", f"--dst={tmp_path / 'x'}", "--noprogress")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()
