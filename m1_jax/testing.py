"""Tiny release directories and tokenizers for tests, and how far two implementations may differ.

The second implementation of the model is `oracle.py`.
"""

import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

# How far two float32 implementations of the same equations may differ. They are never loosened to
# make a test pass.
TOLERANCES = {
    # Absolute. Logits have a standard deviation near 1 and come after some hundred float32
    # reductions, each off by about 1e-7 of its largest term, since the order of its terms differs.
    # Log-probabilities have the errors of their logits.
    "logits": 2e-4,
    "logprobs": 2e-4,
    # Absolute. These are means over all tokens of values near 2 and near 7, whose single errors
    # average out.
    "aux_loss": 1e-5,
    "loss": 2e-5,
    # Relative to the tensor's norm. In sums over tokens without cancellation only the order counts.
    "state": 1e-4,
    "activations": 1e-4,
    # Relative to the tensor's norm. The backward pass doubles the depth, and router gradients are
    # differences of nearly equal expert outputs.
    "gradients": 1e-3,
}

# As text, with the keys and the spelling of the release's own file.
_TINY_CONFIG = json.loads("""{
  "architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1", "torch_dtype": "bfloat16",
  "transformers_version": "4.45.2", "bos_token_id": null, "eos_token_id": null, "use_cache": true,
  "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 8, "initializer_range": 0.02,
  "attn_type_list": [0, 0, 0, 1, 0, 0, 0, 1], "num_attention_heads": 4, "num_key_value_heads": 2,
  "head_dim": 32, "rotary_dim": 16, "rope_theta": 10000000, "max_position_embeddings": 4096,
  "attention_dropout": 0.0, "sliding_window": null, "hidden_act": "silu", "intermediate_size": 96,
  "num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": false,
  "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "tie_word_embeddings": false,
  "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "rms_norm_eps": 1e-05,
  "layernorm_full_attention_alpha": 3.5565588200778455, "layernorm_full_attention_beta": 1.0,
  "layernorm_linear_attention_alpha": 3.5565588200778455, "layernorm_linear_attention_beta": 1.0,
  "layernorm_mlp_alpha": 3.5565588200778455, "layernorm_mlp_beta": 1.0, "postnorm": true
}""")

_SPECIAL_TOKENS = (
    "<begin_of_document>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<end_of_document>",
)

# Enough distinct words for a few hundred merges. Their meaning does not matter.
_TOKENIZER_TEXT = """
Lightning attention keeps one matrix for each head instead of a cache that grows with every token.
The matrix decays a little at each step, then the outer product of the new key and value is added.
A softmax layer follows after every seven of these, so that exact recall stays possible far back.
system ai_setting=assistant user name=user ai name=assistant tool name=tools tool_setting=tools
You are a helpful assistant. Think about the question, then answer: 12 + 30 = 42, and 7 * 6 = 42.
<think> Wait, let me check whether the number is prime. </think> {"name": "search", "arguments": {}}
def main(argument): return [value for value in range(10) if value % 2 == 0]  # even numbers only
Experts are chosen by a router; two of them work on each token and the others remain idle there.
"""


