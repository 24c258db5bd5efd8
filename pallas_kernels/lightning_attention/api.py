"""Entry point to lightning attention, which validates and chooses the implementation."""

import functools
import logging

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
        program is lowered: "tpu" for TPU and "gpu" for CUDA where the shapes fit, else "chunked".
        TPUs before v5 have no kernel and take "chunked", too.
      interpret: run the kernels in Pallas interpret mode on any backend, for tests.
      platform: "tpu", "cuda" or "cpu" where the caller knows the platform while it traces. Then
        None chooses at once, and the other forms are not traced.

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
        raise ValueError(
            f"interpret: got implementation {implementation!r}; "
            f"wanted one of {list(KERNEL_IMPLEMENTATIONS)}"
        )
    if initial_state is None:
        batch, _, width = qkv.shape
        head_dim = width // (3 * slopes.shape[0])
        initial_state = jnp.zeros((batch, slopes.shape[0], head_dim, head_dim), jnp.float32)
    arguments = qkv, slopes, segment_ids, initial_state
    if implementation is None:
        # Shapes are known here, the platform mostly is not.
        return _choose_implementation(*_find_kernels(qkv, slopes.shape[0], platform))(*arguments)
    if implementation in KERNEL_IMPLEMENTATIONS:
        return IMPLEMENTATIONS[implementation](*arguments, interpret=interpret)
    return IMPLEMENTATIONS[implementation](*arguments)


def resolve_implementation(qkv: jax.ShapeDtypeStruct, num_heads: int, platform: str) -> str:
    """Return the implementation that None stands for where `platform` is known.

    Args:
      qkv: shape and dtype of the fused projection.
      num_heads: heads of `qkv`.
      platform: "tpu", "cuda" or "cpu". For another TPU than this process has:
        `tiling.compile_for`.
    """
    kernels, _ = _find_kernels(qkv, num_heads, platform)
    return {"tpu": "tpu", "cuda": "gpu"}[kernels[0]] if kernels else "chunked"


def _find_kernels(qkv, num_heads: int, platform: str | None) -> tuple[tuple[str, ...], bool]:
    """Return the platforms whose kernels take these shapes, and whether the platform is known."""
    supports = {"tpu": tpu.supports_shapes, "cuda": gpu.supports_shapes}
    kernels = tuple(
        name
        for name, supports_shapes in supports.items()
        if platform in (None, name) and supports_shapes(qkv, num_heads)
    )
    return kernels, platform is not None


@functools.cache
def _choose_implementation(platforms: tuple[str, ...], is_platform_known: bool):
    """Return what implementation=None runs. The arguments are those of `_find_kernels`.

    The cache makes each choice be logged once in a process.
    """
    kernels = {"tpu": tpu.lightning_attention, "cuda": gpu.lightning_attention}
    kernels = {name: kernels[name] for name in platforms}
    if not kernels:
        _log.info("lightning attention: chunked XLA, because no kernel fits the shapes or device")
        return chunked.lightning_attention
    if is_platform_known:
        (name,) = platforms
        _log.info("lightning attention: Pallas kernels for %s", name)
        return kernels[name]
    _log.info(
        "lightning attention: Pallas kernels where lowered for %s, chunked XLA elsewhere",
        " or ".join(kernels),
    )
    # The platform is decided at lowering: a program compiled ahead of time on a machine without an
    # accelerator gets the kernels of the platform that it is compiled for.
    return functools.partial(
        jax.lax.platform_dependent, default=chunked.lightning_attention, **kernels
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
