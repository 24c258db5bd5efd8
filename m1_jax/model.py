"""MiniMax-M1: embedding, decoder layers scanned over their repeating unit, norm, head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from m1_jax import attention, layers, lightning, moe, ring_attention, sharding
from m1_jax import config as config_lib
from m1_jax import state as state_lib
from m1_jax.serving import ragged_batch
from pallas_kernels.lightning_attention import documents as documents_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What every layer of one forward pass shares.

    positions: for RoPE, and places in the cache. documents: their numbers in the row, which never
    fall; 0 is padding, None says that there is one and no padding. routes: the experts that each
    layer is to take, -1 where it chooses itself; None: everywhere. split: whether each device of
    the context axis has its own part of the tokens.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None
    expert_ids: Int[Array, "B T L A"] | None = None
    length_sharded: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def token_mask(self) -> Float[Array, "B T"] | None:
        """Return 1.0 for real tokens; None where all are."""
        return None if self.segment_ids is None else (self.segment_ids > 0).astype(jnp.float32)

    def layer_expert_ids(self, layer) -> Int[Array, "B T A"] | None:
        """Return the routes of one layer."""
        return None if self.expert_ids is None else jnp.take(self.expert_ids, layer, axis=2)


class DecoderLayer(nnx.Module):
    """Attention and experts, each as x = r * alpha + f(norm(x)) * beta.

    The residual r is the normed input with postnorm (M1), the plain input without.
    """

    def __init__(self, config: config_lib.ModelConfig, kind: str, rngs, *, param_dtype):
        blocks = {
            config_lib.LIGHTNING: lightning.LightningAttention,
            config_lib.SOFTMAX: attention.SoftmaxAttention,
        }
        norm = functools.partial(
            layers.RMSNorm,
            config.hidden_size,
            "embed",
            eps=config.rms_norm_eps,
            param_dtype=param_dtype,
        )
        self.input_norm = norm()
        self.attention = blocks[kind](config, rngs, param_dtype=param_dtype)
        self.moe_norm = norm()
        self.moe = moe.MoE(config, rngs, param_dtype=param_dtype)
        self.kind, self.postnorm = kind, config.postnorm
        self.attention_scales = config.attention_scales(kind)
        self.moe_scales = (config.layernorm_mlp_alpha, config.layernorm_mlp_beta)

    def __call__(self, x, slopes, context, state=None, stack_index=None, layer_index=None):
        """Return (x, router statistics, new state of the run); None starts and keeps none.

        place, layer: this one's index in its run's stack, and its number in the model.
        """
        if isinstance(context, ragged_batch.RaggedBatch):
            return self._serve_ragged(x, slopes, context, state, stack_index)
        h = self.input_norm(x)
        if self.kind == config_lib.LIGHTNING:
            before = None if state is None else state[stack_index]
            o, after = self.attention(
                h, slopes, context.segment_ids, before, context.length_sharded
            )
            state = None if state is None else state.at[stack_index].set(after)
        elif state is None:
            o = self.attention(h, context.positions, context.segment_ids)
        else:
            o, state = self.attention.extend(
                h, context.positions, state, stack_index, context.length_sharded
            )
        x = self._add_branch(x, h, o, self.attention_scales)
        h = self.moe_norm(x)
        y, stats = self.moe(
            h, context.token_mask, stack_index, context.layer_expert_ids(layer_index)
        )
        return self._add_branch(x, h, y, self.moe_scales), stats, state

    def _serve_ragged(
        self, x: Float[Array, "M D"], slopes, batch: ragged_batch.RaggedBatch, pool, stack_index
    ):
        """Do the same for rows of several sequences; `serving/ragged_batch.py` says why in parts.
        """

        def before(x, positions):
            h = self.input_norm(x)
            return h, self.attention.project_inputs(h, positions)

        def between(x, h, o):
            x = self._add_branch(x, h, self.attention.project_output(h, o), self.attention_scales)
            h = self.moe_norm(x)
            weights, routes, _ = self.moe.route(h, None)
            return x, h, weights, routes

        def after(x, h, y):
            return self._add_branch(x, h, self.moe.combine(h, y), self.moe_scales)

        h, inputs = batch.map_matmul_tiles(before, x, batch.positions)
        o, pool = self.attention.serve_rows(inputs, slopes, batch, pool, stack_index)
        x, h, weights, routes = batch.map_matmul_tiles(between, x, h, o)
        chosen = jnp.where(batch.positions[:, None] >= 0, routes, self.moe.no_expert)
        # Devices that share the experts hold all rows, too: each sends its part of them.
        more = ((0, -len(x) % sharding.axis_size("experts")), (0, 0))
        rows, weights = (sharding.local_slice(jnp.pad(a, more), "experts", 0) for a in (h, weights))
        chosen = jnp.pad(chosen, more, constant_values=self.moe.no_expert)
        y, _ = self.moe.dispatch(
            rows, weights, sharding.local_slice(chosen, "experts", 0), stack_index
        )
        y = sharding.all_gather(y, "experts", 0)[: len(x)]
        return batch.map_matmul_tiles(after, x, h, y), routes, pool

    def _add_branch(self, x, normed, branch, scales):
        alpha, beta = scales
        return (normed if self.postnorm else x) * alpha + branch * beta


class MiniMaxM1(nnx.Module):
    """The language model; see `m1_jax.load`. Also a pytree: pass it to jitted functions whole.

    Parameters of the layers are stacked: `layers[p]` holds run p of equal layers in the repeating
    unit, at index [repeat of the unit, place in the run] (`ModelConfig.stack_index_of`).
    Activations have `dtype`, parameters `param_dtype` (or int8: `quantize.py`), routers and states
    float32. `layout` says how parameters and activations lie on a mesh; None: one device.
    """

    def __init__(
        self,
        config: config_lib.ModelConfig,
        rngs: nnx.Rngs,
        *,
        dtype=jnp.bfloat16,
        param_dtype=None,
        layout: sharding.MeshLayout | None = None,
    ):
        param_dtype = jnp.dtype(param_dtype or dtype)
        self.config, self.dtype, self.layout = config, jnp.dtype(dtype), layout
        kwargs = {"std": config.initializer_range, "param_dtype": param_dtype}
        self.embed = layers.Embedding(rngs, config.vocab_size, config.hidden_size, **kwargs)
        make = functools.partial(DecoderLayer, config, param_dtype=param_dtype)
        shapes = [(kind, (config.repeats, number)) for kind, number in config.layer_groups]
        self.layers = nnx.List([_stack_layers(make, kind, shape, rngs) for kind, shape in shapes])
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

        segment_ids: 0 marks padding; a change between two other ids starts a new document, and
        no document sees another. positions: for RoPE; by default counted from 0 per document.

        Raises:
          ValueError: shapes that do not fit, or (outside of jit) ids outside the vocabulary.
        """
        check_token_ids(tokens, self.config.vocab_size)
        _check_token_shape("segment_ids", segment_ids, tokens)
        _check_token_shape("positions", positions, tokens)
        return _compute_logits(self, tokens, segment_ids, positions)[0]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        expert_ids: Int[Array, "B T L A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats]:
        """Return what the head reads, and router statistics with a leading axis of layers.

        routes: experts that the tokens are sent to, such as those that a sampler chose; a layer
          chooses itself where they are -1. Weights are the router's own either way.
        """
        hidden, stats, _ = self._compute_outputs(tokens, segment_ids, positions, expert_ids)
        return hidden, stats

    def trace(
        self,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats, Float[Array, "L B T D"]]:
        """Return what `hidden` does, and the output of every layer: for comparing models."""
        return self._compute_outputs(tokens, segment_ids, positions, keep_layer_outputs=True)

    def _compute_outputs(
        self,
        tokens,
        segment_ids,
        positions,
        expert_ids=None,
        keep_layer_outputs=False,
        with_logits=False,
    ) -> tuple[Any, ...]:
        """Return (what the head reads, or logits), router statistics, outputs of all layers."""
        layout, length = self.layout, tokens.shape[1]
        tokens, context = _prepare_inputs(layout, tokens, segment_ids, positions, expert_ids)
        local = functools.partial(
            _forward_local, keep_layer_outputs=keep_layer_outputs, with_logits=with_logits
        )
        if layout is None:
            return local(self, tokens, context)
        rows = len(tokens)
        where = jax.tree.map(
            lambda a: layout.activation_spec("batch" if len(a) == rows else None, "length"), context
        )
        program = sharding.run_sharded(
            layout,
            local,
            (sharding.param_specs(layout, self), layout.activation_spec("batch", "length"), where),
            (
                layout.activation_spec("batch", "length", "vocab" if with_logits else None),
                jax.sharding.PartitionSpec(),
                layout.activation_spec(None, "batch", "length", None)
                if keep_layer_outputs
                else None,
            ),
        )
        x, stats, kept = program(self, tokens, context)
        return x[:, :length], stats, None if kept is None else kept[:, :, :length]

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
        """Append T >= 1 tokens to each row; return their float32 logits and the new state.

        num_tokens: row b appends only its first num_tokens[b] tokens; the logits of the rest
          are finite and mean nothing. None: all of them.
        last_only: logits [B, 1, V] of each row's last real token alone.

        Raises:
          ValueError: shapes that do not fit, token ids outside the vocabulary, or more tokens
            than the cache holds. Ids and lengths are checked only outside of jit, where their
            values are known.
        """
        check_token_ids(tokens, self.config.vocab_size)
        _check_capacity(tokens, state, num_tokens)
        return _extend_sequences(self, tokens, state, num_tokens, last_only)

    def run_layers(
        self,
        x,
        context: ForwardContext | ragged_batch.RaggedBatch,
        state: Any = None,
        keep_layer_outputs=False,
    ) -> tuple[Any, ...]:
        """Run all layers.

        Returns (x, router statistics [L, ...], layer states, layer outputs [L, B, T, D] or None).
        """
        config = self.config
        slopes = jnp.asarray(lightning.decay_slopes(config)).reshape(
            config.repeats, config.period, -1
        )
        slopes = sharding.local_slice(slopes, "heads", 2)

        def run(layer, *arguments):
            return sharding.gather_params(layer, self.layout, self.dtype)(*arguments)

        run = _apply_remat(config.remat, run, self.layout is not None)

        ends = np.cumsum([number for _, number in config.layer_groups])
        starts = ends[:-1]
        stacks = tuple(zip(self.layers, jnp.split(slopes, starts, axis=1), strict=True))

        def unit(carry, xs):
            x, states = carry
            *runs, repeat = xs
            kept, after = [], []
            for index, (_, number) in enumerate(config.layer_groups):

                def one(carry, xs, index=index):
                    x, state = carry
                    *sliced, number = xs
                    place = (repeat, number)
                    layer, slopes = (
                        sliced[0] if sliced else self._slice_layer(*stacks[index], place)
                    )
                    which = (
                        repeat * config.period
                        + (ends[index] - config.layer_groups[index][1])
                        + number
                    )
                    x, stat, state = run(layer, x, slopes, context, state, place, which)
                    return (x, state), (stat, x if keep_layer_outputs else None)

                arrays = runs[index : index + 1]
                (x, new), outputs = _scan_indexed(one, (x, states[index]), (*arrays, number))
                kept.append(outputs)
                after.append(new)
            return (x, tuple(after)), jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)

        if state is None:
            carry, kept = _scan_indexed(
                unit, (x, (None,) * len(config.layer_groups)), (*stacks, config.repeats)
            )
        else:
            # No gradients: a slice of both axes at once, where a loop in a loop copies whole runs.
            carry, kept = _scan_indexed(unit, (x, state), (config.repeats,))
        kept = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept)
        return carry[0], kept[0], carry[1], kept[1]

    def _slice_layer(self, stack: DecoderLayer, slopes, stack_index):
        """Return one layer of a run; on one device its experts stay stacked, see `experts.py`."""

        def one(param):
            stays = param.dtype in (self.dtype, jnp.int8) or param.get_metadata()["float32"]
            if self.layout is None and stays and "experts" in param.get_metadata()["logical_axes"]:
                return param
            return param.replace(param[...][stack_index])

        leaf = functools.partial(jax.tree.map, is_leaf=lambda node: isinstance(node, nnx.Param))
        return leaf(one, stack), slopes[stack_index]


