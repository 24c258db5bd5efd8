"""Lightning attention on TPU: the two kernels as one differentiable function."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.lightning_attention import boundaries, tiling, tpu_bwd, tpu_fwd


def supports_shapes(qkv: Float[Array, "B T N3H"], num_heads: int) -> bool:
    """Say whether the kernels take these shapes, on the TPU that there is or is compiled for."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    # One head more, because `lightning_attention` pads where blocks would not fill whole lanes.
    return (
        head_dim in (64, 128, 256)
        and 0 not in qkv.shape
        and any(
            tiling.choose_block_sizes(heads, head_dim, qkv.shape[1], qkv.dtype.itemsize)
            for heads in (num_heads, num_heads + 1)
        )
    )


def lightning_attention(
    qkv: Float[Array, "B T N3H"],
    slopes: Float[Array, "N"],
    segment_ids: Int[Array, "B T"] | None,
    initial_state: Float[Array, "B N H H"],
    *,
    block_sizes: tiling.TpuBlockSizes | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T NH"], Float[Array, "B N H H"]]:
    """Run the TPU kernels. See `api.lightning_attention`.

    Precision: bfloat16 input means bfloat16 operands, float32 sums and a float32 carried state
    that queries read as two bfloat16 halves. float32 input means float32 throughout.

    Args:
      qkv, slopes, segment_ids, initial_state: as in `api.lightning_attention`.
      block_sizes: None lets `tiling.choose_block_sizes` find them.
      interpret: run the kernels' Python on any backend, for tests.

    Raises:
      ValueError: no block sizes fit.
    """
    batch, length, _ = qkv.shape
    num_heads, head_dim = initial_state.shape[1:3]
    if 0 in qkv.shape:
        return qkv[:, :, : num_heads * head_dim], initial_state
    choose = functools.partial(
        tiling.choose_block_sizes,
        head_dim=head_dim,
        length=length,
        item_bytes=qkv.dtype.itemsize,
    )
    block_sizes = block_sizes or choose(num_heads)
    if block_sizes is None and choose(num_heads + 1):
        # An odd number of heads of 64. Blocks are whole lanes, so a head of zeros is added, at the
        # price of a copy of qkv.
        qkv = jnp.pad(qkv, [(0, 0), (0, 0), (0, 3 * head_dim)])
        slopes = jnp.pad(slopes, [(0, 1)])
        initial_state = jnp.pad(initial_state, [(0, 0), (0, 1), (0, 0), (0, 0)])
        o, state = lightning_attention(qkv, slopes, segment_ids, initial_state, interpret=interpret)
        return o[:, :, : num_heads * head_dim], state[:, :num_heads]
    if tiling.current_generation() is None:
        raise ValueError(
            f"implementation 'tpu': got {jax.devices()[0].device_kind}; wanted one of "
            f"{', '.join(tiling.MATRIX_UNIT_SIDES)}: use implementation='chunked'"
        )
    if block_sizes is None:
        raise ValueError(
            f"no TPU block fits {num_heads} heads of {head_dim}; wanted heads of 64, 128 or 256: "
            "use implementation='chunked'"
        )
    if segment_ids is None and length % block_sizes.superblock_tokens:
        # The kernel reads whole superblocks. Only the tables tell it that a row ends inside one.
        segment_ids = jnp.ones((batch, length), jnp.int32)
    tables = None
    if segment_ids is not None:
        tables = boundaries.build_boundary_tables(
            segment_ids, block_sizes.chunk_tokens, block_sizes.superblock_tokens
        )
    return _lightning_attention(block_sizes, interpret, qkv, slopes, tables, initial_state)


# Static arguments first: custom_vjp hands them to the backward rule before the others.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lightning_attention(block_sizes, interpret, qkv, slopes, tables, initial_state):
    # Without differentiation nothing needs the saved states.
    outputs = tpu_fwd.lightning_forward(
        qkv,
        slopes,
        tables,
        initial_state,
        block_sizes=block_sizes,
        save_superblock_states=False,
        interpret=interpret,
    )
    return outputs.o, outputs.final_state


def _lightning_attention_fwd(block_sizes, interpret, qkv, slopes, tables, initial_state):
    outputs = tpu_fwd.lightning_forward(
        qkv,
        slopes,
        tables,
        initial_state,
        block_sizes=block_sizes,
        save_superblock_states=True,
        interpret=interpret,
    )
    residuals = qkv, slopes, tables, outputs.superblock_states
    return (outputs.o, outputs.final_state), residuals


def _lightning_attention_bwd(block_sizes, interpret, residuals, cotangents):
    qkv, slopes, tables, superblock_states = residuals
    d_o, d_final = cotangents
    d_qkv, d_initial = tpu_bwd.lightning_backward(
        qkv,
        slopes,
        tables,
        superblock_states,
        d_o,
        d_final,
        block_sizes=block_sizes,
        interpret=interpret,
    )
    # Slopes are constants of the model, and tables are integers: neither has a gradient.
    return d_qkv, jnp.zeros_like(slopes), None, d_initial


_lightning_attention.defvjp(_lightning_attention_fwd, _lightning_attention_bwd)
