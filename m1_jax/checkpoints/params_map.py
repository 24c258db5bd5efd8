"""The map between tensors of the release and parts of the model's parameters, as data.

The tables have one row per kind of tensor. `{l}` is the absolute layer and `{e}` the expert. `{p}`
is the group of equal neighbours in the repeating unit, see `ModelConfig.layer_groups`.

A parameter under `layers.{p}` is stacked over the R repeats of the unit and over the layers of its
group. An expert parameter is stacked over the experts as well. So one index on a parameter's
leading axes selects one tensor.
"""

import dataclasses

import numpy as np

from m1_jax import config as config_lib

ANY_KIND, LIGHTNING, SOFTMAX = "any", config_lib.LIGHTNING, config_lib.SOFTMAX
SHARED_EXPERT = "shared"  # all layers of a model with a shared expert

# Columns: release name, parameter path, transposed, layers that have the tensor. torch stores
# matrices as [out, in] and the model as [in, out], so every matrix but the embedding table is
# transposed.
MODEL_TABLE = (
    ("model.embed_tokens.weight", "embed.table", False, ANY_KIND),
    ("lm_head.weight", "head.kernel", True, ANY_KIND),
    ("model.norm.weight", "norm.scale", False, ANY_KIND),
)
_LAYER, _PATH = "model.layers.{l}.", "layers.{p}."
_MOE = _LAYER + "block_sparse_moe."
LAYER_TABLE = (
    (_LAYER + "input_layernorm.weight", _PATH + "input_norm.scale", False, ANY_KIND),
    (_LAYER + "post_attention_layernorm.weight", _PATH + "moe_norm.scale", False, ANY_KIND),
    (_LAYER + "self_attn.qkv_proj.weight", _PATH + "attention.qkv.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.output_gate.weight", _PATH + "attention.gate.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.norm.weight", _PATH + "attention.norm.scale", False, LIGHTNING),
    (_LAYER + "self_attn.out_proj.weight", _PATH + "attention.out.kernel", True, LIGHTNING),
    (_LAYER + "self_attn.q_proj.weight", _PATH + "attention.query.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.k_proj.weight", _PATH + "attention.key.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.v_proj.weight", _PATH + "attention.value.kernel", True, SOFTMAX),
    (_LAYER + "self_attn.o_proj.weight", _PATH + "attention.out.kernel", True, SOFTMAX),
    (_MOE + "gate.weight", _PATH + "moe.router", True, ANY_KIND),
    (_MOE + "experts.{e}.w1.weight", _PATH + "moe.gate", True, ANY_KIND),
    (_MOE + "experts.{e}.w3.weight", _PATH + "moe.up", True, ANY_KIND),
    (_MOE + "experts.{e}.w2.weight", _PATH + "moe.down", True, ANY_KIND),
    (_LAYER + "shared_mlp.gate_proj.weight", _PATH + "moe.shared.gate.kernel", True, SHARED_EXPERT),
    (_LAYER + "shared_mlp.up_proj.weight", _PATH + "moe.shared.up.kernel", True, SHARED_EXPERT),
    (_LAYER + "shared_mlp.down_proj.weight", _PATH + "moe.shared.down.kernel", True, SHARED_EXPERT),
    (_LAYER + "coefficient.weight", _PATH + "moe.shared.coefficient", True, SHARED_EXPERT),
)

# Constants that transformers' native model saves beside its weights, in every lightning layer. This
# model computes them from the config, so they belong to no parameter.
SLOPE_RATE = _LAYER + "self_attn.slope_rate"
DERIVED_TENSORS = (
    SLOPE_RATE,
    _LAYER + "self_attn.query_decay",
    _LAYER + "self_attn.key_decay",
    _LAYER + "self_attn.diagonal_decay",
)


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor of the release and where its values lie in the model.

    Attributes:
      name: the release's name of the tensor.
      param_path: the dotted path of its parameter.
      index: its position on the parameter's leading axes, empty for an unstacked parameter.
      transposed: whether parameter[index] is the tensor's transpose.
    """

    name: str
    param_path: str
    index: tuple[int, ...]
    transposed: bool

    def orient(self, data: np.ndarray) -> np.ndarray:
        """Return a tensor of the release as the parameter holds it, or the other way round."""
        # One function for both directions, because a transpose undoes itself.
        return data.T if self.transposed else data


def list_tensor_entries(config: config_lib.ModelConfig) -> list[TensorEntry]:
    """Return every tensor of a model once, in the order of the layers: 8,243 for the release.

    The tensors that belong to no layer come first.
    """
    entries = [TensorEntry(name, path, (), transposed) for name, path, transposed, _ in MODEL_TABLE]
    for layer, kind in enumerate(config.layer_types):
        location = config.locate_layer(layer)
        index = location.stack_index
        present_kinds = {ANY_KIND, kind}
        if config.has_shared_expert:
            present_kinds.add(SHARED_EXPERT)
        for name, path, transposed, layer_kind in LAYER_TABLE:
            if layer_kind not in present_kinds:
                continue
            path = path.format(p=location.group)
            # A row with `{e}` stands for one tensor of each expert.
            if "{e}" not in name:
                entries.append(TensorEntry(name.format(l=layer), path, index, transposed))
                continue
            for expert in range(config.num_local_experts):
                expert_name = name.format(l=layer, e=expert)
                entries.append(TensorEntry(expert_name, path, (*index, expert), transposed))
    return entries


def list_derived_tensors(config: config_lib.ModelConfig) -> dict[str, int]:
    """Return the names of the native layout's constants and the layer of each."""
    return {
        name.format(l=layer): layer
        for layer, kind in enumerate(config.layer_types)
        if kind == LIGHTNING
        for name in DERIVED_TENSORS
    }
