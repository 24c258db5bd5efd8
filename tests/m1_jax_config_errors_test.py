"""Every way in which config.json can be wrong is an error that names the key."""

import dataclasses

import hf_config_support
import pytest

from m1_jax import config as config_lib

_ModelConfig = config_lib.ModelConfig
_M1 = _ModelConfig.m1().to_hf()
_NATIVE = {
    "model_type": "minimax",
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "linear_attention"] * 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}


@pytest.mark.parametrize("hf", [_M1, _NATIVE], ids=["release", "native"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("attention_dropout", 0.1),
        ("router_jitter_noise", 0.01),
        ("sliding_window", 4096),
        ("tie_word_embeddings", True),
        ("shared_moe_mode", "softmax"),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"type": "yarn", "factor": 4}),
        ("rope_type", "linear"),
        ("use_qk_norm", True),
        ("layernorm_attention_alpha", 2.0),
        ("attention_bias", False),
    ],
)
def test_keys_that_would_change_the_computation(hf, key, value):
    hf_config_support.assert_refused(hf | {key: value}, key, repr(value))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"postnorm": False}, ["postnorm", "False"]),
        ({"shared_intermediate_size": 64}, ["shared_intermediate_size", "64"]),
        ({"attn_type_list": [0, 1]}, ["attn_type_list"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type", "'yarn'"]),
        ({"rope_parameters": {"mscale": 2.0}}, ["rope_parameters", "mscale"]),
        ({"rope_parameters": "default"}, ["rope_parameters"]),
        ({"rope_theta": 5e5}, ["rope_theta", "500000", "1000000"]),
        (
            {"rotary_dim": 4, "rope_parameters": {"partial_rotary_factor": 0.5}},
            ["rotary_dim", "4", "8"],
        ),
        ({"rope_parameters": {"partial_rotary_factor": "half"}}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 2.0}}, ["rotary_dim", "32"]),
        ({"layer_types": ["full_attention"] * 3}, ["layer_types", "3", "4"]),
        ({"layer_types": ["full_attention"] * 3 + ["sliding"]}, ["layer_types", "'sliding'"]),
        ({"layer_types": "full_attention"}, ["layer_types"]),
        ({"num_hidden_layers": "4"}, ["num_hidden_layers", "'4'"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "0"]),
        ({"head_dim": "16"}, ["head_dim", "'16'"]),
        ({"linear_attn_alpha_factor": "1"}, ["layernorm_linear_attention_alpha", "'1'"]),
    ],
)
def test_native_refusals(changes, words):
    hf_config_support.assert_refused(_NATIVE | changes, *words)


_NEEDED = sorted(
    key
    for key in _M1
    if key in {field.name for field in dataclasses.fields(_ModelConfig) if field.type is int}
    and key not in ("shared_intermediate_size", "max_position_embeddings")
)


@pytest.mark.parametrize(
    "key", [*_NEEDED, "rope_theta", "rms_norm_eps", "attn_type_list", "num_hidden_layers"]
)
@pytest.mark.parametrize("value", [..., None], ids=["absent", "null"])
def test_missing_keys(key, value):
    assert "missing" in hf_config_support.assert_refused(
        hf_config_support.change_keys(_M1, {key: value}), key
    )


def test_all_missing_keys_are_named_at_once():
    hf_config_support.assert_refused(
        {"model_type": "minimax_m1", "attn_type_list": [0], "num_hidden_layers": 1}, *_NEEDED
    )


@pytest.mark.parametrize("value", ["64", 64.0, True, [64], -1, 0])
@pytest.mark.parametrize("key", _NEEDED)
def test_wrong_integers(key, value):
    hf_config_support.assert_refused(_M1 | {key: value}, key, repr(value), "integer")


@pytest.mark.parametrize("value", ["1.0", True, [1.0], float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", [field.name for field in dataclasses.fields(_ModelConfig) if field.type is float]
)
def test_wrong_numbers(key, value):
    hf_config_support.assert_refused(_M1 | {key: value}, key, repr(value), "number")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"postnorm": "true"}, ["postnorm", "'true'"]),
        ({"postnorm": 1}, ["postnorm", "1"]),
        ({"rope_theta": 0}, ["rope_theta", "0"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps", "-1e-05"]),
        ({"shared_intermediate_size": -1}, ["shared_intermediate_size", "-1"]),
        ({"shared_intermediate_size": [0]}, ["shared_intermediate_size", "[0]"]),
        ({"num_key_value_heads": 7}, ["num_key_value_heads", "7", "64"]),
        ({"rotary_dim": 63}, ["rotary_dim", "63"]),
        ({"rotary_dim": 130}, ["rotary_dim", "130", "128"]),
        ({"num_experts_per_tok": 33}, ["num_experts_per_tok", "33", "32"]),
        ({"num_hidden_layers": 79}, ["attn_type_list", "80", "79"]),
        ({"num_hidden_layers": "80"}, ["num_hidden_layers", "'80'"]),
        ({"attn_type_list": [2] * 80}, ["attn_type_list", "2"]),
        ({"attn_type_list": [[0]] * 80}, ["attn_type_list", "[0]"]),
        ({"attn_type_list": "01"}, ["attn_type_list", "'01'"]),
        ({"attn_type_list": []}, ["attn_type_list", "0", "80"]),
        ({"attn_type_list": [], "num_hidden_layers": 0}, ["layer_types"]),
        ({"model_type": "mixtral"}, ["model_type", "'mixtral'", "minimax_m1"]),
        ({"model_type": ["minimax_m1"]}, ["model_type"]),
        ({"layernorm_mlp_alfa": 1.0}, ["layernorm_mlp_alfa", "layernorm_mlp_alpha?"]),
    ],
)
def test_release_refusals(changes, words):
    hf_config_support.assert_refused(_M1 | changes, *words)


def test_no_object_is_refused():
    hf_config_support.assert_refused(["minimax_m1"], "config.json", "object")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["config.json", "does not exist"]),
        ("{", ["config.json", "not valid JSON"]),
        (b"\xff\xfe", ["config.json", "not valid JSON"]),
        ("[]", ["config.json", "object"]),
        ('{"rms_norm_eps": 1e-5, "rms_norm_eps": 1e-6}', ["rms_norm_eps", "twice", "1e-06"]),
    ],
)
def test_damaged_files(tmp_path, text, words):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(config_lib.ConfigError) as caught:
        _ModelConfig.from_file(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"remat": "all"}, "remat"),
        ({"layer_types": ("linear",)}, "layer_types"),
        ({"layer_types": ["softmax"]}, "layer_types"),
        ({"layer_types": ()}, "layer_types"),
    ],
)
def test_wrong_fields_are_refused_without_a_file_too(changes, key):
    with pytest.raises(config_lib.ConfigError, match=key):
        dataclasses.replace(_ModelConfig.tiny(), **changes)
