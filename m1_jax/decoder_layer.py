"""One decoder layer: attention, then experts, each added to the residual stream."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import attention, layer_stack, layers, lightning, moe
from m1_jax import config as config_lib
from m1_jax import state as state_lib

# The state of all layers of a group: matrices of lightning layers, or the cache of softmax layers.
GroupState = Float[Array, "R P B N H H"] | state_lib.KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What every layer of one forward pass shares.

    Attributes:
      positions: of each token, for RoPE and as its place in the cache.
      segment_ids: number of each token's document in its row. The numbers never fall along a row,
        and 0 is padding. None: each row is one document without padding.
      expert_ids: experts that each layer sends a token to, -1 where the router chooses. None: the
        router chooses everywhere.
      length_sharded: whether each device of the context axis has its own part of the tokens.
    """

    positions: Int[Array, "#B T"]
    segment_ids: Int[Array, "B T"] | None = None
    expert_ids: Int[Array, "B T L A"] | None = None
    length_sharded: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def token_mask(self) -> Float[Array, "B T"] | None:
        """Return 1.0 for real tokens and 0.0 for padding; None where all tokens are real."""
        return None if self.segment_ids is None else (self.segment_ids > 0).astype(jnp.float32)

    def layer_expert_ids(self, layer_index: Int[Array, ""] | int) -> Int[Array, "B T A"] | None:
        """Return the expert ids of one layer."""
        return None if self.expert_ids is None else jnp.take(self.expert_ids, layer_index, axis=2)


class DecoderLayer(nnx.Module):
    """Attention and experts, each as x = r * alpha + f(norm(x)) * beta.

    The residual r is the normed input with postnorm (M1), the plain input without. Serving runs the
    same parts on rows of many sequences, see `serving/forward.py`.
    """

    def __init__(
        self, config: config_lib.ModelConfig, kind: str, rngs: nnx.Rngs, *, param_dtype: jnp.dtype
    ):
        blocks = {
            config_lib.LIGHTNING: lightning.LightningAttention,
            config_lib.SOFTMAX: attention.SoftmaxAttention,
        }
        make_norm = functools.partial(
            layers.RMSNorm,
            config.hidden_size,
            "embed",
            eps=config.rms_norm_eps,
            param_dtype=param_dtype,
        )
        self.input_norm = make_norm()
        self.attention = blocks[kind](config, rngs, param_dtype=param_dtype)
        self.moe_norm = make_norm()
        self.moe = moe.MoE(config, rngs, param_dtype=param_dtype)
        self.kind, self.postnorm = kind, config.postnorm
        self.attention_scales = config.attention_scales(kind)
        self.moe_scales = (config.layernorm_mlp_alpha, config.layernorm_mlp_beta)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        slopes: Float[Array, "N"],
        context: ForwardContext,
        state: GroupState | None = None,
        stack_index: layer_stack.StackIndex | None = None,
        layer_index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats, GroupState | None]:
        """Return the layer's output, its router statistics, and the group's new state.

        Args:
          slopes: decay rates of lightning attention, by head; softmax attention has no use for
            them.
          state: of all layers of this one's group, of which this one updates its entry. None: the
            rows begin here, and nothing is kept.
          stack_index: where this layer lies in its group's stack and state.
          layer_index: number of this layer in the model, from 0.
        """
        # The kind of attention names the scope, so that a profile tells the two apart.
        with jax.named_scope(self.kind):
            h = self.input_norm(x)
            o, state = self._attend(h, slopes, context, state, stack_index)
        x = self.add_to_residual(x, h, o, self.attention_scales)
        h = self.moe_norm(x)
        y, stats = self.moe(
            h, context.token_mask, stack_index, context.layer_expert_ids(layer_index)
        )
        return self.add_to_residual(x, h, y, self.moe_scales), stats, state

    def _attend(self, h, slopes, context: ForwardContext, state, stack_index):
        if self.kind == config_lib.LIGHTNING:
            state_before = None if state is None else state[stack_index]
            o, state_after = self.attention(
                h, slopes, context.segment_ids, state_before, context.length_sharded
            )
            return o, None if state is None else state.at[stack_index].set(state_after)
        if state is None:
            return self.attention(h, context.positions, context.segment_ids), None
        # `extend` writes into the group's cache itself: of a layer's entry only the places of the
        # new tokens change.
        return self.attention.extend(
            h, context.positions, state, stack_index, context.length_sharded
        )

    def add_to_residual(
        self,
        x: Float[Array, "*batch D"],
        normed: Float[Array, "*batch D"],
        branch: Float[Array, "*batch D"],
        scales: tuple[float, float],
    ) -> Float[Array, "*batch D"]:
        """Return r * alpha + branch * beta, where r is the normed or the plain input."""
        alpha, beta = scales
        return (normed if self.postnorm else x) * alpha + branch * beta
