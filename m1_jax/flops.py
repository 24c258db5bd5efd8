"""Floating-point operations of the model by arithmetic: a multiplication and an addition are two.

The compiler's own count takes a loop's body once however often it runs, so it sees a tenth of
the layers; here every product is counted as often as it is computed. Only matrix products count:
norms, activations, softmax and the optimizer are under a percent at the release's width.
"""

import dataclasses

from m1_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """One pass over some tokens, by part of the model.

    projections: of both kinds of attention. lightning: products of chunks and states. softmax:
    scores and weighted values of the causal pairs. experts: the chosen ones and the shared one.
    """

    projections: float = 0.0
    lightning: float = 0.0
    softmax: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    head: float = 0.0

    @property
    def layers(self) -> float:
        return self.total - self.head

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """A training step. model: forward and backward, what MFU counts. again: rematerialisation."""

    model: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def count_forward_flops(
    config: config_lib.ModelConfig,
    num_sequences: int,
    num_new_tokens: int,
    context_tokens: int = 0,
    num_logits: int | None = None,
    chunk_tokens: int | None = None,
) -> ForwardFlops:
    """Return the operations of passing `sequences` rows of `length` new tokens.

    Args:
      context: tokens that each row has in its cache already; softmax attends to them, too.
      logits: positions of each row that the head computes; None: all of them.
      chunk: of lightning attention (None: head_dim, as in the XLA form). Within a chunk all pairs
        are computed, causal or not. Rows shorter than it are one chunk, so one token is one.
    """
    tokens = num_sequences * num_new_tokens
    embed, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    width, kv_width = heads * size, config.num_key_value_heads * size
    softmax_layers = config.layer_types.count(config_lib.SOFTMAX)
    lightning_layers = config.num_hidden_layers - softmax_layers
    chunk_tokens = min(chunk_tokens or size, num_new_tokens)
    pairs = num_new_tokens * (num_new_tokens + 1) // 2 + num_new_tokens * context_tokens
    experts = config.num_experts_per_tok + config.has_shared_expert
    # qkv, gate and out have width 3, 1 and 1; query and out 1 and 1, key and value the kv width.
    projections = lightning_layers * 5 * width + softmax_layers * 2 * (width + kv_width)
    return ForwardFlops(
        projections=2.0 * tokens * embed * projections,
        # q k^T and its product with v over a chunk; q S and k^T v over the state.
        lightning=4.0 * tokens * lightning_layers * width * (chunk_tokens + size),
        softmax=4.0 * num_sequences * pairs * softmax_layers * width,
        router=2.0 * tokens * config.num_hidden_layers * embed * config.num_local_experts,
        experts=6.0
        * tokens
        * config.num_hidden_layers
        * experts
        * embed
        * config.intermediate_size,
        head=2.0
        * num_sequences
        * (num_new_tokens if num_logits is None else num_logits)
        * embed
        * config.vocab_size,
    )


def count_train_flops(
    config: config_lib.ModelConfig, num_sequences: int, num_new_tokens: int, **kwargs
) -> TrainFlops:
    """Return the operations of a training step: a backward pass is two forward passes.

    Computed again: with remat "layer", each layer's forward pass; with "dots", attention
    and experts (projections and router are kept). In all cases softmax attention twice more, for
    its blocks of queries and then of keys keep nothing, and the logits, which come in chunks.
    """
    once = count_forward_flops(config, num_sequences, num_new_tokens, **kwargs)
    again = {
        "none": 0.0,
        "layer": once.layers,
        "dots": once.lightning + once.softmax + once.experts,
    }[config.remat]
    return TrainFlops(model=3 * once.total, recomputed=again + 2 * once.softmax + once.head)
