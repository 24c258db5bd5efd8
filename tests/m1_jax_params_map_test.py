"""The name map at full size, against names and shapes that are written down here a second time."""

import collections
import dataclasses
import math

import jax.numpy as jnp
import pytest

from m1_jax import config as config_lib
from m1_jax import params as params_lib
from m1_jax import testing
from m1_jax.checkpoints import params_map

# The 17 patterns of the release: name, count, shape [out, in], bytes per element.
_PATTERNS = (
    ("model.embed_tokens.weight", 1, (200064, 6144), 2),
    ("lm_head.weight", 1, (200064, 6144), 2),
    ("model.norm.weight", 1, (6144,), 2),
    ("model.layers.{any}.input_layernorm.weight", 80, (6144,), 2),
    ("model.layers.{any}.post_attention_layernorm.weight", 80, (6144,), 2),
    ("model.layers.{lightning}.self_attn.qkv_proj.weight", 70, (24576, 6144), 2),
    ("model.layers.{lightning}.self_attn.output_gate.weight", 70, (8192, 6144), 2),
    ("model.layers.{lightning}.self_attn.norm.weight", 70, (8192,), 2),
    ("model.layers.{lightning}.self_attn.out_proj.weight", 70, (6144, 8192), 2),
    ("model.layers.{softmax}.self_attn.q_proj.weight", 10, (8192, 6144), 2),
    ("model.layers.{softmax}.self_attn.k_proj.weight", 10, (1024, 6144), 2),
    ("model.layers.{softmax}.self_attn.v_proj.weight", 10, (1024, 6144), 2),
    ("model.layers.{softmax}.self_attn.o_proj.weight", 10, (6144, 8192), 2),
    ("model.layers.{any}.block_sparse_moe.gate.weight", 80, (32, 6144), 4),
    ("model.layers.{any}.block_sparse_moe.experts.{expert}.w1.weight", 2560, (9216, 6144), 2),
    ("model.layers.{any}.block_sparse_moe.experts.{expert}.w3.weight", 2560, (9216, 6144), 2),
    ("model.layers.{any}.block_sparse_moe.experts.{expert}.w2.weight", 2560, (6144, 9216), 2),
)
_LAYERS = {
    "any": range(80),
    "lightning": [layer for layer in range(80) if layer % 8 != 7],
    "softmax": range(7, 80, 8),
}
_PARAMETERS, _BYTES = 456_089_655_296, 912_210_767_872


def _names(pattern):
    """Yield every name of a pattern."""
    experts = range(32) if "{expert}" in pattern else [0]
    for kind, layers in _LAYERS.items():
        if "{" + kind + "}" in pattern:
            for layer in layers:
                for expert in experts:
                    yield pattern.format(**{kind: layer}, expert=expert)
            return
    yield pattern


@pytest.fixture(scope="module")
def m1():
    return config_lib.ModelConfig.m1()


@pytest.fixture(scope="module")
def abstract(m1):
    return params_lib.params_by_path(params_lib.abstract_model(m1, jnp.bfloat16))


def _tensor_shape(entry, parameters):
    shape = parameters[entry.param_path].shape[len(entry.index) :]
    return shape[::-1] if entry.transposed else shape


def _assert_covers(entries, parameters):
    """Every element of every parameter belongs to one tensor."""
    places = collections.Counter((entry.param_path, entry.index) for entry in entries)
    assert max(places.values()) == 1
    lead = {entry.param_path: len(entry.index) for entry in entries}
    assert lead.keys() == parameters.keys()
    count = collections.Counter(entry.param_path for entry in entries)
    for path, parameter in parameters.items():
        leading = parameter.shape[: lead[path]]
        assert count[path] == math.prod(leading), path
        for entry in (entry for entry in entries if entry.param_path == path):
            assert len(entry.index) == lead[path]
            assert all(0 <= i < n for i, n in zip(entry.index, leading, strict=True)), entry


def test_the_patterns_written_here_are_the_release_s():
    """8,243 names and the total size of its index: what guards this table against slips."""
    assert sum(count for _, count, _, _ in _PATTERNS) == 8243
    for pattern, count, _, _ in _PATTERNS:
        assert len(set(_names(pattern))) == count, pattern
    elements = [(count * math.prod(shape), size) for _, count, shape, size in _PATTERNS]
    assert sum(n for n, _ in elements) == _PARAMETERS
    assert sum(n * size for n, size in elements) == _BYTES


