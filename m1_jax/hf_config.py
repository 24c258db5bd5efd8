"""Hugging Face's `config.json` in two spellings, and the values of `ModelConfig`'s fields.

The release's spelling is that of `config.json` and `configuration_minimax_m1.py` of
MiniMaxAI/MiniMax-M1. The native spelling is that of the `minimax` model of transformers.

No key is ignored silently. A key that is unknown, missing or contradictory raises `ConfigError`,
because a model that is computed in another way than it was trained still gives plausible text.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from m1_jax import configlib, json_file, strict_json

LIGHTNING, SOFTMAX = "lightning", "softmax"  # the kinds of layers
_RELEASE_MODEL_TYPES = ("minimax_m1", "minimax_text_01", "MiniMaxM1", "MiniMaxText01")
_NATIVE_MODEL_TYPES = ("minimax",)
_RELEASE_LAYER_KINDS = {0: LIGHTNING, 1: SOFTMAX}
_NATIVE_LAYER_KINDS = {"full_attention": SOFTMAX, "linear_attention": LIGHTNING}


class ConfigError(ValueError):
    """A configuration that this code cannot compute exactly. The message names the key."""


# Keys that both spellings share with ModelConfig. True: the file must hold the key. In a native
# file transformers' defaults count as held.
_SHARED_FIELDS = {
    "vocab_size": True,
    "hidden_size": True,
    "num_attention_heads": True,
    "num_key_value_heads": True,
    "head_dim": True,
    "intermediate_size": True,
    "num_local_experts": True,
    "num_experts_per_tok": True,
    "rms_norm_eps": True,
    "router_aux_loss_coef": False,
    "initializer_range": False,
    "max_position_embeddings": False,
}
# Native key -> ModelConfig field, which has the release's key.
_NATIVE_SCALE_NAMES = {
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
_RELEASE_FIELDS = _SHARED_FIELDS | {
    "rotary_dim": True,
    "rope_theta": True,
    "postnorm": False,
    "shared_intermediate_size": False,
    **dict.fromkeys(_NATIVE_SCALE_NAMES.values(), False),
}
# transformers leaves out of the file what equals its own defaults (MiniMaxConfig, 5.x).
_NATIVE_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.001,
    "initializer_range": 0.02,
    "max_position_embeddings": 4096 * 32,
}
_NATIVE_ROPE_THETA = 1e6  # transformers' default, where a native file has no rope_theta

# Keys that would change the computation if they held any other value.
_FIXED_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "shared_moe_mode": "sigmoid",  # the release never reads it and always computes this form
}
# Native checkpoints still carry these keys of the release. transformers has no other form.
_NATIVE_FIXED_VALUES = _FIXED_VALUES | {"postnorm": True, "shared_intermediate_size": 0}

# Keys that describe files, tokens or library behaviour, not the computation. `block_size` regroups
# the sums of lightning attention, so it changes results by rounding only.
_INERT_KEYS_TEXT = """
    architectures auto_map model_type torch_dtype dtype transformers_version use_cache
    output_router_logits output_hidden_states output_attentions return_dict bos_token_id
    eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id tokenizer_class
    _name_or_path id2label label2id problem_type prefix finetuning_task task_specific_params
    torchscript is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder chunk_size_feed_forward _attn_implementation
    _attn_implementation_autoset _experts_implementation block_size
"""
_INERT_KEYS = frozenset(_INERT_KEYS_TEXT.split())
# Known keys that this model has no computation for, and what to do about each.
_UNSUPPORTED_KEYS = {
    "quantization_config": "these weights are quantized. Download the bfloat16 release instead.",
    "rope_scaling": "it would change every position. Use the config.json of the release.",
    "rope_type": "it would change every position. Use the config.json of the release.",
    "rope_parameters": "it is of the native spelling, and this file has the release's. Write its "
    "rope_theta, and rotary_dim, as keys of their own instead.",
    "compression_config": "these weights are compressed. Download the bfloat16 release instead.",
}

# Upper bounds of counts, far beyond any model, so that a damaged file is refused before anything
# of that size is made. The product of all bounds still fits in 64 bits.
_MAX_COUNTS = {
    "num_hidden_layers": 2**10,
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "num_local_experts": 2**16,
}
_MAX_COUNT = 2**31 - 1  # of all other counts
MAX_EXPERTS_OF_ALL_LAYERS = 2**18  # the release has 2,560
_MIN_NUMBER, _MAX_NUMBER = 1.2e-38, 3.4e38  # about the range of float32


# ---- checks


def check_field(valid: bool, key: str, value: Any, requirement: str) -> None:
    """Raise `ConfigError` for a value that is not valid."""
    if not valid:
        shown = strict_json.show_value(value)
        raise ConfigError(
            f"config: {strict_json.shorten_text(key)} is {shown}; wanted {requirement}"
        )


def check_scalar(key: str, kind: Any, value: Any) -> None:
    """Check the type and range of a field, since JSON may hold a string or a bool for a number.

    `kind` is the field's annotation. Kinds other than bool, int and float are not checked here.
    """
    if kind is bool:
        check_field(isinstance(value, bool), key, value, "true or false")
    elif kind is int:
        # The size 0 means no shared expert. No other size may be 0.
        minimum = 0 if key == "shared_intermediate_size" else 1
        maximum = _MAX_COUNTS.get(key, _MAX_COUNT)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        check_field(is_integer and value >= minimum, key, value, f"an integer, {minimum} or more")
        check_field(value <= maximum, key, value, f"an integer, {maximum} at most")
    elif kind is float:
        # JSON writes 1e7 as 10000000. Python's reader also takes NaN and Infinity.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared and not converted: a whole number may be too large for a float. NaN compares
        # as false.
        is_finite = is_number and -_MAX_NUMBER <= value <= _MAX_NUMBER
        check_field(is_finite, key, value, "a number that float32 can hold")
        if key in ("rope_theta", "rms_norm_eps", "expert_capacity"):
            check_field(value >= _MIN_NUMBER, key, value, "more than 0 in float32")


# ---- reading and writing


def read_config_json(path: pathlib.Path) -> Mapping[str, Any]:
    """Return the object that a `config.json` file holds. Its keys are not checked yet.

    Raises:
      ConfigError: no such file, a file that is not JSON, a key that is given twice, or the pointer
        of Git LFS.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist. Copy it beside the weights.")
    return json_file.read_json(path, ConfigError)


