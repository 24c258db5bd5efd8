"""The lightning block: fused projection, per-head decay, joint norm, output gate (M1 2)."""

import contextlib
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m1_jax import collectives, context_parallel, layers, measured_choices, sharding
from m1_jax import config as config_lib
from pallas_kernels.lightning_attention import api, gpu, tiling

NORM_EPS = 1e-6  # the release builds this norm, unlike others, with its constructor's default


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the ALiBi slopes: 2^(-8 (h + 1) / H) for head h of H, where H is a power of 2."""
    if math.log2(num_heads).is_integer():
        return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
    # Otherwise those of the next lower power of 2, then every second one of twice that power.
    power = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: num_heads - power]


def decay_slopes(config: config_lib.ModelConfig) -> Float[np.ndarray, "L N"]:
    """Return float32 decay rates s(l, h). l is the ABSOLUTE layer index: softmax layers count.

    s = head slope * (1 - l / (L - 1) + 1e-5), so that later layers forget more slowly.
    """
    base = np.asarray(alibi_slopes(config.num_attention_heads), np.float32)
    last = max(config.num_hidden_layers - 1, 1)  # a single layer must not divide by 0
    factors = [1 - layer / last + 1e-5 for layer in range(config.num_hidden_layers)]
    return base[None, :] * np.asarray(factors, np.float32)[:, None]


def decay_slopes_by_group(config: config_lib.ModelConfig) -> list[Float[Array, "R J N"]]:
    """Return the decay rates of this device's heads, stacked like the layers of each group.

    Softmax layers do not read theirs. They have some all the same, because they count as layers.
    """
    slopes = jnp.asarray(decay_slopes(config)).reshape(config.repeats, config.period, -1)
    slopes = collectives.local_slice(slopes, "heads", 2)
    group_ends = list(itertools.accumulate(num_layers for _, num_layers in config.layer_groups))
    return jnp.split(slopes, group_ends[:-1], axis=1)


def attend_on_target(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    *,
    implementation: str | None = None,
    **kwargs: Any,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Run `api.lightning_attention` for the devices that the program is traced for.

    None is what m1-selfcheck measured there (`measured_choices.py`), if it has run. Else, on a
    mesh, the devices are known while the program is traced, so the choice needs no branch for each
    platform. Elsewhere the API chooses when the program is lowered.
    """
    target = sharding.target_device()
    if implementation is None:
        implementation = _find_measured(qkv, slopes.shape[0], target)
        if implementation == "gpu" and target is None:
            return _attend_where_lowered_for_gpu(qkv, slopes, **kwargs)
    kwargs["implementation"] = implementation
    if target is None:
        return api.lightning_attention(qkv, slopes, **kwargs)
    with choose_for(target):
        return api.lightning_attention(qkv, slopes, **kwargs, platform=kernel_platform(target))


def _find_measured(qkv: Any, num_heads: int, target: sharding.TargetDevice | None) -> str | None:
    """Return what m1-selfcheck found to be the default, where that differs from the API's own."""
    choice = measured_choices.find_choice("lightning", target)
    fits_gpu = choice == "gpu" and gpu.supports_shapes(qkv, num_heads)
    return choice if choice == "chunked" or fits_gpu else None


def _attend_where_lowered_for_gpu(qkv, slopes, *, segment_ids=None, initial_state=None) -> Any:
    """Run the GPU kernels where the program is lowered for one, which nobody knows yet."""

    def attend(implementation, qkv, slopes, segment_ids, initial_state):
        return api.lightning_attention(
            qkv,
            slopes,
            segment_ids=segment_ids,
            initial_state=initial_state,
            implementation=implementation,
        )

    return jax.lax.platform_dependent(
        *(qkv, slopes, segment_ids, initial_state),
        cuda=functools.partial(attend, "gpu"),
        default=functools.partial(attend, "chunked"),
    )


