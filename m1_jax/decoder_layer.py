"""One decoder layer: attention, then experts, each added to the residual stream."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import ad_checkpoint
from jaxtyping import Array, Float, Int

from m1_jax import attention, forward_context, layer_stack, layers, lightning, moe
from m1_jax import config as config_lib
from m1_jax import state as state_lib


class DecoderLayer(nnx.Module):
    """Attention and experts, each as x = r * alpha + f(norm(x)) * beta.

    With postnorm (M1), the residual r is the normed input. Without, it is the plain input. Serving
    runs the same parts on rows of many sequences (`serving/forward.py`).
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
        context: forward_context.ForwardContext,
        group_state: state_lib.GroupState | None = None,
        stack_index: layer_stack.StackIndex | None = None,
        layer_index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], moe.RouterStats, state_lib.GroupState | None]:
        """Return the layer's output, its router statistics, and the group's new state.

        Args:
          slopes: decay rates of lightning attention, by head. Softmax attention does not read them.
          group_state: state of all layers of the group. This layer updates its own entry. None: the
            rows begin here, and no state is kept.
          stack_index: where this layer lies in its group's stack and state.
          layer_index: number of this layer in the model, from 0.
        """
        # The kind of attention names the scope, so that a profile tells the two apart.
        with jax.named_scope(self.kind):
            h = self.input_norm(x)
            o, group_state = self._attend(h, slopes, context, group_state, stack_index)
            o = ad_checkpoint.checkpoint_name(o, layer_stack.ATTENTION_NAME)
        x = self.add_to_residual(x, h, o, self.attention_scales)
        h = self.moe_norm(x)
        y, stats = self.moe(
            h, context.token_mask, stack_index, context.layer_expert_ids(layer_index)
        )
        return self.add_to_residual(x, h, y, self.moe_scales), stats, group_state

    def _attend(
        self,
        h: Float[Array, "B T D"],
        slopes: Float[Array, "N"],
        context: forward_context.ForwardContext,
        group_state: state_lib.GroupState | None,
        stack_index: layer_stack.StackIndex | None,
    ) -> tuple[Float[Array, "B T D"], state_lib.GroupState | None]:
        """Return the attention's output and the group's new state."""
        if self.kind == config_lib.LIGHTNING:
            assert not isinstance(group_state, state_lib.KVCache)
            state_before = None if group_state is None else group_state[stack_index]
            o, state_after = self.attention(
                h, slopes, context.segment_ids, state_before, context.length_sharded
            )
            if group_state is None:
                return o, None
            # The loop over layers carries the whole state: XLA updates one entry of it in place.
            return o, group_state.at[stack_index].set(state_after)
        if group_state is None:
            return self.attention(h, context.positions, context.segment_ids), None
        # `extend` writes into the group's cache itself. Only the new tokens' positions change, and
        # the layer's entry is not copied.
        return self.attention.extend(
            h, context.positions, group_state, stack_index, context.length_sharded
        )

    def add_to_residual(
        self,
        x: Float[Array, "*batch D"],
        normed: Float[Array, "*batch D"],
        branch: Float[Array, "*batch D"],
        scales: tuple[float, float],
    ) -> Float[Array, "*batch D"]:
        """Return r * alpha + branch * beta, where r is the normed or the plain input."""
        alpha, beta = scales  # of this kind of block, see `ModelConfig.attention_scales`
        return (normed if self.postnorm else x) * alpha + branch * beta