def parse_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of `ModelConfig`'s fields from a parsed `config.json`.

    Fields that the file does not give are left out, so that they keep their defaults.

    Raises:
      ConfigError: a key that is unknown, missing, contradictory, or asks for a computation
        that this model does not have.
    """
    check_field(isinstance(hf, Mapping), "config.json", hf, "a JSON object")
    model_type = hf.get("model_type")
    if model_type in _RELEASE_MODEL_TYPES:
        return _parse_release_config(hf)
    if model_type in _NATIVE_MODEL_TYPES:
        return _parse_native_config(hf)
    raise ConfigError(
        f"config.json: model_type is {strict_json.show_value(model_type)}; this code reads "
        f"{', '.join(_RELEASE_MODEL_TYPES[:2] + _NATIVE_MODEL_TYPES)}"
    )


def format_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config.json` in the release's spelling, which `parse_config` reads back."""
    layer_types = fields["layer_types"]
    # The fixed values are written as well, so that other readers need not know the defaults.
    return {name: fields[name] for name in _RELEASE_FIELDS} | {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "model_type": "minimax_m1",
        "num_hidden_layers": len(layer_types),
        "attn_type_list": [int(kind == SOFTMAX) for kind in layer_types],
        **_FIXED_VALUES,
    }


def _check_keys(hf: Mapping[str, Any], known_keys: set[str], fixed: Mapping[str, Any]) -> None:
    """Refuse unknown keys, and keys of one allowed value that have another value."""
    for key, fixed_value in fixed.items():
        value = hf.get(key, fixed_value)
        # Python takes true for 1 and 0 for false.
        is_equal = value == fixed_value and isinstance(value, bool) == isinstance(fixed_value, bool)
        check_field(is_equal, key, value, f"{fixed_value!r}: this model has no other form")
    for key in hf:
        if key not in known_keys and key not in fixed:
            raise ConfigError(_describe_unknown_key(key, hf[key], known_keys))


def _describe_unknown_key(key: str, value: Any, known_keys: set[str]) -> str:
    shown_key, shown_value = strict_json.shorten_text(key), strict_json.show_value(value)
    if key in _UNSUPPORTED_KEYS:
        return f"config.json: unknown key {key!r} = {shown_value}: {_UNSUPPORTED_KEYS[key]}"
    hint = configlib.suggest_names(
        shown_key, known_keys, "it is none of the release or transformers."
    )
    return (
        f"config.json: unknown key {shown_key!r} = {shown_value}; {hint} "
        "Remove it if it does not change the computation."
    )


def _select_fields(hf: Mapping[str, Any], fields: Mapping[str, bool]) -> dict[str, Any]:
    """Return the named fields, without those that are absent or null.

    `fields` maps a name to whether the file must hold the field.
    """
    missing = [name for name, needed in fields.items() if needed and hf.get(name) is None]
    if missing:
        raise ConfigError(
            f"config.json: missing {', '.join(missing)}. Is it the config.json of these weights?"
        )
    return {name: hf[name] for name in fields if hf.get(name) is not None}


