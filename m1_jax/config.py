"""The architecture of a MiniMax-M1 model, read from and written to Hugging Face's `config.json`.

Sources: `config.json` and `configuration_minimax_m1.py` of MiniMaxAI/MiniMax-M1, and the
`minimax` model of transformers (the "native" spelling).
"""

import dataclasses
import difflib
import itertools
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

LIGHTNING, SOFTMAX = "lightning", "softmax"
REMAT_POLICIES = ("none", "layer", "dots")

_RELEASE_MODEL_TYPES = ("minimax_m1", "minimax_text_01", "MiniMaxM1", "MiniMaxText01")
_NATIVE_MODEL_TYPES = ("minimax",)


class ConfigError(ValueError):
    """A configuration that this code cannot compute exactly; the message names the key."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one model; every field changes the computation or its size.

    Names are the release's. `layer_types` holds one of "lightning" and "softmax" per layer,
    in order. `shared_intermediate_size` > 0 adds a shared expert to every layer, whose width
    the release takes from `intermediate_size`. `remat` is what the backward pass recomputes:
    "none", "layer" (keep each layer's input only) or "dots" (keep matmul outputs too).
    `expert_capacity` limits the rows that a device takes for its experts, as a multiple of a
    balanced router's share; None drops no token.
    `lightning_implementation` is that of `lightning_attention.api`: "chunked" is plain XLA; "tpu"
    takes the Pallas kernels, which have been compiled for TPUs and not yet run on one.

    Raises:
      ConfigError: a value that is out of range or contradicts another one.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    rope_theta: float = 1e7
    rms_norm_eps: float = 1e-5
    postnorm: bool = False
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    shared_intermediate_size: int = 0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    max_position_embeddings: int = 10_240_000
    remat: str = "none"
    expert_capacity: float | None = None
    lightning_implementation: str | None = "chunked"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_scalar(field.name, field.type, getattr(self, field.name))
        listed = isinstance(self.layer_types, tuple) and len(self.layer_types) > 0
        _check_field(listed, "layer_types", self.layer_types, "a tuple of at least one layer")
        for kind in self.layer_types:
            _check_field(
                kind in (LIGHTNING, SOFTMAX), "layer_types", kind, f"{LIGHTNING} or {SOFTMAX}"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        wanted = f"a divisor of num_attention_heads = {heads}"
        _check_field(heads % groups == 0, "num_key_value_heads", groups, wanted)
        fits = self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim
        wanted = f"an even number up to head_dim = {self.head_dim}"
        _check_field(fits, "rotary_dim", self.rotary_dim, wanted)
        active, experts = self.num_experts_per_tok, self.num_local_experts
        wanted = f"at most num_local_experts = {experts}"
        _check_field(active <= experts, "num_experts_per_tok", active, wanted)
        capacity = self.expert_capacity
        if capacity is not None:
            _check_scalar("expert_capacity", float, capacity)
        _check_field(self.remat in REMAT_POLICIES, "remat", self.remat, f"one of {REMAT_POLICIES}")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def period(self) -> int:
        """Length of the shortest repeating unit of `layer_types`: 8 in the release."""
        total = self.num_hidden_layers
        for period in range(1, total + 1):
            if total % period == 0 and self.layer_types[:period] * (total // period) == (
                self.layer_types
            ):
                return period
        raise AssertionError("a list is always a repeat of itself")

    @property
    def repeats(self) -> int:
        """How often the repeating unit occurs: 10 in the release."""
        return self.num_hidden_layers // self.period

    @property
    def layer_groups(self) -> tuple[tuple[str, int], ...]:
        """Neighbours of one kind in the unit: 7 lightning, then 1 softmax in the release."""
        unit = itertools.groupby(self.layer_types[: self.period])
        return tuple((kind, len(list(same))) for kind, same in unit)

    def stack_index_of(self, layer: int) -> tuple[int, int, int]:
        """Return which of `runs` a layer belongs to, in which repeat of the unit, and its place."""
        repeat, place = divmod(layer, self.period)
        run = 0
        while place >= self.layer_groups[run][1]:
            place -= self.layer_groups[run][1]
            run += 1
        return run, repeat, place

    @property
    def has_shared_expert(self) -> bool:
        return self.shared_intermediate_size > 0

    def attention_scales(self, kind: str) -> tuple[float, float]:
        """Return (alpha, beta) of the residual sum around attention of the given kind."""
        if kind == LIGHTNING:
            return self.layernorm_linear_attention_alpha, self.layernorm_linear_attention_beta
        return self.layernorm_full_attention_alpha, self.layernorm_full_attention_beta

    @classmethod
    def m1(cls) -> "ModelConfig":
        """Return the released MiniMax-M1 (40k and 80k): 456,089,655,296 parameters."""
        alpha = 3.5565588200778455
        return cls(
            vocab_size=200_064,
            hidden_size=6144,
            layer_types=((LIGHTNING,) * 7 + (SOFTMAX,)) * 10,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            rotary_dim=64,
            intermediate_size=9216,
            num_local_experts=32,
            num_experts_per_tok=2,
            postnorm=True,
            layernorm_linear_attention_alpha=alpha,
            layernorm_full_attention_alpha=alpha,
            layernorm_mlp_alpha=alpha,
        )

    @classmethod
    def tiny(cls) -> "ModelConfig":
        """Return a model of 1.5 million parameters with the release's awkward ratios."""
        return dataclasses.replace(
            cls.m1(),
            vocab_size=512,
            hidden_size=64,
            layer_types=((LIGHTNING,) * 3 + (SOFTMAX,)) * 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rotary_dim=16,
            intermediate_size=96,
            num_local_experts=8,
            max_position_embeddings=4096,
        )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json` in the release's or in transformers' native spelling.

        Raises:
          ConfigError: a key that is unknown, missing, contradictory, or asks for a computation
            that this model does not have.
        """
        _check_field(isinstance(hf, Mapping), "config.json", hf, "a JSON object")
        kind = hf.get("model_type")
        if kind in _RELEASE_MODEL_TYPES:
            return _parse_release_config(hf)
        if kind in _NATIVE_MODEL_TYPES:
            return _parse_native_config(hf)
        raise ConfigError(
            f"config.json: model_type is {kind!r}; this code reads "
            f"{', '.join(_RELEASE_MODEL_TYPES[:2] + _NATIVE_MODEL_TYPES)}"
        )

    @classmethod
    def from_file(cls, path) -> "ModelConfig":
        """Read a `config.json` file; see `from_hf`."""
        path = pathlib.Path(path)
        try:
            hf = json.loads(path.read_text(), object_pairs_hook=_refuse_repeated_keys)
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; it must lie beside the weights") from None
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        return cls.from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """Return `config.json` in the release's spelling; `from_hf` reads the same config back."""
        hf = {name: getattr(self, name) for name in _RELEASE_FIELDS}
        return hf | {
            "architectures": ["MiniMaxM1ForCausalLM"],
            "model_type": "minimax_m1",
            "num_hidden_layers": self.num_hidden_layers,
            "attn_type_list": [int(kind == SOFTMAX) for kind in self.layer_types],
            **_FIXED_VALUES,
        }


# Keys that both spellings share with ModelConfig, and whether the file must hold them.
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
_NATIVE_ROPE_THETA = 1e6
_NATIVE_LAYER_KINDS = {"full_attention": SOFTMAX, "linear_attention": LIGHTNING}

# Keys that would change the computation if they held anything else.
_FIXED_VALUES = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "shared_moe_mode": "sigmoid",  # the release never reads it and always computes this form
}
# Native checkpoints still carry these keys of the release; transformers has no other form.
_NATIVE_FIXED_VALUES = _FIXED_VALUES | {"postnorm": True, "shared_intermediate_size": 0}

# Keys that describe files, tokens or library behaviour, not the computation.
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
# block_size only regroups the same sums; it is inert for the result up to rounding.


def _check_field(condition: bool, key: str, got: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"config: {key} is {got!r}; wanted {wanted}")


def _check_scalar(key: str, kind: Any, value: Any) -> None:
    """Check the type and sign of a field: JSON may hold a string or a bool instead of a number."""
    if kind is bool:
        _check_field(isinstance(value, bool), key, value, "true or false")
    elif kind is int:
        least = 0 if key == "shared_intermediate_size" else 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        _check_field(whole and value >= least, key, value, f"an integer, {least} or more")
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _check_field(number and math.isfinite(value), key, value, "a number")
        if key in ("rope_theta", "rms_norm_eps", "expert_capacity"):
            _check_field(value > 0, key, value, "more than 0")


def _check_keys(hf: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any]) -> None:
    for key, wanted in fixed.items():
        got = hf.get(key, wanted)
        _check_field(got == wanted, key, got, f"{wanted!r}: this model has no other form")
    for key in hf:
        if key not in known and key not in fixed:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"config.json: unknown key {key!r} = {hf[key]!r}.{hint} "
                "Remove it if it does not change the computation."
            )


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object, refusing a key that is given twice: which one holds is anyone's guess."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ConfigError(f"config.json: {key} is given twice: {out[key]!r} and {value!r}")
        out[key] = value
    return out


def _select_fields(hf: Mapping[str, Any], fields: Mapping[str, bool]) -> dict[str, Any]:
    missing = [name for name, needed in fields.items() if needed and hf.get(name) is None]
    if missing:
        raise ConfigError(f"config.json: missing {', '.join(missing)}")
    return {name: hf[name] for name in fields if hf.get(name) is not None}


def _translate_layer_types(
    hf: Mapping[str, Any], key: str, listed: Any, kinds: Mapping[Any, str]
) -> tuple[str, ...]:
    """Translate the file's list of layers, of the length that num_hidden_layers says."""
    _check_field(isinstance(listed, list | tuple), key, listed, "a list with one entry per layer")
    for kind in listed:
        wanted = " or ".join(f"{k} ({v})" for k, v in kinds.items())
        _check_field(kind in list(kinds), key, kind, wanted)
    wanted = _select_fields(hf, {"num_hidden_layers": True})["num_hidden_layers"]
    if wanted != len(listed):
        raise ConfigError(
            f"config.json: {key} lists {len(listed)} layers but num_hidden_layers is {wanted!r}"
        )
    return tuple(kinds[kind] for kind in listed)


def _parse_release_config(hf: Mapping[str, Any]) -> ModelConfig:
    known = {*_RELEASE_FIELDS, *_INERT_KEYS, "num_hidden_layers", "attn_type_list"}
    _check_keys(hf, known, _FIXED_VALUES)
    listed = _select_fields(hf, {"attn_type_list": True})["attn_type_list"]
    types = _translate_layer_types(hf, "attn_type_list", listed, {0: LIGHTNING, 1: SOFTMAX})
    return ModelConfig(layer_types=types, **_select_fields(hf, _RELEASE_FIELDS))


def _parse_native_config(hf: Mapping[str, Any]) -> ModelConfig:
    own = {"num_hidden_layers", "layer_types", "rope_parameters", "rope_theta", "rotary_dim"}
    _check_keys(
        hf, {*_SHARED_FIELDS, *_NATIVE_SCALE_NAMES, *_INERT_KEYS, *own}, _NATIVE_FIXED_VALUES
    )
    no_groups = "num_key_value_heads" in hf and hf["num_key_value_heads"] is None
    hf = _NATIVE_DEFAULTS | {key: value for key, value in hf.items() if value is not None}
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        _check_scalar(key, int, hf[key])
    heads = hf["num_attention_heads"]
    if no_groups:  # transformers reads null as one KV head per head, an absent key as its default
        hf["num_key_value_heads"] = heads
    hf.setdefault("head_dim", hf["hidden_size"] // heads)
    _check_scalar("head_dim", int, hf["head_dim"])
    default = [list(_NATIVE_LAYER_KINDS)[layer % 2] for layer in range(hf["num_hidden_layers"])]
    types = _translate_layer_types(
        hf, "layer_types", hf.get("layer_types", default), _NATIVE_LAYER_KINDS
    )
    if LIGHTNING in types:
        wanted = "a power of 2: beyond it transformers' decay rates are not the release's"
        _check_field(heads & (heads - 1) == 0, "num_attention_heads", heads, wanted)
    return ModelConfig(
        layer_types=types,
        postnorm=True,
        **_select_fields(hf, _SHARED_FIELDS),
        **_parse_native_rope(hf),
        **{ours: hf[theirs] for theirs, ours in _NATIVE_SCALE_NAMES.items() if theirs in hf},
    )


def _parse_native_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rotary_dim; full rotary unless the file says otherwise."""
    rope = hf.get("rope_parameters", {})
    _check_field(isinstance(rope, Mapping), "rope_parameters", rope, "an object")
    rope = dict(rope)
    kind = rope.pop("rope_type", "default")
    _check_field(kind == "default", "rope_parameters.rope_type", kind, "'default'")
    theta = _reconcile_rope_key("rope_theta", rope.pop("rope_theta", None), hf.get("rope_theta"))
    dims = fraction = rope.pop("partial_rotary_factor", None)
    if fraction is not None:
        _check_scalar("partial_rotary_factor", float, fraction)
        dims = int(fraction * hf["head_dim"])
    dims = _reconcile_rope_key("rotary_dim", dims, hf.get("rotary_dim"))
    if rope:
        raise ConfigError(f"config.json: unknown key in rope_parameters: {sorted(rope)}")
    return {
        "rope_theta": _NATIVE_ROPE_THETA if theta is None else theta,
        "rotary_dim": hf["head_dim"] if dims is None else dims,
    }


def _reconcile_rope_key(key: str, nested: Any, plain: Any) -> Any:
    """Return what rope_parameters or the key beside it says, None if neither does."""
    if None not in (nested, plain) and nested != plain:
        raise ConfigError(f"config.json: {key} is {plain!r} but rope_parameters say {nested!r}")
    return plain if nested is None else nested
