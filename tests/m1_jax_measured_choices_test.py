"""The file in which m1-selfcheck keeps defaults: what is read, what is ignored, and who obeys."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1_jax import ModelConfig, lightning, measured_choices, multihost, sharding
from m1_jax import params as params_lib
from m1_jax.plan import topology
from m1_jax.serving import implementations
from pallas_kernels.lightning_attention import api

KIND = "TPU v5 lite"
TARGET = sharding.TargetDevice("tpu", KIND)
XLA_EVERYWHERE = {
    "lightning": "chunked",
    "softmax": "xla",
    "serving_lightning": "xla",
    "serving_softmax": "xla",
}
CONFIG = dataclasses.replace(
    ModelConfig.tiny(),
    layer_types=("lightning", "softmax"),
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=128,
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured_choices.forget_choices()
    yield
    measured_choices._shared_entries.clear()
    measured_choices.forget_choices()
    jax.clear_caches()


def write_file(content):
    path = measured_choices.choices_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    measured_choices.forget_choices()


def write_choices(choices, key=None):
    entry = {
        use: measured_choices.MeasuredChoice(name, "9 ms against 8 ms")
        for use, name in choices.items()
    }
    key = key or measured_choices.entry_key(KIND)
    write_file(measured_choices.format_entries({key: entry}))


def find_all(target=TARGET):
    return {use: measured_choices.find_choice(use, target) for use in measured_choices.USES}


def test_without_a_file_nothing_is_chosen(caplog):
    assert set(find_all().values()) == {None}
    assert not caplog.messages


def test_choices_are_read_back_and_logged_once(caplog):
    write_choices(XLA_EVERYWHERE)
    with caplog.at_level(logging.INFO, logger=measured_choices.__name__):
        assert find_all() == find_all() == XLA_EVERYWHERE
    assert len(caplog.messages) == 4
    assert (
        "lightning on TPU v5 lite: chunked by default, as m1-selfcheck measured (9 ms"
        in (caplog.messages[0])
    )
    # Another kind of device, and a CPU, have no entry.
    assert set(find_all(sharding.TargetDevice("tpu", "TPU v6 lite")).values()) == {None}
    assert set(find_all(sharding.TargetDevice("cpu", KIND)).values()) == {None}


@pytest.mark.parametrize("changed", ["jax 0.0.1", "libtpu 9", "kernels abc"])
def test_a_file_of_other_versions_is_ignored_with_a_line(caplog, changed):
    package = changed.split()[0]
    versions = measured_choices.versions_of_kernels() | {package: changed.split()[1]}
    key = f"{KIND} | " + " ".join(f"{name} {version}" for name, version in versions.items())
    write_choices(XLA_EVERYWHERE, key)
    with caplog.at_level(logging.WARNING, logger=measured_choices.__name__):
        assert set(find_all().values()) == {None}
    (line,) = caplog.messages
    assert changed in line
    assert "Run m1-selfcheck again" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "got a JSON list; wanted an object"),
        ({"format": 2}, "format is 2; wanted 1"),
        ({"format": 1, "choices": []}, "choices is no object"),
        ({"format": 1, "choices": {"TPU": []}}, "TPU"),
        (
            {"format": 1, "choices": {"TPU": {"lightning": {"implementation": "fast"}}}},
            "TPU lightning: got {'implementation': 'fast'}; wanted an implementation of",
        ),
        (
            {"format": 1, "choices": {"TPU": {"norm": {"implementation": "xla", "reason": ""}}}},
            "TPU norm",
        ),
    ],
)
def test_a_malformed_file_is_ignored_by_name(caplog, content, words):
    write_file(content)
    path = measured_choices.choices_path()
    with pytest.raises(measured_choices.ChoiceFileError, match=r"Run m1-selfcheck again"):
        measured_choices.read_entries(path)
    with caplog.at_level(logging.WARNING, logger=measured_choices.__name__):
        assert set(find_all().values()) == {None}
    (line,) = caplog.messages
    assert str(path) in line
    assert words in line


def test_a_relative_cache_directory_is_not_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wanted = tmp_path / "home" / ".cache" / "m1_jax" / "implementations.json"
    assert measured_choices.choices_path() == wanted


# ---- several processes


def test_several_processes_have_the_choices_of_process_0(monkeypatch):
    write_choices(XLA_EVERYWHERE)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # Nobody shared anything: files of different hosts may differ.
    assert set(find_all().values()) == {None}
    told = measured_choices.read_entries(measured_choices.choices_path())
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost, "broadcast_object", lambda mine: told if mine is None else None)
    write_choices({"lightning": "tpu"})  # this host's own file, which is not asked
    measured_choices.share_choices()
    assert find_all() == XLA_EVERYWHERE


# ---- who obeys


def make_layout():
    pytest.importorskip("libtpu")
    devices = topology.get_slice_devices(topology.parse_slice("v5e:2x2"))
    return sharding.make_layout(sharding.make_mesh({"expert": 4}, devices), CONFIG, sharding.TRAIN)


def lower_forward(config, layout):
    model = params_lib.abstract_model(config, jnp.bfloat16, layout=layout)
    where = layout.activation_sharding("batch", "length")
    tokens = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=where)
    traced = jax.jit(lambda model, tokens: model(tokens)).trace(model, tokens)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(
    ("choices", "has_lightning", "has_splash"),
    [
        ({}, True, True),
        ({"lightning": "tpu", "softmax": "splash"}, True, True),
        ({"lightning": "chunked"}, False, True),
        ({"softmax": "xla"}, True, False),
    ],
)
def test_programs_have_the_measured_kernels(choices, has_lightning, has_splash):
    layout = make_layout()
    write_choices(choices)
    text = lower_forward(CONFIG, layout)
    assert ("lightning_fwd" in text) == has_lightning
    assert ("splash" in text) == has_splash
    runs = lightning.resolve_implementation(CONFIG, jnp.bfloat16, layout)
    assert runs == ("tpu" if has_lightning else "chunked")


def test_an_explicit_choice_goes_before_the_file():
    layout = make_layout()
    write_choices(XLA_EVERYWHERE)
    named = dataclasses.replace(
        CONFIG, lightning_implementation="tpu", softmax_implementation="splash"
    )
    text = lower_forward(named, layout)
    assert "lightning_fwd" in text
    assert "splash" in text
    assert lightning.resolve_implementation(named, jnp.bfloat16, layout) == "tpu"


@pytest.mark.parametrize(
    ("choices", "named", "want"),
    [
        ({}, None, {"lightning": "tpu", "softmax": "tpu"}),
        ({"serving_lightning": "xla"}, None, {"lightning": "xla", "softmax": "tpu"}),
        ({"serving_softmax": "xla"}, None, {"lightning": "tpu", "softmax": "xla"}),
        # Training's kernel is another one.
        ({"lightning": "chunked"}, None, {"lightning": "tpu", "softmax": "tpu"}),
        (XLA_EVERYWHERE, "tpu", {"lightning": "tpu", "softmax": "xla"}),
    ],
)
def test_engines_have_the_measured_kernels(monkeypatch, choices, named, want):
    write_choices(choices)
    device = types.SimpleNamespace(platform="tpu", device_kind=KIND)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    config = dataclasses.replace(CONFIG, lightning_implementation=named)
    got = implementations.resolve_implementations(config, jnp.bfloat16, None, 8, 64)
    assert got == want


def test_a_gpu_has_its_kernels_where_they_were_measured(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    resolve = lightning.resolve_implementation
    assert resolve(CONFIG, jnp.bfloat16) == "chunked"
    write_choices({"lightning": "gpu"}, measured_choices.entry_key(device.device_kind))
    assert resolve(CONFIG, jnp.bfloat16) == "gpu"
    narrow = dataclasses.replace(CONFIG, head_dim=32)  # which they do not take
    assert resolve(narrow, jnp.bfloat16) == "chunked"


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_without_a_mesh_the_gpu_kernels_run_where_lowered_for_one(monkeypatch):
    """A process with a GPU may compute on its CPU, too."""
    gpu_kind = "NVIDIA H100 80GB HBM3"
    qkv = jax.random.normal(jax.random.key(0), (1, 96, 2 * 3 * 64))
    slopes = jnp.asarray([0.5, 0.01], jnp.float32)
    segment_ids = jnp.ones((1, 96), jnp.int32)
    wanted = api.lightning_attention(qkv, slopes, segment_ids=segment_ids, implementation="chunked")
    device = types.SimpleNamespace(platform="gpu", device_kind=gpu_kind)
    write_choices({"lightning": "gpu"}, measured_choices.entry_key(gpu_kind))

    @jax.jit
    def attend(qkv, slopes, segment_ids):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "local_devices", lambda: [device])
            return lightning.attend_on_target(qkv, slopes, segment_ids=segment_ids)

    # Newer JAX wants to be told which GPU.
    abstract_device = jax.sharding.AbstractDevice(gpu_kind, None, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=abstract_device)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = attend.trace(qkv, slopes, segment_ids)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "lightning_gpu_fwd" in text
    jax.clear_caches()
    for got, expected in zip(attend(qkv, slopes, segment_ids), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