def _translate_layer_types(
    hf: Mapping[str, Any], key: str, layer_kinds: Any, kinds: Mapping[Any, str]
) -> tuple[str, ...]:
    """Translate the file's list of layers, whose length must be num_hidden_layers."""
    check_field(
        isinstance(layer_kinds, list | tuple), key, layer_kinds, "a list with one entry per layer"
    )
    num_layers = _select_fields(hf, {"num_hidden_layers": True})["num_hidden_layers"]
    choices = " or ".join(f"{k} ({v})" for k, v in kinds.items())
    for kind in layer_kinds:
        # true is no 1 here, and 0.0 no 0. The list and not the dict is searched, because an entry
        # of a damaged file may have no hash.
        is_known = isinstance(kind, int | str) and not isinstance(kind, bool)
        check_field(is_known and kind in list(kinds), key, kind, choices)
    # Python takes true for 1, and 2.0 for 2.
    if type(num_layers) is not int or num_layers != len(layer_kinds):
        raise ConfigError(
            f"config.json: {key} lists {len(layer_kinds)} layers but num_hidden_layers is "
            f"{strict_json.show_value(num_layers)}"
        )
    return tuple(kinds[kind] for kind in layer_kinds)


def _parse_release_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    known_keys = {*_RELEASE_FIELDS, *_INERT_KEYS, "num_hidden_layers", "attn_type_list"}
    _check_keys(hf, known_keys, _FIXED_VALUES)
    layer_kinds = _select_fields(hf, {"attn_type_list": True})["attn_type_list"]
    layer_types = _translate_layer_types(hf, "attn_type_list", layer_kinds, _RELEASE_LAYER_KINDS)
    return {"layer_types": layer_types, **_select_fields(hf, _RELEASE_FIELDS)}


def _parse_native_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    native_keys = {
        "num_hidden_layers",
        "layer_types",
        "rope_parameters",
        "rope_theta",
        "rotary_dim",
    }
    _check_keys(
        hf,
        {*_SHARED_FIELDS, *_NATIVE_SCALE_NAMES, *_INERT_KEYS, *native_keys},
        _NATIVE_FIXED_VALUES,
    )
    # Read before null values are dropped, because transformers tells null (one KV head per query
    # head) from an absent key (its default).
    is_multi_head = "num_key_value_heads" in hf and hf["num_key_value_heads"] is None
    hf = _NATIVE_DEFAULTS | {key: value for key, value in hf.items() if value is not None}
    # The lines below compute with these, before `ModelConfig` checks all fields.
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        check_scalar(key, int, hf[key])
    heads = hf["num_attention_heads"]
    if is_multi_head:
        hf["num_key_value_heads"] = heads
    # At least 1, for a damaged file whose heads outnumber its features.
    hf.setdefault("head_dim", max(1, hf["hidden_size"] // heads))
    check_scalar("head_dim", int, hf["head_dim"])
    # transformers' default: softmax and lightning layers in turn, softmax first.
    default_kinds = [
        list(_NATIVE_LAYER_KINDS)[layer % 2] for layer in range(hf["num_hidden_layers"])
    ]
    layer_types = _translate_layer_types(
        hf, "layer_types", hf.get("layer_types", default_kinds), _NATIVE_LAYER_KINDS
    )
    if LIGHTNING in layer_types:
        requirement = "a power of 2: beyond it transformers' decay rates are not the release's"
        check_field(heads & (heads - 1) == 0, "num_attention_heads", heads, requirement)
    scales = {name: hf[key] for key, name in _NATIVE_SCALE_NAMES.items() if key in hf}
    return {
        "layer_types": layer_types,
        "postnorm": True,  # transformers has no other form
        **_select_fields(hf, _SHARED_FIELDS),
        **_parse_native_rope(hf),
        **scales,
    }


def _parse_native_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rotary_dim, which is head_dim unless the file says otherwise.

    transformers 5 writes an object `rope_parameters`. Older versions wrote plain keys.
    """
    rope = hf.get("rope_parameters", {})
    check_field(isinstance(rope, Mapping), "rope_parameters", rope, "an object")
    rope = dict(rope)  # known keys are popped, so what remains is unknown
    kind = rope.pop("rope_type", "default")
    check_field(kind == "default", "rope_parameters.rope_type", kind, "'default'")
    theta = _reconcile_rope_key("rope_theta", rope.pop("rope_theta", None), hf.get("rope_theta"))
    dims = fraction = rope.pop("partial_rotary_factor", None)
    if fraction is not None:
        check_scalar("partial_rotary_factor", float, fraction)
        dims = int(fraction * hf["head_dim"])
    dims = _reconcile_rope_key("rotary_dim", dims, hf.get("rotary_dim"))
    if rope:
        raise ConfigError(
            "config.json: unknown key in rope_parameters: "
            f"{strict_json.show_value(sorted(rope))}; wanted rope_type, "
            "rope_theta and partial_rotary_factor. Remove it if it does not change the computation."
        )
    return {
        "rope_theta": _NATIVE_ROPE_THETA if theta is None else theta,
        "rotary_dim": hf["head_dim"] if dims is None else dims,
    }


def _reconcile_rope_key(key: str, nested: Any, plain: Any) -> Any:
    """Return the value of rope_parameters or of the plain key, None if the file has neither.

    Both may be there if they agree.
    """
    if None not in (nested, plain) and nested != plain:
        raise ConfigError(
            f"config.json: {key} is {strict_json.show_value(plain)} but rope_parameters say "
            f"{strict_json.show_value(nested)}"
        )
    return plain if nested is None else nested
