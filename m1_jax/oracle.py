"""A second implementation of the release, to test the model against: `run_oracle`.

It is written from the description of the release alone and shares no code with the model. It
prefers the obvious form to the fast one: the lightning recurrence one token at a time, softmax
attention with the whole [T, T] matrix, every expert on every token. It is for tiny shapes.

B rows, T tokens, D hidden size, N query heads, K key and value heads, H head dim, R rotary dim,
E experts, V vocabulary, L layers.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike


def run_oracle(
    config: dict[str, Any],
    tensors: Mapping[str, ArrayLike],
    tokens: ArrayLike,
    dtype: DTypeLike = jnp.float32,
    segment_ids: ArrayLike | None = None,
) -> dict[str, Any]:
    """Compute what the release computes for `tokens`, slowly and plainly.

    It is differentiable in `tensors`. Without `segment_ids` it can be jitted in `tensors` and
    `tokens`.

    Args:
      config: a release config.json.
      tensors: the release's tensors by name, [out, in], in any float dtype. They are cast to
        `dtype`.
      tokens: [B, T] int32.
      dtype: dtype of all arithmetic, float32 or float64. Rounding to bfloat16 is not imitated.
      segment_ids: None or a concrete [B, T] array, 0 for padding, a positive number per document.
        Each document runs alone from position 0. Outputs at padding are 0.

    Returns:
      A dict of:
      logits: [B, T, V].
      hidden_states: list of L + 1 arrays [B, T, D]: the embeddings, the output of each layer but
        the last, the final norm's output.
      lightning_states: {layer: [B, N, H (k), H (v)]} after the last token (of the last document).
      keys, values: {layer: [B, T, K, H]}, keys after rotation.
      router_logits: list of L arrays [B, T, E].
      aux_loss: scalar load-balancing loss over all layers and real tokens.
    """
    tensors = {name: jnp.asarray(value).astype(dtype) for name, value in tensors.items()}
    # By default TPUs and GPUs multiply float32 numbers with less than float32 precision.
    with jax.default_matmul_precision("highest"):
        if segment_ids is None:
            token_mask = np.ones(np.shape(tokens), bool)
            by_token, states = _compiled_forward(json.dumps(config))(tensors, tokens)
        else:
            token_mask = np.asarray(segment_ids) > 0
            by_token, states = _forward_documents(config, tensors, tokens, np.asarray(segment_ids))
        # A mask of numpy selects rows under jit, too: the number of real tokens is static.
        aux_loss = _aux_loss(config, [logits[token_mask] for logits in by_token["router_logits"]])
    return {**by_token, "lightning_states": states, "aux_loss": aux_loss}


def oracle_loss(
    config: dict[str, Any], tensors: Mapping[str, ArrayLike], tokens: ArrayLike
) -> jax.Array:
    """Return mean next-token cross-entropy of [B, T] tokens + router_aux_loss_coef * aux loss."""
    out = run_oracle(config, tensors, tokens)
    logprobs = jax.nn.log_softmax(out["logits"][:, :-1])
    target_logprobs = jnp.take_along_axis(logprobs, jnp.asarray(tokens)[:, 1:, None], axis=-1)
    return -jnp.mean(target_logprobs) + config["router_aux_loss_coef"] * out["aux_loss"]


def lightning_slopes(config: dict, layer: int) -> np.ndarray:
    """Return the float32 decay rates s of one layer's heads, [N]. A step multiplies by exp(-s)."""

    def alibi(num_heads):
        if math.log2(num_heads).is_integer():
            return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
        # The slopes of the power of two below, then every other slope of the power of two above.
        below = 2 ** math.floor(math.log2(num_heads))
        return alibi(below) + alibi(2 * below)[0::2][: num_heads - below]

    base = np.array(alibi(config["num_attention_heads"]), np.float32)
    # The layer's index counts softmax layers as well. Later layers forget more slowly.
    return base * np.float32(1 - layer / (config["num_hidden_layers"] - 1) + 1e-5)


@functools.cache
def _compiled_forward(config_json: str):
    """Return the jitted forward pass of a config, given as text because dicts have no hash."""
    return jax.jit(functools.partial(_forward_rows, json.loads(config_json)))


def _forward_rows(config, tensors, tokens):
    """Return (dict of per-token outputs [B, T, ...], lightning states) of unpacked rows."""
    out = {"hidden_states": [], "keys": {}, "values": {}, "router_logits": []}
    states = {}
    eps = config["rms_norm_eps"]
    x = tensors["model.embed_tokens.weight"][jnp.asarray(tokens)]  # [B, T, D]
    for layer, is_softmax in enumerate(config["attn_type_list"]):
        # The input of every layer, so the embeddings are first and the last layer's output is not
        # in the list.
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
    """Run every document of every row alone, and write the results to the places of its tokens."""
    forward = _compiled_forward(json.dumps(config))
    # Zeros of the shapes of whole rows: padding keeps them.
    shapes = jax.eval_shape(forward, tensors, tokens)
    by_token, states = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    for row, segments in enumerate(segment_ids):
        for segment_id in dict.fromkeys(segments[segments > 0].tolist()):
            columns = np.flatnonzero(segments == segment_id)
            document, end_states = forward(tensors, tokens[row : row + 1, columns])
            by_token = _write_outputs(by_token, document, (row, columns))
            # A state has no token axis, so the last document of the row remains.
            states = _write_outputs(states, end_states, row)
    return by_token, states


