"""Every way in which a checkpoint can be wrong: one line, status 1, no result."""

import json
import shutil

import convert_support
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import m1_jax
from m1_jax import config as config_lib
from m1_jax import convert, testing
from m1_jax.checkpoints import release

# Fixtures.
small = convert_support.small
small_converted = convert_support.small_converted
source = convert_support.source
converted = convert_support.converted

_INDEX = release.INDEX_FILE
_REFUSALS = (release.CheckpointError, config_lib.ConfigError)


def _edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def command(capsys):
    """Run the command line in this process; return its exit status and all it printed."""
    before = set(flags.FLAGS)
    convert._define_flags()

    def call(to, src, dst):
        arguments = ["m1-convert", f"--to={to}", f"--src={src}", f"--dst={dst}", "--noprogress"]
        try:
            convert.main(flags.FLAGS(arguments))
        except SystemExit as stop:
            # A string is what the interpreter prints before it exits with status 1.
            status = 1 if isinstance(stop.code, str) else stop.code
            return status, f"{capsys.readouterr().out}{stop.code}"
        return 0, capsys.readouterr().out

    yield call
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def _shards(directory):
    return sorted(directory.glob("*.safetensors"))


def _edit_header(shard, edit):
    header, data = convert_support.read_shard(shard)
    edit(header)
    convert_support.write_shard(shard, header, data)


def _truncate(directory):
    shard = _shards(directory)[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def _grow(directory):
    with _shards(directory)[1].open("ab") as stream:
        stream.write(b"x")


def _cut_header(directory):
    shard = _shards(directory)[0]
    shard.write_bytes(shard.read_bytes()[:100])


def _git_lfs_pointer(directory):
    _shards(directory)[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _damage_header(directory):
    shard = _shards(directory)[0]
    raw = bytearray(shard.read_bytes())
    raw[8] = ord("[")
    shard.write_bytes(raw)


def _header_is_a_list(directory):
    convert_support.write_shard(_shards(directory)[0], [1, 2], b"")


def _header_of_the_wrong_kind(directory):
    _edit_header(_shards(directory)[0], lambda header: header.update(x=3))


def _gap(directory):
    def edit(header):
        for spec in header.values():
            if "data_offsets" in spec:
                spec["data_offsets"] = [place + 8 for place in spec["data_offsets"]]

    _edit_header(_shards(directory)[0], edit)


def _wrong_dtype(directory):
    _edit_header(_shards(directory)[2], lambda h: h["lm_head.weight"].update(dtype="F32"))


def _unknown_dtype(directory):
    _edit_header(_shards(directory)[2], lambda h: h["lm_head.weight"].update(dtype="F8_E4M3"))


def _wrong_shape(directory):
    _edit_header(_shards(directory)[2], lambda h: h["lm_head.weight"].update(shape=[64, 512]))


def _set_head_shape(shape):
    """Dimensions that Python would take for those of the tensor, which has [512, 64]."""

    def edit(directory):
        _edit_header(_shards(directory)[2], lambda h: h["lm_head.weight"].update(shape=shape))

    return edit


def _metadata_is_no_map_of_strings(directory):
    _edit_header(_shards(directory)[0], lambda header: header.update(__metadata__={"format": 1}))


def _repeat_key(key):
    """Name a key twice in the JSON of a header, which Python's own parser accepts."""

    def edit(directory):
        shard = _shards(directory)[2]
        raw = shard.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].decode()
        tensor = "lm_head.weight"
        if key == tensor:
            pair, begin = f'"{tensor}": {json.dumps(json.loads(header)[tensor])}', 0
        else:
            pair, begin = '"dtype": "BF16"', header.index(f'"{tensor}"')
        first = header.index("{", begin)
        header = f"{header[: first + 1]}{pair}, {header[first + 1 :]}"
        shard.write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[8 + length :])

    return edit


def _mixed_dtypes(directory):
    hf = testing.tiny_config(**convert_support.SMALL_CONFIG)
    tensors = testing.random_tensors(hf)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    testing.write_release(directory, hf, tensors | {name: tensors[name].astype(np.float32)})