def _scan_indexed(body, carry, xs):
    """Scan over arrays and the count of their leading axis, `xs[-1]`; no loop around one step."""
    *arrays, count = xs
    if count > 1:
        return jax.lax.scan(body, carry, (*arrays, jnp.arange(count)))
    carry, out = body(carry, (*jax.tree.map(lambda a: a[0], arrays), 0))
    return carry, jax.tree.map(lambda a: a[None], out)


def _prepare_inputs(
    layout, tokens: Any, segment_ids, positions, expert_ids
) -> tuple[Any, ForwardContext]:
    """Return tokens and their `ForwardContext`; on a mesh, padded to a length that it splits."""
    if layout is not None:
        sharding.check_batch_rows(layout, tokens.shape[0])
        more = -tokens.shape[1] % layout.axis_size("length")
        if more and segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        tokens, segment_ids, positions = (
            None if x is None else jnp.pad(x, ((0, 0), (0, more)))
            for x in (tokens, segment_ids, positions)
        )
        if expert_ids is not None:
            expert_ids = jnp.pad(
                expert_ids, ((0, 0), (0, more), (0, 0), (0, 0)), constant_values=-1
            )
    if segment_ids is None:
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32).reshape(1, -1)
        return tokens, ForwardContext(positions, expert_ids=expert_ids)
    if layout is not None:
        # Counting documents needs whole rows: a few bytes a token.
        rows = layout.activation_sharding("batch", None)
        segment_ids = jax.lax.with_sharding_constraint(segment_ids, rows)
    if positions is None:
        positions = documents_lib.document_positions(segment_ids)
    return tokens, ForwardContext(
        positions, documents_lib.document_numbers(segment_ids), expert_ids
    )


