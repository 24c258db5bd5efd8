"""Floating-point operations of the model by arithmetic. A multiply-add counts as two operations.

The compiler's own count has the body of a loop once, however often the loop runs. So it has a tenth
of the release's layers. Here every product is counted as often as it is computed. Only matrix
products count: norms, activations, softmax and the optimizer are under one percent at the release's
width.
"""

import dataclasses

from m1_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class ForwardFlops:
    """Operations of one forward pass over a batch, by part of the model.

    Attributes:
      projections: queries, keys, values, gate and output of both kinds of attention.
      lightning: products within chunks, and those with the states.
      softmax: scores and weighted values of the causal pairs.
      router: router logits of all layers.
      experts: the chosen experts and the shared expert of all layers.
      head: logits.
    """

    projections: float = 0.0
    lightning: float = 0.0
    softmax: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    head: float = 0.0

    @property
    def layers(self) -> float:
        """Operations of all layers, without the head."""
        return self.total - self.head

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TrainFlops:
    """Operations of a training step."""

    model: float  # forward and backward pass, as MFU counts them
    recomputed: float  # operations that the backward pass repeats, on top of `model`

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
    """Return the operations of one forward pass.

    Args:
      config: the model's configuration.
      num_sequences: rows of the batch.
      num_new_tokens: tokens of each row that the pass computes.
      context_tokens: tokens that each row has in its cache already. Softmax attends to them, too.
      num_logits: positions of each row that the head computes. None: all of them.
      chunk_tokens: tokens of a chunk of lightning attention. None: head_dim, as in the XLA form. A
        shorter row is one chunk. Within a chunk all pairs are computed, causal or not.
    """
    tokens = num_sequences * num_new_tokens
    embed, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    width, kv_width = heads * size, config.num_key_value_heads * size
    softmax_layers = config.layer_types.count(config_lib.SOFTMAX)
    layers = config.num_hidden_layers
    lightning_layers = layers - softmax_layers
    chunk_tokens = min(chunk_tokens or size, num_new_tokens)
    num_logits = num_new_tokens if num_logits is None else num_logits
    # Pairs of a query and a key at or before it, in one row.
    pairs = num_new_tokens * (num_new_tokens + 1) // 2 + num_new_tokens * context_tokens
    experts = config.num_experts_per_tok + config.has_shared_expert
    # Columns of all projections. Lightning: qkv 3, gate 1 and out 1 times the width. Softmax: query
    # and out have the width, key and value the kv width.
    projections = lightning_layers * 5 * width + softmax_layers * 2 * (width + kv_width)
    return ForwardFlops(
        projections=2.0 * tokens * embed * projections,
        # Four products of a token: q k^T and its product with v, over a chunk, then q S and k^T v,
        # over the state.
        lightning=4.0 * tokens * lightning_layers * width * (chunk_tokens + size),
        softmax=4.0 * num_sequences * pairs * softmax_layers * width,
        router=2.0 * tokens * layers * embed * config.num_local_experts,
        # Three products: gate, up and down.
        experts=6.0 * tokens * layers * experts * embed * config.intermediate_size,
        head=2.0 * num_sequences * num_logits * embed * config.vocab_size,
    )


def count_train_flops(
    config: config_lib.ModelConfig, num_sequences: int, num_new_tokens: int, **kwargs
) -> TrainFlops:
    """Return the operations of a training step. A backward pass counts as two forward passes.

    `config.remat` says what the backward pass computes again. With "layer" it is each layer's
    forward pass, with "attention" the same but the output projections of attention, with "dots"
    attention and experts (projections and router are kept), and with "products" attention (the
    experts' gate and up are kept, and nothing needs the output of down). In all cases softmax
    attention is computed twice more, once for the gradients of the queries and once for those of
    the keys, because its blocks keep nothing. The logits, which come in chunks, are computed once
    more.

    The arguments are those of `count_forward_flops`.
    """
    forward = count_forward_flops(config, num_sequences, num_new_tokens, **kwargs)
    attention = forward.lightning + forward.softmax
    # The output projections have a fifth of lightning's columns, and fewer than half of softmax's.
    output_projections = 2.0 * num_sequences * num_new_tokens * config.num_hidden_layers
    output_projections *= config.hidden_size * config.num_attention_heads * config.head_dim
    recomputed = {
        "none": 0.0,
        "products": attention,
        "dots": attention + forward.experts,
        "attention": forward.layers - output_projections,
        "layer": forward.layers,
    }[config.remat]
    return TrainFlops(
        model=3 * forward.total,  # forward, gradients of inputs, gradients of weights
        recomputed=recomputed + 2 * forward.softmax + forward.head,
    )