def _write_outputs(outputs, document_outputs, at):
    """Write the outputs of one document, a batch of one row, at an index of all outputs."""
    return jax.tree.map(lambda out, part: out.at[at].set(part[0]), outputs, document_outputs)


def _select_prefix(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _add_branch(config, kind, x, h, branch):
    """Return alpha * residual + beta * branch, where h = norm(x) is the input of the branch."""
    alpha, beta = (config.get(f"layernorm_{kind}_{name}", 1.0) for name in ("alpha", "beta"))
    return (h if config.get("postnorm", False) else x) * alpha + branch * beta


def _apply_linear(x, weight):
    return jnp.einsum("bti,oi->bto", x, weight)


def _rms_norm(x, weight, eps):
    return weight[None, None, :] * x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _lightning_step(carry, qkv):
    """S_t = lambda S_(t-1) + k_t^T v_t, o_t = q_t S_t."""
    state, decay = carry  # [B, N, H (k), H (v)], [1, N, 1, 1]
    q, k, v = qkv  # each [B, N, H]
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
    # One norm over all heads. Its eps is the release's constructor default, not rms_norm_eps.
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
    first, second = x[..., :half], x[..., half:rotary_dim]
    rotated_parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*rotated_parts, x[..., rotary_dim:]], axis=-1)


def _softmax_attention(config, weights, h):
    batch, length, _ = h.shape
    head_dim, kv_heads = config["head_dim"], config["num_key_value_heads"]
    q, k, v = (
        _apply_linear(h, weights[f"{name}_proj.weight"]).reshape(batch, length, -1, head_dim)
        for name in "qkv"
    )
    q, k = _apply_rope(config, q), _apply_rope(config, k)
    repeats = config["num_attention_heads"] // kv_heads
    # Query head n reads KV head n // repeats.
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, repeats, axis=2)) / head_dim**0.5
    causal_mask = np.tril(np.ones((length, length), bool))[None, None]
    p = jax.nn.softmax(jnp.where(causal_mask, scores, -jnp.inf), axis=-1)
    o = jnp.einsum("bnts,bsnh->btnh", p, jnp.repeat(v, repeats, axis=2))
    return _apply_linear(o.reshape(batch, length, -1), weights["o_proj.weight"]), k, v


def _moe_block(config, weights, h):
    """Return (output of the experts and the optional shared MLP, router logits).

    Their shapes are [B, T, D] and [B, T, E].
    """
    logits = _apply_linear(h, weights["block_sparse_moe.gate.weight"])
    top_p, top_e = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), config["num_experts_per_tok"])
    # The chosen experts' weights sum to 1.
    top_p = top_p / jnp.sum(top_p, axis=-1, keepdims=True)
    y = jnp.zeros_like(h)
    for expert in range(config["num_local_experts"]):
        prefix = f"block_sparse_moe.experts.{expert}"
        gate, up = (_apply_linear(h, weights[f"{prefix}.{name}.weight"]) for name in ("w1", "w3"))
        # The expert's weight for each token, [B, T, 1]: 0 for tokens that did not choose it.
        share = jnp.sum(jnp.where(top_e == expert, top_p, 0.0), axis=-1, keepdims=True)
        y = y + share * _apply_linear(jax.nn.silu(gate) * up, weights[f"{prefix}.w2.weight"])
    if config["shared_intermediate_size"] > 0:
        gate, up = (
            _apply_linear(h, weights[f"shared_mlp.{n}_proj.weight"]) for n in ("gate", "up")
        )
        shared_output = _apply_linear(
            jax.nn.silu(gate) * up, weights["shared_mlp.down_proj.weight"]
        )
        c = jax.nn.sigmoid(_apply_linear(h, weights["coefficient.weight"]))  # [B, T, 1]
        y = y * (1 - c) + shared_output * c
    return y, logits


def _aux_loss(config, router_logits):
    """Return E * (sum over rank, e of f[rank, e] * p[e]), the tokens of all layers pooled.

    f is the share of tokens whose choice of that rank is expert e, and p the mean probability of e.
    """
    num_experts = config["num_local_experts"]
    p = jax.nn.softmax(jnp.concatenate(router_logits), axis=-1)  # [L * tokens, E]
    _, top_e = jax.lax.top_k(p, config["num_experts_per_tok"])
    # No gradient flows through f, which is made of counts.
    f = jnp.mean(jax.nn.one_hot(top_e, num_experts, dtype=p.dtype), axis=0)
    return num_experts * jnp.sum(f * jnp.mean(p, axis=0)[None, :])