def _twice(directory):
    """One tensor in the second shard too, and the index says so."""
    first, second = _shards(directory)[:2]
    (name, spec), *_ = (
        (k, v) for k, v in convert_support.read_shard(first)[0].items() if k != "__metadata__"
    )
    start, end = spec["data_offsets"]
    header, data = convert_support.read_shard(second)
    header[name] = spec | {"data_offsets": [len(data), len(data) + end - start]}
    convert_support.write_shard(
        second, header, data + convert_support.read_shard(first)[1][start:end]
    )


def _index_repeats_a_key(directory):
    path = directory / _INDEX
    path.write_text(path.read_text().replace("{", '{"metadata": {}, ', 1))


def _index_names_the_wrong_file(directory):
    where = json.loads((directory / _INDEX).read_text())["weight_map"]
    where["lm_head.weight"] = _shards(directory)[0].name
    _edit_json(directory / _INDEX, weight_map=where)


def _index_lacks_a_tensor(directory):
    where = json.loads((directory / _INDEX).read_text())["weight_map"]
    del where["model.norm.weight"]
    _edit_json(directory / _INDEX, weight_map=where)


def _index_has_one_more(directory):
    where = json.loads((directory / _INDEX).read_text())["weight_map"]
    where["model.extra.weight"] = _shards(directory)[0].name
    _edit_json(directory / _INDEX, weight_map=where)


def _weights_lack_a_tensor(directory):
    hf = testing.tiny_config(**convert_support.SMALL_CONFIG)
    tensors = testing.random_tensors(hf)
    del tensors["model.norm.weight"]
    testing.write_release(directory, hf, tensors)


def _weights_have_one_more(directory):
    hf = testing.tiny_config(**convert_support.SMALL_CONFIG)
    extra = {"model.layers.1.self_attn.q_norm.weight": np.ones(3, np.float32)}
    testing.write_release(directory, hf, testing.random_tensors(hf) | extra)


def _json_change(file, **changes):
    return lambda directory: _edit_json(directory / file, **changes)


def _remove(pattern):
    def remove(directory):
        path = sorted(directory.glob(pattern))[1 if "*.safe" in pattern else 0]
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _put(file, text):
    return lambda directory: (directory / file).write_text(text)


