"""Mixture of experts: float32 router, dropless dispatch, experts, balance loss.

M tokens choose A of E experts each. The rank of a choice counts from 0, the most probable expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import collectives, expert_exchange, layer_stack, layers, quantize
from m1_jax import config as config_lib

# Logical axes of an expert's gate and up. Its down is split for storage where they are.
EXPERT_AXES = ("experts", "embed", "mlp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStats:
    """Sums over the real tokens of a layer, float32, from which the balance loss is computed.

    All fields may have a leading axis of layers.

    Attributes:
      choice_counts: how often expert e was a token's choice of each rank.
      prob_sums: sum of the probabilities of expert e.
      num_tokens: how many tokens were counted.
      num_dropped: how many of their choices a capacity limit left out.
    """

    choice_counts: Float[Array, "*L A E"]
    prob_sums: Float[Array, "*L E"]
    num_tokens: Float[Array, "*L"]
    num_dropped: Float[Array, "*L"]


def balance_loss(stats: RouterStats) -> Float[Array, ""]:
    """Return E * sum over rank, e of f[rank, e] p[e], over the tokens of ALL layers together.

    f is the share of tokens whose choice of that rank is e, and p the mean probability of e (the
    release's `load_balancing_loss_func`). Perfect balance gives A, 2 in the release.
    """
    num_experts = stats.prob_sums.shape[-1]
    num_tokens = jnp.maximum(jnp.sum(stats.num_tokens), 1.0)
    # As in the release, layers are summed before the product: it is not a mean of layers' losses.
    choice_counts = stats.choice_counts.reshape(-1, *stats.choice_counts.shape[-2:])
    choice_shares = choice_counts.sum(0) / num_tokens  # [A, E]
    mean_probs = stats.prob_sums.reshape(-1, num_experts).sum(0) / num_tokens
    return num_experts * jnp.sum(choice_shares * mean_probs[None, :])


def dropped_share(stats: RouterStats) -> Float[Array, ""]:
    """Return the share of all choices that a capacity limit left out, 0 without a limit."""
    return jnp.sum(stats.num_dropped) / jnp.maximum(jnp.sum(stats.choice_counts), 1.0)


class MoE(nnx.Module):
    """y = sum over the top A experts of p_e * down_e(silu(gate_e h) * up_e h).

    No token is dropped, unless `config.expert_capacity` sets a limit.

    With a shared expert, y becomes y (1 - c) + shared(h) c, where c = sigmoid(h . coefficient).
    """

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs, *, param_dtype):
        embed, hidden = config.hidden_size, config.intermediate_size
        num_experts, std = config.num_local_experts, config.initializer_range
        self.num_experts_per_token = config.num_experts_per_tok
        self.expert_capacity = config.expert_capacity
        # The router is float32: in bfloat16, near-ties would pick other experts.
        shape, axes = (embed, num_experts), ("embed", None)
        self.router = layers.make_param(rngs, shape, axes, param_dtype, std, float32=True)
        outward = ("experts", "mlp_in", "embed_out")
        inward_shape, outward_shape = (num_experts, embed, hidden), (num_experts, hidden, embed)
        self.gate = layers.make_param(rngs, inward_shape, EXPERT_AXES, param_dtype, std)
        self.up = layers.make_param(rngs, inward_shape, EXPERT_AXES, param_dtype, std)
        self.down = layers.make_param(rngs, outward_shape, outward, param_dtype, std)
        # Only int8 experts have scales (`quantize.py`).
        self.gate_scale = self.up_scale = self.down_scale = nnx.data(None)
        self.shared = (
            SharedExpert(config, rngs, param_dtype=param_dtype)
            if config.has_shared_expert
            else None
        )

    def __call__(
        self,
        h: Float[Array, "B T D"],
        token_mask: Float[Array, "B T"] | None,
        stack_index: layer_stack.StackIndex | None = None,
        forced_expert_ids: Int[Array, "B T A"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the block's output and its router statistics.

        Args:
          token_mask: 1 for the tokens that statistics count, 0 for padding. None: all tokens.
          stack_index: index of this layer, where its experts are left stacked over layers.
          forced_expert_ids: experts to take, -1 where the router chooses.
        """
        x = h.reshape(-1, h.shape[-1])
        token_mask = None if token_mask is None else token_mask.reshape(-1)
        forced_expert_ids = (
            None
            if forced_expert_ids is None
            else forced_expert_ids.reshape(-1, self.num_experts_per_token)
        )
        weights, expert_ids, stats = self.route(x, token_mask, forced_expert_ids)
        # Padding goes to no expert, so that it never travels to another device.
        if token_mask is not None and collectives.axis_size("experts") > 1:
            expert_ids = jnp.where(token_mask[:, None] > 0, expert_ids, self.no_expert)
        y, dropped = self.dispatch(x, weights, expert_ids, stack_index)
        return self.combine(h, y.reshape(h.shape)), dataclasses.replace(stats, num_dropped=dropped)

    def dispatch(
        self,
        x: Float[Array, "M D"],
        weights: Float[Array, "M A"],
        expert_ids: Int[Array, "M A"],
        stack_index: layer_stack.StackIndex | None,
    ) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
        """Return each row's weighted sum of its experts' outputs, and dropped choices."""
        gate, up, down = (self._expert_matrices(name, x.dtype) for name in ("gate", "up", "down"))
        # Experts that a loop over layers has sliced already are [E, D, F], and need no index.
        stack_index = stack_index if self.gate.ndim > 3 else None
        y, dropped = expert_exchange.run_routed_experts(
            x, weights, expert_ids, gate, up, down, self.expert_capacity, stack_index
        )
        # Devices of the tensor axis have a part of every expert's hidden units.
        return collectives.psum(y.astype(x.dtype), "mlp"), dropped

    def combine(
        self, h: Float[Array, "*batch D"], y: Float[Array, "*batch D"]
    ) -> Float[Array, "*batch D"]:
        """Return the block's output, given the output `y` of the routed experts."""
        if self.shared is None:
            return y
        with jax.named_scope("experts"):
            return self.shared(h, y)

    @property
    def no_expert(self) -> int:
        """Return the expert id that stands for no expert: one past the last."""
        return self.gate.shape[-3] * collectives.axis_size("experts")

    def _expert_matrices(self, name: str, dtype):
        values = getattr(self, name)[...]
        if values.dtype == jnp.int8:
            return quantize.QuantizedMatrices(values, getattr(self, f"{name}_scale")[...])
        return values.astype(dtype)

    @jax.named_scope("router")
    def route(
        self,
        x: Float[Array, "M D"],
        token_mask: Float[Array, "M"] | None,
        forced_expert_ids: Int[Array, "M A"] | None = None,
    ) -> tuple[Float[Array, "M A"], Int[Array, "M A"], RouterStats]:
        """Return the weights and the ids of each row's experts, and the statistics.

        Args:
          token_mask: 1 for the rows that statistics count. None: all rows.
          forced_expert_ids: experts to take, -1 where the router chooses. None: it always chooses.

        Precision: logits and probabilities are float32. Weights are float32 numbers that x's dtype
        can hold.
        """
        # HIGHEST, since TPUs would otherwise round float32 operands to bfloat16.
        logits = jnp.matmul(
            x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST
        )
        prob = jax.nn.softmax(logits, axis=-1)
        top_probs, expert_ids = jax.lax.top_k(prob, self.num_experts_per_token)
        if forced_expert_ids is not None:
            expert_ids = jnp.where(
                forced_expert_ids >= 0, forced_expert_ids.astype(expert_ids.dtype), expert_ids
            )
            # Forced experts have the router's own probabilities, and gradients reach it.
            top_probs = jnp.take_along_axis(prob, expert_ids, axis=-1)
        weights = top_probs / jnp.sum(top_probs, axis=-1, keepdims=True)
        token_mask = (
            jnp.ones(x.shape[0], jnp.float32)
            if token_mask is None
            else token_mask.astype(jnp.float32)
        )
        hits = jax.nn.one_hot(expert_ids, prob.shape[-1], dtype=jnp.float32)  # [M, A, E]
        stats = RouterStats(
            choice_counts=jnp.sum(hits * token_mask.reshape(-1, 1, 1), axis=0),
            prob_sums=jnp.sum(prob * token_mask.reshape(-1, 1), axis=0),
            num_tokens=jnp.sum(token_mask),
            num_dropped=jnp.zeros(()),  # only the exchange knows, and `__call__` fills it in
        )
        # The release multiplies in the model's dtype, so weights are rounded to it.
        return weights.astype(x.dtype).astype(jnp.float32), expert_ids, stats


class SharedExpert(nnx.Module):
    """One expert that every token passes, mixed in by a learned sigmoid coefficient."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs, *, param_dtype):
        embed, hidden, std = config.hidden_size, config.intermediate_size, config.initializer_range
        kwargs = {"std": std, "param_dtype": param_dtype}
        self.gate = layers.Linear(rngs, embed, hidden, ("embed", "mlp"), **kwargs)
        self.up = layers.Linear(rngs, embed, hidden, ("embed", "mlp"), **kwargs)
        self.down = layers.Linear(rngs, hidden, embed, ("mlp_in", "embed_out"), **kwargs)
        shape, axes = (embed, 1), ("embed", None)
        self.coefficient = layers.make_param(rngs, shape, axes, param_dtype, std, float32=True)

    def __call__(self, h: Float[Array, "*batch D"], y: Float[Array, "*batch D"]):
        c = jnp.matmul(
            h.astype(jnp.float32), self.coefficient[...], precision=jax.lax.Precision.HIGHEST
        )
        c = jax.nn.sigmoid(c).astype(h.dtype)
        return y * (1 - c) + self.down(jax.nn.silu(self.gate(h)) * self.up(h)) * c
