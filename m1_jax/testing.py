"""Tiny fixtures, a second implementation of the release to test against, and tolerances.

The oracle below is written from the description of the release alone and shares no code with the
model. It prefers the obvious form to the fast one: the lightning recurrence one token at a time,
softmax attention with the whole [T, T] matrix, every expert on every token. Use it on tiny shapes.
"""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

# How far two float32 implementations of the same maths may differ. Never loosened to pass.
TOLERANCES = {
    # Absolute: logits have a deviation near 1 and end some hundred float32 reductions, each off by
    # about 1e-7 of its largest term in an order that differs. Log-probabilities follow them.
    "logits": 2e-4,
    "logprobs": 2e-4,
    # Absolute: means over all tokens of values near 2 and near 7, whose single errors average out.
    "aux_loss": 1e-5,
    "loss": 2e-5,
    # Relative to the tensor's norm: a sum over tokens without cancellation sees only the order.
    "state": 1e-4,
    "activations": 1e-4,
    # Relative to the tensor's norm: the backward pass doubles the depth, and router gradients are
    # differences of nearly equal expert outputs.
    "gradients": 1e-3,
}

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

# Enough distinct words for a few hundred merges; its content does not matter.
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
      **overrides: release keys. `attn_type_list` alone sets `num_hidden_layers`;
        `num_hidden_layers` alone repeats the pattern of three lightning layers and one softmax.

    Raises:
      ValueError: an override is not a key of the release.
    """
    if unknown := sorted(set(overrides) - set(_TINY_CONFIG)):
        raise ValueError(
            f"got overrides {unknown}, want keys of config.json: {sorted(_TINY_CONFIG)}"
        )
    if "attn_type_list" in overrides:
        overrides.setdefault("num_hidden_layers", len(overrides["attn_type_list"]))
    elif num_layers := overrides.get("num_hidden_layers"):
        overrides["attn_type_list"] = [int(layer % 4 == 3) for layer in range(num_layers)]
    return json.loads(
        json.dumps({**_TINY_CONFIG, **overrides})
    )  # A copy: callers may change the list.


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return the release's tensor names with their torch shapes [out, in]."""
    embed, mlp, head_dim = (config[k] for k in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv_heads = (config[f"num_{k}_heads"] * head_dim for k in ("attention", "key_value"))
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], embed)}
    for layer, is_softmax in enumerate(config["attn_type_list"]):
        own = {"input_layernorm": (embed,), "post_attention_layernorm": (embed,)}
        if is_softmax:
            own |= {"self_attn.q_proj": (heads, embed), "self_attn.o_proj": (embed, heads)}
            own |= {"self_attn.k_proj": (kv_heads, embed), "self_attn.v_proj": (kv_heads, embed)}
        else:
            own |= {"self_attn.qkv_proj": (3 * heads, embed), "self_attn.norm": (heads,)}
            own |= {"self_attn.output_gate": (heads, embed), "self_attn.out_proj": (embed, heads)}
        own["block_sparse_moe.gate"] = (config["num_local_experts"], embed)
        for expert in range(config["num_local_experts"]):
            prefix = f"block_sparse_moe.experts.{expert}"
            own |= {f"{prefix}.w1": (mlp, embed), f"{prefix}.w3": (mlp, embed)}
            own[f"{prefix}.w2"] = (embed, mlp)
        if config["shared_intermediate_size"] > 0:
            # The release takes the width from intermediate_size, not from the key that enables it.
            own |= {f"shared_mlp.{name}_proj": (mlp, embed) for name in ("gate", "up")}
            own |= {"shared_mlp.down_proj": (embed, mlp), "coefficient": (1, embed)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return shapes | {"model.norm.weight": (embed,), "lm_head.weight": (config["vocab_size"], embed)}


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random weights under the release's names: bfloat16, routers float32, [out, in].

    The scale keeps every path visible in the logits: with the release's own normal(0, 0.02) a tiny
    model is nearly its embedding table, and a broken layer would pass. Compare on some hundred
    tokens: among 1,400 in 8 layers the closest choice of experts was already near float32 noise.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:  # A norm weight of exactly 1 would hide a forgotten multiplication.
            tensors[name] = rng.uniform(0.5, 1.5, shape).astype(jnp.bfloat16)
        elif name.endswith("embed_tokens.weight"):
            tensors[name] = rng.standard_normal(shape).astype(jnp.bfloat16)
        elif name.endswith("block_sparse_moe.gate.weight"):
            # Router logits of standard deviation 2: ties are as rare as the experts are unequal.
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

    Ids are the 256 bytes, merges of a built-in text, reserved slots if that text runs out of
    merges, and last the four special tokens: exactly `vocab_size` of them, always the same.

    Raises:
      ValueError: `vocab_size` cannot hold the bytes and the special tokens.
    """
    base_size = vocab_size - len(_SPECIAL_TOKENS)
    if base_size < 256:
        raise ValueError(f"got vocab_size {vocab_size}, want at least {256 + len(_SPECIAL_TOKENS)}")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    all_bytes = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=base_size, show_progress=False, initial_alphabet=all_bytes
    )
    tokenizer.train_from_iterator([_TOKENIZER_TEXT], trainer)
    reserved = [f"<reserved_{i}>" for i in range(base_size - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*reserved, *_SPECIAL_TOKENS])
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


def run_oracle(config: dict, tensors: dict, tokens, dtype=jnp.float32, segment_ids=None) -> dict:
    """Compute what the release computes for `tokens`, slowly and plainly.

    Differentiable in `tensors`; jittable in `tensors` and `tokens` when `segment_ids` is None.

    Args:
      config: a release config.json.
      tensors: the release's tensors by name, [out, in]; any float dtype, cast to `dtype`.
      tokens: [B, T] int32.
      dtype: of all arithmetic, float32 or float64; bfloat16 rounding is not imitated.
      segment_ids: None or a concrete [B, T] array, 0 for padding, a positive number per document.
        Each document runs alone from position 0; its results are put in place, padding reads 0.

    Returns:
      A dict, with H the head dim, N query heads, K kv heads, E experts:
      logits: [B, T, V].
      hidden_states: list of L + 1 arrays [B, T, D]: the embeddings, the output of each layer but
        the last, the final norm's output.
      lightning_states: {layer: [B, N, H (k), H (v)]} after the last token (of the last document).
      keys, values: {layer: [B, T, K, H]}, keys after rotation.
      router_logits: list of L arrays [B, T, E].
      aux_loss: scalar load-balancing loss over all layers and real tokens.
    """
    tensors = {name: jnp.asarray(value).astype(dtype) for name, value in tensors.items()}
    with jax.default_matmul_precision("highest"):
        if segment_ids is None:
            real = np.ones(np.shape(tokens), bool)
            by_token, states = _compiled_forward(json.dumps(config))(tensors, tokens)
        else:
            real = np.asarray(segment_ids) > 0
            by_token, states = _forward_documents(config, tensors, tokens, np.asarray(segment_ids))
        aux_loss = _aux_loss(config, [logits[real] for logits in by_token["router_logits"]])
    return {**by_token, "lightning_states": states, "aux_loss": aux_loss}


def oracle_loss(config: dict, tensors: dict, tokens):
    """Return mean next-token cross-entropy of [B, T] tokens + router_aux_loss_coef * aux loss."""
    out = run_oracle(config, tensors, tokens)
    logprobs = jax.nn.log_softmax(out["logits"][:, :-1])
    chosen = jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], axis=-1)
    return -jnp.mean(chosen) + config["router_aux_loss_coef"] * out["aux_loss"]


def lightning_slopes(config: dict, layer: int) -> np.ndarray:
    """Return the float32 decay rates s of one layer's heads, [N]; a token multiplies by exp(-s)."""

    def alibi(num_heads):
        if math.log2(num_heads).is_integer():
            return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
        # The slopes of the power of two below, then every other slope of the power of two above.
        below = 2 ** math.floor(math.log2(num_heads))
        return alibi(below) + alibi(2 * below)[0::2][: num_heads - below]

    base = np.array(alibi(config["num_attention_heads"]), np.float32)
    return base * np.float32(1 - layer / (config["num_hidden_layers"] - 1) + 1e-5)


@functools.cache
def _compiled_forward(config_json):
    return jax.jit(functools.partial(_forward_rows, json.loads(config_json)))


def _forward_rows(config, tensors, tokens):
    """Return (dict of per-token outputs [B, T, ...], lightning states) of unpacked rows."""
    out = {"hidden_states": [], "keys": {}, "values": {}, "router_logits": []}
    states = {}
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][jnp.asarray(tokens)]
    for layer, is_softmax in enumerate(config["attn_type_list"]):
        out["hidden_states"].append(x)
        weights = _select_prefix(tensors, f"model.layers.{layer}.")

        h = _rms_norm(x, weights["input_layernorm.weight"], eps)
        if is_softmax:
            branch, out["keys"][layer], out["values"][layer] = _softmax_attention(
                config, _select_prefix(weights, "self_attn."), h
            )
        else:
            slopes = jnp.asarray(lightning_slopes(config, layer))
            branch, states[layer] = _lightning_attention(
                config, _select_prefix(weights, "self_attn."), slopes, h
            )
        kind = "full_attention" if is_softmax else "linear_attention"
        x = _add_branch(config, kind, x, h, branch)

        h = _rms_norm(x, weights["post_attention_layernorm.weight"], eps)
        branch, router_logits = _moe_block(config, weights, h)
        out["router_logits"].append(router_logits)
        x = _add_branch(config, "mlp", x, h, branch)
    x = _rms_norm(x, tensors["model.norm.weight"], eps)
    out["hidden_states"].append(x)
    out["logits"] = _apply_linear(x, tensors["lm_head.weight"])
    return out, states


