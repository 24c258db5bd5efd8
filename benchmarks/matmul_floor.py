"""A lower bound for `model_vs_transformers.py`: the time of a model's matmuls alone, in torch."""

import functools
from collections.abc import Mapping
from typing import Any

import side_by_side
import torch


def count_matmuls(model: Mapping[str, Any], tokens: int, head_tokens: int, passes: int = 1):
    """Return (rows, in, out, count) of every weight matmul of a call.

    Args:
      model: fields of transformers' MiniMaxConfig.
      tokens: of a call.
      head_tokens: tokens of which logits are computed.
      passes: cost in forward passes, 3 for a forward and a backward pass.
    """
    hidden, ffn = model["hidden_size"], model["intermediate_size"]
    width = model["num_attention_heads"] * model["head_dim"]
    softmax = model["layer_types"].count("full_attention")
    lightning = len(model["layer_types"]) - softmax
    kv = 2 * model["num_key_value_heads"] * model["head_dim"]
    experts = model["num_local_experts"]
    rows = tokens * model["num_experts_per_tok"] // experts  # of an expert, perfectly balanced
    shapes = (
        (tokens, hidden, 3 * width, lightning),
        (tokens, hidden, width, lightning),  # the output gate
        (tokens, hidden, width + kv, softmax),
        (tokens, width, hidden, lightning + softmax),
        (rows, hidden, ffn, 2 * experts * (lightning + softmax)),
        (rows, ffn, hidden, experts * (lightning + softmax)),
        (head_tokens, hidden, model["vocab_size"], 1),
    )
    return tuple((*shape, passes * count) for *shape, count in shapes)


@torch.no_grad()
def matmul_secs(shapes, repeats: int) -> float:
    """Return the seconds of these matmuls: each shape's fastest call, times its count."""
    total = 0.0
    for rows, width, out, count in shapes:
        x, weight = torch.randn(rows, width), torch.randn(out, width)
        call = functools.partial(torch.nn.functional.linear, x, weight)
        call()  # the first call is slower
        total += count * min(side_by_side.clock(call) for _ in range(3 * repeats))
    return total
