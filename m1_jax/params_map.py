"""Which tensor of the release is which part of which parameter: data only.

One row per kind of tensor. `{l}` is the absolute layer, `{e}` the expert; `{p}` is the run of equal
layers in the repeating unit. A parameter under `layers.{p}` is stacked over the R repeats and the
layers of its run, and an expert parameter over the experts too, so a tensor is one index of its
parameter's leading axes.
"""

import dataclasses

from m1_jax import config as config_lib

ANY, LIGHTNING, SOFTMAX = "any", config_lib.LIGHTNING, config_lib.SOFTMAX
SHARED = "shared"  # layers of a model with a shared expert

# (release name, our path, transposed, layers that have it)
TABLE = (
    ("model.embed_tokens.weight", "embed.table", False, ANY),
    ("lm_head.weight", "head.kernel", True, ANY),
    ("model.norm.weight", "norm.scale", False, ANY),
)
_LAYER, _OURS = "model.layers.{l}.", "layers.{p}."
_MOE = _LAYER + "block_sparse_moe."
LAYER_TABLE = (
    (_LAYER + "input_layernorm.weight", _OURS + "input_norm.scale", False, ANY),
    (_LAYER + "post_attention_layernorm.weight", _OURS + "moe_norm.scale", False, ANY),
    (_LAYER + "self_attn.qkv_proj.weight", _OURS + "attention.qkv.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.output_gate.weight", _OURS + "attention.gate.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.norm.weight", _OURS + "attention.norm.scale", False, LIGHTNING),
    (_LAYER + "self_attn.out_proj.weight", _OURS + "attention.out.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.q_proj.weight", _OURS + "attention.query.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.k_proj.weight", _OURS + "attention.key.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.v_proj.weight", _OURS + "attention.value.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.o_proj.weight", _OURS + "attention.out.kernel", True, SOFTMAX),
    (_MOE + "gate.weight", _OURS + "moe.router", True, ANY),
    (_MOE + "experts.{e}.w1.weight", _OURS + "moe.gate", True, ANY),
    (_MOE + "experts.{e}.w3.weight", _OURS + "moe.up", True, ANY),
    (_MOE + "experts.{e}.w2.weight", _OURS + "moe.down", True, ANY),
    (_LAYER + "shared_mlp.gate_proj.weight", _OURS + "moe.shared.gate.kernel", True, SHARED),
    (_LAYER + "shared_mlp.up_proj.weight", _OURS + "moe.shared.up.kernel", True, SHARED),
    (_LAYER + "shared_mlp.down_proj.weight", _OURS + "moe.shared.down.kernel", True, SHARED),
    (_LAYER + "coefficient.weight", _OURS + "moe.shared.coefficient", True, SHARED),
)

# Constants that transformers' native model saves beside its weights, in every lightning layer.
SLOPE_RATE = _LAYER + "self_attn.slope_rate"
DERIVED = (
    SLOPE_RATE,
    _LAYER + "self_attn.query_decay",
    _LAYER + "self_attn.key_decay",
    _LAYER + "self_attn.diagonal_decay",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: its release name, its parameter, and the index of its place in it.

    The tensor equals parameter[index], or its transpose where `transposed`.
    """

    name: str
    path: str
    index: tuple[int, ...]
    transposed: bool


def entries(config: config_lib.ModelConfig) -> list[Entry]:
    """Return every tensor of a model once, in the order of the layers: 8,243 for the release."""
    out = [Entry(name, path, (), transposed) for name, path, transposed, _ in TABLE]
    for layer, kind in enumerate(config.layer_types):
        run, *index = config.place(layer)
        present = {ANY, kind} | ({SHARED} if config.has_shared_expert else set())
        for name, path, transposed, where in LAYER_TABLE:
            if where not in present:
                continue
            path = path.format(p=run)
            if "{e}" not in name:
                out.append(Entry(name.format(l=layer), path, tuple(index), transposed))
                continue
            for expert in range(config.num_local_experts):
                full = name.format(l=layer, e=expert)
                out.append(Entry(full, path, (*index, expert), transposed))
    return out


def derived(config: config_lib.ModelConfig) -> dict[str, int]:
    """Return the names of the native layout's constants and the layer of each."""
    return {
        name.format(l=layer): layer
        for layer, kind in enumerate(config.layer_types)
        if kind == LIGHTNING
        for name in DERIVED
    }