def _forward_documents(config, tensors, tokens, segment_ids):
    """Run every document of every row alone and put the results where its tokens are."""
    forward = _compiled_forward(json.dumps(config))
    shapes = jax.eval_shape(forward, tensors, tokens)
    by_token, states = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for row, segments in enumerate(segment_ids):
        for document in dict.fromkeys(segments[segments > 0].tolist()):
            columns = np.flatnonzero(segments == document)
            own_tokens, own_states = forward(tensors, tokens[row : row + 1, columns])
            by_token = _write_outputs(by_token, own_tokens, (row, columns))
            states = _write_outputs(states, own_states, row)
    return by_token, states


def _write_outputs(outputs, own, at):
    return jax.tree.map(lambda whole, own: whole.at[at].set(own[0]), outputs, own)


def _select_prefix(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _add_branch(config, kind, x, h, branch):
    alpha, beta = (config.get(f"layernorm_{kind}_{name}", 1.0) for name in ("alpha", "beta"))
    return (h if config.get("postnorm", False) else x) * alpha + branch * beta


def _apply_linear(x, weight):
    return jnp.einsum("bti,oi->bto", x, weight)


def _rms_norm(x, weight, eps):
    return weight[None, None, :] * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _lightning_step(carry, qkv):
    """S_t = lambda S_(t-1) + k_t^T v_t; o_t = q_t S_t."""
    state, decay = carry
    q, k, v = qkv
    state = decay * state + jnp.einsum("bnk,bnv->bnkv", k, v)
    return (state, decay), jnp.einsum("bnk,bnkv->bnv", q, state)


def _lightning_attention(config, weights, slopes, h):
    batch, length, _ = h.shape
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    qkv = jax.nn.silu(_apply_linear(h, weights["qkv_proj.weight"]))
    qkv = qkv.reshape(batch, length, heads, 3 * head_dim)  # The split is inside each head.
    by_time = [jnp.moveaxis(part, 1, 0) for part in jnp.split(qkv, 3, axis=-1)]
    decay = jnp.exp(-slopes.astype(h.dtype))[None, :, None, None]
    state = jnp.zeros((batch, heads, head_dim, head_dim), h.dtype)
    (state, _), o = jax.lax.scan(_lightning_step, (state, decay), tuple(by_time))
    o = jnp.moveaxis(o, 0, 1).reshape(batch, length, heads * head_dim)
    # One norm over all heads; its eps is the release's constructor default, not rms_norm_eps.
    o = _rms_norm(o, weights["norm.weight"], 1e-6)
    o = o * jax.nn.sigmoid(_apply_linear(h, weights["output_gate.weight"]))
    return _apply_linear(o, weights["out_proj.weight"]), state


def _apply_rope(config, x):
    """Rotate dims i and i + R/2 of each head of [B, T, heads, H] by position * theta^(-2i/R)."""
    rotary_dim = config["rotary_dim"]
    half = rotary_dim // 2
    inv_freq = 1.0 / config["rope_theta"] ** (jnp.arange(half, dtype=jnp.float32) / half)
    phase = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * inv_freq[None, :]
    cos, sin = (f(phase).astype(x.dtype)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _softmax_attention(config, weights, h):
    batch, length, _ = h.shape
    head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    q, k, v = (
        _apply_linear(h, weights[f"{name}_proj.weight"]).reshape(batch, length, -1, head_dim)
        for name in "qkv"
    )
    q, k = _apply_rope(config, q), _apply_rope(config, k)
    repeats = config["num_attention_heads"] // kv_heads
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, repeats, axis=2)) / head_dim**0.5
    causal = np.tril(np.ones((length, length), bool))[None, None]
    p = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    o = jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, repeats, axis=2))
    return _apply_linear(o.reshape(batch, length, -1), weights["o_proj.weight"]), k, v


