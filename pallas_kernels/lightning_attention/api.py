"""Entry point to lightning attention, which validates and chooses the implementation."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import chunked, gpu, reference, tpu

_log = logging.getLogger(__name__)

IMPLEMENTATIONS = {
    "reference": reference.lightning_attention,
    "chunked": chunked.lightning_attention,
    "tpu": tpu.lightning_attention,
    "gpu": gpu.lightning_attention,
}
KERNEL_IMPLEMENTATIONS = ("tpu", "gpu")  # written in Pallas, so they have an interpret mode


def lightning_attention(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B N H H"] | None = None,
    implementation: str | None = None,
    interpret: bool = False,
    platform: str | None = None,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Run S_t = exp(-s) S_(t-1) + k_t^T v_t, o_t = q_t S_t over every head.

    Source: M1 report, section 2, and `MiniMaxM1LightningAttention` of the release, whose state
    after each token is S_t. There is no 1/sqrt(H) scale.

    Args:
      qkv: fused projection, bfloat16 or float32. Each head is q | k | v, H wide each.
      slopes: decay rates s >= 0, one per head.
      segment_ids: 0 is padding, whose output is 0 and which leaves the state as it is, without a
        decay. A change between two other ids starts a new document. None: one document, no padding.
      initial_state: float32 state that the row's first document continues. None: zeros.
      implementation: a key of `IMPLEMENTATIONS`, which then runs or raises. None chooses when the
        program is lowered: "tpu" for TPUs from v5 on where the shapes fit, else "chunked". "gpu" is
        for callers to choose: no GPU has checked its kernels.
      interpret: run the kernels in Pallas interpret mode on any backend, for tests.
      platform: such as "tpu" or "cpu", where the caller knows the platform while it traces. Then
        None chooses at once, and the other form is not traced.

    What one document holds reaches no other document, be it NaN or infinity, in no output, state or
    gradient. Its own tokens, also earlier ones of the same chunk, may all become NaN.

    Returns:
      (o in qkv's dtype with heads concatenated, float32 state of the row's last document after its
      last real token). Both are differentiable with respect to qkv and initial_state.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation, or `interpret`
        with an implementation that is no kernel.
    """
    _validate_inputs(qkv, slopes, segment_ids, initial_state)
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation is {implementation!r}; wanted None or one of {list(IMPLEMENTATIONS)}"
        )
    if interpret and implementation not in KERNEL_IMPLEMENTATIONS:
        wanted = f"wanted one of {list(KERNEL_IMPLEMENTATIONS)}"
        raise ValueError(f"interpret: got implementation {implementation!r}; {wanted}")
    if initial_state is None:
        batch, _, width = qkv.shape
        head_dim = width // (3 * slopes.shape[0])
        initial_state = jnp.zeros((batch, slopes.shape[0], head_dim, head_dim), jnp.float32)
    arguments = qkv, slopes, segment_ids, initial_state
    if implementation is None:
        # Shapes are known here, the platform mostly is not.
        choice = _choose_implementation(tpu.supports_shapes(qkv, slopes.shape[0]), platform)
        return choice(*arguments)
    if implementation in KERNEL_IMPLEMENTATIONS:
        return IMPLEMENTATIONS[implementation](*arguments, interpret=interpret)
    return IMPLEMENTATIONS[implementation](*arguments)


def resolve_implementation(qkv: Any, num_heads: int, platform: str) -> str:
    """Return the implementation that None stands for where `platform` is known.

    Args:
      qkv: the fused projection, or a `jax.ShapeDtypeStruct` of it.
      num_heads: heads of `qkv`.
      platform: such as "tpu" or "cpu". For another TPU than this process has: `tiling.compile_for`.
    """
    return "tpu" if platform == "tpu" and tpu.supports_shapes(qkv, num_heads) else "chunked"


@functools.cache
def _choose_implementation(kernel_fits: bool, platform: str | None):
    """Return what implementation=None runs. None is a platform that is not known yet.

    The cache makes each choice be logged once in a process.
    """
    if not kernel_fits or platform not in (None, "tpu"):
        _log.info("lightning attention: chunked XLA, because no kernel fits the shapes or device")
        return chunked.lightning_attention
    if platform == "tpu":
        _log.info("lightning attention: Pallas kernels for tpu")
        return tpu.lightning_attention
    _log.info("lightning attention: Pallas kernels where lowered for tpu, chunked XLA elsewhere")
    # The platform is decided at lowering: a program compiled ahead of time on a machine without an
    # accelerator gets the kernels of the platform that it is compiled for.
    return functools.partial(
        jax.lax.platform_dependent,
        tpu=tpu.lightning_attention,
        default=chunked.lightning_attention,
    )


def _validate_inputs(qkv, slopes, segment_ids, initial_state) -> None:
    """Raise ValueError for shapes or dtypes that do not fit."""
    if slopes.ndim != 1 or slopes.dtype != jnp.float32:
        raise ValueError(f"slopes: got {jax.typeof(slopes)}; wanted float32[N]")
    num_heads = slopes.shape[0]
    if qkv.ndim != 3 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv: got shape {qkv.shape}; wanted [B, T, {num_heads} * 3 * H]")
    if qkv.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"qkv: got dtype {qkv.dtype}; wanted float32 or bfloat16")
    batch, length, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids: got shape {segment_ids.shape}; wanted {(batch, length)}")
    state = (batch, num_heads, head_dim, head_dim)
    if initial_state is not None and (
        initial_state.shape != state or initial_state.dtype != jnp.float32
    ):
        raise ValueError(f"initial_state: got {jax.typeof(initial_state)}; wanted float32{state}")