def tiny_config(**overrides) -> dict:
    """Return a tiny config.json of the release's spelling, with some keys replaced.

    Args:
      **overrides: release keys. `attn_type_list` alone sets `num_hidden_layers`.
        `num_hidden_layers` alone repeats the pattern of three lightning layers and one softmax.

    Raises:
      ValueError: an override is not a key of the release.
    """
    if unknown := sorted(set(overrides) - set(_TINY_CONFIG)):
        raise ValueError(
            f"got overrides {unknown}; wanted keys of config.json: {sorted(_TINY_CONFIG)}"
        )
    if "attn_type_list" in overrides:
        overrides.setdefault("num_hidden_layers", len(overrides["attn_type_list"]))
    elif num_layers := overrides.get("num_hidden_layers"):
        overrides["attn_type_list"] = [int(layer % 4 == 3) for layer in range(num_layers)]
    # A deep copy, since callers may change the list.
    return json.loads(json.dumps({**_TINY_CONFIG, **overrides}))


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the release's tensor names with their torch shapes [out, in].

    The names are written out here, and not taken from `params_map`, which they test.
    """
    embed, mlp, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    # The widths of all heads together, which need not be `embed`.
    width, kv_width = (config[f"num_{k}_heads"] * head_dim for k in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], embed)}
    for layer, is_softmax in enumerate(config["attn_type_list"]):
        layer_shapes = {"input_layernorm": (embed,), "post_attention_layernorm": (embed,)}
        if is_softmax:
            layer_shapes |= {"self_attn.q_proj": (width, embed), "self_attn.o_proj": (embed, width)}
            layer_shapes |= {
                "self_attn.k_proj": (kv_width, embed),
                "self_attn.v_proj": (kv_width, embed),
            }
        else:
            layer_shapes |= {"self_attn.qkv_proj": (3 * width, embed), "self_attn.norm": (width,)}
            layer_shapes |= {
                "self_attn.output_gate": (width, embed),
                "self_attn.out_proj": (embed, width),
            }
        layer_shapes["block_sparse_moe.gate"] = (config["num_local_experts"], embed)
        for expert in range(config["num_local_experts"]):
            prefix = f"block_sparse_moe.experts.{expert}"
            layer_shapes |= {f"{prefix}.w1": (mlp, embed), f"{prefix}.w3": (mlp, embed)}
            layer_shapes[f"{prefix}.w2"] = (embed, mlp)
        if config["shared_intermediate_size"] > 0:
            # The release takes the width from intermediate_size, not from the key that enables it.
            layer_shapes |= {f"shared_mlp.{name}_proj": (mlp, embed) for name in ("gate", "up")}
            layer_shapes |= {"shared_mlp.down_proj": (embed, mlp), "coefficient": (1, embed)}
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape for name, shape in layer_shapes.items()
        }
    return shapes | {"model.norm.weight": (embed,), "lm_head.weight": (config["vocab_size"], embed)}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights under the release's names: bfloat16, routers float32, [out, in].

    Their scale keeps every path visible in the logits. With the release's own normal(0, 0.02) a
    tiny model is nearly its embedding table, so a broken layer would pass.

    Compare on some hundred tokens only. Among 1,400 tokens in 8 layers, the closest choice between
    two experts was already near float32 noise.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            # A norm weight of exactly 1 would hide a forgotten multiplication.
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(jnp.bfloat16)
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = rng.standard_normal(shape).astype(jnp.bfloat16)
        elif name.endswith("block_sparse_moe.gate.weight"):
            # Router logits have standard deviation 2, which makes experts unequal and ties rare.
            tensors[name] = (rng.standard_normal(shape) * 2 / math.sqrt(shape[1])).astype("float32")
        else:
            values = rng.standard_normal(shape) * 1.5 / math.sqrt(shape[1])
            tensors[name] = values.astype(jnp.bfloat16)
    return tensors


def write_release(directory, config: dict, tensors: dict, num_shards: int = 3) -> pathlib.Path:
    """Write config.json, safetensors shards and their index as the release lays them out."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    total_size = sum(value.nbytes for value in tensors.values())
    shards = [{} for _ in range(num_shards)]
    written_bytes = 0
    for name, value in tensors.items():
        # A tensor goes to the shard where its first byte falls, with shards of equal size.
        shards[min(written_bytes * num_shards // total_size, num_shards - 1)][name] = value
        written_bytes += value.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i:05d}-of-{num_shards:05d}.safetensors"
        safetensors.numpy.save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return directory


def write_tiny_tokenizer(directory, vocab_size: int = 512) -> pathlib.Path:
    """Write tokenizer.json (byte-level BPE) and tokenizer_config.json in the release's form.

    The ids are the 256 bytes, then merges of a built-in text, then reserved slots if that text runs
    out of merges, and last the four special tokens. There are exactly `vocab_size` ids, and every
    call makes the same ones.

    Raises:
      ValueError: `vocab_size` cannot hold the bytes and the special tokens.
    """
    base_size = vocab_size - len(_SPECIAL_TOKENS)
    if base_size < 256:
        least = 256 + len(_SPECIAL_TOKENS)
        raise ValueError(f"got vocab_size {vocab_size}; wanted at least {least}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    all_bytes = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=base_size, show_progress=False, initial_alphabet=all_bytes
    )
    tokenizer.train_from_iterator([_TOKENIZER_TEXT], trainer)
    # The trainer stops early when no pair of the text is left to merge.
    reserved_names = [f"<reserved_{i}>" for i in range(base_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*reserved_names, *_SPECIAL_TOKENS])
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<beginning_of_sentence>",
        "eos_token": "<end_of_sentence>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<end_of_document>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return directory