_SOURCE_ERRORS = [
    (_truncate, ["model-00001-of-00003", "truncated", "got", "wanted", "Download"]),
    (_grow, ["model-00001-of-00003", "longer", "got", "wanted", "Download"]),
    (_cut_header, ["model-00000-of-00003", "truncated", "100 bytes", "Download"]),
    (_git_lfs_pointer, ["model-00000-of-00003", "Git LFS pointer", "git lfs pull"]),
    (_damage_header, ["model-00000-of-00003", "damaged safetensors header", "Download"]),
    (_header_is_a_list, ["model-00000-of-00003", "damaged safetensors header", "Download"]),
    (_header_of_the_wrong_kind, ["model-00000-of-00003", "damaged safetensors header"]),
    (_gap, ["model-00000-of-00003", "damaged safetensors header", "wanted", "Download"]),
    (_set_head_shape([512.0, 64]), ["model-00002-of-00003", "lm_head.weight", "512.0", "integers"]),
    (_set_head_shape([True, 512, 64]), ["lm_head.weight", "True", "integers", "Download"]),
    (_set_head_shape([-512, -64]), ["lm_head.weight", "-512", "integers", "Download"]),
    (_set_head_shape([2**62, 64]), ["lm_head.weight", "takes", "but its range has", "Download"]),
    (_metadata_is_no_map_of_strings, ["model-00000-of-00003", "map of strings", "Download"]),
    (_repeat_key("lm_head.weight"), ["model-00002-of-00003", "lm_head.weight", "given twice"]),
    (_repeat_key("dtype"), ["model-00002-of-00003", "dtype", "twice", "Download"]),
    (_wrong_dtype, ["model-00002-of-00003", "lm_head.weight", "F32", "takes", "has"]),
    (_unknown_dtype, ["lm_head.weight", "F8_E4M3", "wanted one of F32, F16, BF16"]),
    (_wrong_shape, ["lm_head.weight", "[64, 512]", "asks for [512, 64]", "config.json"]),
    (_mixed_dtypes, ["layers.0", "experts.1.w1", "F32", "BF16", "agree"]),
    (_twice, ["model-00000-of-00003", "model-00001-of-00003", "wanted it once", "Download"]),
    (_index_repeats_a_key, [_INDEX, "metadata is given twice", "Download"]),
    (_index_names_the_wrong_file, [_INDEX, "lm_head", "00000-of", "it is in model-00002"]),
    (_index_lacks_a_tensor, [_INDEX, "model.norm.weight", "nowhere", "it is in model-00002"]),
    (_index_has_one_more, [_INDEX, "model.extra.weight", "no shard"]),
    (_json_change(_INDEX, metadata={"total_size": 7}), [_INDEX, "total_size is 7", "hold"]),
    (_json_change(_INDEX, weight_map=...), [_INDEX, "damaged", "weight_map"]),
    (_json_change(_INDEX, weight_map=["x"]), [_INDEX, "damaged", "weight_map"]),
    (_put(_INDEX, "[]"), [_INDEX, "damaged", "weight_map", "Download"]),
    (_put(_INDEX, "{"), [_INDEX, "damaged", "Download"]),
    (_remove("*.safetensors"), ["1 shards missing", "model-00001-of-00003", "of 3", "Download"]),
    (_remove(_INDEX), ["neither", _INDEX, "model.safetensors"]),
    (_remove("config.json"), ["has weights, but no config.json"]),
    (_put("config.json", "{"), ["config.json", "not valid JSON"]),
    (_weights_lack_a_tensor, ["1 missing, e.g. model.norm.weight", "config.json"]),
    (_weights_have_one_more, ["1 not in the model", "q_norm", "config.json"]),
    (
        _json_change("config.json", attn_type_list=[1, 0]),
        ["missing, e.g. model.layers.0.self_attn.k_proj", "config.json"],
    ),
    (_json_change("config.json", num_local_experts=3), ["6 missing", "experts.2", "config.json"]),
    (_json_change("config.json", num_local_experts=1), ["6 not in the model", "experts.1"]),
    (
        _json_change("config.json", intermediate_size=95),
        ["experts.0.w1", "[96, 64]", "asks for [95, 64]", "config.json"],
    ),
    (_json_change("config.json", vocab_size=511), ["[512, 64]", "asks for [511, 64]"]),
    (_json_change("config.json", head_dim=16), ["qkv_proj", "[384, 64]", "[192, 64]"]),
    (_json_change("config.json", rope_scaling={"factor": 2}), ["unknown key 'rope_scaling'"]),
]


def _name(value):
    return value.__qualname__.split(".")[0].strip("_") if callable(value) else " ".join(value)


@pytest.mark.parametrize(("damage", "words"), _SOURCE_ERRORS, ids=_name)
def test_a_damaged_release_is_refused(source, tmp_path, command, damage, words):
    damage(source)
    dst = tmp_path / "orbax"
    with pytest.raises(_REFUSALS) as caught:
        convert_support.run_convert("orbax", source, dst)
    for word in words:
        assert word in str(caught.value)
    if damage is not _mixed_dtypes:  # loading casts to one dtype anyway
        with pytest.raises(_REFUSALS):
            m1_jax.load(source)
    status, printed = command("orbax", source, dst)
    assert status == 1
    assert printed == f"error: {caught.value}"
    assert "\n" not in printed
    assert not dst.exists()
    assert not dst.with_name("orbax.partial").exists()


def _damage_chunk(edit):
    def damage(directory):
        chunk = directory / "params" / "layers.1.moe.up" / "c" / "0" / "0" / "1" / "0" / "0"
        content = chunk.read_bytes()
        chunk.unlink()
        if edit:
            chunk.write_bytes(edit(content))

    return damage


def _swap_array(directory):
    """An array of another shape, as if two conversions were mixed."""
    params = directory / "params"
    shutil.rmtree(params / "layers.0.moe.up")
    shutil.copytree(params / "layers.0.moe.down", params / "layers.0.moe.up")