@jax.jit
def _compute_logits(model: MiniMaxM1, tokens, segment_ids, positions):
    return model._compute_outputs(tokens, segment_ids, positions, with_logits=True)


def _forward_local(
    model: MiniMaxM1, tokens, context: ForwardContext, *, keep_layer_outputs, with_logits
):
    """Run the model on this device's tokens."""
    x = model.embed(tokens, model.dtype, model.layout)
    x, stats, _, kept = model.run_layers(x, context, keep_layer_outputs=keep_layer_outputs)
    x = sharding.gather_params(model.norm, model.layout, model.dtype)(x)
    if with_logits:
        x = sharding.gather_params(model.head, model.layout, model.dtype)(x)
    return x, jax.tree.map(lambda s: sharding.psum(s, "tokens"), stats), kept


@functools.partial(jax.jit, static_argnames="last_only")
def _extend_sequences(model: MiniMaxM1, tokens, state, num_tokens, last_only):
    layout, length = model.layout, tokens.shape[1]
    if layout is None:
        return _extend_local(
            model, tokens, state, num_tokens, last_only=last_only, length_sharded=False
        )
    sharding.check_batch_rows(layout, tokens.shape[0])
    # One token has no length to split.
    split = length > 1 and layout.axis_size("length") > 1
    more = -length % layout.axis_size("length") if split else 0
    if more:
        tokens = jnp.pad(tokens, ((0, 0), (0, more)))
        if num_tokens is None:
            num_tokens = jnp.full(tokens.shape[:1], length, jnp.int32)
    states = state_lib.decode_state_specs(state, layout)
    where = "length" if split else None
    program = sharding.run_sharded(
        layout,
        functools.partial(_extend_local, last_only=last_only, length_sharded=split),
        (
            sharding.param_specs(layout, model),
            layout.activation_spec("batch", where),
            states,
            None if num_tokens is None else layout.activation_spec("batch"),
        ),
        (layout.activation_spec("batch", None if last_only else where, "vocab"), states),
    )
    logits, state = program(model, tokens, state, num_tokens)
    return logits[:, :length], state