def resolve_implementation(
    config: config_lib.ModelConfig,
    dtype: jax.typing.DTypeLike,
    layout: sharding.MeshLayout | None = None,
) -> str:
    """Return the implementation that a model's lightning layers run: what bits depend on.

    Args:
      config: the model's config.
      dtype: dtype of its activations.
      layout: where the model lies. None: on this process's first device.
    """
    if config.lightning_implementation is not None:
        return config.lightning_implementation
    device = jax.local_devices()[0] if layout is None else layout.mesh.devices.flat[0]
    target = sharding.TargetDevice(device.platform, device.device_kind)
    num_heads = config.num_attention_heads // (1 if layout is None else layout.axis_size("heads"))
    # Of the lengths only 0 decides anything.
    qkv = jax.ShapeDtypeStruct((1, 1, num_heads * 3 * config.head_dim), dtype)
    with choose_for(target):
        measured = _find_measured(qkv, num_heads, target)
        return measured or api.resolve_implementation(qkv, num_heads, kernel_platform(target))


def kernel_platform(target: sharding.TargetDevice) -> str:
    """Return the platform that kernels are chosen for. "cpu" has none."""
    # The kernels do not compile for every TPU.
    return "tpu" if target.platform == "tpu" and target.kind in tiling.KINDS else "cpu"


def choose_for(target: sharding.TargetDevice) -> contextlib.AbstractContextManager:
    """Choose block sizes for a TPU, which need not be that of this process."""
    generation = tiling.KINDS.get(target.kind)
    return tiling.compile_for(generation) if generation else contextlib.nullcontext()


class LightningAttention(nnx.Module):
    """o = out(norm(lightning(silu(qkv h))) * sigmoid(gate h)), norm over all heads at once."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs, *, param_dtype):
        embed, width = config.hidden_size, config.num_attention_heads * config.head_dim
        kwargs = {"std": config.initializer_range, "param_dtype": param_dtype}
        # Columns of qkv are ordered by head, then q, k and v: devices split them by heads.
        self.qkv = layers.Linear(rngs, embed, 3 * width, ("embed", "heads"), **kwargs)
        self.gate = layers.Linear(rngs, embed, width, ("embed", "heads"), **kwargs)
        self.norm = layers.RMSNorm(width, "heads", eps=NORM_EPS, param_dtype=param_dtype)
        self.out = layers.Linear(rngs, width, embed, ("heads_in", "embed_out"), **kwargs)
        self.implementation = config.lightning_implementation

    def __call__(
        self,
        h: Float[Array, "B T D"],
        slopes: Float[Array, "N"],
        segment_ids: Int[Array, "B T"] | None,
        state: Float[Array, "B N H H"] | None,
        length_sharded: bool,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N H H"]]:
        """Return the block's output and the float32 state after the last real token.

        Args:
          h: normed layer input, which both the projection and the gate read.
          slopes: decay rate of each head.
          segment_ids: see `context_parallel.attend_sharded_length`.
          state: state before the first token. None: zeros.
          length_sharded: whether the context axis, where there is one, splits the tokens.
        """
        qkv = self.project_inputs(h)
        kernel = functools.partial(attend_on_target, implementation=self.implementation)
        if length_sharded:
            o, state = context_parallel.attend_sharded_length(
                kernel, qkv, slopes, segment_ids, state
            )
        else:
            # Every device of the context axis has all tokens, and computes the same.
            o, state = kernel(qkv, slopes, segment_ids=segment_ids, initial_state=state)
        return self.project_output(h, o), state

    def project_inputs(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch N3H"]:
        """Return q, k and v of every token in one array, by head, then q, k and v."""
        return jax.nn.silu(self.qkv(h))

    def project_output(self, h: Float[Array, "*batch D"], o: Float[Array, "*batch NH"]):
        """Return the block's output, given the attention output `o`."""
        # The norm is over all heads at once, so it sums over the devices that split them.
        return self.out(self.norm(o) * jax.nn.sigmoid(self.gate(h)))
