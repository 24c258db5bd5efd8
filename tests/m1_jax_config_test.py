"""`ModelConfig`: every spelling of config.json, and every way in which one can be wrong."""

import ast
import dataclasses
import json
import pathlib

import hf_config_support
import hypothesis
import hypothesis.strategies as st
import pytest

from m1_jax import config as config_lib
from m1_jax import hf_config, testing

_REPO = pathlib.Path(__file__).resolve().parents[1]
_ModelConfig = config_lib.ModelConfig
_LIGHTNING, _SOFTMAX = config_lib.LIGHTNING, config_lib.SOFTMAX

# The release's config.json, key by key (MiniMaxAI/MiniMax-M1 at 2abb4f4).
_M1 = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [int(layer % 8 == 7) for layer in range(80)],
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 6144,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 64,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 64,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 200064,
}
# What transformers 5 writes for a small model that leaves everything else at its defaults.
_NATIVE = {
    "architectures": ["MiniMaxForCausalLM"],
    "attention_dropout": 0.0,
    "block_size": 256,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "full_attn_alpha_factor": 3.5,
    "full_attn_beta_factor": 0.5,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "linear_attention"] * 2,
    "linear_attn_alpha_factor": 2.5,
    "linear_attn_beta_factor": 0.25,
    "max_position_embeddings": 131072,
    "mlp_alpha_factor": 1.5,
    "mlp_beta_factor": 0.125,
    "model_type": "minimax",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "5.23.0",
    "use_cache": True,
    "vocab_size": 128,
}


# ---- the release's spelling


def test_the_release_is_the_preset():
    assert _ModelConfig.from_hf(_M1) == _ModelConfig.m1()


def test_text_01_is_read_alike():
    hf = _M1 | {"model_type": "minimax_text_01", "architectures": ["MiniMaxText01ForCausalLM"]}
    assert _ModelConfig.from_hf(hf) == _ModelConfig.m1()


def test_the_golden_file_is_the_tiny_preset(golden_dir):
    assert _ModelConfig.from_file(golden_dir / "config.json") == _ModelConfig.tiny()
    assert _ModelConfig.from_hf(testing.tiny_config()) == _ModelConfig.tiny()


def test_the_preset_writes_the_release_s_values():
    ours = _ModelConfig.m1().to_hf()
    inert = {"auto_map", "torch_dtype", "transformers_version", "use_cache", "output_router_logits"}
    inert |= {"bos_token_id", "eos_token_id"}
    assert ours == {key: value for key, value in _M1.items() if key not in inert}


def test_absent_keys_take_the_release_s_defaults():
    optional = [key for key in _M1 if key.startswith("layernorm_")]
    hf = hf_config_support.change_keys(
        _M1, dict.fromkeys([*optional, "postnorm", "shared_intermediate_size"], ...)
    )
    config = _ModelConfig.from_hf(hf)
    assert config.attention_scales(_LIGHTNING) == config.attention_scales(_SOFTMAX) == (1.0, 1.0)
    assert (config.layernorm_mlp_alpha, config.layernorm_mlp_beta) == (1.0, 1.0)
    assert config.postnorm is False
    assert not config.has_shared_expert


def test_scales_belong_to_their_kind():
    config = dataclasses.replace(
        _ModelConfig.tiny(),
        layernorm_linear_attention_alpha=2.0,
        layernorm_linear_attention_beta=3.0,
        layernorm_full_attention_alpha=4.0,
        layernorm_full_attention_beta=5.0,
    )
    assert config.attention_scales(_LIGHTNING) == (2.0, 3.0)
    assert config.attention_scales(_SOFTMAX) == (4.0, 5.0)


# ---- transformers' native spelling


def test_native_keys_are_translated():
    assert _ModelConfig.from_hf(_NATIVE) == _ModelConfig(
        vocab_size=128,
        hidden_size=32,
        layer_types=(_SOFTMAX, _LIGHTNING) * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=16,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        postnorm=True,
        layernorm_linear_attention_alpha=2.5,
        layernorm_linear_attention_beta=0.25,
        layernorm_full_attention_alpha=3.5,
        layernorm_full_attention_beta=0.5,
        layernorm_mlp_alpha=1.5,
        layernorm_mlp_beta=0.125,
        max_position_embeddings=131072,
    )


def test_native_defaults_are_transformers_own():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    written = transformers.MiniMaxConfig().to_dict()
    assert _ModelConfig.from_hf({"model_type": "minimax"}) == _ModelConfig.from_hf(written)


def test_m1_in_the_native_spelling_is_the_preset():
    """As MiniMax-Text-01-hf spells it, with what it still carries of the release's keys."""
    kinds = ["linear_attention"] * 7 + ["full_attention"]
    renamed = {"attn_type_list": ..., "layer_types": kinds * 10, "model_type": "minimax"}
    for theirs, ours in hf_config._NATIVE_SCALE_NAMES.items():
        renamed |= {ours: ..., theirs: _M1[ours]}
    assert _ModelConfig.from_hf(hf_config_support.change_keys(_M1, renamed)) == _ModelConfig.m1()


