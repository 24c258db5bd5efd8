"""MiniMax-M1: embedding, decoder layers scanned over their repeating unit, norm, head.

Two ways lead through the model. `MiniMaxM1.__call__`, `hidden` and `trace` read whole rows, which
is what training needs. `extend` appends tokens to rows whose earlier tokens a `DecodeState` sums
up. On a mesh each way is one `shard_map`: a function named `*_local` sees the part of every array
that its device holds. The serving engine has a third way, `serving/forward.py`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import (
    collectives,
    compiler_options,
    decoder_layer,
    forward_context,
    fsdp,
    input_checks,
    layer_stack,
    layers,
    lightning,
    moe,
    ring_attention,
    sharding,
)
from m1_jax import config as config_lib
from m1_jax import state as state_lib


class ForwardOutput(NamedTuple):
    """What a forward pass over whole rows returns."""

    x: Float[Array, "B T _"]  # what the head reads [B, T, D], or float32 logits [B, T, V]
    stats: moe.RouterStats  # sums over all tokens of all devices, with a leading axis of layers
    layer_outputs: Float[Array, "L B T D"] | None  # of every layer, if asked to keep them


class MiniMaxM1(nnx.Module):
    """The language model. `m1_jax.load` makes one from a checkpoint.

    A model is a pytree, so jitted functions take it as one argument.

    `layers[g]` holds all layers of group g of the repeating unit, stacked on two leading axes (see
    `layer_stack.py`). `ModelConfig.locate_layer` tells where a layer lies. Activations have
    `dtype`. Parameters have `param_dtype`, or are int8 (`quantize.py`). Routers and recurrent
    states are float32. `layout` says how parameters and activations lie on a mesh. None means one
    device.
    """

    def __init__(
        self,
        config: config_lib.ModelConfig,
        rngs: nnx.Rngs,
        *,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        param_dtype: jax.typing.DTypeLike | None = None,
        layout: sharding.MeshLayout | None = None,
    ):
        param_dtype = jnp.dtype(param_dtype or dtype)
        self.config, self.dtype, self.layout = config, jnp.dtype(dtype), layout
        kwargs = {"std": config.initializer_range, "param_dtype": param_dtype}
        # The order of construction fixes which random numbers a parameter gets from `rngs`.
        self.embed = layers.Embedding(rngs, config.vocab_size, config.hidden_size, **kwargs)
        stacks = []
        for kind, num_layers in config.layer_groups:
            make_layer = functools.partial(
                decoder_layer.DecoderLayer, config, kind, param_dtype=param_dtype
            )
            shape = (config.repeats, num_layers)
            stacks.append(layer_stack.make_stack(make_layer, shape, rngs))
        self.layers = nnx.List(stacks)
        self.norm = layers.RMSNorm(
            config.hidden_size, "embed", eps=config.rms_norm_eps, param_dtype=param_dtype
        )
        self.head = layers.Head(rngs, config.hidden_size, config.vocab_size, **kwargs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return float32 logits of every token.

        Args:
          segment_ids: 0 marks padding. A change between two other ids starts a new document, and
            no document sees another. None: each row is one document.
          positions: positions for RoPE. None: they count from 0 in each document.

        Raises:
          ValueError: shapes that do not fit, or (outside of jit) ids outside the vocabulary.
        """
        input_checks.check_token_ids(tokens, self.config.vocab_size)
        input_checks.check_token_shape("segment_ids", segment_ids, tokens)
        input_checks.check_token_shape("positions", positions, tokens)
        # Jitted, since a model is called like a function, outside of any program. `hidden` and
        # `trace` are parts of a caller's own program (a loss, a comparison): the caller jits that.
        return _compute_logits(self, tokens, segment_ids, positions).x

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        expert_ids: Int[Array, "B T L A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats]:
        """Return what the head reads, and the router statistics.

        Args:
          expert_ids: experts that the tokens are sent to, such as those that a sampler chose.
            Where they are -1, the layer's router chooses. The weights are the router's either way.

        Returns:
          (x after the last layer and the final norm, in the model's dtype; sums over all tokens,
          with a leading axis of layers).
        """
        output = _compute_outputs(self, tokens, segment_ids, positions, expert_ids)
        return output.x, output.stats

    def trace(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats, Float[Array, "L B T D"]]:
        """Return what `hidden` returns, and the output of every layer, to compare two models.

        Returns:
          (x after the last layer and the final norm; the router statistics; x after each layer,
          before the final norm).
        """
        output = _compute_outputs(self, tokens, segment_ids, positions, keep_layer_outputs=True)
        assert output.layer_outputs is not None
        return output.x, output.stats, output.layer_outputs

    def init_state(self, batch: int, max_length: int) -> state_lib.DecodeState:
        """Return the decode state of `batch` empty sequences of up to `max_length` tokens."""
        return state_lib.init_decode_state(self.config, batch, max_length, self.dtype, self.layout)

    def extend(
        self,
        tokens: Int[Array, "B T"],
        state: state_lib.DecodeState,
        num_tokens: Int[Array, "B"] | None = None,
        last_only: bool = False,
    ) -> tuple[Float[Array, "B _ V"], state_lib.DecodeState]:
        """Append T >= 1 tokens to each row. Return their float32 logits and the new state.

        Args:
          num_tokens: row b appends only its first num_tokens[b] tokens. Logits of the remaining
            tokens are finite and mean nothing. None: all T tokens are appended.
          last_only: return logits [B, 1, V] of each row's last appended token alone.

        Raises:
          ValueError: shapes that do not fit, token ids outside the vocabulary, or more tokens
            than the cache holds. Ids and lengths are checked only outside of jit, because inside
            their values are unknown.
        """
        input_checks.check_token_ids(tokens, self.config.vocab_size)
        input_checks.check_capacity(tokens, state, num_tokens)
        return _extend_sequences(self, tokens, state, num_tokens, last_only)

    def run_layers(
        self,
        x: Float[Array, "*rows D"],
        context: Any,
        group_states: Sequence[Any] | None = None,
        *,
        apply_layer: layer_stack.ApplyLayer = decoder_layer.DecoderLayer.__call__,
        keep_layer_outputs: bool = False,
    ) -> layer_stack.LayersOutput:
        """Run all layers on this device's rows.

        Args:
          context: what all layers share, handed to `apply_layer`: a `ForwardContext`, or serving's
            `RaggedBatch`.
          group_states: by group, the state of its layers. None: no states are read or kept.
          apply_layer: runs one layer.
          keep_layer_outputs: return x after every layer too.
        """
        config, layout = self.config, self.layout
        # A gathered stack would be all layers' experts of all devices.
        experts_stay_stacked = not fsdp.is_gathered(layout, moe.EXPERT_AXES)

        # `context` and the indices are arguments and not closed over: jax.checkpoint keeps its
        # arguments, and computes again what depends on them.
        def gather_and_apply(layer, *arguments):
            # Gathered inside of jax.checkpoint, so that the backward pass gathers again and no
            # layer's full parameters outlive it.
            layer = fsdp.gather_params(layer, layout, self.dtype)
            return apply_layer(layer, *arguments)

        gather_and_apply = layer_stack.apply_remat(
            config.remat, gather_and_apply, has_gathered_params=layout is not None
        )

        def apply_stacked(layer_and_slopes, x, group_state, stack_index, layer_index):
            layer, slopes = layer_and_slopes
            return gather_and_apply(
                layer, x, slopes, context, group_state, stack_index, layer_index
            )

        group_sizes = [num_layers for _, num_layers in config.layer_groups]
        return layer_stack.scan_layer_groups(
            apply_stacked,
            tuple(zip(self.layers, lightning.decay_slopes_by_group(config), strict=True)),
            group_sizes,
            config.repeats,
            x,
            group_states,
            functools.partial(
                layer_stack.slice_layer,
                dtype=self.dtype,
                experts_stay_stacked=experts_stay_stacked,
            ),
            keep_layer_outputs,
        )

    def apply_head(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Return float32 logits of what the last layer returned."""
        with jax.named_scope("head"):
            x = fsdp.gather_params(self.norm, self.layout, self.dtype)(x)
            return fsdp.gather_params(self.head, self.layout, self.dtype)(x)


# ---- whole rows


@compiler_options.jit_for_device
def _compute_logits(
    model: MiniMaxM1,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
) -> ForwardOutput:
    return _compute_outputs(model, tokens, segment_ids, positions, with_logits=True)


def _compute_outputs(
    model: MiniMaxM1,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"] | None,
    expert_ids: Int[Array, "B T L A"] | None = None,
    keep_layer_outputs: bool = False,
    with_logits: bool = False,
) -> ForwardOutput:
    """Run the model on whole rows, on a mesh if there is one."""
    layout, length = model.layout, tokens.shape[1]
    tokens, context = forward_context.prepare_inputs(
        layout, tokens, segment_ids, positions, expert_ids
    )
    forward = functools.partial(
        _forward_local, keep_layer_outputs=keep_layer_outputs, with_logits=with_logits
    )
    if layout is None:
        return forward(model, tokens, context)
    num_rows = len(tokens)
    # Default positions are one row for all. Arrays with a row for each are split by rows.
    context_specs = jax.tree.map(
        lambda a: layout.activation_spec("batch" if len(a) == num_rows else None, "length"),
        context,
    )
    row_spec = layout.activation_spec("batch", "length")
    output_specs = ForwardOutput(
        layout.field_spec("batch", "length", "vocab" if with_logits else None),
        layout.field_spec(),  # `_forward_local` sums the statistics over all devices
        layout.field_spec(None, "batch", "length", None) if keep_layer_outputs else None,
    )
    program = sharding.run_sharded(
        layout,
        forward,
        (sharding.param_specs(layout, model), row_spec, context_specs),
        output_specs,
    )
    x, stats, layer_outputs = program(model, tokens, context)
    # What `prepare_inputs` added at the end of the rows is cut off again.
    if layer_outputs is not None:
        layer_outputs = layer_outputs[:, :, :length]
    return ForwardOutput(x[:, :length], stats, layer_outputs)


def _forward_local(
    model: MiniMaxM1,
    tokens: Int[Array, "B T"],
    context: forward_context.ForwardContext,
    *,
    keep_layer_outputs: bool,
    with_logits: bool,
) -> ForwardOutput:
    """Run the model on this device's part of the rows."""
    x = model.embed(tokens, model.dtype, model.layout)
    output = model.run_layers(x, context, keep_layer_outputs=keep_layer_outputs)
    if with_logits:
        x = model.apply_head(output.x)
    else:
        # A caller without logits (`logprobs.py`) applies the head to chunks of the vocabulary.
        with jax.named_scope("head"):
            x = fsdp.gather_params(model.norm, model.layout, model.dtype)(output.x)
    # Each device has counted its own tokens.
    stats = jax.tree.map(lambda s: collectives.psum(s, "tokens"), output.per_layer)
    return ForwardOutput(x, stats, output.layer_outputs)


# ---- rows with a state


@functools.partial(compiler_options.jit_for_device, static_argnames="last_only")
def _extend_sequences(
    model: MiniMaxM1,
    tokens: Int[Array, "B T"],
    state: state_lib.DecodeState,
    num_tokens: Int[Array, "B"] | None,
    last_only: bool,
) -> tuple[Float[Array, "B _ V"], state_lib.DecodeState]:
    layout, length = model.layout, tokens.shape[1]
    if layout is None:
        return _extend_local(
            model, tokens, state, num_tokens, last_only=last_only, length_sharded=False
        )
    sharding.check_batch_rows(layout, tokens.shape[0])
    # One token has no length to split, so every device of the context axis has all tokens then.
    # The cache is split by length in either case.
    length_sharded = length > 1 and layout.axis_size("length") > 1
    padding = -length % layout.axis_size("length") if length_sharded else 0
    if padding:
        tokens = jnp.pad(tokens, ((0, 0), (0, padding)))
        # Padding must not enter the state: rows append only their first `length` tokens.
        if num_tokens is None:
            num_tokens = jnp.full(tokens.shape[:1], length, jnp.int32)
    state_specs = state_lib.decode_state_specs(state, layout)
    length_axis = "length" if length_sharded else None
    program = sharding.run_sharded(
        layout,
        functools.partial(_extend_local, last_only=last_only, length_sharded=length_sharded),
        (
            sharding.param_specs(layout, model),
            layout.activation_spec("batch", length_axis),
            state_specs,
            None if num_tokens is None else layout.activation_spec("batch"),
        ),
        (layout.activation_spec("batch", None if last_only else length_axis, "vocab"), state_specs),
    )
    logits, state = program(model, tokens, state, num_tokens)
    return logits[:, :length], state


def _extend_local(
    model: MiniMaxM1,
    tokens: Int[Array, "B T"],
    state: state_lib.DecodeState,
    num_tokens: Int[Array, "B"] | None,
    *,
    last_only: bool,
    length_sharded: bool,
) -> tuple[Float[Array, "B _ V"], state_lib.DecodeState]:
    """Append this device's part of the tokens to its rows."""
    length = tokens.shape[1]  # tokens of this device, a part of the row where it is sharded
    num_devices = collectives.axis_size("length") if length_sharded else 1
    start = collectives.axis_index("length") * length if length_sharded else 0
    step = start + jnp.arange(length, dtype=jnp.int32).reshape(1, -1)
    positions = state.length[:, None] + step
    if num_tokens is None:
        segment_ids, num_added = None, length * num_devices
    else:
        # Lightning attention skips padding as segment 0. Softmax attention does not write padding
        # to the cache, because its position lies past the cache's end.
        is_token, num_added = step < num_tokens[:, None], num_tokens
        positions = jnp.where(is_token, positions, ring_attention.PADDING_POSITION)
        segment_ids = is_token.astype(jnp.int32)
    context = forward_context.ForwardContext(positions, segment_ids, length_sharded=length_sharded)
    x = model.embed(tokens, model.dtype, model.layout)
    output = model.run_layers(x, context, state.group_states)
    x = output.x
    if last_only:
        # Index of each row's last token among this device's tokens. Another device may hold it,
        # and the sum over devices then brings it here.
        last = jnp.broadcast_to(jnp.asarray(num_added) - 1, state.length.shape)
        last = jnp.maximum(last, 0) - start
        is_local = (last >= 0) & (last < length)
        x = jnp.take_along_axis(x, jnp.clip(last, 0, length - 1)[:, None, None], axis=1)
        if length_sharded:
            x = collectives.psum(jnp.where(is_local[:, None, None], x, 0), "length")
    logits = model.apply_head(x)
    return logits, state_lib.DecodeState(output.group_states, state.length + num_added)