def _extend_local(model: MiniMaxM1, tokens, state, num_tokens, *, last_only, length_sharded):
    """Append this device's tokens to its rows."""
    length, devices = tokens.shape[1], sharding.axis_size("length") if length_sharded else 1
    start = sharding.axis_index("length") * length if length_sharded else 0
    step = start + jnp.arange(length, dtype=jnp.int32).reshape(1, -1)
    places = state.length[:, None] + step
    # Padding is an empty segment to lightning, and has no place in the cache of softmax.
    if num_tokens is None:
        real, added = None, length * devices
    else:
        real, added = step < num_tokens[:, None], num_tokens
        places = jnp.where(real, places, ring_attention.PADDING_POSITION)
        real = real.astype(jnp.int32)
    context = ForwardContext(places, real, length_sharded=length_sharded)
    x = model.embed(tokens, model.dtype, model.layout)
    x, _, after, _ = model.run_layers(x, context, state.layers)
    if last_only:
        last = jnp.maximum(jnp.broadcast_to(jnp.asarray(added) - 1, state.length.shape), 0) - start
        here = (last >= 0) & (last < length)
        x = jnp.take_along_axis(x, jnp.clip(last, 0, length - 1)[:, None, None], axis=1)
        if length_sharded:
            x = sharding.psum(jnp.where(here[:, None, None], x, 0), "length")
    x = sharding.gather_params(model.norm, model.layout, model.dtype)(x)
    logits = sharding.gather_params(model.head, model.layout, model.dtype)(x)
    return logits, state_lib.DecodeState(after, state.length + added)


