"""A model from memory to a converted directory, and from there to a release."""

import json
import shutil

import convert_support
import jax
import jax.numpy as jnp
import numpy as np
import params_support
import pytest
import tensorstore as ts

import m1_jax
from m1_jax import params as params_lib
from m1_jax import sharding, testing
from m1_jax.checkpoints import format as format_lib
from m1_jax.checkpoints import release
from m1_jax.checkpoints import save as save_lib

_SMALL = {"attn_type_list": [0, 1], "num_local_experts": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A release of two layers in three shards, with a tokenizer; read only."""
    hf = testing.tiny_config(**_SMALL)
    directory = tmp_path_factory.mktemp("source") / "release"
    testing.write_release(directory, hf, testing.random_tensors(hf))
    testing.write_tiny_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def converted(source):
    return convert_support.run_convert("orbax", source, source.parent / "orbax")


def _moved(path, **settings):
    """Return a loaded model after a training step's worth of change."""
    model = m1_jax.load(path, **settings)
    for param in params_lib.params_by_path(model).values():
        param.set_value(param.get_value() * 1.01)
    return model


def _mesh():
    return sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})


def _equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def _tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 512, (4, 20)), jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mesh", [None, _mesh])
def test_what_is_saved_is_loaded_and_exported(source, tmp_path, dtype, mesh):
    mesh = mesh and mesh()
    model = _moved(source, param_dtype=jnp.float32, mesh=mesh)
    saved = save_lib.save(model, tmp_path / "saved", source, dtype)
    wanted = params_support.param_values(model)
    routers = {name for name in wanted if name.endswith("router")}
    wanted = {k: v if k in routers else v.astype(dtype) for k, v in wanted.items()}
    _equal(params_support.param_values(m1_jax.load(saved, dtype)), wanted)
    _equal(params_support.param_values(m1_jax.load(saved, dtype, _mesh())), wanted)
    back = convert_support.run_convert("hf", saved, tmp_path / "back")
    assert {release.CODES_BY_DTYPE[t.dtype] for t in release.Release(back).tensors.values()} == (
        {"F32"} if dtype == jnp.float32 else {"BF16", "F32"}
    )
    one, two = (m1_jax.load(path, dtype) for path in (saved, back))
    np.testing.assert_array_equal(one(_tokens()), two(_tokens()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "saved"]


@pytest.mark.parametrize("kind", ["source", "converted"])
def test_an_unchanged_model_comes_back_byte_for_byte(request, source, tmp_path, kind):
    """The release's own cut into shards, its index, and the files beside it."""
    path = request.getfixturevalue(kind)
    saved = save_lib.save(m1_jax.load(path, jnp.bfloat16, _mesh()), tmp_path / "saved", path)
    back = convert_support.run_convert("hf", saved, tmp_path / "back")
    names = sorted(file.name for file in source.iterdir())
    assert sorted(file.name for file in back.iterdir()) == names
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_without_a_source_the_config_is_written(source, tmp_path):
    model = m1_jax.load(source)
    saved = save_lib.save(model, tmp_path / "saved")
    assert m1_jax.ModelConfig.from_file(saved / "config.json") == model.config
    _equal(params_support.param_values(m1_jax.load(saved)), params_support.param_values(model))
    back = convert_support.run_convert("hf", saved, tmp_path / "back")
    _equal(params_support.param_values(m1_jax.load(back)), params_support.param_values(model))


def test_float32_parameters_of_a_bfloat16_checkpoint(source, converted):
    for path in (source, converted):
        model = m1_jax.load(path, jnp.bfloat16, param_dtype=jnp.float32)
        assert model.dtype == jnp.bfloat16
        assert {v.dtype for v in params_support.param_values(model).values()} == {
            np.dtype(np.float32)
        }
        _equal(params_support.param_values(model), params_support.param_values(m1_jax.load(path)))
    with pytest.raises(ValueError, match="param_dtype: got float16"):
        m1_jax.load(source, param_dtype=jnp.float16)


def test_chunks_lie_within_what_one_device_holds(source, tmp_path):
    """Two processes that wrote parts of one chunk would lose each other's."""
    model = m1_jax.load(source, mesh=_mesh())
    saved = save_lib.save(model, tmp_path / "saved", source)
    for name, param in params_lib.params_by_path(model).items():
        metadata = json.loads((saved / "params" / name / "zarr.json").read_text())
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        piece = param.get_value().sharding.shard_shape(param.shape)
        assert all(size % part == 0 for size, part in zip(piece, chunk, strict=True)), name


# ---- what is refused, and interruptions


def test_existing_directories_are_left_alone(source, tmp_path):
    model = m1_jax.load(source)
    for name in ("saved", "saved.partial"):
        theirs = tmp_path / name / "theirs.txt"
        theirs.parent.mkdir()
        theirs.write_text("1")
        with pytest.raises(FileExistsError, match=f"{name} exists"):
            save_lib.save(model, tmp_path / "saved", source)
        assert theirs.read_text() == "1"
        shutil.rmtree(theirs.parent)


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (format_lib, "allocate_params"),
        (save_lib, "_write_param"),
        (format_lib, "copy_small_files"),
    ],
)
def test_an_interrupted_save_is_no_checkpoint_and_is_made_anew(
    source, tmp_path, monkeypatch, module, function
):
    model = m1_jax.load(source)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, function, stop)
        with pytest.raises(KeyboardInterrupt):
            save_lib.save(model, tmp_path / "saved", source)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(release.CheckpointError):
        m1_jax.load(tmp_path / "saved.partial")
    saved = save_lib.save(model, tmp_path / "saved", source)
    _equal(params_support.param_values(m1_jax.load(saved)), params_support.param_values(model))
    assert not (tmp_path / "saved.partial").exists()


def test_other_models_are_refused_in_words(source, tmp_path):
    path = tmp_path / "saved"
    with pytest.raises(ValueError, match="dtype: got float16"):
        save_lib.save(m1_jax.load(source), path, source, jnp.float16)
    with pytest.raises(ValueError, match=r"got 6 parameters .* layers\.0\.moe\.down_scale"):
        save_lib.save(m1_jax.load(source, weights="int8-experts"), path, source)
    other = testing.tiny_config(**_SMALL | {"rope_theta": 1000})
    testing.write_release(tmp_path / "other", other, testing.random_tensors(other))
    with pytest.raises(ValueError, match="got rope_theta 1000; the model has 10000000"):
        save_lib.save(m1_jax.load(source), path, tmp_path / "other")
    assert not path.exists()


def test_devices_of_copies_write_once(source, tmp_path, monkeypatch):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    model = m1_jax.load(source, mesh=mesh)
    written = []
    array_write = ts.TensorStore.write

    def write(array, data, **orbax):
        if not orbax:
            written.append(data.size)
        return array_write(array, data, **orbax)

    monkeypatch.setattr(ts.TensorStore, "write", write)
    save_lib.save(model, tmp_path / "saved", source)
    assert sum(written) == sum(leaf.size for leaf in jax.tree.leaves(model))