@pytest.mark.parametrize(
    ("changes", "rotary_dim", "theta"),
    [
        ({"rope_parameters": ...}, 16, 1e6),
        ({"rope_parameters": None, "rope_theta": 1e4}, 16, 1e4),
        ({"rotary_dim": 8}, 8, 1e6),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, 4, 1e6),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}, "rotary_dim": 4}, 4, 1e6),
        ({"rope_parameters": {"rope_theta": 1e7}, "rope_theta": 10000000}, 16, 1e7),
    ],
)
def test_native_rope(changes, rotary_dim, theta):
    config = _ModelConfig.from_hf(hf_config_support.change_keys(_NATIVE, changes))
    assert (config.rotary_dim, config.rope_theta) == (rotary_dim, theta)


def test_native_null_kv_heads_means_one_per_head():
    assert _ModelConfig.from_hf(_NATIVE | {"num_key_value_heads": None}).num_key_value_heads == 4


def test_native_null_head_dim_is_derived():
    config = _ModelConfig.from_hf(_NATIVE | {"head_dim": None})
    assert config.head_dim == config.rotary_dim == 8


def test_native_heads_without_a_power_of_two_are_refused_where_they_decay():
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    hf_config_support.assert_refused(_NATIVE | heads, "num_attention_heads is 6", "power of 2")
    softmax_only = heads | {"layer_types": ["full_attention"] * 4}
    assert _ModelConfig.from_hf(_NATIVE | softmax_only).num_attention_heads == 6
    assert _ModelConfig.from_hf(_M1 | {"num_attention_heads": 48}).num_attention_heads == 48


# ---- there and back


@st.composite
def _configs(draw):
    groups, head_dim = draw(st.integers(1, 4)), draw(st.sampled_from((2, 8, 30, 128)))
    experts = draw(st.integers(1, 9))
    scale = st.floats(-8, 8, allow_nan=False)
    return _ModelConfig(
        vocab_size=draw(st.integers(1, 300_000)),
        hidden_size=draw(st.integers(1, 9000)),
        layer_types=tuple(draw(st.lists(st.sampled_from((_LIGHTNING, _SOFTMAX)), min_size=1))),
        num_attention_heads=groups * draw(st.integers(1, 16)),
        num_key_value_heads=groups,
        head_dim=head_dim,
        rotary_dim=2 * draw(st.integers(1, head_dim // 2)),
        intermediate_size=draw(st.integers(1, 20_000)),
        num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        rope_theta=draw(st.floats(1, 1e9)),
        rms_norm_eps=draw(st.floats(1e-12, 1e-2)),
        postnorm=draw(st.booleans()),
        layernorm_linear_attention_alpha=draw(scale),
        layernorm_linear_attention_beta=draw(scale),
        layernorm_full_attention_alpha=draw(scale),
        layernorm_full_attention_beta=draw(scale),
        layernorm_mlp_alpha=draw(scale),
        layernorm_mlp_beta=draw(scale),
        shared_intermediate_size=draw(st.integers(0, 100)),
        router_aux_loss_coef=draw(st.floats(0, 1)),
        initializer_range=draw(st.floats(0, 1)),
        max_position_embeddings=draw(st.integers(1, 10**9)),
    )


@hypothesis.given(_configs())
def test_what_is_written_is_read_back(config):
    hf = json.loads(json.dumps(config.to_hf()))
    assert _ModelConfig.from_hf(hf) == config


@hypothesis.given(_configs())
def test_the_unit_repeats_and_no_shorter_one_does(config):
    types, period = config.layer_types, config.period
    assert types == types[:period] * config.repeats
    assert period * config.repeats == config.num_hidden_layers == len(types)
    for shorter in range(1, period):
        assert types[:shorter] * (len(types) // shorter) != types


@pytest.mark.parametrize(
    ("listed", "period", "repeats"),
    [
        ([0] * 7 + [1], 8, 1),
        (([0] * 7 + [1]) * 10, 8, 10),
        ([0, 1] * 3, 2, 3),
        ([0, 0, 0, 0], 1, 4),
        ([1], 1, 1),
        ([0, 0, 1, 0, 1, 1], 6, 1),  # irregular: the unit is the whole list
        ([0, 0, 1, 0, 0], 5, 1),  # a repeat that is cut off is none
        ([0, 1, 0, 0, 1, 0], 3, 2),
    ],
)
def test_period_and_repeats(listed, period, repeats):
    config = _ModelConfig.from_hf(testing.tiny_config(attn_type_list=listed))
    assert (config.period, config.repeats) == (period, repeats)


# ---- the fields themselves


def test_a_config_is_frozen_and_hashable():
    config = _ModelConfig.tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    assert hash(config) == hash(_ModelConfig.tiny())


def test_every_field_has_a_reader():
    """Somebody outside of config.py reads it, or a property of ModelConfig that is read does."""
    attributes = set()
    for package in ("m1_jax", "infer", "train"):
        for path in (_REPO / package).rglob("*.py"):
            if path.name != "config.py":
                nodes = ast.walk(ast.parse(path.read_text()))
                attributes |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    own = ast.parse((_REPO / "m1_jax" / "config.py").read_text())
    (body,) = (n for n in own.body if isinstance(n, ast.ClassDef) and n.name == "ModelConfig")
    for method in (n for n in body.body if isinstance(n, ast.FunctionDef)):
        if method.name in attributes and method.name != "to_hf":
            attributes |= {n.attr for n in ast.walk(method) if isinstance(n, ast.Attribute)}
    unread = {field.name for field in dataclasses.fields(_ModelConfig)} - attributes
    assert not unread