def _check_token_shape(name: str, array, tokens) -> None:
    if array is not None and array.shape != tokens.shape:
        raise ValueError(f"{name}: got shape {array.shape}; wanted that of tokens, {tokens.shape}")


def _check_capacity(tokens, state: state_lib.DecodeState, num_tokens) -> None:
    """Refuse what the state cannot take; lengths are checked outside of jit only."""
    rows, length = state.length.shape[0], tokens.shape[1]
    if tokens.shape[0] != rows:
        raise ValueError(f"tokens: got shape {tokens.shape}; wanted [{rows}, T >= 1], as the state")
    added = length if num_tokens is None else num_tokens
    if isinstance(state.length, Tracer) or isinstance(added, Tracer):
        return
    added = np.broadcast_to(np.asarray(added), (rows,))
    if added.min() < 0 or added.max() > length:
        raise ValueError(f"num_tokens: got {added.tolist()}; wanted 0 to {length} each")
    # Of rows that several processes hold, each checks its own.
    parts = [(part.index, np.asarray(part.data)) for part in state.length.addressable_shards]
    limit, total = state.max_length, max(int(np.max(now + added[rows])) for rows, now in parts)
    if limit is not None and total > limit:
        raise ValueError(
            f"the cache holds {limit} tokens per row; got {total}. "
            "Make it larger: init_state(max_length=...)."
        )


def check_token_ids(tokens, vocab_size: int) -> None:
    """Raise ValueError for a wrong shape, or (outside of jit) an id outside the vocabulary."""
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens: got shape {tokens.shape}; wanted [B >= 1, T >= 1]")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens: got dtype {tokens.dtype}; wanted int32")
    if isinstance(tokens, Tracer):
        return
    # Of an array that several processes hold, each checks what it can see.
    parts = getattr(tokens, "addressable_shards", None)
    for part in [tokens] if parts is None else [shard.data for shard in parts]:
        values = np.asarray(part)
        bad = values[(values < 0) | (values >= vocab_size)]
        if bad.size:
            raise ValueError(
                f"token id {bad[0]} is outside of the vocabulary: wanted 0 to {vocab_size - 1}. "
                "Does the tokenizer belong to this model?"
            )


def _stack_layers(make_layer, kind: str, shape: tuple[int, int], rngs) -> DecoderLayer:
    """Make a run of layers for every repeat of the unit, stacked on two leading axes."""

    @nnx.vmap
    @nnx.vmap
    def one(key):
        return make_layer(kind, nnx.Rngs(key))

    stacked = one(jax.random.split(rngs.params(), shape))
    for _, node in nnx.iter_graph(stacked):
        if isinstance(node, nnx.Param):
            names = node.get_metadata()["logical_axes"]
            node.set_metadata(logical_axes=("layers", "layers", *names))
    return stacked


def _apply_remat(policy: str, function, has_gathered_params: bool):
    if policy == "none" and not has_gathered_params:
        return function
    policies = jax.checkpoint_policies
    saved = {
        # Gathered parameters are gathered again: kept for all layers they would not fit.
        "none": policies.save_anything_except_these_names(sharding.GATHERED_NAME),
        "layer": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
    }
    return jax.checkpoint(function, policy=saved[policy])