def _integer_array(directory):
    path = directory / "params" / "norm.scale" / "zarr.json"
    _edit_json(path, data_type="int16", fill_value=0)


_ORBAX_ERRORS = [
    (_damage_chunk(None), ["layers.1.moe.up", "missing", "m1_jax.convert"]),
    (_damage_chunk(lambda b: b[:-2]), ["layers.1.moe.up", "Not enough data", "m1_jax.convert"]),
    (_remove("params/layers.1.moe.up"), ["1 missing, e.g. layers.1.moe.up", "m1_jax.convert"]),
    (_remove("params"), ["missing", "m1_jax.convert"]),
    (_put("params/norm.scale/zarr.json", "{"), ["norm.scale", "not valid JSON", "m1_jax.convert"]),
    (_swap_array, ["layers.0.moe.up", "[1, 1, 2, 96, 64]", "asks for [1, 1, 2, 64, 96]"]),
    (_integer_array, ["norm.scale", "int16", "bfloat16"]),
    (_remove("release.json"), ["release.json", "not complete", "m1_jax.convert"]),
    (_put("release.json", "{"), ["release.json", "not complete", "m1_jax.convert"]),
    (_put("release.json", "[]"), ["release.json", "format None", "wanted"]),
    (_put("release.json", '{"format": "2"}'), ["release.json", "format '2'", "version 2"]),
    (_remove("config.json"), ["has weights, but no config.json"]),
    (
        _json_change("config.json", shared_intermediate_size=96),
        ["8 missing", "moe.shared", "config.json"],
    ),
    (_json_change("config.json", attn_type_list=[0, 0]), ["not in the model", "layers.1"]),
    (_json_change("config.json", intermediate_size=48), ["layers.0.moe", "96", "48"]),
]


@pytest.mark.parametrize(("damage", "words"), _ORBAX_ERRORS, ids=_name)
def test_a_damaged_conversion_is_refused(converted, tmp_path, command, damage, words):
    damage(converted)
    dst = tmp_path / "back"
    status, printed = command("hf", converted, dst)
    assert status == 1
    assert printed.startswith("error: ")
    assert "\n" not in printed
    for word in words:
        assert word in printed
    assert not dst.exists()
    with pytest.raises(_REFUSALS) as caught:
        m1_jax.load(converted)
    # The command calls the path by its flag.
    message = str(caught.value).replace("checkpoint: ", "--src: ", 1)
    assert f"error: {message}" == printed
    assert not (tmp_path / "back.partial" / "config.json").exists()  # without it, nothing loads


def test_a_destination_that_exists_is_refused(small, tmp_path, command):
    status, printed = command("orbax", small, tmp_path)
    assert status == 1
    assert (
        printed == f"error: {tmp_path} exists; wanted a new directory. Remove it or choose another."
    )


def test_a_source_of_the_wrong_kind_is_refused(small, small_converted, tmp_path, command):
    dst = tmp_path / "result"
    for to, src, words in (
        ("orbax", tmp_path / "nothing", "nothing does not exist"),
        ("hf", small / "config.json", "config.json is a file; wanted a directory"),
        ("hf", small, "not converted yet; wanted a converted directory for --to=hf"),
        ("orbax", small_converted, "converted already; wanted a release directory for --to=orbax"),
        ("hf", tmp_path, "is empty"),
        ("orbax", tmp_path, "is empty"),
    ):
        status, printed = command(to, src, dst)
        assert status == 1
        assert words in printed
    assert not list(tmp_path.iterdir())


def test_settings_are_checked(small):
    with pytest.raises(ValueError, match="--to is 'torch'; wanted orbax or hf"):
        convert.ConvertConfig("torch", "a", "b")
    with pytest.raises(ValueError, match="memory_gib is 0"):
        convert.ConvertConfig("hf", "a", "b", memory_gib=0)
    with pytest.raises(ValueError, match="--src and --dst"):
        convert.ConvertConfig("hf", "a", "")
    with pytest.raises(release.CheckpointError, match="nothing does not exist"):
        m1_jax.load(small / "nothing")
    with pytest.raises(ValueError, match="float16"):
        m1_jax.load(small, dtype=jnp.float16)