def test_every_tensor_of_the_release_is_covered_once(m1):
    wanted = [name for pattern, *_ in _PATTERNS for name in _names(pattern)]
    got = [entry.name for entry in params_map.list_tensor_entries(m1)]
    assert len(got) == len(set(got)) == 8243
    assert set(got) == set(wanted)


def test_every_tensor_has_the_release_s_shape_and_dtype(m1, abstract):
    by_name = {entry.name: entry for entry in params_map.list_tensor_entries(m1)}
    for pattern, _, shape, size in _PATTERNS:
        for name in _names(pattern):
            entry = by_name[name]
            assert _tensor_shape(entry, abstract) == shape, name
            assert abstract[entry.param_path].dtype.itemsize == size, name


def test_every_element_of_the_parameters_is_covered_once(m1, abstract):
    _assert_covers(params_map.list_tensor_entries(m1), abstract)


def test_parameters_and_bytes_of_the_release(abstract):
    assert sum(math.prod(p.shape) for p in abstract.values()) == _PARAMETERS
    assert sum(math.prod(p.shape) * p.dtype.itemsize for p in abstract.values()) == _BYTES


def test_a_layer_lies_at_its_place_in_the_repeating_unit(m1):
    by_name = {entry.name: entry for entry in params_map.list_tensor_entries(m1)}
    for layer in range(80):
        entry = by_name[f"model.layers.{layer}.block_sparse_moe.experts.31.w2.weight"]
        assert entry.param_path == f"layers.{layer % 8 // 7}.moe.down"
        assert entry.index == (layer // 8, layer % 8 % 7, 31)


@pytest.mark.parametrize(
    "overrides",
    [
        {"attn_type_list": [0, 0, 1, 0, 1]},  # irregular
        {"attn_type_list": [1, 0] * 3},
        {"attn_type_list": [0] * 4},
        {"attn_type_list": [1]},
        {"shared_intermediate_size": 1},
        {"num_key_value_heads": 1, "num_attention_heads": 6, "num_local_experts": 3},
    ],
    ids=str,
)
def test_other_models(overrides):
    hf = testing.tiny_config(**overrides)
    config = config_lib.ModelConfig.from_hf(hf)
    parameters = params_lib.params_by_path(params_lib.abstract_model(config))
    entries = params_map.list_tensor_entries(config)
    _assert_covers(entries, parameters)
    got = {entry.name: _tensor_shape(entry, parameters) for entry in entries}
    assert len(got) == len(entries)
    assert got == testing.tensor_shapes(hf)


def test_a_shared_expert_adds_four_tensors_to_every_layer(m1):
    shared = dataclasses.replace(m1, shared_intermediate_size=18432)
    added = {e.name for e in params_map.list_tensor_entries(shared)} - {
        e.name for e in params_map.list_tensor_entries(m1)
    }
    parts = ("coefficient", *(f"shared_mlp.{part}_proj" for part in ("gate", "up", "down")))
    assert added == {f"model.layers.{n}.{part}.weight" for n in range(80) for part in parts}
    abstract = params_lib.params_by_path(params_lib.abstract_model(shared, jnp.bfloat16))
    extra = sum(math.prod(p.shape) for p in abstract.values()) - _PARAMETERS
    # The width is intermediate_size, not the key that enables it.
    assert extra == 80 * (3 * 9216 * 6144 + 6144)


def test_every_row_has_its_own_name_and_parameter():
    rows = (*params_map.MODEL_TABLE, *params_map.LAYER_TABLE)
    names, paths = [row[0] for row in rows], [(row[1], row[3]) for row in rows]
    assert len(set(names)) == len(names)
    assert len(set(paths)) == len(paths)


def test_constants_of_the_native_layout(m1):
    derived = params_map.list_derived_tensors(m1)
    assert len(derived) == 4 * 70
    assert not derived.keys() & {entry.name for entry in params_map.list_tensor_entries(m1)}
    assert derived["model.layers.78.self_attn.slope_rate"] == 78
    assert "model.layers.79.self_attn.slope_rate" not in derived