def _moe_block(config, weights, h):
    """Return (mixture of experts and optional shared MLP [B, T, D], router logits [B, T, E])."""
    logits = _apply_linear(h, weights["block_sparse_moe.gate.weight"])
    top_p, top_e = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config["num_experts_per_tok"])
    top_p = top_p / jnp.sum(top_p, axis=-1, keepdims=True)
    y = jnp.zeros_like(h)
    for expert in range(config["num_local_experts"]):
        prefix = f"block_sparse_moe.experts.{expert}"
        gate, up = (_apply_linear(h, weights[f"{prefix}.{name}.weight"]) for name in ("w1", "w3"))
        share = jnp.sum(jnp.where(top_e == expert, top_p, 0.0), axis=-1, keepdims=True)
        y = y + share * _apply_linear(jax.nn.silu(gate) * up, weights[f"{prefix}.w2.weight"])
    if config["shared_intermediate_size"] > 0:
        gate, up = (
            _apply_linear(h, weights[f"shared_mlp.{n}_proj.weight"]) for n in ("gate", "up")
        )
        shared = _apply_linear(jax.nn.silu(gate) * up, weights["shared_mlp.down_proj.weight"])
        c = jax.nn.sigmoid(_apply_linear(h, weights["coefficient.weight"]))
        y = y * (1 - c) + shared * c
    return y, logits


def _aux_loss(config, router_logits):
    """E * sum over slot, e of f[slot, e] * P[e], the rows of all layers pooled."""
    num_experts = config["num_local_experts"]
    p = jax.nn.softmax(jnp.concatenate(router_logits), axis=-1)
    _, top_e = jax.lax.top_k(p, config["num_experts_per_tok"])
    f = jnp.mean(jax.nn.one_hot(top_e, num_experts, dtype=p.dtype), axis=0)
    return num_experts * jnp.sum(f * jnp.mean(p, axis=0)[None, :])
